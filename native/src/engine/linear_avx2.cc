// Quantized linear layers for AVX2 and FMA, without VNNI. Layout and terms: linear.h.
//
// A *unit* is half a block: 256 weights, 32 bytes of each plane, eight groups. Planes are merged by delta swaps into
// four vectors, each with the indices of steps s and s + 4 in the low and high half of its bytes; a byte shuffle looks
// up 16 entries and ignores bits 4 to 6 of an index, bit 7 must be clear.
//
// Two ways to multiply:
// - bytes: vpmaddubsw of table bytes and activations. Entries are at most 127 (base 128), so a pair sum is at most
//   2 * 127 * 127 = 32258 and cannot saturate, but two of them could: each is widened by vpmaddwd, with ones or, high
//   parts, with 128. (Entries of 6 bits would allow one addition before.)
// - words: low and high bytes of a 14-bit entry are interleaved to int16 and vpmaddwd multiplies by int16 activations,
//   which were widened once per call. For two parts: as many operations as bytes for one token, but more shuffles; a
//   third less for each further token. The bytes of a plane are ordered 0 1 4 5 8 9 12 13 | 2 3 6 7 10 11 14 15 in each
//   16 for that: the low and the high half of an interleaved vector then both have group j in 32-bit lane j.
#include <immintrin.h>

#include <cstring>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

using V = __m256i;

#define EVERYBIT_INLINE inline __attribute__((always_inline))

constexpr std::size_t kUnitBytes = kBlockBytes / 2;  // of a plane
constexpr std::size_t kUnitGroups = kGroups / 2;
constexpr std::size_t kUnitWords = kBlock / 2;  // int16 numbers of a unit: [8 steps][2 vectors][16]

EVERYBIT_INLINE V load(const void* at) { return _mm256_loadu_si256(static_cast<const V*>(at)); }
EVERYBIT_INLINE V bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// Exchanges the bits of a at mask << kShift with the bits of b at mask.
template <int kShift>
EVERYBIT_INLINE void swap_bits(V& a, V& b, V mask) {
  const V moved = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, kShift), b), mask);
  b = _mm256_xor_si256(b, moved);
  a = _mm256_xor_si256(a, kShift == 1 ? _mm256_add_epi8(moved, moved) : _mm256_slli_epi16(moved, kShift));
}

EVERYBIT_INLINE V pair_order() {
  return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
}

// The tables of a row in registers (7 and 8 bits: in L1), and the lookups of a unit.
template <int kBits, int kParts, bool kWords>
class Row {
 public:
  static constexpr int kTables = kBits == 1 ? 4 : kBits == 2 ? 2 : kBits <= 4 ? 1 : 1 << (kBits - 4);

