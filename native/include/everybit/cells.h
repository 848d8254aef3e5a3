// Codebook kind `cells` above 4 bits (docs/spec.md): an even grid of residual codes inside each 4-bit cell.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/solver.h"

namespace everybit {

inline constexpr int kCellBits = 4;
inline constexpr std::size_t kCells = std::size_t{1} << kCellBits;
inline constexpr int kLadders = 8;  // a cell is 1 to 8 steps of its row wide

// One precision: value = centre[cell] + step * (ladder[cell] * grid(r)), grid(r) = (2r + 1 - n) * 16 / n, n = 2^(b-4).
struct CellsBook {
  float* centres;         // [rows, 16]
  std::uint8_t* ladders;  // [rows, 16], 1..8
  float* steps;           // [rows], >= 0
};

struct CellsProblem {
  const float* weights;      // [rows, columns], finite
  const float* sensitivity;  // [rows, columns], finite, >= 0; null = all ones
  std::size_t rows, columns;
  std::vector<int> bits;  // ascending, within 5..8
  int threads;
  std::uint8_t* codes;                          // [rows, columns]; in: 4-bit codes, out: bits.back()-bit codes
  std::array<CellsBook, kMaxBits + 1> books{};  // [b] for each b in bits
};

// Appends residual bits to 4-bit codes and fits the codebook of every wanted precision.
void solve_cells(const CellsProblem& problem);

}  // namespace everybit
