#include "everybit/split.h"

#include <cstring>

#include "everybit/clones.h"

namespace everybit {

// Cutting [i, j) at m lowers the error by t^2 / (W_l * W_r * W) with t = S_l * W - S * W_l, where W, S are the
// cell's sums of weight and weight*value and W_l, S_l those left of m: one division per candidate.
// The scan keeps 8 running bests (candidates m = i + 1 + 8k + lane) and joins them at the end; the first of
// equal gains wins.
EVERYBIT_CLONES
std::size_t best_split_sums(const double* weight_sum, const double* moment_sum, std::size_t i, std::size_t j) {
  typedef double Lanes __attribute__((vector_size(64)));
  typedef long long Places __attribute__((vector_size(64)));
  const double w0 = weight_sum[i], s0 = moment_sum[i];
  const double w = weight_sum[j] - w0, s = moment_sum[j] - s0;
  double best = -1;
  std::size_t at = i + 1, m = i + 1;
  if (j - m >= 16) {
    Lanes bests = {-1, -1, -1, -1, -1, -1, -1, -1};
    Places ats = {0, 0, 0, 0, 0, 0, 0, 0};
    Places now = {0, 1, 2, 3, 4, 5, 6, 7};
    now += static_cast<long long>(m);
    for (; m + 8 <= j; m += 8) {
      Lanes wl, sl;
      std::memcpy(&wl, weight_sum + m, sizeof wl);
      std::memcpy(&sl, moment_sum + m, sizeof sl);
      wl -= w0;
      sl -= s0;
      const Lanes t = sl * w - s * wl;
      const Lanes gain = t * t / (wl * (w - wl));
      const Places better = gain > bests;
      bests = better ? gain : bests;
      ats = better ? now : ats;
      now += 8;
    }
    for (int lane = 0; lane < 8; ++lane) {
      const auto place = static_cast<std::size_t>(ats[lane]);
      if (bests[lane] > best || (bests[lane] == best && place < at)) best = bests[lane], at = place;
    }
  }
  for (; m < j; ++m) {
    const double wl = weight_sum[m] - w0, t = (moment_sum[m] - s0) * w - s * wl;
    const double gain = t * t / (wl * (w - wl));
    if (gain > best) best = gain, at = m;
  }
  return at;
}

std::size_t best_split(const SortedRow& row, std::size_t i, std::size_t j) {
  if (j - i < 2) return j;
  if (j - i == 2) return i + 1;
  return best_split_sums(row.weight_sum.data(), row.moment_sum.data(), i, j);
}

std::size_t stationary_split(const SortedRow& row, std::size_t i, std::size_t j) {
  if (j - i < 2) return j;
  std::size_t low = i + 1, high = j - 1;
  while (low < high) {
    const std::size_t m = (low + high) / 2;
    const double middle = (row.mean(i, m) + row.mean(m, j)) / 2;
    if (middle < row.value[m - 1]) {
      high = m > low ? m - 1 : low;
    } else if (middle > row.value[m]) {
      low = m + 1;
    } else {
      return m;
    }
  }
  return low;
}

}  // namespace everybit
