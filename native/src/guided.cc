// Solver `guided`: one leaf per weight, chosen for all precisions at once against a Hessian.
//
// Per row and precision b the error e_b = w - v_b costs importance_b * e_b' H e_b. Every precision has its own codebook
// and its own gradient H e_b; a code is the leaf of a binary tree whose nodes at depth b are the b-bit codes. A round
// alternates
//   fit     least squares of each codebook with the codes fixed. With S the 0/1 matrix of leaves, S'HS of the finest
//           precision, summed in blocks, is that of every coarser one, and the sums of H's rows by leaf (S'H) give it
//           and all gradients. A weight that moves takes its row of H along from sum to sum, so that one pass over H
//           serves all rounds and precisions.
//   sweep   coordinate descent: each weight moves to the leaf with the least summed cost, given all others. For a
//           quadratic that is the sum over precisions of importance * (value - target)^2, so all leaves are tried.
// Values are those that the format holds (int8 tables, one step a row), so later sweeps make up for their rounding.
// Sweeps know 6 bits at most; 7 and 8 follow at the end, each weight within its 6-bit cell.
//
// Source: the Hessian, least-squares codebooks and coordinate descent of LNQ with GuidedQuant (Kim et al., ICML 2025,
// 2505.07004), sections 3 and 4; nested levels with own error states are ours (docs/design/0003).
#include "everybit/guided.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "everybit/clones.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

constexpr int kSweepBits = 6;
constexpr std::size_t kMostLeaves = std::size_t{1} << kSweepBits;
constexpr double kRidge = 1e-6;  // of the mean diagonal: keeps empty leaves where they are

EVERYBIT_CLONES
void add_scaled(const float* from, float scale, float* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

// cost[leaf] of a child is its parent's plus its own.
EVERYBIT_CLONES
void descend(const float* parents, const float* values, float target, float importance, float* costs, std::size_t n) {
  for (std::size_t i = 0; i < n; i += 2) {
    const float a = values[i] - target, b = values[i + 1] - target;
    costs[i] = parents[i / 2] + importance * a * a;
    costs[i + 1] = parents[i / 2] + importance * b * b;
  }
}

// x <- the solution of (A + ridge) x = b, A of order n in rows of `stride`; A is overwritten.
void solve_positive(double* a, std::size_t n, std::size_t stride, double* x) {
  double mean = 0;
  for (std::size_t i = 0; i < n; ++i) mean += a[i * stride + i];
  const double ridge = mean > 0 ? kRidge * mean / static_cast<double>(n) : 1.0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double sum = a[i * stride + j] + (i == j ? ridge : 0);
      for (std::size_t k = 0; k < j; ++k) sum -= a[i * stride + k] * a[j * stride + k];
      a[i * stride + j] = i == j ? std::sqrt(std::max(sum, ridge * 1e-3)) : sum / a[j * stride + j];
    }
    for (std::size_t k = 0; k < i; ++k) x[i] -= a[i * stride + k] * x[k];
    x[i] /= a[i * stride + i];
  }
  for (std::size_t i = n; i-- > 0;) {
    for (std::size_t k = i + 1; k < n; ++k) x[i] -= a[k * stride + i] * x[k];
    x[i] /= a[i * stride + i];
  }
}

float to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

double grid(std::size_t residual, int bits) {  // of docs/spec.md, for ladder 1
  const int n = 1 << (bits - kCellBits);
  return (2 * static_cast<int>(residual) + 1 - n) * (16 / n);
}

using Values = std::array<float, std::size_t{1} << kMaxBits>;

class GuidedWorker {
 public:
  explicit GuidedWorker(const GuidedProblem& problem)
      : problem_(problem),
        columns_(problem.columns),
        top_(problem.bits.back()),
        depth_(std::min(top_, kSweepBits)),
        leaves_(std::size_t{1} << depth_),
        cells_(top_ > kCellBits),
        target_(columns_),
        leaf_(columns_),
        leaf_rows_(leaves_ * columns_) {
    for (const int b : problem.bits) {
      importance_[b > depth_ ? kMaxBits : b] += problem.importance[b];
      if (b <= depth_ || levels_.empty() || levels_.back() < depth_) {
        levels_.push_back(std::min(b, depth_));
        gradients_[levels_.back()].resize(columns_);
      }
    }
    if (top_ > depth_) {
      if (importance_[depth_] == 0) importance_[depth_] = importance_[kMaxBits];  // it stands for those above
      gradients_[kMaxBits].resize(columns_);
      free_.resize(columns_);
    }
  }

