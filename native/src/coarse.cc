// The first cuts: the row is divided into a few dozen parts of equal companded mass, and the joint objective is
// minimized exactly over cuts at their edges.
//
// Source: at high resolution the best cells have a density proportional to the cube root of the points' density
// (Panter and Dite 1951); the mass between neighbouring points is then cbrt(weight * gap^2).
#include <algorithm>
#include <bit>
#include <cmath>

#include "everybit/clones.h"
#include "everybit/joint.h"

namespace everybit {
namespace {

constexpr int kCapRounds = 8;  // each divides an outlier's share by about `bins`

// cbrt to 1 %: exponent and mantissa divided by three, one Newton step. Placing first cuts needs no more, and
// std::cbrt would cost as much as sorting the row.
float rough_cbrt(float x) {
  const float guess = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) / 3 + 709921077u);
  return (2.0f * guess + x / (guess * guess)) * (1.0f / 3.0f);
}

}  // namespace

EVERYBIT_CLONES
void compand_mass(const double* value, const double* weight_sum, std::size_t points, float* mass) {
  for (std::size_t i = 0; i + 1 < points; ++i) {
    const double gap = value[i + 1] - value[i];
    // 1e-30 keeps the argument a normal float.
    const auto area = static_cast<float>((weight_sum[i + 2 < points ? i + 2 : points] - weight_sum[i]) * gap * gap);
    mass[i] = rough_cbrt(area + 1e-30f);
  }
}

// best[i, j] = scale * min over k in [i, j] of (left[i, k] + left[k, j]) + importance * error[i, j].
EVERYBIT_CLONES
void join_halves(const float* left, const float* error, std::size_t edges, std::size_t stride, float importance,
                 float* best) {
  for (std::size_t i = 0; i < edges; ++i) {
    float* out = best + i * stride;
    for (std::size_t j = 0; j < stride; ++j) out[j] = kForbidden;
    for (std::size_t k = i; k < edges; ++k) {
      const float head = left[i * stride + k];
      const float* tail = left + k * stride;
      for (std::size_t j = k / 16 * 16; j < stride; ++j) {
        const float sum = head + tail[j];
        out[j] = sum < out[j] ? sum : out[j];
      }
    }
    for (std::size_t j = i; j < edges; ++j) out[j] += importance * error[i * stride + j];
  }
}

EVERYBIT_CLONES
void coarse_errors(const double* weight, const double* moment, const double* square, std::size_t edges,
                   std::size_t stride, float* error) {
  for (std::size_t i = 0; i < edges; ++i) {
    float* out = error + i * stride;
    for (std::size_t j = 0; j < stride; ++j) out[j] = kForbidden;
    for (std::size_t j = i; j < edges; ++j) {
      const double w = weight[j] - weight[i], s = moment[j] - moment[i];
      const double e = square[j] - square[i] - s * s / (w > 0 ? w : 1.0);
      out[j] = e > 0 ? static_cast<float>(e) : 0.0f;
    }
  }
}

void compand(const SortedRow& row, std::size_t bins, std::vector<std::uint32_t>& edges, std::vector<float>& mass) {
  const std::size_t n = row.points;
  edges.assign(bins + 1, static_cast<std::uint32_t>(n));
  edges[0] = 0;
  if (n < 2) return;
  mass.resize(n);
  compand_mass(row.value.data(), row.weight_sum.data(), n, mass.data());
  double total = 0;
  for (std::size_t i = 0; i + 1 < n; ++i) total += mass[i];
  // Two edges are all that a gap can use, so the mass of a wide gap (an outlier) is cut back to one part, round
  // by round because that shrinks the parts; otherwise one outlier would take nearly every edge.
  for (int round = 0; round < kCapRounds; ++round) {
    const auto cap = static_cast<float>(total / static_cast<double>(bins));
    const float wide = 1.5f * cap;
    bool capped = false;
    total = 0;
    for (std::size_t i = 0; i + 1 < n; ++i) {
      if (mass[i] > wide) mass[i] = cap, capped = true;
      total += mass[i];
    }
    if (!capped) break;
  }
  double sum = 0;
  std::size_t edge = 1;
  for (std::size_t i = 0; i + 1 < n && edge < bins; ++i) {
    sum += mass[i];
    while (edge < bins && sum * static_cast<double>(bins) >= total * static_cast<double>(edge))
      edges[edge++] = static_cast<std::uint32_t>(i + 1);
  }
}