  EVERYBIT_INLINE explicit Row(const std::uint8_t* entries) {
    constexpr int kSize = 1 << kBits;
    for (int i = 0; i < kTables; ++i) {
      __m128i high = sixteen(entries, i), low = _mm_setzero_si128();
      if constexpr (kParts == 2) low = sixteen(entries + kSize, i);
      if constexpr (kWords) {  // base 128 to base 256: the interleaved bytes are then the int16 entry
        low = _mm_or_si128(low, _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(1)), 7));
        high = _mm_and_si128(_mm_srli_epi16(high, 1), _mm_set1_epi8(0x7f));
      }
      table_[0][i] = _mm256_broadcastsi128_si256(high);
      table_[kParts - 1][i] = _mm256_broadcastsi128_si256(kParts == 2 ? low : high);
    }
  }

  // Calls f<step>(high bytes, low bytes) for the eight steps, in any order.
  template <typename F>
  EVERYBIT_INLINE void steps(V* p, F&& f) const {
    if constexpr (kWords)
      for (int i = 0; i < kBits; ++i) p[i] = _mm256_shuffle_epi8(p[i], pair_order());
    const V nibble = bytes_of(0x0f);
    if constexpr (kBits == 1) {
      const V low = _mm256_and_si256(p[0], nibble), high = _mm256_and_si256(_mm256_srli_epi16(p[0], 4), nibble);
      emit<0, 0>(low, f), emit<1, 1>(low, f), emit<2, 2>(low, f), emit<3, 3>(low, f);
      emit<4, 0>(high, f), emit<5, 1>(high, f), emit<6, 2>(high, f), emit<7, 3>(high, f);
    } else {
      V even = p[0], odd = p[1];  // pairs of bits: steps 0 2 4 6 and 1 3 5 7
      swap_bits<1>(even, odd, bytes_of(0x55));
      if constexpr (kBits == 2) {  // an index holds two steps, and a table for each looks at its half
        V low = _mm256_and_si256(even, nibble), high = _mm256_and_si256(_mm256_srli_epi16(even, 4), nibble);
        emit<0, 0>(low, f), emit<2, 1>(low, f), emit<4, 0>(high, f), emit<6, 1>(high, f);
        low = _mm256_and_si256(odd, nibble), high = _mm256_and_si256(_mm256_srli_epi16(odd, 4), nibble);
        emit<1, 0>(low, f), emit<3, 1>(low, f), emit<5, 0>(high, f), emit<7, 1>(high, f);
      } else {
        V even2 = p[2], odd2 = p[kBits == 3 ? 2 : 3];
        if constexpr (kBits == 3) {
          odd2 = _mm256_and_si256(_mm256_srli_epi16(even2, 1), bytes_of(0x55));
          even2 = _mm256_and_si256(even2, bytes_of(0x55));
        } else {
          swap_bits<1>(even2, odd2, bytes_of(0x55));
        }
        swap_bits<2>(even, even2, bytes_of(0x33));
        both<0>(even, p, f);
        both<2>(even2, p, f);
        swap_bits<2>(odd, odd2, bytes_of(0x33));
        both<1>(odd, p, f);
        both<3>(odd2, p, f);
      }
    }
  }

 private:
  static EVERYBIT_INLINE __m128i sixteen(const std::uint8_t* entries, int table) {
    if constexpr (kBits == 1) {
      const __m128i all = _mm_set1_epi16(static_cast<short>(entries[0] | entries[1] << 8));
      const __m128i count = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m128i bit = _mm_and_si128(_mm_srli_epi16(count, table), _mm_set1_epi8(1));
      return _mm_shuffle_epi8(all, bit);
    } else if constexpr (kBits == 2) {
      int all;
      std::memcpy(&all, entries, 4);
      const __m128i fast = _mm_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
      const __m128i slow = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      return _mm_shuffle_epi8(_mm_cvtsi32_si128(all), table ? slow : fast);
    } else if constexpr (kBits == 3) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entries));  // bit 3 of an index is clear
    } else {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * table));
    }
  }

  template <int kStep, int kTable, typename F>
  EVERYBIT_INLINE void emit(V index, F&& f) const {
    f.template operator()<kStep>(_mm256_shuffle_epi8(table_[0][kTable], index),
                                 kParts == 2 ? _mm256_shuffle_epi8(table_[kParts - 1][kTable], index) : index);
  }

  // The steps s and s + 4. With three planes bits 3 and 7 are clear: nothing to mask, and what a shift brings into
  // bits 4 to 6 from the next byte does not matter.
  template <int kStep, typename F>
  EVERYBIT_INLINE void both(V indices, const V* p, F&& f) const {
    if constexpr (kBits == 3) {
      emit<kStep, 0>(indices, f);
      emit<kStep + 4, 0>(_mm256_srli_epi16(indices, 4), f);
    } else {
      const V low = _mm256_and_si256(indices, bytes_of(0x0f));
      const V high = _mm256_and_si256(_mm256_srli_epi16(indices, 4), bytes_of(0x0f));
      if constexpr (kBits == 4) {
        emit<kStep, 0>(low, f);
        emit<kStep + 4, 0>(high, f);
      } else {
        f.template operator()<kStep>(select<kStep, kBits>(0, 0, low, p),
                                     kParts == 2 ? select<kStep, kBits>(kParts - 1, 0, low, p) : low);
        f.template operator()<kStep + 4>(select<kStep + 4, kBits>(0, 0, high, p),
                                         kParts == 2 ? select<kStep + 4, kBits>(kParts - 1, 0, high, p) : high);
      }
    }
  }

  // From the 2^(kPlanes - 4) tables at `first`, chosen by planes 4 .. kPlanes-1, whose bit of this step is moved to
  // bit 7.
  template <int kStep, int kPlanes>
  EVERYBIT_INLINE V select(int part, int first, V index, const V* p) const {
    if constexpr (kPlanes == 4) {
      return _mm256_shuffle_epi8(table_[part][first], index);
    } else {
      const V clear = select<kStep, kPlanes - 1>(part, first, index, p);
      const V set = select<kStep, kPlanes - 1>(part, first + (1 << (kPlanes - 5)), index, p);
      return _mm256_blendv_epi8(clear, set, _mm256_slli_epi16(p[kPlanes - 1], 7 - kStep));
    }
  }

  V table_[kParts][kTables];
};

