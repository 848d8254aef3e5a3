// Dequantization: planes and a table per row -> float32 values.
//
// Eight codes are formed in one register (spread.h). With up to 4 planes two neighbouring codes index a
// table of value pairs, which halves the lookups and the stores; building it (4^bits pairs) is repaid
// after a few hundred weights, so short rows take single lookups.
#include <array>
#include <cstring>

#include "everybit/planes.h"
#include "everybit/spread.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

struct Pair {
  float first, second;
};

template <std::size_t kPlanes>
void lookup_row(const std::uint8_t* const* planes, const float* table, std::size_t begin, std::size_t columns,
                float* values) {
  for (std::size_t l = begin; l < (columns + 7) / 8; ++l) {
    const std::uint64_t codes = codes_at<kPlanes>(planes, l);
    float* out = values + 8 * l;
    if (8 * l + 8 <= columns) {
      for (int t = 0; t < 8; ++t) out[t] = table[(codes >> (8 * t)) & 0xff];
    } else {
      for (std::size_t t = 0; t < columns % 8; ++t) out[t] = table[(codes >> (8 * t)) & 0xff];
    }
  }
}

template <std::size_t kPlanes>
void dequantize_row(const std::uint8_t* const* planes, const float* table, std::size_t columns, float* values) {
  std::size_t done = 0;
  if constexpr (kPlanes <= 4) {
    constexpr std::size_t kCodes = std::size_t{1} << kPlanes;
    if (columns >= 4 * kCodes * kCodes) {
      std::array<Pair, kCodes * kCodes> pairs;
      for (std::size_t high = 0; high < kCodes; ++high)
        for (std::size_t low = 0; low < kCodes; ++low) pairs[high * kCodes + low] = {table[low], table[high]};
      for (; done < columns / 8; ++done) {
        const std::uint64_t codes = codes_at<kPlanes>(planes, done);
        const std::uint64_t joined = codes | (codes >> (8 - kPlanes));  // even bytes: code[t] | code[t+1] << bits
        float* out = values + 8 * done;
        for (int t = 0; t < 4; ++t) std::memcpy(out + 2 * t, &pairs[(joined >> (16 * t)) & (kCodes * kCodes - 1)], 8);
      }
    }
  }
  lookup_row<kPlanes>(planes, table, done, columns, values);
}

using DequantizeRow = void (*)(const std::uint8_t* const*, const float*, std::size_t, float*);
constexpr std::array<DequantizeRow, 9> kDequantizeRow = {nullptr,           dequantize_row<1>, dequantize_row<2>,
                                                         dequantize_row<3>, dequantize_row<4>, dequantize_row<5>,
                                                         dequantize_row<6>, dequantize_row<7>, dequantize_row<8>};

}  // namespace

void dequantize_rows(const std::uint8_t* const* planes, int bits, const float* table, engine::Range rows,
                     std::size_t columns, float* values) {
  const std::size_t bytes = (columns + 7) / 8;
  const auto count = static_cast<std::size_t>(bits);
  for (std::size_t row = rows.begin; row < rows.end; ++row, values += columns) {
    std::array<const std::uint8_t*, 8> at{};
    for (std::size_t k = 0; k < count; ++k) at[k] = planes[k] + row * bytes;
    kDequantizeRow[count](at.data(), table + (row << bits), columns, values);
  }
}

void dequantize(const std::vector<const std::uint8_t*>& planes, const float* table, std::size_t rows,
                std::size_t columns, float* values, int threads) {
  parallel_rows(rows, rows_per_chunk(columns), threads, [&] {
    return [&](std::size_t row) {
      dequantize_rows(planes.data(), static_cast<int>(planes.size()), table, {row, row + 1}, columns,
                      values + row * columns);
    };
  });
}

}  // namespace everybit