void CoarseSearch::cut(const SortedRow& row, const JointLevels& levels, const std::vector<std::uint32_t>& edges,
                       std::vector<std::uint32_t>& cuts) {
  const std::size_t count = edges.size(), stride = (count + 15) / 16 * 16;
  sums_.resize(3 * count);
  double *weight = sums_.data(), *moment = weight + count, *square = moment + count;
  for (std::size_t e = 0; e < count; ++e) {
    weight[e] = row.weight_sum[edges[e]];
    moment[e] = row.moment_sum[edges[e]];
    square[e] = row.square_sum[edges[e]];
  }
  error_.resize(count * stride);
  coarse_errors(weight, moment, square, count, stride, error_.data());
  for (int level = levels.base; level >= levels.low; --level) {
    auto& table = table_[level];
    table.resize(count * stride);
    if (level == levels.base) {
      for (std::size_t i = 0; i < count; ++i)
        for (std::size_t j = 0; j < stride; ++j)
          table[i * stride + j] = j >= i && j < count ? levels.importance[level] * error_[i * stride + j] : kForbidden;
    } else {
      join_halves(table_[level + 1].data(), error_.data(), count, stride, levels.importance[level], table.data());
    }
  }
  // Chain of roots: chain[c, j] = least objective of c roots that cover edges [0, j].
  const std::size_t roots = levels.roots();
  const float* table = table_[levels.low].data();
  chain_.assign((roots + 1) * stride, kForbidden);
  chain_[0] = 0;
  for (std::size_t c = 0; c < roots; ++c) {
    const float* from = &chain_[c * stride];
    float* to = &chain_[(c + 1) * stride];
    for (std::size_t i = 0; i < count; ++i) {
      const float head = from[i];
      if (head >= kForbidden) continue;
      for (std::size_t j = i; j < count; ++j) to[j] = std::min(to[j], head + table[i * stride + j]);
    }
  }
  chosen_.assign(levels.leaves() + 1, 0);
  const std::size_t span = levels.leaves() / roots;
  chosen_[levels.leaves()] = count - 1;
  for (std::size_t c = roots; c-- > 0;) {
    const std::size_t right = chosen_[(c + 1) * span];
    std::size_t best = 0;
    for (std::size_t i = 0; i <= right; ++i)
      if (chain_[c * stride + i] + table[i * stride + right] < chain_[c * stride + best] + table[best * stride + right])
        best = i;
    chosen_[c * span] = best;
    trace(levels, levels.low, c, stride);
  }
  cuts.resize(levels.leaves() + 1);
  for (std::size_t c = 0; c < cuts.size(); ++c) cuts[c] = edges[chosen_[c]];
}

void CoarseSearch::trace(const JointLevels& levels, int level, std::size_t cell, std::size_t stride) {
  if (level == levels.base) return;
  const std::size_t span = levels.leaves() >> level, left = chosen_[cell * span], right = chosen_[(cell + 1) * span];
  const float* half = table_[level + 1].data();
  std::size_t best = left;
  for (std::size_t k = left; k <= right; ++k)
    if (half[left * stride + k] + half[k * stride + right] < half[left * stride + best] + half[best * stride + right])
      best = k;
  chosen_[cell * span + span / 2] = best;
  trace(levels, level + 1, 2 * cell, stride);
  trace(levels, level + 1, 2 * cell + 1, stride);
}

}  // namespace everybit