// The planes of one row, unit by unit.
template <int kBits>
class Reader {
 public:
  // Bytes after a row's last one are some other row's, or beyond the plane: of `rows_left` rows the last may not be
  // read on. What they hold does not matter, the activations there are zero.
  EVERYBIT_INLINE Reader(const Planes& planes, std::size_t row, std::size_t rows_left)
      : left_(rows_left * planes.row_bytes) {
    for (int p = 0; p < kBits; ++p) at_[p] = planes.plane[p] + row * planes.row_bytes;
  }
  // So many units from the row's first on can be read as they are.
  EVERYBIT_INLINE std::size_t whole_units() const { return left_ / kUnitBytes; }
  EVERYBIT_INLINE void read_whole(std::size_t unit, V* p) const {
    for (int i = 0; i < kBits; ++i) p[i] = load(at_[i] + unit * kUnitBytes);
  }
  EVERYBIT_INLINE void read(std::size_t unit, V* p) const {
    if (unit < whole_units()) return read_whole(unit, p);
    const std::size_t from = unit * kUnitBytes;
    for (int i = 0; i < kBits; ++i) {
      alignas(32) std::uint8_t copy[kUnitBytes] = {};
      if (from < left_) std::memcpy(copy, at_[i] + from, left_ - from);
      p[i] = load(copy);
    }
  }

 private:
  const std::uint8_t* at_[kBits];
  std::size_t left_;
};

EVERYBIT_INLINE float sum_of(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

EVERYBIT_INLINE void finish(const Output& out, std::size_t token, std::size_t row, float value) {
  float* at = out.data + token * out.stride + row;
  if (out.bias) value += out.bias[row];
  *at = out.add ? *at + value : value;
}

// Units of activations as the products want them: codes as they are (one part), or int16 in pairs order (two).
struct Input {
  const std::int8_t* bytes;   // of the first token
  const std::int16_t* words;  // likewise
  std::size_t byte_stride, word_stride;
  const float* scales;
  std::size_t scale_stride;
};

// Blocks [begin, end) of tokens [first, first + tokens) as int16.
void widen(const QuantizedRows& x, std::size_t first, std::size_t tokens, Range blocks, std::int16_t* to) {
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t b = blocks.begin; b < blocks.end; ++b) {
      const std::int8_t* from = x.codes + ((first + t) * x.blocks + b) * kBlock;
      for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t step = 0; step < 8; ++step, to += 32) {
          V bytes = _mm256_shuffle_epi8(load(from + 64 * step + 32 * half), pair_order());
          const V sign = _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
          _mm256_storeu_si256(reinterpret_cast<V*>(to), _mm256_unpacklo_epi8(bytes, sign));
          _mm256_storeu_si256(reinterpret_cast<V*>(to + 16), _mm256_unpackhi_epi8(bytes, sign));
        }
    }
}

Input input_of(const QuantizedRows& x, std::size_t token, Range blocks, const std::int16_t* words) {
  return {x.codes + (token * x.blocks + blocks.begin) * kBlock,
          words,
          x.blocks * kBlock,
          (blocks.end - blocks.begin) * kBlock,
          x.scales + (token * x.blocks + blocks.begin) * kGroups,
          x.blocks * kGroups};
}

// ---- few tokens: looked up and used at once ------------------------------------------------------------------------

template <int kParts, int kTokens>
constexpr bool kWordsFor = kParts == 2 && kTokens > 1;

