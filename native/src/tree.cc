// The joint solver: low precisions chosen together, higher ones by the best possible split of each cell.
//
// Up to `base` (4 bits) one dynamic program weighs the errors of all wanted levels; independent k-means per
// level would not nest, and the original's level-after-level splits leave 4 bits about 7 % above optimal.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "everybit/joint.h"
#include "everybit/sorted_row.h"
#include "everybit/split.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

// Sixteen cells make a window pass (16^3 sums per merge) about as dear as sorting a row of a thousand; one
// level more doubles that for a precision whose excess is already small in absolute terms.
constexpr int kBase = 4;

// Balances the worst of the three excesses over the optimum on GPT-2's attention matrices (unit sensitivities:
// 2.14/1.84/2.15 % at 1.0, 2.26/2.00/1.90 % at 1.15; docs/log.md).
constexpr float kBaseFactor = 1.1f;

// Up to this many points the coarse search sees every point and is exact by itself (n^3 / 6 sums per merge, at
// 192 points some 40 us); beyond, it sees the edges of 64 parts, four per base cell.
constexpr std::size_t kExactPoints = 192;
constexpr std::size_t kCoarseBins = 64;
// More rounds lower the objective by less than 2e-5 of itself.
constexpr int kRoundsPerStride = 1;
constexpr int kFinalRounds = 2;

JointLevels joint_levels(const std::vector<int>& bits) {
  JointLevels levels;
  levels.low = bits.front();
  levels.base = std::min(bits.back(), std::max(kBase, levels.low));
  for (int b = levels.low; b <= levels.base; ++b) {
    // The optimal error falls by about 4 per bit, so importance 4^b weighs relative errors equally. The base
    // level counts even where nobody asks for it, and a little more: every finer level inherits its cuts.
    const bool wanted = std::find(bits.begin(), bits.end(), b) != bits.end() || b == levels.base;
    levels.importance[b] = wanted ? (b == levels.base ? kBaseFactor : 1.0f) * std::ldexp(1.0f, 2 * b) : 0.0f;
  }
  return levels;
}

class TreeWorker {
 public:
  explicit TreeWorker(const Problem& problem) : problem_(problem), levels_(joint_levels(problem.bits)) {}

  void operator()(std::size_t index) {
    row_.load(problem_.weights_row(index), problem_.sensitivity_row(index), problem_.columns, Equals::kMerged);
    if (row_.points <= levels_.roots()) {
      cut_every_point(row_, levels_.roots(), cuts_);
      for (int b = levels_.low; b < levels_.base; ++b) split_cells(row_, cuts_, best_split);
    } else {
      joint_cuts();
    }
    for (int b = levels_.base; b < problem_.max_bits(); ++b) split_cells(row_, cuts_, best_split);
    writer_.write(row_, cuts_, problem_, index);
  }

 private:
  void joint_cuts() {
    const std::size_t leaves = levels_.leaves();
    std::size_t stride = 1;
    if (row_.points <= kExactPoints) {
      edges_.resize(row_.points + 1);
      std::iota(edges_.begin(), edges_.end(), 0u);
      coarse_.cut(row_, levels_, edges_, cuts_);
      return;
    }
    if (leaves <= kCoarseBins / 2) {
      const std::size_t bins = std::max(kCoarseBins, 4 * leaves);
      compand(row_, bins, edges_, mass_);
      coarse_.cut(row_, levels_, edges_, cuts_);
      // A coarse cut is off by about an edge, row/bins points; a window reaches 8 strides.
      while (8 * stride < 2 * row_.points / bins) stride *= 2;
    } else {
      compand(row_, leaves, cuts_, mass_);
      while (8 * stride < row_.points / leaves) stride *= 2;
    }
    for (;; stride /= 2) {
      const int rounds = stride > 1 ? kRoundsPerStride : kFinalRounds;
      for (int round = 0; round < rounds && window_.improve(row_, levels_, stride, cuts_); ++round) {
      }
      if (stride == 1) return;
    }
  }

  const Problem& problem_;
  JointLevels levels_;
  SortedRow row_;
  CoarseSearch coarse_;
  WindowSearch window_;
  CellWriter writer_;
  std::vector<std::uint32_t> cuts_, edges_;
  std::vector<float> mass_;
};

}  // namespace

void solve_tree(const Problem& problem) {
  parallel_rows(problem.rows, 4, problem.threads, [&] { return TreeWorker(problem); });
}

}  // namespace everybit
