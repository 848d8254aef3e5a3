// A row of weights as sorted points with prefix sums, ready for interval clustering.
//
// Points are moved to the row's median and scaled to [-1, 1], sensitivities to a sum of 1:
// prefix sums in double then lose nothing that matters even beside an outlier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/solver.h"

namespace everybit {

// Equal weights can become one point (no cut parts them, and a row with few distinct values is then small) or
// stay apart (as the original solver has them: its bisection depends on how many there are).
enum class Equals { kMerged, kApart };

struct SortedRow {
  std::size_t points = 0;             // n
  std::vector<std::uint32_t> column;  // [K]   columns in ascending order of weight
  std::vector<std::uint32_t> start;   // [n+1] points' first places in `column`
  std::vector<double> value;          // [n]   moved and scaled, ascending
  // [n+1] sums over the points before i of weight, weight*value, weight*value^2
  std::vector<double> weight_sum, moment_sum, square_sum;

  void load(const float* weights, const float* sensitivity, std::size_t columns, Equals equals);

  // Counts distinct values, stopping at `enough`.
  std::size_t distinct(const float* weights, std::size_t enough) const {
    std::size_t count = 1;
    for (std::size_t place = 1; place < column.size() && count < enough; ++place)
      count += weights[column[place]] != weights[column[place - 1]];
    return count;
  }

  // Weighted squared error of points [i, j) around their mean, i <= j.
  double cost(std::size_t i, std::size_t j) const {
    const double w = weight_sum[j] - weight_sum[i];
    const double m = moment_sum[j] - moment_sum[i];
    const double error = square_sum[j] - square_sum[i] - (w > 0 ? m * m / w : 0.0);
    return error > 0 ? error : 0.0;
  }
  double mean(std::size_t i, std::size_t j) const {
    return (moment_sum[j] - moment_sum[i]) / (weight_sum[j] - weight_sum[i]);
  }

 private:
  void sort(const float* weights, std::size_t columns);
  std::vector<std::uint64_t> keys_, swap_;
};

// Cut points [cuts[c], cuts[c+1]) are cell c of the finest level: writes the row's codes and the codebook of
// every wanted level (sensitivity-weighted means; docs/design/0001).
class CellWriter {
 public:
  void write(const SortedRow& row, const std::vector<std::uint32_t>& cuts, const Problem& problem, std::size_t index);

 private:
  struct Sums {
    double weight = 0, moment = 0, count = 0, plain = 0;
    float low = 0, high = 0;
  };
  std::vector<Sums> sums_;
  std::vector<float> means_;
};

}  // namespace everybit