// total += scales * dots of one unit with the planes p.
template <int kBits, int kParts, int kTokens>
EVERYBIT_INLINE void few_unit(const Row<kBits, kParts, kWordsFor<kParts, kTokens>>& table, V* p, const Input& x,
                              const std::int8_t* bytes, const std::int16_t* words, const float* scales, __m256* total) {
  V dot[kTokens];
  for (auto& d : dot) d = _mm256_setzero_si256();
  table.steps(p, [&]<int kStep>(V high, V low) __attribute__((always_inline)) {
    if constexpr (kWordsFor<kParts, kTokens>) {
      const V first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
      for (int t = 0; t < kTokens; ++t) {
        const std::int16_t* at = words + static_cast<std::size_t>(t) * x.word_stride + 32 * kStep;
        dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(first, load(at)));
        dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(second, load(at + 16)));
      }
    } else {
      for (int t = 0; t < kTokens; ++t) {
        const V codes = load(bytes + static_cast<std::size_t>(t) * x.byte_stride + 64 * kStep);
        const V pairs = _mm256_maddubs_epi16(high, codes);
        dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(kParts == 2 ? 128 : 1)));
        if constexpr (kParts == 2) {
          const V low_pairs = _mm256_maddubs_epi16(low, codes);
          dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(low_pairs, _mm256_set1_epi16(1)));
        }
      }
    }
  });
  for (int t = 0; t < kTokens; ++t)
    total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]),
                               _mm256_loadu_ps(scales + static_cast<std::size_t>(t) * x.scale_stride), total[t]);
}

// Adds scale * dot of `blocks` to out; with `sums`, the row's other terms too.
template <int kBits, int kParts, int kTokens>
void few(const Planes& planes, const Tables& tables, const Input& x, Range blocks, const float* sums, Range rows,
         const Output& out) {
  const std::size_t begin = 2 * blocks.begin, units = 2 * (blocks.end - blocks.begin);
  for (std::size_t row = rows.begin; row < rows.end; ++row) {
    const Row<kBits, kParts, kWordsFor<kParts, kTokens>> table(tables.entries + row * tables.stride);
    const Reader<kBits> reader(planes, row, rows.end - row);
    const std::size_t readable = reader.whole_units() > begin ? reader.whole_units() - begin : 0;
    const std::size_t whole = readable < units ? readable / 2 * 2 : units;
    __m256 total[kTokens];
    for (auto& t : total) t = _mm256_setzero_ps();
    const std::int8_t* bytes = x.bytes;
    const std::int16_t* words = x.words;
    const float* scales = x.scales;
    V p[kBits];
    std::size_t u = 0;
    for (; u < whole; u += 2, bytes += kBlock, words += 2 * kUnitWords, scales += kGroups) {
      reader.read_whole(begin + u, p);
      few_unit<kBits, kParts, kTokens>(table, p, x, bytes, words, scales, total);
      reader.read_whole(begin + u + 1, p);
      few_unit<kBits, kParts, kTokens>(table, p, x, bytes + 32, words + kUnitWords, scales + kUnitGroups, total);
    }
    for (; u < units; ++u, bytes += 32, words += kUnitWords, scales += kUnitGroups) {
      reader.read(begin + u, p);
      few_unit<kBits, kParts, kTokens>(table, p, x, bytes, words, scales, total);
    }
    const float scale = tables.lines[2 * row], offset = tables.lines[2 * row + 1];
    for (std::size_t t = 0; t < kTokens; ++t)
      finish(out, t, row, scale * sum_of(total[t]) + (sums ? offset * sums[t] : 0.0f));
  }
}

template <int kBits, int kParts>
void few_tokens(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
                void* scratch) {
  std::int16_t* words = static_cast<std::int16_t*>(scratch);
  if (kParts == 1 || x.tokens == 1) {
    const Range blocks{0, x.blocks};
    const Input input = input_of(x, 0, blocks, words);
    switch (x.tokens) {
      case 1:
        return few<kBits, kParts, 1>(planes, tables, input, blocks, x.sums, rows, out);
      case 2:
        return few<kBits, 1, 2>(planes, tables, input, blocks, x.sums, rows, out);
      case 3:
        return few<kBits, 1, 3>(planes, tables, input, blocks, x.sums, rows, out);
      default:
        return few<kBits, 1, 4>(planes, tables, input, blocks, x.sums, rows, out);
    }
  }
  // So many columns that their activations do not fit into scratch are taken piece by piece.
  const std::size_t most = kScratchBytes / (2 * kBlock * x.tokens);
  Output piece = out;
  for (std::size_t begin = 0; begin < x.blocks; begin += most) {
    const Range blocks{begin, x.blocks - begin < most ? x.blocks : begin + most};
    widen(x, 0, x.tokens, blocks, words);
    const Input input = input_of(x, 0, blocks, words);
    const float* sums = begin ? nullptr : x.sums;
    switch (x.tokens) {
      case 2:
        few<kBits, 2, 2>(planes, tables, input, blocks, sums, rows, piece);
        break;
      case 3:
        few<kBits, 2, 3>(planes, tables, input, blocks, sums, rows, piece);
        break;
      default:
        few<kBits, 2, 4>(planes, tables, input, blocks, sums, rows, piece);
    }
    piece.add = true;
    piece.bias = nullptr;
  }
}

