// Solver `guided`: nested codes under a Hessian, codebook kind `compact` (docs/spec.md).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/cells.h"

namespace everybit {

struct GuidedProblem {
  const float* weights;   // [rows, columns], finite
  const float* hessians;  // [groups, columns, columns], symmetric, positive definite; row r has group r * groups / rows
  std::size_t rows, columns, groups;
  std::vector<int> bits;                             // ascending, within 2..8
  std::array<float, kMaxBits + 1> importance{};      // [b]: what a squared error counts at that precision
  int rounds, sweeps, threads;                       // a round: fit codebooks, then that many sweeps over the codes
  std::uint8_t* codes;                               // [rows, columns] of bits.back() bits; in: where to start
  std::array<std::int8_t*, kCellBits + 1> tables{};  // [b]: [rows, 2^b] for each b <= 4 in bits, times the scale
  float* scales;                                     // [rows]
  std::int8_t* centres;                              // [rows, 16], times the scale; null where no precision is above 4
  std::uint8_t* ladders;                             // [rows, 16], 1..8
  float* steps;                                      // [rows], each a bfloat16
};

void solve_guided(const GuidedProblem& problem);

}  // namespace everybit
