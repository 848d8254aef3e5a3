// The original Any-Precision solver: k-means at the lowest precision, then every cluster cut in two.
//
// Source: Any-Precision LLM (Park et al., ICML 2024) section 3, "incremental upscaling"; seeds as in
// SqueezeLLM (weighted k-means), started by greedy k-means++ (Arthur and Vassilvitskii 2007, with the
// local trials of scikit-learn) and refined by at most 50 rounds of Lloyd. We differ in this only: rows
// have their own random stream (any thread count gives the same codes), a row with at most 2^seed distinct
// values is kept exactly, and a weight of exactly zero keeps its sensitivity.
#include <algorithm>
#include <array>
#include <cmath>

#include "everybit/sorted_row.h"
#include "everybit/split.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

constexpr int kLloydRounds = 50;

// A random stream per (seed, row): splitmix64 (Steele, Lea, Flood 2014) over a counter.
class Stream {
 public:
  Stream(std::uint64_t seed, std::uint64_t row) : state_(mix(seed + kStep) ^ mix(~row)) {}
  double uniform() {
    state_ += kStep;
    return static_cast<double>(mix(state_) >> 11) * 0x1p-53;
  }

 private:
  static constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

class Seeder {
 public:
  // cuts [cells + 1] of a k-means clustering of the row.
  void cluster(const SortedRow& row, std::size_t cells, Stream& stream, std::vector<std::uint32_t>& cuts) {
    start_centres(row, cells, stream);
    cuts.assign(cells + 1, 0);
    cuts[cells] = static_cast<std::uint32_t>(row.points);
    for (int round = 0; round < kLloydRounds; ++round) {
      bool moved = false;
      std::size_t from = 0;
      for (std::size_t c = 1; c < cells; ++c) {
        from = boundary(row, (centres_[c - 1] + centres_[c]) / 2, from);
        moved |= cuts[c] != from;
        cuts[c] = static_cast<std::uint32_t>(from);
      }
      if (!moved && round > 0) break;
      for (std::size_t c = 0; c < cells; ++c)
        if (cuts[c] < cuts[c + 1]) centres_[c] = row.mean(cuts[c], cuts[c + 1]);
    }
  }

 private:
  // The first point at or after `from` that is not below `x`.
  static std::size_t boundary(const SortedRow& row, double x, std::size_t from) {
    const auto begin = row.value.begin(), end = begin + static_cast<std::ptrdiff_t>(row.points);
    return static_cast<std::size_t>(std::lower_bound(begin + static_cast<std::ptrdiff_t>(from), end, x) - begin);
  }

  static double error(const SortedRow& row, std::size_t i, std::size_t j, double centre) {
    if (i >= j) return 0;
    const double e = row.square_sum[j] - row.square_sum[i] - 2 * centre * (row.moment_sum[j] - row.moment_sum[i]) +
                     centre * centre * (row.weight_sum[j] - row.weight_sum[i]);
    return e > 0 ? e : 0;
  }

  // Greedy k-means++: each new centre is the best of a few points drawn by weight * distance^2. A candidate
  // changes only the gap it falls into, so its gain needs that gap's two new boundaries and no full pass.
  void start_centres(const SortedRow& row, std::size_t cells, Stream& stream) {
    const std::size_t n = row.points;
    const int trials = 2 + static_cast<int>(std::log(static_cast<double>(cells)));
    const double draw = stream.uniform() * row.weight_sum[n];
    centres_.assign(1, row.value[first_above(row.weight_sum, 0, n, draw)]);
    borders_ = {0, static_cast<std::uint32_t>(n)};
    errors_.assign(1, error(row, 0, n, centres_[0]));
    while (centres_.size() < cells) {
      double total = 0;
      for (const double e : errors_) total += e;
      Insertion best;
      for (int trial = 0; trial < trials; ++trial) {
        const Insertion candidate = try_point(row, sample(row, stream.uniform() * total));
        if (trial == 0 || candidate.gain > best.gain) best = candidate;
      }
      insert(row, best);
    }
  }

