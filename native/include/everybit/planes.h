// Bit-planes: the code of a weight, most significant bit first, one bit array per significance.
//
// A row of K codes is ceil(K/8) bytes in each plane; bit t of byte l belongs to weight 8l + t and the
// padding bits of the last byte are zero (docs/spec.md, "A quantized weight").
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/engine/share.h"

namespace everybit {

// codes u8[rows, columns] -> packed u8[planes, rows, ceil(columns/8)]; only the low `planes` bits count.
void pack_planes(const std::uint8_t* codes, std::size_t rows, std::size_t columns, int planes, std::uint8_t* packed,
                 int threads);

// planes[k] u8[rows, ceil(columns/8)], k = 0 most significant -> codes u8[rows, columns].
void unpack_codes(const std::vector<const std::uint8_t*>& planes, std::size_t rows, std::size_t columns,
                  std::uint8_t* codes, int threads);

// As unpack_codes, then values[row, column] = table[row, code]; table f32[rows, 2^planes].
void dequantize(const std::vector<const std::uint8_t*>& planes, const float* table, std::size_t rows,
                std::size_t columns, float* values, int threads);

// As dequantize, for rows [rows.begin, rows.end) on this thread alone: values f32[rows.end - rows.begin, columns].
void dequantize_rows(const std::uint8_t* const* planes, int bits, const float* table, engine::Range rows,
                     std::size_t columns, float* values);

}  // namespace everybit