// ---- many tokens: rows are expanded once ---------------------------------------------------------------------------

constexpr std::size_t kTileRows = 4,
                      kTileTokens = 2;   // more sums would fit, but g++ 12 spills them: 4 x 3 is 12 % slower
constexpr std::size_t kMostTokens = 48;  // share one expansion
constexpr std::size_t kInputBytes = kScratchBytes / 2, kRowsBytes = kScratchBytes / 4 + kScratchBytes / 8;
constexpr std::size_t kPieceUnits = 8;  // 4 rows of 2048 int16 entries: 16 KiB, half of an L1
static_assert(kTileRows * kMostTokens * 32 <= kScratchBytes / 8);
static_assert(kInputBytes / (kRowsBytes / (kTileRows * 2 * kBlock) * kBlock * 2) >= kTileTokens);

// Entries of a row as int16 (two parts) in the order of the words, or as bytes in the order of the codes.
template <int kBits, int kParts>
void expand(const Planes& planes, const Tables& tables, std::size_t row, std::size_t rows_left, Range blocks,
            void* to) {
  const Row<kBits, kParts, kParts == 2> table(tables.entries + row * tables.stride);
  const Reader<kBits> reader(planes, row, rows_left);
  for (std::size_t u = 0; u < 2 * (blocks.end - blocks.begin); ++u) {
    V p[kBits];
    reader.read(2 * blocks.begin + u, p);
    if constexpr (kParts == 2) {
      std::int16_t* words = static_cast<std::int16_t*>(to) + u * kUnitWords;
      table.steps(p, [&]<int kStep>(V high, V low) __attribute__((always_inline)) {
        V* at = reinterpret_cast<V*>(words + 32 * kStep);
        _mm256_storeu_si256(at, _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256(at + 1, _mm256_unpackhi_epi8(low, high));
      });
    } else {
      std::uint8_t* bytes = static_cast<std::uint8_t*>(to) + u / 2 * kBlock + u % 2 * 32;
      table.steps(p, [&]<int kStep>(V high, V) __attribute__((always_inline)) {
        _mm256_storeu_si256(reinterpret_cast<V*>(bytes + 64 * kStep), high);
      });
    }
  }
}

// sums[kRows][kTokens], rows `sum_stride` vectors apart, += scale * dot of `units` units.
template <int kParts, int kRows, int kTokens>
void tile(const std::uint8_t* weights, std::size_t row_stride, const Input& x, std::size_t unit, std::size_t units,
          float* sums, std::size_t sum_stride) {
  const V ones = _mm256_set1_epi16(1);
  for (std::size_t u = unit; u < unit + units; ++u) {
    V dot[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kTokens; ++m) dot[r][m] = _mm256_setzero_si256();
    if constexpr (kParts == 2) {
      const std::uint8_t* w = weights + u * kUnitWords * 2;
      const std::int16_t* a = x.words + u * kUnitWords;
#pragma GCC unroll 1
      for (int i = 0; i < 16; ++i, w += 32, a += 16)
#pragma GCC unroll 4
        for (int m = 0; m < kTokens; ++m) {
          const V step = load(a + static_cast<std::size_t>(m) * x.word_stride);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
            dot[r][m] = _mm256_add_epi32(dot[r][m],
                                         _mm256_madd_epi16(step, load(w + static_cast<std::size_t>(r) * row_stride)));
        }
    } else {
      const std::uint8_t* w = weights + u / 2 * kBlock + u % 2 * 32;
      const std::int8_t* a = x.bytes + u / 2 * kBlock + u % 2 * 32;
#pragma GCC unroll 1
      for (int i = 0; i < 8; ++i, w += 64, a += 64)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V entries = load(w + static_cast<std::size_t>(r) * row_stride);
#pragma GCC unroll 4
          for (int m = 0; m < kTokens; ++m) {
            const V pairs = _mm256_maddubs_epi16(entries, load(a + static_cast<std::size_t>(m) * x.byte_stride));
            dot[r][m] = _mm256_add_epi32(dot[r][m], _mm256_madd_epi16(pairs, ones));
          }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) {
      const __m256 scale = _mm256_loadu_ps(x.scales + static_cast<std::size_t>(m) * x.scale_stride + u * kUnitGroups);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* at = sums + (static_cast<std::size_t>(r) * sum_stride + static_cast<std::size_t>(m)) * 8;
        _mm256_store_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r][m]), scale, _mm256_load_ps(at)));
      }
    }
  }
}

