// The plane-linear solver: an even grid over the row's range, then per level the best line through the codes.
//
// code = floor((x - min) / (max - min) * 2^B), so the b-bit code (its top b bits) is the even grid of 2^b
// cells. Each level's scale and offset are the sensitivity-weighted least-squares line of weight on code.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>

#include "everybit/solver.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

struct Bin {
  double weight = 0, moment = 0;  // sums of sensitivity and sensitivity * (x - min)
};

// A line through weights near the largest float can start beyond it.
float to_float(double value) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(value, -kLargest, kLargest));
}

void uniform_row(const Problem& problem, std::size_t row) {
  const float* x = problem.weights_row(row);
  const float* w = problem.sensitivity_row(row);
  const std::size_t columns = problem.columns;
  std::uint8_t* codes = problem.codes + row * columns;
  if (w && std::all_of(w, w + columns, [](float v) { return v == 0; })) w = nullptr;

  const auto [least, most] = std::minmax_element(x, x + columns);
  const double low = *least, range = static_cast<double>(*most) - low;
  const int top = problem.max_bits();
  const double cells = std::ldexp(1.0, top), per_unit = range > 0 ? cells / range : 0.0;
  std::array<Bin, 1 << kMaxBits> bins{};
  for (std::size_t k = 0; k < columns; ++k) {
    const double above = x[k] - low;
    const auto code = static_cast<std::uint8_t>(std::min(above * per_unit, cells - 1));
    codes[k] = code;
    const double weight = w ? w[k] : 1.0;
    bins[code].weight += weight;
    bins[code].moment += weight * above;
  }
  for (int b = top; b >= problem.bits.front(); --b) {
    const std::size_t count = std::size_t{1} << b;
    if (float* line = problem.codebooks[b]) {
      double weight = 0, code_sum = 0, moment = 0;
      for (std::size_t c = 0; c < count; ++c) {
        weight += bins[c].weight;
        code_sum += bins[c].weight * static_cast<double>(c);
        moment += bins[c].moment;
      }
      const double mean_code = code_sum / weight, mean = moment / weight;
      double spread = 0, joint = 0;
      for (std::size_t c = 0; c < count; ++c) {
        const double off = static_cast<double>(c) - mean_code;
        spread += bins[c].weight * off * off;
        joint += bins[c].moment * off;
      }
      const double scale = spread > 0 ? joint / spread : 0.0;
      line[2 * row] = to_float(scale);
      line[2 * row + 1] = to_float(low + (mean - scale * mean_code));
    }
    for (std::size_t c = 0; c < count / 2; ++c)
      bins[c] = {bins[2 * c].weight + bins[2 * c + 1].weight, bins[2 * c].moment + bins[2 * c + 1].moment};
  }
}

}  // namespace

void solve_uniform(const Problem& problem) {
  parallel_rows(problem.rows, 4, problem.threads, [&] { return [&](std::size_t row) { uniform_row(problem, row); }; });
}

std::int64_t find_bad_row(const float* values, std::size_t rows, std::size_t columns, bool refuse_negative,
                          int threads) {
  std::atomic<std::size_t> first{rows};
  parallel_rows(rows, 65536 / (columns + 1) + 1, threads, [&] {
    return [&](std::size_t row) {
      const float* v = values + row * columns;
      // A comparison with NaN is false, and |v| <= largest excludes the infinities.
      bool good = true;
      const float least = refuse_negative ? 0.0f : -std::numeric_limits<float>::max();
      for (std::size_t k = 0; k < columns; ++k) good &= (v[k] >= least) & (v[k] <= std::numeric_limits<float>::max());
      if (good) return;
      std::size_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
    };
  });
  return first < rows ? static_cast<std::int64_t>(first.load()) : -1;
}

}  // namespace everybit
