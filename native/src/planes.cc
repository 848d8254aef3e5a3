#include "everybit/planes.h"

#include <array>
#include <cstring>

#include "everybit/spread.h"
#include "everybit/threads.h"

namespace everybit {
namespace {

template <std::size_t kPlanes>
void unpack_row(const std::uint8_t* const* planes, std::size_t columns, std::uint8_t* codes) {
  const std::size_t whole = columns / 8;
  for (std::size_t l = 0; l < whole; ++l) {
    const std::uint64_t word = codes_at<kPlanes>(planes, l);
    std::memcpy(codes + 8 * l, &word, 8);
  }
  if (columns % 8) {
    const std::uint64_t word = codes_at<kPlanes>(planes, whole);
    std::memcpy(codes + 8 * whole, &word, columns % 8);
  }
}

using UnpackRow = void (*)(const std::uint8_t* const*, std::size_t, std::uint8_t*);
constexpr std::array<UnpackRow, 9> kUnpackRow = {nullptr,       unpack_row<1>, unpack_row<2>,
                                                 unpack_row<3>, unpack_row<4>, unpack_row<5>,
                                                 unpack_row<6>, unpack_row<7>, unpack_row<8>};

}  // namespace

void pack_planes(const std::uint8_t* codes, std::size_t rows, std::size_t columns, int planes, std::uint8_t* packed,
                 int threads) {
  const std::size_t bytes = (columns + 7) / 8;
  parallel_rows(rows, rows_per_chunk(columns), threads, [=] {
    return [=](std::size_t row) {
      const std::uint8_t* from = codes + row * columns;
      for (std::size_t l = 0; l < bytes; ++l) {
        std::uint64_t word = 0;
        std::memcpy(&word, from + 8 * l, l < columns / 8 ? 8 : columns % 8);
        for (int k = 0; k < planes; ++k)
          packed[(static_cast<std::size_t>(k) * rows + row) * bytes + l] = gather_bits(word, planes - 1 - k);
      }
    };
  });
}

void unpack_codes(const std::vector<const std::uint8_t*>& planes, std::size_t rows, std::size_t columns,
                  std::uint8_t* codes, int threads) {
  const std::size_t bytes = (columns + 7) / 8;
  const UnpackRow unpack = kUnpackRow[planes.size()];
  parallel_rows(rows, rows_per_chunk(columns), threads, [&, unpack] {
    return [&, unpack](std::size_t row) {
      std::array<const std::uint8_t*, 8> at{};
      for (std::size_t k = 0; k < planes.size(); ++k) at[k] = planes[k] + row * bytes;
      unpack(at.data(), columns, codes + row * columns);
    };
  });
}

}  // namespace everybit
