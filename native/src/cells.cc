// The residual bits of codebook kind `cells`: 4-bit codes are given, each cell gets an even grid.
//
// First a width for every cell: its error as a function of the width is sampled, and the step is taken whose ladder
// 1..8 leaves the least sum. Then two exact moves in turn lower the sum over precisions of importance * weighted
// squared error:
//   fit     codes fixed: the least-squares centres, step and ladders of every precision;
//   assign  codebooks fixed: a weight x costs const + sum importance * (v^2 - 2 x v) with residual r, a line in x, so
//           the best residuals of a cell are the lower envelope of 2^(top-4) lines: intervals.
// A cell is its sorted weights with prefix sums, so that a move costs a few binary searches per residual.
#include "everybit/cells.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "everybit/sorted_row.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

constexpr std::size_t kMostResiduals = std::size_t{1} << (kMaxBits - kCellBits);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// As in sorted_row.cc: every weight keeps this share of the row's mean sensitivity.
constexpr double kLeastWeight = 1e-9;

// The error falls by 3.3 to 3.9 per bit (even grids of a bell shape), so 3^b weighs relative errors about equally. 4^b
// buys 2 % at 8 bits for 1 % at 6 (docs/log.md).
constexpr double kImportance = 3;

// Widths are sampled from the cell's reach downwards, until the error has passed its minimum by half or, beside an
// outlier, the last sample (1/40 of the reach) is taken. Ratios of 1.07 gain less than 0.5 %.
constexpr double kWidthRatio = 1.15;
constexpr double kPastMinimum = 1.5;
constexpr std::size_t kMostSamples = 27;
// Twice as many gain 1 % at 8 bits and nothing below.
constexpr int kRounds = 4;

// The bracket of the format for ladder 1, by bits and residual.
constexpr auto kGrid = [] {
  std::array<std::array<double, kMostResiduals>, kMaxBits + 1> grid{};
  for (int b = kCellBits + 1; b <= kMaxBits; ++b) {
    const int n = 1 << (b - kCellBits);
    for (int r = 0; r < n; ++r) grid[b][r] = (2 * r + 1 - n) * (16 / n);
  }
  return grid;
}();

// Residual r is points [bounds[r], bounds[r + 1]) of the cell.
using Bounds = std::array<std::uint32_t, kMostResiduals + 1>;

// A cell at one precision: its error for a width is least + spread * (width - best)^2, with the centre to match.
struct Line {
  double spread = 0, best = 0;           // no spread: any width will do
  double mean_value = 0, mean_grid = 0;  // weighted means over the cell
  double width = 0;                      // the one chosen
  double centre() const { return mean_value - width * mean_grid; }
};

struct Cell {
  const std::uint32_t* column;  // its weights, ascending
  std::uint32_t count;
  double origin;                                  // values are minus this
  double square;                                  // weighted squared error around the mean
  const double *value, *weight_sum, *moment_sum;  // [count], [count + 1], [count + 1]
  Bounds bounds;

  // The first point not below `at`. Branchless: std::lower_bound would mispredict at every level.
  std::uint32_t first_from(double at) const {
    const double* low = value;
    std::uint32_t left = count;
    while (left > 1) {
      const std::uint32_t half = left / 2;
      low += low[half - 1] < at ? half : 0;
      left -= half;
    }
    return static_cast<std::uint32_t>(low - value) + (*low < at ? 1 : 0);
  }
};

// The error of a cell at widths reach / kWidthRatio^i, with the centre that goes with each.
struct Samples {
  double log_reach = 0;
  std::size_t count = 0, best = 0;
  std::array<double, kMostSamples> error, centre;

  // In units of log(kWidthRatio), 0 at the reach.
  double error_at(double place) const {
    const double log_ratio = std::log(kWidthRatio), last = static_cast<double>(count - 1);
    // Wider than the reach, a grid's error is that of its spacing; narrower than all samples, it only must not win.
    if (place <= 0) return error[0] * std::exp(2 * std::min(-place * log_ratio, 100.0));
    if (place >= last) return error[count - 1] * std::exp(4 * std::min((place - last) * log_ratio, 100.0));
    const auto i = static_cast<std::size_t>(place);
    return error[i] + (place - static_cast<double>(i)) * (error[i + 1] - error[i]);
  }
};

class CellsWorker {
 public:
  explicit CellsWorker(const CellsProblem& problem)
      : problem_(problem), top_(problem.bits.back()), residuals_(std::size_t{1} << (top_ - kCellBits)) {
    for (const int b : problem.bits) importance_[b] = std::pow(kImportance, b - kCellBits);
    for (int l = 1; l <= kLadders; ++l) log_ladder_[l] = std::log(l) / std::log(kWidthRatio);
  }

