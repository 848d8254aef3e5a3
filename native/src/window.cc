// Windowed dynamic programming: the three inner loops (plain, for the compiler to vectorize), then the search.
#include <algorithm>

#include "everybit/clones.h"
#include "everybit/joint.h"

namespace everybit {

// The prefix sums of one cut's candidates, moved so that the cell beside it is near 0: the subtraction inside
// `window_errors` then cancels nothing and single precision is enough.
struct Candidates {
  float weight[kWindow], moment[kWindow], square[kWindow];
};

// block[a, b] (+)= importance * weighted squared error of the points between candidates a (left) and b (right).
EVERYBIT_CLONES
void window_errors(const Candidates& left, const Candidates& right, float importance, bool add, float* block) {
  for (std::size_t a = 0; a < kWindow; ++a) {
    const float w0 = left.weight[a], s0 = left.moment[a], q0 = left.square[a];
    float row[kWindow];
    for (std::size_t b = 0; b < kWindow; ++b) {
      const float w = right.weight[b] - w0, s = right.moment[b] - s0, q = right.square[b] - q0;
      float error = q - s * s / (w > 0 ? w : 1.0f);
      error = error > 0 ? error * importance : 0.0f;
      row[b] = w < 0 ? kForbidden : error;
    }
    float* out = block + a * kWindow;
    if (add) {
      for (std::size_t b = 0; b < kWindow; ++b) out[b] += row[b];
    } else {
      for (std::size_t b = 0; b < kWindow; ++b) out[b] = row[b];
    }
  }
}

// out[a, b] = min over m of left[a, m] + right[m, b]. The bound is an argument, not kWindow, because gcc 12
// unrolls a loop of known length before it would vectorize it (6x slower).
EVERYBIT_CLONES
void min_plus(const float* __restrict left, const float* __restrict right, std::size_t window, float* __restrict out) {
  for (std::size_t a = 0; a < window; ++a) {
    float* __restrict best = out + a * window;
    for (std::size_t b = 0; b < window; ++b) best[b] = left[a * window] + right[b];
    for (std::size_t m = 1; m < window; ++m) {
      const float head = left[a * window + m];
      for (std::size_t b = 0; b < window; ++b) {
        const float sum = head + right[m * window + b];
        best[b] = sum < best[b] ? sum : best[b];
      }
    }
  }
}

namespace {

constexpr std::size_t kStay = kWindow / 2;  // the candidate that leaves a cut where it is

// The m with the least head[m] + tail[m * step]; staying wins a tie, so that a search ends.
std::size_t least_sum(const float* head, const float* tail, std::size_t step) {
  std::size_t best = kStay;
  for (std::size_t m = 0; m < kWindow; ++m)
    if (head[m] + tail[m * step] < head[best] + tail[best * step]) best = m;
  return best;
}

}  // namespace

void WindowSearch::place(const SortedRow& row, std::size_t stride, const std::vector<std::uint32_t>& cuts) {
  places_.resize(cuts.size() * kWindow);
  const auto last = static_cast<std::ptrdiff_t>(row.points);
  for (std::size_t c = 0; c < cuts.size(); ++c) {
    for (std::size_t k = 0; k < kWindow; ++k) {
      auto at = static_cast<std::ptrdiff_t>(cuts[c]);
      if (c > 0 && c + 1 < cuts.size())  // the row's two ends stay
        at +=
            (static_cast<std::ptrdiff_t>(k) - static_cast<std::ptrdiff_t>(kStay)) * static_cast<std::ptrdiff_t>(stride);
      places_[c * kWindow + k] = static_cast<std::uint32_t>(std::clamp<std::ptrdiff_t>(at, 0, last));
    }
  }
}

void WindowSearch::errors(const SortedRow& row, const std::vector<std::uint32_t>& cuts, std::size_t left,
                          std::size_t right, float importance, bool add, float* block) const {
  const std::size_t i = cuts[left], j = cuts[right];
  const double centre = i < j ? row.mean(i, j) : row.value[std::min(i, row.points - 1)];
  const double w0 = row.weight_sum[i], s0 = row.moment_sum[i], q0 = row.square_sum[i];
  Candidates sides[2];
  for (int side = 0; side < 2; ++side) {
    const std::uint32_t* places = &places_[(side ? right : left) * kWindow];
    for (std::size_t k = 0; k < kWindow; ++k) {
      const double w = row.weight_sum[places[k]] - w0, s = row.moment_sum[places[k]] - s0,
                   q = row.square_sum[places[k]] - q0;
      sides[side].weight[k] = static_cast<float>(w);
      sides[side].moment[k] = static_cast<float>(s - centre * w);
      sides[side].square[k] = static_cast<float>(q - centre * (2 * s - centre * w));
    }
  }
  window_errors(sides[0], sides[1], importance, add, block);
}

bool WindowSearch::improve(const SortedRow& row, const JointLevels& levels, std::size_t stride,
                           std::vector<std::uint32_t>& cuts) {
  place(row, stride, cuts);
  const std::size_t leaves = levels.leaves(), roots = levels.roots();
  for (int level = levels.base; level >= levels.low; --level) {
    const std::size_t cells = std::size_t{1} << level, span = leaves / cells;
    auto& blocks = blocks_[level];
    blocks.resize(cells);
    const bool leaf = level == levels.base;
    for (std::size_t c = 0; c < cells; ++c) {
      if (!leaf)
        min_plus(blocks_[level + 1][2 * c].data(), blocks_[level + 1][2 * c + 1].data(), kWindow, blocks[c].data());
      if (leaf || levels.importance[level] > 0)
        errors(row, cuts, c * span, (c + 1) * span, levels.importance[level], !leaf, blocks[c].data());
    }
  }
  const auto& blocks = blocks_[levels.low];
  chain_.resize(roots + 1);
  chain_[0].fill(0);
  for (std::size_t c = 0; c < roots; ++c) {
    for (std::size_t b = 0; b < kWindow; ++b) {
      float best = chain_[c][0] + blocks[c][b];
      for (std::size_t a = 1; a < kWindow; ++a) best = std::min(best, chain_[c][a] + blocks[c][a * kWindow + b]);
      chain_[c + 1][b] = best;
    }
  }
  chosen_.assign(leaves + 1, kStay);
  for (std::size_t c = roots; c-- > 0;) {
    const std::size_t span = leaves / roots, right = chosen_[(c + 1) * span];
    if (c > 0) chosen_[c * span] = least_sum(chain_[c].data(), blocks[c].data() + right, kWindow);
    trace(levels, levels.low, c);
  }
  bool moved = false;
  for (std::size_t c = 1; c < leaves; ++c) {
    // Points of next to no weight look alike in single precision; the order of cuts must not depend on them.
    const std::uint32_t at = std::max(cuts[c - 1], places_[c * kWindow + chosen_[c]]);
    moved |= at != cuts[c];
    cuts[c] = at;
  }
  return moved;
}

// Chooses the cuts inside one cell whose two ends are chosen.
void WindowSearch::trace(const JointLevels& levels, int level, std::size_t cell) {
  if (level == levels.base) return;
  const std::size_t span = levels.leaves() >> level, left = chosen_[cell * span], right = chosen_[(cell + 1) * span];
  const auto& blocks = blocks_[level + 1];
  chosen_[cell * span + span / 2] =
      least_sum(blocks[2 * cell].data() + left * kWindow, blocks[2 * cell + 1].data() + right, kWindow);
  trace(levels, level + 1, 2 * cell);
  trace(levels, level + 1, 2 * cell + 1);
}

}  // namespace everybit
