// Cutting every cell of a level in two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/sorted_row.h"

namespace everybit {

// The cut m of points [i, j), i < m < j, with the least weighted error of [i, m) and [m, j); j if j - i < 2.
std::size_t best_split(const SortedRow& row, std::size_t i, std::size_t j);

// The original's cut: bisection for a point where both sides' means have it as their midpoint.
std::size_t stationary_split(const SortedRow& row, std::size_t i, std::size_t j);

// One point per cell while points last, then empty cells: exact for a row with few distinct values.
inline void cut_every_point(const SortedRow& row, std::size_t cells, std::vector<std::uint32_t>& cuts) {
  cuts.resize(cells + 1);
  for (std::size_t c = 0; c <= cells; ++c) cuts[c] = static_cast<std::uint32_t>(c < row.points ? c : row.points);
}

// cuts [2^level + 1] -> [2^(level+1) + 1], each cell cut by `split`.
template <class Split>
void split_cells(const SortedRow& row, std::vector<std::uint32_t>& cuts, const Split& split) {
  const std::size_t cells = cuts.size() - 1;
  cuts.resize(2 * cells + 1);
  cuts[2 * cells] = cuts[cells];
  for (std::size_t c = cells; c-- > 0;) {
    const std::uint32_t i = cuts[c], j = cuts[2 * c + 2];
    cuts[2 * c] = i;
    cuts[2 * c + 1] = static_cast<std::uint32_t>(split(row, i, j));
  }
}

}  // namespace everybit