  void operator()(std::size_t row) {
    row_ = row;
    weights_ = problem_.weights + row * columns_;
    hessian_ = problem_.hessians + row * problem_.groups / problem_.rows * columns_ * columns_;
    codes_ = problem_.codes + row * columns_;
    for (std::size_t k = 0; k < columns_; ++k) leaf_[k] = static_cast<std::uint8_t>(codes_[k] >> (top_ - depth_));
    std::fill(target_.begin(), target_.end(), 0.0f);
    for (std::size_t k = 0; k < columns_; ++k)
      add_scaled(hessian_ + k * columns_, weights_[k], target_.data(), columns_);
    start();
    std::fill(leaf_rows_.begin(), leaf_rows_.end(), 0.0f);
    for (std::size_t k = 0; k < columns_; ++k) add_scaled(hessian_ + k * columns_, 1.0f, leaf_row(leaf_[k]), columns_);
    for (int round = 0; round < problem_.rounds; ++round) {
      fit();
      bool moved = false;
      for (int sweep = 0; sweep < problem_.sweeps; ++sweep) {
        if (!this->sweep()) break;
        moved = true;
      }
      if (!moved) break;
    }
    fit();
    finish();
  }

 private:
  // Codebooks to start from: the means of the weights under each node, an empty one has its parent's.
  void start() {
    step_ = 0;
    ladders_.fill(1);
    std::array<double, kMostLeaves> sum{};
    std::array<std::size_t, kMostLeaves> count{};
    std::array<float, std::size_t{1} << kCellBits> least{}, greatest{};
    for (std::size_t k = 0; k < columns_; ++k) {
      sum[leaf_[k]] += weights_[k];
      ++count[leaf_[k]];
    }
    const int deepest = std::min(depth_, kCellBits);
    for (int b = 1; b <= deepest; ++b) {
      const std::size_t per = leaves_ >> b;
      for (std::size_t c = 0; c < std::size_t{1} << b; ++c) {
        double total = 0;
        std::size_t n = 0;
        for (std::size_t i = c * per; i < (c + 1) * per; ++i) total += sum[i], n += count[i];
        values_[b][c] = n ? static_cast<float>(total / static_cast<double>(n)) : b > 1 ? values_[b - 1][c / 2] : 0.0f;
      }
    }
    if (!cells_) return;
    std::array<bool, kCells> seen{};
    double mean = 0;
    std::size_t wide = 0;
    for (std::size_t k = 0; k < columns_; ++k) {
      const std::size_t c = leaf_[k] >> (depth_ - kCellBits);
      least[c] = seen[c] ? std::min(least[c], weights_[k]) : weights_[k];
      greatest[c] = seen[c] ? std::max(greatest[c], weights_[k]) : weights_[k];
      seen[c] = true;
    }
    for (std::size_t c = 0; c < kCells; ++c) {
      centres_[c] = values_[kCellBits][c];
      widths_[c] = (greatest[c] - least[c]) / 32.0;
      if (widths_[c] > 0) mean += widths_[c], ++wide;
    }
    for (double& width : widths_)
      if (!(width > 0)) width = wide ? mean / static_cast<double>(wide) : 0.0;
  }

  float* leaf_row(std::size_t leaf) { return leaf_rows_.data() + leaf * columns_; }

  void fit() {
    products_.fill(0);
    moments_.fill(0);
    for (std::size_t k = 0; k < columns_; ++k) moments_[leaf_[k]] += target_[k];
    for (std::size_t a = 0; a < leaves_; ++a) {
      const float* from = leaf_row(a);
      double* to = products_.data() + a * kMostLeaves;
      for (std::size_t k = 0; k < columns_; ++k) to[leaf_[k]] += from[k];
    }
    for (const int b : problem_.bits)
      if (b <= kCellBits) fit_table(b);
    if (cells_) fit_cells();
    round_values();
    for (const int b : levels_) {
      float* gradient = gradients_[b].data();
      std::copy(target_.begin(), target_.end(), gradient);
      for (std::size_t a = 0; a < leaves_; ++a)
        add_scaled(leaf_row(a), -values_[b][a >> (depth_ - b)], gradient, columns_);
    }
    if (top_ == depth_) return;
    std::fill(gradients_[kMaxBits].begin(), gradients_[kMaxBits].end(), 0.0f);
    for (std::size_t k = 0; k < columns_; ++k) {
      free_[k] = within(leaf_[k], weights_[k]);
      const float error = weights_[k] - free_[k];
      if (error != 0) add_scaled(hessian_ + k * columns_, error, gradients_[kMaxBits].data(), columns_);
    }
  }