template <int kParts, int kRows>
void tiles(const std::uint8_t* weights, std::size_t row_stride, Input x, std::size_t units, std::size_t tokens,
           float* sums) {
  for (std::size_t unit = 0; unit < units; unit += kPieceUnits) {
    const std::size_t count = units - unit < kPieceUnits ? units - unit : kPieceUnits;
    Input at = x;
    for (std::size_t t = 0; t < tokens;) {
      const std::size_t m = tokens - t < kTileTokens ? tokens - t : kTileTokens;
      float* to = sums + 8 * t;
      if (m == 2)
        tile<kParts, kRows, 2>(weights, row_stride, at, unit, count, to, kMostTokens);
      else
        tile<kParts, kRows, 1>(weights, row_stride, at, unit, count, to, kMostTokens);
      t += m;
      at.bytes += m * at.byte_stride;
      at.words += m * at.word_stride;
      at.scales += m * at.scale_stride;
    }
  }
}

template <int kBits, int kParts>
void many_tokens(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
                 void* scratch) {
  std::uint8_t* const weights = static_cast<std::uint8_t*>(scratch);
  std::int16_t* const words = reinterpret_cast<std::int16_t*>(weights + kRowsBytes);
  float* const sums = reinterpret_cast<float*>(weights + kRowsBytes + kInputBytes);
  // Blocks at a time: a tile of rows in kRowsBytes and a tile of tokens in kInputBytes. All of them in practice.
  const std::size_t limit = kRowsBytes / (kTileRows * kParts * kBlock);
  const std::size_t most = x.blocks < limit ? x.blocks : limit;
  std::size_t share = kMostTokens;
  if (kParts == 2 && kInputBytes / (most * kBlock * 2) < share)
    share = kInputBytes / (most * kBlock * 2) / kTileTokens * kTileTokens;  // at least one tile, as static_assert says
  const std::size_t row_stride = most * kParts * kBlock;
  for (std::size_t token = 0; token < x.tokens;) {
    // An even split: 50 tokens as 25 + 25.
    const std::size_t left = x.tokens - token, turns = (left + share - 1) / share, tokens = (left + turns - 1) / turns;
    Output piece = out;
    for (std::size_t begin = 0; begin < x.blocks; begin += most) {
      const Range blocks{begin, x.blocks - begin < most ? x.blocks : begin + most};
      const std::size_t units = 2 * (blocks.end - blocks.begin);
      if constexpr (kParts == 2) widen(x, token, tokens, blocks, words);
      const Input input = input_of(x, token, blocks, words);
      for (std::size_t row = rows.begin; row < rows.end;) {
        const std::size_t count = rows.end - row < kTileRows ? 1 : kTileRows;
        for (std::size_t r = 0; r < count; ++r)
          expand<kBits, kParts>(planes, tables, row + r, rows.end - row - r, blocks, weights + r * row_stride);
        std::memset(sums, 0, kTileRows * kMostTokens * 32);
        if (count == kTileRows)
          tiles<kParts, kTileRows>(weights, row_stride, input, units, tokens, sums);
        else
          tiles<kParts, 1>(weights, row_stride, input, units, tokens, sums);
        for (std::size_t r = 0; r < count; ++r, ++row) {
          const float scale = tables.lines[2 * row], offset = begin ? 0.0f : tables.lines[2 * row + 1];
          for (std::size_t t = 0; t < tokens; ++t) {
            const float dot = sum_of(_mm256_load_ps(sums + (r * kMostTokens + t) * 8));
            finish(piece, token + t, row, scale * dot + (begin ? 0.0f : offset * x.sums[token + t]));
          }
        }
      }
      piece.add = true;
      piece.bias = nullptr;
    }
    token += tokens;
  }
}