  struct Insertion {
    double centre = 0, gain = 0;
    std::size_t place = 0;  // index among the sorted centres
    std::size_t left = 0, right = 0;
  };

  static std::size_t first_above(const std::vector<double>& sums, std::size_t i, std::size_t n, double target) {
    const auto at = std::upper_bound(sums.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                                     sums.begin() + static_cast<std::ptrdiff_t>(n) + 1, target);
    return std::min(static_cast<std::size_t>(at - sums.begin()) - 1, n - 1);
  }

  // The point where the running weighted squared distance passes `target`.
  std::size_t sample(const SortedRow& row, double target) const {
    std::size_t c = 0;
    while (c + 1 < errors_.size() && target >= errors_[c]) target -= errors_[c++];
    std::size_t low = borders_[c], high = borders_[c + 1];
    while (low + 1 < high) {
      const std::size_t middle = (low + high) / 2;
      (error(row, borders_[c], middle, centres_[c]) > target ? high : low) = middle;
    }
    return std::min(low, row.points - 1);
  }

  Insertion try_point(const SortedRow& row, std::size_t point) const {
    Insertion in;
    in.centre = row.value[point];
    in.place =
        static_cast<std::size_t>(std::upper_bound(centres_.begin(), centres_.end(), in.centre) - centres_.begin());
    const std::size_t p = in.place;
    const bool has_left = p > 0, has_right = p < centres_.size();
    in.left = has_left ? boundary(row, (centres_[p - 1] + in.centre) / 2, borders_[p - 1]) : 0;
    in.right = has_right ? boundary(row, (in.centre + centres_[p]) / 2, in.left) : row.points;
    const double before = (has_left ? errors_[p - 1] : 0) + (has_right ? errors_[p] : 0);
    const double after = (has_left ? error(row, borders_[p - 1], in.left, centres_[p - 1]) : 0) +
                         error(row, in.left, in.right, in.centre) +
                         (has_right ? error(row, in.right, borders_[p + 1], centres_[p]) : 0);
    in.gain = before - after;
    return in;
  }

  void insert(const SortedRow& row, const Insertion& in) {
    const auto p = static_cast<std::ptrdiff_t>(in.place);
    centres_.insert(centres_.begin() + p, in.centre);
    errors_.insert(errors_.begin() + p, 0);
    borders_.insert(borders_.begin() + p, 0);
    borders_[in.place] = static_cast<std::uint32_t>(in.left);
    borders_[in.place + 1] = static_cast<std::uint32_t>(in.right);
    const std::size_t first = in.place > 0 ? in.place - 1 : 0, last = std::min(in.place + 1, centres_.size() - 1);
    for (std::size_t c = first; c <= last; ++c) errors_[c] = error(row, borders_[c], borders_[c + 1], centres_[c]);
  }

  std::vector<double> centres_, errors_;
  std::vector<std::uint32_t> borders_;
};

}  // namespace

void solve_upscale(const Problem& problem) {
  parallel_rows(problem.rows, 4, problem.threads, [&] {
    return [&, row = SortedRow(), seeder = Seeder(), writer = CellWriter(),
            cuts = std::vector<std::uint32_t>()](std::size_t index) mutable {
      const float* weights = problem.weights_row(index);
      const std::size_t cells = std::size_t{1} << problem.bits.front();
      row.load(weights, problem.sensitivity_row(index), problem.columns, Equals::kApart);
      if (row.distinct(weights, cells + 1) <= cells) {
        row.load(weights, problem.sensitivity_row(index), problem.columns, Equals::kMerged);
        cut_every_point(row, cells, cuts);
      } else {
        Stream stream(problem.seed, index);
        seeder.cluster(row, cells, stream, cuts);
      }
      for (int b = problem.bits.front(); b < problem.max_bits(); ++b) split_cells(row, cuts, stationary_split);
      writer.write(row, cuts, problem, index);
    };
  });
}

}  // namespace everybit