  void operator()(std::size_t index) {
    load(index);
    choose_widths();
    for (const int b : problem_.bits) fit(b);
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0)
        for (const int b : problem_.bits) fit_step(b);
      bool moved = false;
      for (std::size_t c = 0; c < kCells; ++c) moved |= cells_[c].count > 0 && assign(c);
      if (!moved) break;
    }
    for (const int b : problem_.bits) fit(b);
    write(index);
  }

 private:
  void load(std::size_t index) {
    const std::size_t columns = problem_.columns;
    const float* weights = problem_.weights + index * columns;
    const float* sensitivity = problem_.sensitivity ? problem_.sensitivity + index * columns : nullptr;
    const std::uint8_t* codes = problem_.codes + index * columns;
    row_.load(weights, sensitivity, columns, Equals::kApart);
    double total = 0;
    if (sensitivity)
      for (std::size_t k = 0; k < columns; ++k) total += sensitivity[k];
    if (total == 0) sensitivity = nullptr;
    const double least = sensitivity ? kLeastWeight * total / static_cast<double>(columns) : 1.0;

    std::array<std::uint32_t, kCells + 1> begin{};
    for (std::size_t k = 0; k < columns; ++k) ++begin[codes[k] + 1];
    for (std::size_t c = 0; c < kCells; ++c) begin[c + 1] += begin[c];
    auto place = begin;
    column_.resize(columns);
    for (const std::uint32_t k : row_.column) column_[place[codes[k]]++] = k;
    value_.resize(columns);
    weight_sum_.resize(columns + kCells);
    moment_sum_.resize(columns + kCells);
    for (std::size_t c = 0; c < kCells; ++c) {
      const std::uint32_t* column = column_.data() + begin[c];
      const std::uint32_t count = begin[c + 1] - begin[c];
      double* value = value_.data() + begin[c];
      double* w = weight_sum_.data() + begin[c] + c;
      double* m = moment_sum_.data() + begin[c] + c;
      const double low = count ? weights[column[0]] : 0.0, high = count ? weights[column[count - 1]] : 0.0;
      const double origin = (low + high) / 2;
      double square = 0;
      w[0] = m[0] = 0;
      for (std::uint32_t i = 0; i < count; ++i) {
        const double share = sensitivity ? sensitivity[column[i]] + least : least;
        value[i] = weights[column[i]] - origin;
        w[i + 1] = w[i] + share;
        m[i + 1] = m[i] + share * value[i];
        square += share * value[i] * value[i];
      }
      if (count) square = std::max(0.0, square - m[count] * m[count] / w[count]);
      cells_[c] = {column, count, origin, square, value, w, m, {}};
    }
  }

  Line line(const Cell& cell, int b) const {
    const std::size_t n = std::size_t{1} << (b - kCellBits), span = residuals_ / n;
    const auto& grid = kGrid[b];
    std::array<double, kMostResiduals> weight, moment;
    double grids = 0;
    for (std::size_t r = 0; r < n; ++r) {
      const std::uint32_t i = cell.bounds[r * span], j = cell.bounds[(r + 1) * span];
      weight[r] = cell.weight_sum[j] - cell.weight_sum[i];
      moment[r] = cell.moment_sum[j] - cell.moment_sum[i];
      grids += weight[r] * grid[r];
    }
    Line found;
    if (cell.count == 0) return found;
    found.mean_value = cell.moment_sum[cell.count] / cell.weight_sum[cell.count];
    found.mean_grid = grids / cell.weight_sum[cell.count];
    double joint = 0;
    for (std::size_t r = 0; r < n; ++r) {
      const double off = grid[r] - found.mean_grid;
      found.spread += weight[r] * off * off;
      joint += moment[r] * off;
    }
    if (joint > 0 && found.spread > 0) {
      found.best = joint / found.spread;
    } else {
      found.spread = 0;
    }
    return found;
  }

  // Cuts the cell evenly and lets the centre follow; the error of this width at all precisions.
  double place(Cell& cell, double width, double& centre) const {
    constexpr int kMoves = 2;
    for (int move = 0;; ++move) {
      cell.bounds[0] = 0;
      for (std::size_t r = 1; r < residuals_; ++r)
        cell.bounds[r] = cell.first_from(centre + width * (kGrid[top_][r - 1] + kGrid[top_][r]) / 2);
      cell.bounds[residuals_] = cell.count;
      if (move == kMoves) break;
      double grids = 0;
      for (std::size_t r = 0; r < residuals_; ++r)
        grids += (cell.weight_sum[cell.bounds[r + 1]] - cell.weight_sum[cell.bounds[r]]) * kGrid[top_][r];
      centre = (cell.moment_sum[cell.count] - width * grids) / cell.weight_sum[cell.count];
    }
    double error = 0;
    for (const int b : problem_.bits) {
      const Line own = line(cell, b);
      const double off = width - own.best;
      error += importance_[b] * (cell.square + own.spread * (off * off - own.best * own.best));
    }
    return std::max(error, 0.0);
  }

  void choose_widths() {
    for (std::size_t c = 0; c < kCells; ++c) {
      Cell& cell = cells_[c];
      Samples& samples = samples_[c];
      samples.count = samples.best = 0;
      cell.bounds.fill(cell.count);
      if (cell.count == 0) continue;
      const double low = cell.value[0], high = cell.value[cell.count - 1];
      if (low == high) {  // one value: one residual, of whichever sign
        std::fill_n(cell.bounds.begin(), residuals_ / 2 + 1, 0u);
        continue;
      }
      double width = (high - low) / 32, centre = (low + high) / 2;
      samples.log_reach = std::log(width) / std::log(kWidthRatio);
      while (samples.count < kMostSamples) {
        const double error = place(cell, width, centre);
        samples.error[samples.count] = error;
        samples.centre[samples.count] = centre;
        if (error < samples.error[samples.best]) samples.best = samples.count;
        ++samples.count;
        if (error > kPastMinimum * samples.error[samples.best]) break;
        width /= kWidthRatio;
      }
    }
    // A step at which some cell has its own best width.
    double least = kInfinity, log_step = 0;
    for (const Samples& samples : samples_) {
      if (samples.count == 0) continue;
      for (int l = 1; l <= kLadders; ++l) {
        const double step = samples.log_reach - static_cast<double>(samples.best) - log_ladder_[l];
        double error = 0;
        for (const Samples& other : samples_)
          if (other.count > 0 && error < least)
            error += other.error_at(other.log_reach - step - log_ladder_[best_ladder(other, step)]);
        if (error < least) least = error, log_step = step;
      }
    }
    for (std::size_t c = 0; c < kCells; ++c) {
      const Samples& samples = samples_[c];
      if (samples.count == 0) continue;
      const double log_width = log_step + log_ladder_[best_ladder(samples, log_step)];
      const double nearest = std::clamp(samples.log_reach - log_width, 0.0, static_cast<double>(samples.count - 1));
      double centre = samples.centre[static_cast<std::size_t>(nearest)];
      place(cells_[c], std::pow(kWidthRatio, log_width), centre);
    }
  }

  // Of the two ladders beside the cell's best width.
  int best_ladder(const Samples& samples, double log_step) const {
    const double log_best = samples.log_reach - static_cast<double>(samples.best) - log_step;
    int l = 1;
    while (l < kLadders && log_ladder_[l + 1] <= log_best) ++l;
    if (l == kLadders) return l;
    const double place = samples.log_reach - log_step;
    return samples.error_at(place - log_ladder_[l]) <= samples.error_at(place - log_ladder_[l + 1]) ? l : l + 1;
  }

  // The step and ladders with the least sum of spread * (best - step * ladder)^2. Nearest ladders change at steps
  // best / (l + 1/2); between two of these places the ladders are fixed and the best step is P / R with a gain of
  // P^2 / R, where P = sum of spread * best * ladder and R = sum of spread * ladder^2. The greatest gain wins.
  void fit(int b) {
    struct Change {
      double step;
      std::size_t cell;
    };
    std::array<Change, kCells*(kLadders - 1)> changes;
    std::size_t count = 0;
    auto& ladders = ladders_[b];
    ladders.fill(1);
    double product = 0, square = 0;
    for (std::size_t c = 0; c < kCells; ++c) {
      const Line& own = lines_[b][c] = line(cells_[c], b);
      if (own.spread == 0) continue;
      for (int l = 1; l < kLadders; ++l) changes[count++] = {own.best / (l + 0.5), c};
      ladders[c] = kLadders;
      product += own.spread * own.best * kLadders;
      square += own.spread * kLadders * kLadders;
    }
    std::sort(
        changes.begin(), changes.begin() + static_cast<std::ptrdiff_t>(count),
        [](const Change& x, const Change& y) { return x.step < y.step || (x.step == y.step && x.cell < y.cell); });
    double most = -1, step = 0;
    std::size_t chosen = 0;
    for (std::size_t i = 0;; ++i) {
      if (square > 0 && product * product > most * square)
        most = product * product / square, step = product / square, chosen = i;
      if (i == count) break;
      const Line& own = lines_[b][changes[i].cell];
      const double l = ladders[changes[i].cell]--;
      product -= own.spread * own.best;
      square -= own.spread * (2 * l - 1);
    }
    for (std::size_t i = chosen; i < count; ++i) ++ladders[changes[i].cell];
    set_step(b, step);
  }

  // The best step for the ladders as they are: a sort less, for the rounds.
  void fit_step(int b) {
    double product = 0, square = 0;
    for (std::size_t c = 0; c < kCells; ++c) {
      const Line& own = lines_[b][c] = line(cells_[c], b);
      product += own.spread * own.best * ladders_[b][c];
      square += own.spread * ladders_[b][c] * ladders_[b][c];
    }
    set_step(b, square > 0 ? product / square : 0.0);
  }

  void set_step(int b, double step) {
    steps_[b] = step;
    for (std::size_t c = 0; c < kCells; ++c) lines_[b][c].width = step * ladders_[b][c];
  }

  // The residuals of least cost; true if one changed.
  bool assign(std::size_t c) {
    Cell& cell = cells_[c];
    std::array<double, kMostResiduals> slope{}, level{};  // cost: level - 2 x slope, slopes ascending
    for (const int b : problem_.bits) {
      const Line& own = lines_[b][c];
      const double centre = own.centre();
      const int span = top_ - b;
      for (std::size_t r = 0; r < residuals_; ++r) {
        const double v = centre + own.width * kGrid[b][r >> span];
        slope[r] += importance_[b] * v;
        level[r] += importance_[b] * v * v;
      }
    }
    // The lower envelope: `kept` residuals, each from a place on. Of two with one slope the lower line stays.
    std::array<std::size_t, kMostResiduals> kept;
    std::array<double, kMostResiduals> from;
    std::size_t size = 0;
    for (std::size_t r = 0; r < residuals_; ++r) {
      double at = -kInfinity;
      for (; size > 0; --size) {
        const std::size_t last = kept[size - 1];
        const double rise = slope[r] - slope[last], lift = level[r] - level[last];
        at = rise > 0 ? lift / (2 * rise) : lift < 0 ? -kInfinity : kInfinity;
        if (at > from[size - 1]) break;
      }
      if (size > 0 && at == kInfinity) continue;
      from[size] = size > 0 ? at : -kInfinity;
      kept[size++] = r;
    }
    const Bounds before = cell.bounds;
    std::size_t r = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const std::uint32_t first = i == 0 ? 0 : cell.first_from(from[i]);
      for (; r <= kept[i]; ++r) cell.bounds[r] = first;
    }
    for (; r <= residuals_; ++r) cell.bounds[r] = cell.count;
    return cell.bounds != before;
  }

  void write(std::size_t index) const {
    std::uint8_t* codes = problem_.codes + index * problem_.columns;
    for (std::size_t c = 0; c < kCells; ++c) {
      const Cell& cell = cells_[c];
      for (std::size_t r = 0; r < residuals_; ++r)
        for (std::uint32_t i = cell.bounds[r]; i < cell.bounds[r + 1]; ++i)
          codes[cell.column[i]] = static_cast<std::uint8_t>(c * residuals_ + r);
    }
    for (const int b : problem_.bits) {
      const CellsBook& book = problem_.books[b];
      book.steps[index] = static_cast<float>(steps_[b]);
      for (std::size_t c = 0; c < kCells; ++c) {
        book.ladders[index * kCells + c] = ladders_[b][c];
        const double centre = cells_[c].origin + lines_[b][c].centre();  // of an empty cell: 0
        book.centres[index * kCells + c] = cells_[c].count ? static_cast<float>(centre) : 0.0f;
      }
    }
  }

  const CellsProblem& problem_;
  const int top_;
  const std::size_t residuals_;
  std::array<double, kMaxBits + 1> importance_{};
  std::array<double, kLadders + 1> log_ladder_{};  // in units of log(kWidthRatio)
  SortedRow row_;
  std::vector<std::uint32_t> column_;
  std::vector<double> value_, weight_sum_, moment_sum_;
  std::array<Cell, kCells> cells_;
  std::array<Samples, kCells> samples_;
  std::array<std::array<Line, kCells>, kMaxBits + 1> lines_;
  std::array<std::array<std::uint8_t, kCells>, kMaxBits + 1> ladders_;
  std::array<double, kMaxBits + 1> steps_{};
};

}  // namespace

void solve_cells(const CellsProblem& problem) {
  parallel_rows(problem.rows, 4, problem.threads, [&] { return CellsWorker(problem); });
}

}  // namespace everybit