  // The value nearest to `wanted` in the range of a leaf that bits beyond the sixth can still reach.
  float within(std::size_t leaf, float wanted) const {
    const float reach = step_ * static_cast<float>(4 * ladders_[leaf >> (depth_ - kCellBits)]);
    const float middle = values_[depth_][leaf];
    return std::clamp(wanted, middle - reach, middle + reach);
  }

  void fit_table(int b) {
    const std::size_t n = std::size_t{1} << b, per = leaves_ >> b;
    std::array<double, kCells * kCells> a{};
    std::array<double, kCells> x{};
    for (std::size_t i = 0; i < leaves_; ++i) {
      x[i / per] += moments_[i];
      for (std::size_t j = 0; j < leaves_; ++j) {
        const double product = products_[i * kMostLeaves + j];
        a[i / per * n + j / per] += product;
        x[i / per] -= product * values_[b][j / per];
      }
    }
    solve_positive(a.data(), n, n, x.data());
    for (std::size_t i = 0; i < n; ++i) values_[b][i] += static_cast<float>(x[i]);
  }

  // Centres and widths together, from the precisions above 4 that sweeps know; then a step and ladders for the widths,
  // and the centres again for those.
  void fit_cells() {
    constexpr std::size_t kSize = 2 * kCells;
    std::array<double, kSize * kSize> a{};
    std::array<double, kSize> x{};
    normal_equations(a, x);
    const auto widths = widths_;
    std::array<double, kCells> weight;
    for (std::size_t c = 0; c < kCells; ++c) weight[c] = a[(kCells + c) * kSize + kCells + c];
    solve_positive(a.data(), kSize, kSize, x.data());
    double widest = 0;
    for (std::size_t c = 0; c < kCells; ++c) {
      centres_[c] += x[c];
      const double found = widths[c] + x[kCells + c];
      widths_[c] = found > 0.1 * widths[c] ? found : 0.1 * widths[c];
      widest = std::max(widest, widths_[c]);
    }
    double best = std::numeric_limits<double>::infinity();
    std::array<std::uint8_t, kCells> ladder{};
    for (int i = 0; i <= 32; ++i) {  // the widest cell gets ladder 8 down to 2
      const double step = to_bfloat16(static_cast<float>(widest / 8 * std::exp2(i / 16.0)));
      double cost = 0;
      for (std::size_t c = 0; c < kCells; ++c) {
        const double rounded = step > 0 ? std::clamp(std::round(widths_[c] / step), 1.0, double{kLadders}) : 1.0;
        ladder[c] = static_cast<std::uint8_t>(rounded);
        cost += weight[c] * (widths_[c] - rounded * step) * (widths_[c] - rounded * step);
      }
      if (cost < best) {
        best = cost;
        step_ = static_cast<float>(step);
        ladders_ = ladder;
      }
    }
    for (std::size_t c = 0; c < kCells; ++c) widths_[c] = static_cast<double>(step_) * ladders_[c];
    a.fill(0);
    x.fill(0);
    normal_equations(a, x);
    solve_positive(a.data(), kCells, kSize, x.data());
    for (std::size_t c = 0; c < kCells; ++c) centres_[c] += x[c];
  }