// ---- activations ---------------------------------------------------------------------------------------------------

// As linear_scalar.cc, to the bit. The eight numbers of vector l of a group are its steps, so four vectors of 32-bit
// codes, packed into bytes, are the group's 32-bit lane in each step.
void quantize(const float* x, std::size_t columns, std::int8_t* codes, float* scales, float* sum) {
  const V magnitude = _mm256_set1_epi32(0x7fffffff), byte = _mm256_set1_epi32(0xff);
  double total = 0;
  for (std::size_t begin = 0; begin < columns; begin += kBlock, codes += kBlock, scales += kGroups) {
    for (std::size_t g = 0; g < kGroups; ++g) {
      const std::size_t at = begin + g * kGroup, left = at < columns ? columns - at : 0;
      float copy[kGroup] = {};
      const float* from = x + at;
      if (left < kGroup) {
        if (left) std::memcpy(copy, from, left * sizeof(float));
        from = copy;
      }
      __m256 v[4];
      V most = _mm256_setzero_si256();  // magnitudes order like their bits, and NaN is above infinity
      for (int l = 0; l < 4; ++l) {
        v[l] = _mm256_loadu_ps(from + 8 * l);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[l]), magnitude));
      }
      __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
      half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
      half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
      const int bits = _mm_cvtsi128_si32(half);
      const float largest = _mm_cvtss_f32(_mm_castsi128_ps(half));
      V packed = _mm256_setzero_si256();
      float scale = 0;
      if (bits >= 0x7f800000) {
        scale = __builtin_nanf("");
        total += scale;
      } else if (largest >= 0x1p-100f) {
        scale = largest / 127;
        const __m256 inverse = _mm256_set1_ps(127 / largest);
        V q[4];
        for (int l = 0; l < 4; ++l) q[l] = _mm256_cvtps_epi32(_mm256_mul_ps(v[l], inverse));
        const V codes_sum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        half = _mm_add_epi32(_mm256_castsi256_si128(codes_sum), _mm256_extracti128_si256(codes_sum, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        total += static_cast<double>(scale) * _mm_cvtsi128_si32(half);
        packed = _mm256_or_si256(
            _mm256_or_si256(_mm256_and_si256(q[0], byte), _mm256_slli_epi32(_mm256_and_si256(q[1], byte), 8)),
            _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(q[2], byte), 16), _mm256_slli_epi32(q[3], 24)));
      }
      scales[g] = scale;
      alignas(32) std::int32_t lanes[8];
      _mm256_store_si256(reinterpret_cast<V*>(lanes), packed);
      for (std::size_t t = 0; t < 8; ++t) std::memcpy(codes + kBlockBytes * t + 4 * g, &lanes[t], 4);
    }
  }
  *sum = static_cast<float>(total);
}

template <int kBits>
void gemv(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
          void* scratch) {
  tables.parts == 2 ? few_tokens<kBits, 2>(planes, tables, x, rows, out, scratch)
                    : few_tokens<kBits, 1>(planes, tables, x, rows, out, scratch);
}

template <int kBits>
void gemm(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
          void* scratch) {
  if (x.tokens == 0) return;
  if (x.tokens <= 4)
    tables.parts == 2 ? few_tokens<kBits, 2>(planes, tables, x, rows, out, scratch)
                      : few_tokens<kBits, 1>(planes, tables, x, rows, out, scratch);
  else
    tables.parts == 2 ? many_tokens<kBits, 2>(planes, tables, x, rows, out, scratch)
                      : many_tokens<kBits, 1>(planes, tables, x, rows, out, scratch);
}

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = {
      "avx2",
      128,
      quantize,
      {nullptr, gemv<1>, gemv<2>, gemv<3>, gemv<4>, gemv<5>, gemv<6>, gemv<7>, gemv<8>},
      {nullptr, gemm<1>, gemm<2>, gemm<3>, gemm<4>, gemm<5>, gemm<6>, gemm<7>, gemm<8>},
  };
  return kernels;
}

}  // namespace everybit::engine
