#include "everybit/sorted_row.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace everybit {
namespace {

// Every point keeps this share of the row's mean sensitivity, so that a run of points without any
// sensitivity is still cut by its shape and every cell has a mean. It moves an objective by 1e-9 of itself,
// and is, at K = 4096, some 2000 times the rounding of a prefix sum.
constexpr double kLeastWeight = 1e-9;

// An unsigned integer in the order of the floats. Negation (rather than the usual complement) maps -0 to
// +0 and keeps trailing zero bits zero: weights that came from 16 bits then skip a sorting pass.
std::uint32_t ordered(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return bits >> 31 ? 0u - (bits & 0x7fffffffu) + 0x80000000u : bits + 0x80000000u;
}

constexpr int kDigitBits = 8;
constexpr std::size_t kDigits = 1u << kDigitBits;
constexpr int kPasses = 32 / kDigitBits;

}  // namespace

// Least-significant-digit radix sort of (ordered weight << 32 | column); stable, so ties stay in column order.
void SortedRow::sort(const float* weights, std::size_t columns) {
  keys_.resize(columns);
  swap_.resize(columns);
  std::array<std::array<std::uint32_t, kDigits>, kPasses> places{};
  for (std::size_t k = 0; k < columns; ++k) {
    const std::uint32_t key = ordered(weights[k]);
    keys_[k] = static_cast<std::uint64_t>(key) << 32 | k;
    for (int pass = 0; pass < kPasses; ++pass) ++places[pass][(key >> (kDigitBits * pass)) % kDigits];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 32 + kDigitBits * pass;
    auto& place = places[pass];
    if (place[(keys_[0] >> shift) % kDigits] == columns) continue;  // one digit only: already in order
    std::uint32_t total = 0;
    for (auto& count : place) total += std::exchange(count, total);
    for (const std::uint64_t key : keys_) swap_[place[(key >> shift) % kDigits]++] = key;
    keys_.swap(swap_);
  }
  column.resize(columns);
  for (std::size_t k = 0; k < columns; ++k) column[k] = static_cast<std::uint32_t>(keys_[k]);
}

void SortedRow::load(const float* weights, const float* sensitivity, std::size_t columns, Equals equals) {
  sort(weights, columns);
  double total = 0;
  if (sensitivity)
    for (std::size_t k = 0; k < columns; ++k) total += sensitivity[k];
  if (total == 0) sensitivity = nullptr;  // a row nobody is sensitive to is clustered by its shape
  const double least = sensitivity ? kLeastWeight * total / static_cast<double>(columns) : 1.0;
  const double weight_scale = 1.0 / (sensitivity ? total : static_cast<double>(columns));
  const double middle = weights[column[columns / 2]];
  const double reach = std::max(weights[column[columns - 1]] - middle, middle - weights[column[0]]);
  const double scale = reach > 0 ? 1.0 / reach : 0.0;

  start.resize(columns + 1);
  value.resize(columns);
  weight_sum.resize(columns + 1);
  moment_sum.resize(columns + 1);
  square_sum.resize(columns + 1);
  weight_sum[0] = moment_sum[0] = square_sum[0] = 0;
  points = 0;
  for (std::size_t place = 0; place < columns;) {
    const float x = weights[column[place]];
    start[points] = static_cast<std::uint32_t>(place);
    double w = 0;
    do {
      w += sensitivity ? sensitivity[column[place]] + least : least;
    } while (++place < columns && equals == Equals::kMerged && weights[column[place]] == x);
    w *= weight_scale;
    const double v = (x - middle) * scale;
    value[points] = v;
    weight_sum[points + 1] = weight_sum[points] + w;
    moment_sum[points + 1] = moment_sum[points] + w * v;
    square_sum[points + 1] = square_sum[points] + w * v * v;
    ++points;
  }
  start[points] = static_cast<std::uint32_t>(columns);
}

void CellWriter::write(const SortedRow& row, const std::vector<std::uint32_t>& cuts, const Problem& problem,
                       std::size_t index) {
  const int top = problem.max_bits();
  const std::size_t leaves = std::size_t{1} << top;
  const float* weights = problem.weights_row(index);
  const float* sensitivity = problem.sensitivity_row(index);
  std::uint8_t* codes = problem.codes + index * problem.columns;

  // Heap order: node 1 is the row, nodes 2^b .. 2^(b+1)-1 are the cells of level b.
  sums_.assign(2 * leaves, Sums{});
  means_.resize(2 * leaves);
  for (std::size_t c = 0; c < leaves; ++c) {
    Sums& sum = sums_[leaves + c];
    const std::uint32_t begin = row.start[cuts[c]], end = row.start[cuts[c + 1]];
    for (std::uint32_t place = begin; place < end; ++place) {
      const std::uint32_t k = row.column[place];
      const double x = weights[k], w = sensitivity ? sensitivity[k] : 1.0;
      sum.weight += w;
      sum.moment += w * x;
      sum.plain += x;
      codes[k] = static_cast<std::uint8_t>(c);
    }
    sum.count = end - begin;
    if (begin < end) sum.low = weights[row.column[begin]], sum.high = weights[row.column[end - 1]];
  }
  for (std::size_t node = leaves - 1; node >= 1; --node) {
    const Sums &left = sums_[2 * node], &right = sums_[2 * node + 1];
    sums_[node] = {left.weight + right.weight,
                   left.moment + right.moment,
                   left.count + right.count,
                   left.plain + right.plain,
                   left.count > 0 ? left.low : right.low,
                   right.count > 0 ? right.high : left.high};
  }
  for (std::size_t node = 1; node < 2 * leaves; ++node) {
    const Sums& sum = sums_[node];
    if (sum.count == 0) {
      means_[node] = means_[node / 2];
      continue;
    }
    const double mean = sum.weight > 0 ? sum.moment / sum.weight : sum.plain / sum.count;
    // A mean lies within its cell; the clamp undoes rounding and makes one-value cells exact.
    means_[node] = std::clamp(static_cast<float>(mean), sum.low, sum.high);
  }
  for (const int b : problem.bits) {
    const std::size_t cells = std::size_t{1} << b;
    std::copy_n(means_.begin() + static_cast<std::ptrdiff_t>(cells), cells, problem.codebooks[b] + index * cells);
  }
}

}  // namespace everybit