  // Of the change in centres (first 16) and widths that lowers the weighted loss most.
  void normal_equations(std::array<double, 4 * kCells * kCells>& a, std::array<double, 2 * kCells>& x) const {
    constexpr std::size_t kSize = 2 * kCells;
    const std::size_t per = leaves_ / kCells;
    for (const int b : levels_) {
      if (b <= kCellBits) continue;
      const double importance = importance_[b];
      const int span = depth_ - b;
      std::array<double, kMostLeaves> g, v;
      for (std::size_t i = 0; i < leaves_; ++i) {
        g[i] = grid((i % per) >> span, b);
        v[i] = centres_[i / per] + widths_[i / per] * g[i];
      }
      for (std::size_t i = 0; i < leaves_; ++i) {
        double residual = moments_[i];
        double* centre = a.data() + i / per * kSize;
        double* width = a.data() + (kCells + i / per) * kSize;
        for (std::size_t j = 0; j < leaves_; ++j) {
          const double product = products_[i * kMostLeaves + j], weighted = importance * product;
          residual -= product * v[j];
          centre[j / per] += weighted;
          centre[kCells + j / per] += weighted * g[j];
          width[j / per] += weighted * g[i];
          width[kCells + j / per] += weighted * g[i] * g[j];
        }
        x[i / per] += importance * residual;
        x[kCells + i / per] += importance * residual * g[i];
      }
    }
  }

  // What the format holds: int8 multiples of one scale a row, and the grid of each cell.
  void round_values() {
    float most = 0;
    for (const int b : problem_.bits)
      if (b <= kCellBits)
        for (std::size_t i = 0; i < std::size_t{1} << b; ++i) most = std::max(most, std::fabs(values_[b][i]));
    if (cells_)
      for (const double centre : centres_) most = std::max(most, std::fabs(static_cast<float>(centre)));
    scale_ = most / 127.0f;
    const float inverse = scale_ > 0 ? 1.0f / scale_ : 0.0f;
    const auto rounded = [&](float value) { return std::clamp(std::nearbyint(value * inverse), -127.0f, 127.0f); };
    for (const int b : problem_.bits)
      if (b <= kCellBits)
        for (std::size_t i = 0; i < std::size_t{1} << b; ++i) values_[b][i] = scale_ * rounded(values_[b][i]);
    if (!cells_) return;
    for (double& centre : centres_) centre = scale_ * rounded(static_cast<float>(centre));
    for (int b = kCellBits + 1; b <= top_; ++b) {
      const std::size_t n = std::size_t{1} << (b - kCellBits);
      for (std::size_t i = 0; i < std::size_t{1} << b; ++i)
        values_[b][i] =
            static_cast<float>(centres_[i / n]) + step_ * static_cast<float>(ladders_[i / n] * grid(i % n, b));
    }
  }

  // Whether a weight moved.
  bool sweep() {
    bool moved = false;
    std::array<float, kMostLeaves> one, two;
    for (std::size_t k = 0; k < columns_; ++k) {
      const float* row = hessian_ + k * columns_;
      if (!(row[k] > 0)) continue;
      const float inverse = 1.0f / row[k];
      float *parents = one.data(), *costs = two.data();
      parents[0] = 0;
      std::size_t n = 1;
      for (int b = 1; b <= depth_; ++b) {
        n *= 2;
        if (importance_[b] > 0) {
          const float own = values_[b][leaf_[k] >> (depth_ - b)];
          descend(parents, values_[b].data(), own + gradients_[b][k] * inverse, importance_[b], costs, n);
        } else {
          for (std::size_t i = 0; i < n; ++i) costs[i] = parents[i / 2];
        }
        std::swap(parents, costs);
      }
      const std::size_t now = leaf_[k];
      const float wanted = top_ > depth_ ? free_[k] + gradients_[kMaxBits][k] * inverse : 0.0f;
      if (top_ > depth_)
        for (std::size_t i = 0; i < n; ++i) {
          const float missed = wanted - within(i, wanted);
          parents[i] += importance_[kMaxBits] * missed * missed;
        }
      std::size_t best = now;
      float least = parents[now] * (1 - 1e-5f);
      for (std::size_t i = 0; i < n; ++i)
        if (parents[i] < least) least = parents[i], best = i;
      if (top_ > depth_) {
        const float found = within(best, wanted);
        if (found != free_[k]) add_scaled(row, free_[k] - found, gradients_[kMaxBits].data(), columns_);
        free_[k] = found;
      }
      if (best == now) continue;
      moved = true;
      add_scaled(row, -1.0f, leaf_row(now), columns_);
      add_scaled(row, 1.0f, leaf_row(best), columns_);
      leaf_[k] = static_cast<std::uint8_t>(best);
      for (const int b : levels_) {
        const float change = values_[b][now >> (depth_ - b)] - values_[b][best >> (depth_ - b)];
        if (change != 0) add_scaled(row, change, gradients_[b].data(), columns_);
      }
    }
    return moved;
  }

