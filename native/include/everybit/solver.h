// What every solver receives and fills: one weight matrix, its sensitivities, the precisions wanted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace everybit {

inline constexpr int kMaxBits = 8;

struct Problem {
  const float* weights;      // [rows, columns], finite
  const float* sensitivity;  // [rows, columns], finite, >= 0; null = all ones
  std::size_t rows, columns;
  std::vector<int> bits;  // ascending, within 2..8
  std::uint64_t seed;     // used by upscale only
  int threads;
  std::uint8_t* codes;                         // [rows, columns], bits.back()-bit codes
  std::array<float*, kMaxBits + 1> codebooks;  // [b]: [rows, 2^b] (uniform: [rows, 2]); null where b is not in bits

  int max_bits() const { return bits.back(); }
  const float* weights_row(std::size_t row) const { return weights + row * columns; }
  const float* sensitivity_row(std::size_t row) const { return sensitivity ? sensitivity + row * columns : nullptr; }
};

void solve_upscale(const Problem& problem);
void solve_tree(const Problem& problem);
void solve_uniform(const Problem& problem);

// The first row with a value that is not finite (or, if `refuse_negative`, below zero); -1 if there is none.
std::int64_t find_bad_row(const float* values, std::size_t rows, std::size_t columns, bool refuse_negative,
                          int threads);

}  // namespace everybit
