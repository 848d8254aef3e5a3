// Eight codes at a time: the bits of one byte, spread over the bytes of a 64-bit word, and back.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace everybit {

static_assert(std::endian::native == std::endian::little, "byte t of a word must be weight 8l + t");

// kSpread[v]: byte t is bit t of v. 2 KiB, stays in L1.
inline constexpr std::array<std::uint64_t, 256> kSpread = [] {
  std::array<std::uint64_t, 256> table{};
  for (std::size_t v = 0; v < 256; ++v)
    for (int t = 0; t < 8; ++t) table[v] |= static_cast<std::uint64_t>((v >> t) & 1) << (8 * t);
  return table;
}();

// The codes of weights 8l .. 8l+7, one per byte.
template <std::size_t kPlanes>
inline std::uint64_t codes_at(const std::uint8_t* const* planes, std::size_t l) {
  std::uint64_t codes = 0;
  for (std::size_t k = 0; k < kPlanes; ++k) codes |= kSpread[planes[k][l]] << (kPlanes - 1 - k);
  return codes;
}

// Bit `shift` of each of eight code bytes, gathered into one byte. The multiplier moves the bit at 8t to
// 56 + t (one shift of 56 - 7t per t); no two partial products meet below, so nothing carries.
inline std::uint8_t gather_bits(std::uint64_t codes, int shift) {
  return static_cast<std::uint8_t>((((codes >> shift) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

}  // namespace everybit