  // The bits that sweeps do not know: nearest first, then descent at the top precision within each cell.
  void finish() {
    const int rest = top_ - depth_;
    const std::size_t choices = std::size_t{1} << rest;
    float* gradient = gradients_[kMaxBits].data();
    const float* values = values_[top_].data();
    if (rest > 0) std::copy(target_.begin(), target_.end(), gradient);
    for (std::size_t k = 0; k < columns_; ++k) {
      const std::size_t first = std::size_t{leaf_[k]} << rest;
      codes_[k] = static_cast<std::uint8_t>(nearest(values + first, choices, weights_[k]) + first);
      if (rest > 0) add_scaled(hessian_ + k * columns_, -values[codes_[k]], gradient, columns_);
    }
    for (int sweep = 0; rest > 0 && sweep < problem_.sweeps; ++sweep) {
      for (std::size_t k = 0; k < columns_; ++k) {
        const float* row = hessian_ + k * columns_;
        if (!(row[k] > 0)) continue;
        const std::size_t first = std::size_t{leaf_[k]} << rest;
        const float own = values[codes_[k]];
        const std::size_t best = nearest(values + first, choices, own + gradient[k] / row[k]) + first;
        if (best == codes_[k]) continue;
        add_scaled(row, own - values[best], gradient, columns_);
        codes_[k] = static_cast<std::uint8_t>(best);
      }
    }
    write();
  }

  static std::size_t nearest(const float* values, std::size_t n, float target) {
    std::size_t best = 0;
    for (std::size_t i = 1; i < n; ++i)
      if (std::fabs(values[i] - target) < std::fabs(values[best] - target)) best = i;
    return best;
  }

  void write() const {
    const float inverse = scale_ > 0 ? 1.0f / scale_ : 0.0f;
    problem_.scales[row_] = scale_;
    for (const int b : problem_.bits) {
      if (b > kCellBits) break;
      const std::size_t n = std::size_t{1} << b;
      for (std::size_t i = 0; i < n; ++i)
        problem_.tables[b][row_ * n + i] = static_cast<std::int8_t>(std::lrint(values_[b][i] * inverse));
    }
    if (!cells_) return;
    problem_.steps[row_] = step_;
    for (std::size_t c = 0; c < kCells; ++c) {
      problem_.centres[row_ * kCells + c] =
          static_cast<std::int8_t>(std::lrint(static_cast<float>(centres_[c]) * inverse));
      problem_.ladders[row_ * kCells + c] = ladders_[c];
    }
  }

  const GuidedProblem& problem_;
  const std::size_t columns_;
  const int top_, depth_;
  const std::size_t leaves_;
  const bool cells_;
  std::vector<int> levels_;  // the precisions that sweeps know, ascending; those above 6 bits stand behind 6
  std::array<float, kMaxBits + 1> importance_{};
  std::size_t row_ = 0;
  const float *weights_ = nullptr, *hessian_ = nullptr;
  std::uint8_t* codes_ = nullptr;
  std::vector<float> target_;  // H w
  std::vector<std::uint8_t> leaf_;
  std::vector<float> leaf_rows_;  // [leaf, columns]: the sum of H's rows by leaf
  std::array<std::vector<float>, kMaxBits + 1>
      gradients_;            // [b]: H e_b; the last: of free_, at the end of the top precision
  std::vector<float> free_;  // what each weight would be with all the bits in the world beyond its leaf
  std::array<double, kMostLeaves * kMostLeaves> products_{};  // S'HS
  std::array<double, kMostLeaves> moments_{};                 // S'Hw
  std::array<Values, kMaxBits + 1> values_{};
  std::array<double, kCells> centres_{}, widths_{};
  std::array<std::uint8_t, kCells> ladders_{};
  float step_ = 0, scale_ = 0;
};

}  // namespace

void solve_guided(const GuidedProblem& problem) {
  parallel_rows(problem.rows, 1, problem.threads, [&] { return GuidedWorker(problem); });
}

}  // namespace everybit
