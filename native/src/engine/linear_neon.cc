// Quantized linear layers for Armv8.2 with the dot product instructions. Layout and terms: linear.h.
//
// A *unit* is a quarter of a block: 128 weights, 16 bytes of each plane, four groups. Bit-selects merge planes into
// four vectors, each with the indices of steps s and s + 4 in the low and high half of its bytes. TBL looks up 16 to 64
// entries, TBX the next 64.
//
// SDOT multiplies signed bytes and exists on every such processor, while a product of unsigned and signed bytes (USDOT)
// needs the later I8MM. Tables therefore have base 128: entries of 7 bits are signed bytes as they are. The
// alternative, entries less 128 with the difference put into the offset, would have 16 bits, but subtract two large
// numbers. All sums of a group are exact: 32 * (128 * 127 + 127) * 127 < 2^27.
#include <arm_neon.h>

#include <cstring>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

using V = uint8x16_t;

#define EVERYBIT_INLINE inline __attribute__((always_inline))

constexpr std::size_t kUnitBytes = 16;  // of a plane
constexpr std::size_t kUnits = kBlockBytes / kUnitBytes;
constexpr std::size_t kUnitGroups = kGroups / kUnits;

template <int kLeft>
EVERYBIT_INLINE V shift(V x) {
  if constexpr (kLeft > 0) return vshlq_n_u8(x, kLeft);
  if constexpr (kLeft < 0) return vshrq_n_u8(x, -kLeft);
  return x;
}

// Bits of `mask` from a, the others from b.
EVERYBIT_INLINE V select_bits(int mask, V a, V b) {
  return vbslq_u8(vdupq_n_u8(static_cast<std::uint8_t>(mask)), a, b);
}

// Exchanges the bits of a at mask << kShift with the bits of b at mask; the two cover a byte.
template <int kShift>
EVERYBIT_INLINE void swap_bits(V& a, V& b, int mask) {
  const V first = select_bits(mask, a, shift<kShift>(b));
  b = select_bits(mask, shift<-kShift>(a), b);
  a = first;
}

// The tables of a row, and the lookups of a unit.
template <int kBits, int kParts>
class Row {
 public:
  static constexpr int kTables = kBits == 1 ? 4 : kBits == 2 ? 2 : kBits <= 4 ? 1 : 1 << (kBits - 4);

  EVERYBIT_INLINE explicit Row(const std::uint8_t* entries) {
    for (int part = 0; part < kParts; ++part)
      for (int i = 0; i < kTables; ++i) table_[part][i] = sixteen(entries + (part << kBits), i);
  }

  // Calls f<step>(high entries, low entries) for the eight steps, in any order.
  template <typename F>
  EVERYBIT_INLINE void steps(const V* p, F&& f) const {
    const V nibble = vdupq_n_u8(0x0f);
    if constexpr (kBits == 1) {
      const V low = vandq_u8(p[0], nibble), high = vshrq_n_u8(p[0], 4);
      emit<0, 0>(low, p, f), emit<1, 1>(low, p, f), emit<2, 2>(low, p, f), emit<3, 3>(low, p, f);
      emit<4, 0>(high, p, f), emit<5, 1>(high, p, f), emit<6, 2>(high, p, f), emit<7, 3>(high, p, f);
    } else {
      V even = p[0], odd = p[1];  // pairs of bits: steps 0 2 4 6 and 1 3 5 7
      swap_bits<1>(even, odd, 0x55);
      if constexpr (kBits == 2) {  // an index holds two steps, and a table for each looks at its half
        V low = vandq_u8(even, nibble), high = vshrq_n_u8(even, 4);
        emit<0, 0>(low, p, f), emit<2, 1>(low, p, f), emit<4, 0>(high, p, f), emit<6, 1>(high, p, f);
        low = vandq_u8(odd, nibble), high = vshrq_n_u8(odd, 4);
        emit<1, 0>(low, p, f), emit<3, 1>(low, p, f), emit<5, 0>(high, p, f), emit<7, 1>(high, p, f);
      } else {
        V even2 = p[2], odd2 = p[kBits == 3 ? 2 : 3];
        if constexpr (kBits == 3)
          odd2 = vshrq_n_u8(odd2, 1);  // bit 3 of an index is then some other step's: the table is there twice
        else
          swap_bits<1>(even2, odd2, 0x55);
        swap_bits<2>(even, even2, 0x33);
        swap_bits<2>(odd, odd2, 0x33);
        emit<0, 0>(vandq_u8(even, nibble), p, f), emit<4, 0>(vshrq_n_u8(even, 4), p, f);
        emit<2, 0>(vandq_u8(even2, nibble), p, f), emit<6, 0>(vshrq_n_u8(even2, 4), p, f);
        emit<1, 0>(vandq_u8(odd, nibble), p, f), emit<5, 0>(vshrq_n_u8(odd, 4), p, f);
        emit<3, 0>(vandq_u8(odd2, nibble), p, f), emit<7, 0>(vshrq_n_u8(odd2, 4), p, f);
      }
    }
  }

 private:
  static EVERYBIT_INLINE V sixteen(const std::uint8_t* entries, int table) {
    if constexpr (kBits <= 2) {
      std::uint8_t places[16];
      for (int i = 0; i < 16; ++i) places[i] = entries[(i >> (kBits * table)) & ((1 << kBits) - 1)];
      return vld1q_u8(places);
    } else if constexpr (kBits == 3) {
      const uint8x8_t eight = vld1_u8(entries);
      return vcombine_u8(eight, eight);
    } else {
      return vld1q_u8(entries + 16 * table);
    }
  }

  template <int kStep, int kTable, typename F>
  EVERYBIT_INLINE void emit(V index, const V* p, F&& f) const {
    // Plane q's bit of this step goes to bit q.
    if constexpr (kBits > 4) index = select_bits(1 << 4, shift<4 - kStep>(p[4]), index);
    if constexpr (kBits > 5) index = select_bits(1 << 5, shift<5 - kStep>(p[kBits > 5 ? 5 : 0]), index);
    if constexpr (kBits > 6) index = select_bits(1 << 6, shift<6 - kStep>(p[kBits > 6 ? 6 : 0]), index);
    if constexpr (kBits > 7) index = select_bits(1 << 7, shift<7 - kStep>(p[kBits > 7 ? 7 : 0]), index);
    const int8x16_t high = vreinterpretq_s8_u8(look_up<kTable>(table_[0], index));
    f.template operator()<kStep>(high,
                                 kParts == 2 ? vreinterpretq_s8_u8(look_up<kTable>(table_[kParts - 1], index)) : high);
  }

  template <int kTable>
  static EVERYBIT_INLINE V look_up(const V* table, V index) {
    if constexpr (kBits <= 4) {
      return vqtbl1q_u8(table[kTable], index);
    } else if constexpr (kBits == 5) {
      return vqtbl2q_u8(uint8x16x2_t{{table[0], table[1]}}, index);
    } else {
      V found = vqtbl4q_u8(four(table), index);  // 0 beyond 63, and TBX then leaves what it has
      if constexpr (kBits >= 7) found = vqtbx4q_u8(found, four(table + 4), vsubq_u8(index, vdupq_n_u8(64)));
      if constexpr (kBits == 8) {
        found = vqtbx4q_u8(found, four(table + 8), vsubq_u8(index, vdupq_n_u8(128)));
        found = vqtbx4q_u8(found, four(table + 12), vsubq_u8(index, vdupq_n_u8(192)));
      }
      return found;
    }
  }
  static EVERYBIT_INLINE uint8x16x4_t four(const V* table) { return {{table[0], table[1], table[2], table[3]}}; }

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
  EVERYBIT_INLINE void read(std::size_t unit, V* p) const {
    const std::size_t from = unit * kUnitBytes;
    if (__builtin_expect(from + kUnitBytes <= left_, 1)) {
      for (int i = 0; i < kBits; ++i) p[i] = vld1q_u8(at_[i] + from);
    } else {
      for (int i = 0; i < kBits; ++i) {
        std::uint8_t copy[kUnitBytes] = {};
        if (from < left_) std::memcpy(copy, at_[i] + from, left_ - from);
        p[i] = vld1q_u8(copy);
      }
    }
  }

 private:
  const std::uint8_t* at_[kBits];
  std::size_t left_;
};

EVERYBIT_INLINE void finish(const Output& out, std::size_t token, std::size_t row, float value) {
  float* at = out.data + token * out.stride + row;
  if (out.bias) value += out.bias[row];
  *at = out.add ? *at + value : value;
}

// ---- few tokens: looked up and used at once ------------------------------------------------------------------------

template <int kBits, int kParts, int kTokens>
void few(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out) {
  for (std::size_t row = rows.begin; row < rows.end; ++row) {
    const Row<kBits, kParts> table(tables.entries + row * tables.stride);
    const Reader<kBits> reader(planes, row, rows.end - row);
    float32x4_t total[kTokens];
    for (auto& t : total) t = vdupq_n_f32(0);
    for (std::size_t unit = 0; unit < kUnits * x.blocks; ++unit) {
      V p[kBits];
      reader.read(unit, p);
      int32x4_t high_dot[kTokens], low_dot[kTokens];
      for (auto& d : high_dot) d = vdupq_n_s32(0);
      for (auto& d : low_dot) d = vdupq_n_s32(0);
      const std::int8_t* codes = x.codes + unit / kUnits * kBlock + unit % kUnits * kUnitBytes;
      table.steps(p, [&]<int kStep>(int8x16_t high, int8x16_t low) __attribute__((always_inline)) {
        for (std::size_t t = 0; t < kTokens; ++t) {
          const int8x16_t step = vld1q_s8(codes + t * x.blocks * kBlock + kBlockBytes * kStep);
          high_dot[t] = vdotq_s32(high_dot[t], high, step);
          if constexpr (kParts == 2) low_dot[t] = vdotq_s32(low_dot[t], low, step);
        }
      });
      for (std::size_t t = 0; t < kTokens; ++t) {
        const int32x4_t dot = kParts == 2 ? vaddq_s32(vshlq_n_s32(high_dot[t], 7), low_dot[t]) : high_dot[t];
        const float32x4_t scale = vld1q_f32(x.scales + t * x.blocks * kGroups + unit * kUnitGroups);
        total[t] = vfmaq_f32(total[t], vcvtq_f32_s32(dot), scale);
      }
    }
    const float scale = tables.lines[2 * row], offset = tables.lines[2 * row + 1];
    for (std::size_t t = 0; t < kTokens; ++t) finish(out, t, row, scale * vaddvq_f32(total[t]) + offset * x.sums[t]);
  }
}

// ---- many tokens: rows are expanded once ---------------------------------------------------------------------------

constexpr std::size_t kTileRows = 4, kTileTokens = 4;  // 16 sums, 4 vectors of entries, one of activations
constexpr std::size_t kMostTokens = 64;                // share one expansion
constexpr std::size_t kSumsBytes = kTileRows * kMostTokens * 16;
constexpr std::size_t kPieceBlocks = 4;  // 4 rows of 2048 weights: 16 KiB with two parts

// Entries of a row, in the order of the codes: [blocks][kParts][512].
template <int kBits, int kParts>
void expand(const Planes& planes, const Tables& tables, std::size_t row, std::size_t rows_left, Range blocks,
            std::int8_t* to) {
  const Row<kBits, kParts> table(tables.entries + row * tables.stride);
  const Reader<kBits> reader(planes, row, rows_left);
  for (std::size_t unit = kUnits * blocks.begin; unit < kUnits * blocks.end; ++unit) {
    V p[kBits];
    reader.read(unit, p);
    std::int8_t* at = to + (unit / kUnits - blocks.begin) * kParts * kBlock + unit % kUnits * kUnitBytes;
    table.steps(p, [&]<int kStep>(int8x16_t high, int8x16_t low) __attribute__((always_inline)) {
      vst1q_s8(at + kBlockBytes * kStep, high);
      if constexpr (kParts == 2) vst1q_s8(at + kBlock + kBlockBytes * kStep, low);
    });
  }
}

// sums[kRows][kTokens], rows kMostTokens vectors apart, += scale * dot of `blocks`. `weights` begin at block `begin` of
// x.
template <int kParts, int kRows, int kTokens>
void tile(const std::int8_t* weights, std::size_t row_stride, const QuantizedRows& x, std::size_t token,
          std::size_t begin, Range blocks, float* sums) {
  for (std::size_t b = blocks.begin; b < blocks.end; ++b)
    for (std::size_t u = 0; u < kUnits; ++u) {
      int32x4_t dot[kRows][kTokens];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < kTokens; ++m) dot[r][m] = vdupq_n_s32(0);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        if (part == 1)
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int m = 0; m < kTokens; ++m) dot[r][m] = vshlq_n_s32(dot[r][m], 7);
        const std::int8_t* w = weights + (b * kParts + static_cast<std::size_t>(part)) * kBlock + u * kUnitBytes;
        const std::int8_t* a = x.codes + (token * x.blocks + begin + b) * kBlock + u * kUnitBytes;
#pragma GCC unroll 1
        for (int t = 0; t < 8; ++t, w += kBlockBytes, a += kBlockBytes) {
          int8x16_t entries[kRows];
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) entries[r] = vld1q_s8(w + static_cast<std::size_t>(r) * row_stride);
#pragma GCC unroll 4
          for (int m = 0; m < kTokens; ++m) {
            const int8x16_t step = vld1q_s8(a + static_cast<std::size_t>(m) * x.blocks * kBlock);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) dot[r][m] = vdotq_s32(dot[r][m], entries[r], step);
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < kTokens; ++m) {
        const std::size_t group = ((token + static_cast<std::size_t>(m)) * x.blocks + begin + b) * kGroups;
        const float32x4_t scale = vld1q_f32(x.scales + group + u * kUnitGroups);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          float* at = sums + (static_cast<std::size_t>(r) * kMostTokens + static_cast<std::size_t>(m)) * 4;
          vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(dot[r][m]), scale));
        }
      }
    }
}

template <int kParts, int kRows>
void tiles(const std::int8_t* weights, std::size_t row_stride, const QuantizedRows& x, std::size_t first,
           std::size_t tokens, Range blocks, float* sums) {
  const std::size_t count = blocks.end - blocks.begin;
  for (std::size_t b = 0; b < count; b += kPieceBlocks) {
    const Range piece{b, count - b < kPieceBlocks ? count : b + kPieceBlocks};
    for (std::size_t t = 0; t < tokens;) {
      std::size_t m = tokens - t;
      if (m > kTileTokens) m = m < 2 * kTileTokens ? (m + 1) / 2 : kTileTokens;
      float* to = sums + 4 * t;
      switch (m) {
        case 4:
          tile<kParts, kRows, 4>(weights, row_stride, x, first + t, blocks.begin, piece, to);
          break;
        case 3:
          tile<kParts, kRows, 3>(weights, row_stride, x, first + t, blocks.begin, piece, to);
          break;
        case 2:
          tile<kParts, kRows, 2>(weights, row_stride, x, first + t, blocks.begin, piece, to);
          break;
        default:
          tile<kParts, kRows, 1>(weights, row_stride, x, first + t, blocks.begin, piece, to);
      }
      t += m;
    }
  }
}

template <int kBits, int kParts>
void many(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
          void* scratch) {
  float* const sums = static_cast<float*>(scratch);
  std::int8_t* const weights = static_cast<std::int8_t*>(scratch) + kSumsBytes;
  // Blocks at a time: as many as fit into scratch. All of them in practice.
  const std::size_t limit = (kScratchBytes - kSumsBytes) / (kTileRows * kParts * kBlock);
  const std::size_t most = x.blocks < limit ? x.blocks : limit, row_stride = most * kParts * kBlock;
  for (std::size_t token = 0; token < x.tokens;) {
    // An even split: 66 tokens as 33 + 33.
    const std::size_t left = x.tokens - token, turns = (left + kMostTokens - 1) / kMostTokens;
    const std::size_t tokens = (left + turns - 1) / turns;
    Output piece = out;
    for (std::size_t begin = 0; begin < x.blocks; begin += most) {
      const Range blocks{begin, x.blocks - begin < most ? x.blocks : begin + most};
      for (std::size_t row = rows.begin; row < rows.end;) {
        const std::size_t count = rows.end - row < kTileRows ? 1 : kTileRows;
        for (std::size_t r = 0; r < count; ++r)
          expand<kBits, kParts>(planes, tables, row + r, rows.end - row - r, blocks, weights + r * row_stride);
        std::memset(sums, 0, kSumsBytes);
        if (count == kTileRows)
          tiles<kParts, kTileRows>(weights, row_stride, x, token, tokens, blocks, sums);
        else
          tiles<kParts, 1>(weights, row_stride, x, token, tokens, blocks, sums);
        for (std::size_t r = 0; r < count; ++r, ++row) {
          const float scale = tables.lines[2 * row], offset = tables.lines[2 * row + 1];
          for (std::size_t t = 0; t < tokens; ++t) {
            const float dot = vaddvq_f32(vld1q_f32(sums + (r * kMostTokens + t) * 4));
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

// As linear_scalar.cc, to the bit. Of the eight vectors of a group, those of one parity hold the same four steps:
// packed into bytes they are the group's 32-bit lane in each.
void quantize(const float* x, std::size_t columns, std::int8_t* codes, float* scales, float* sum) {
  const uint32x4_t byte = vdupq_n_u32(0xff);
  double total = 0;
  for (std::size_t begin = 0; begin < columns; begin += kBlock, codes += kBlock, scales += kGroups) {
    for (std::size_t g = 0; g < kGroups; ++g) {
      const std::size_t at = begin + g * kGroup, left = at < columns ? columns - at : 0;
      float copy[kGroup] = {};
      const float* from = copy;
      if (left >= kGroup)
        from = x + at;
      else if (left)
        std::memcpy(copy, x + at, left * sizeof(float));
      float32x4_t v[8];
      uint32x4_t most = vdupq_n_u32(0);  // magnitudes order like their bits, and NaN is above infinity
      for (int i = 0; i < 8; ++i) {
        v[i] = vld1q_f32(from + 4 * i);
        most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(v[i]), vdupq_n_u32(0x7fffffff)));
      }
      const std::uint32_t bits = vmaxvq_u32(most);
      float largest;
      std::memcpy(&largest, &bits, 4);
      std::uint32_t lanes[8] = {};
      float scale = 0;
      if (bits >= 0x7f800000) {
        scale = __builtin_nanf("");
        total += scale;
      } else if (largest >= 0x1p-100f) {
        scale = largest / 127;
        const float inverse = 127 / largest;
        int32x4_t q[8], codes_sum = vdupq_n_s32(0);
        for (int i = 0; i < 8; ++i) {
          q[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
          codes_sum = vaddq_s32(codes_sum, q[i]);
        }
        total += static_cast<double>(scale) * vaddvq_s32(codes_sum);
        for (int half = 0; half < 2; ++half) {
          uint32x4_t packed = vshlq_n_u32(vreinterpretq_u32_s32(q[6 + half]), 24);
          packed = vorrq_u32(packed, vshlq_n_u32(vandq_u32(vreinterpretq_u32_s32(q[4 + half]), byte), 16));
          packed = vorrq_u32(packed, vshlq_n_u32(vandq_u32(vreinterpretq_u32_s32(q[2 + half]), byte), 8));
          packed = vorrq_u32(packed, vandq_u32(vreinterpretq_u32_s32(q[half]), byte));
          vst1q_u32(lanes + 4 * half, packed);
        }
      }
      scales[g] = scale;
      for (std::size_t t = 0; t < 8; ++t) std::memcpy(codes + kBlockBytes * t + 4 * g, &lanes[t], 4);
    }
  }
  *sum = static_cast<float>(total);
}

template <int kBits>
void gemv(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out, void*) {
  tables.parts == 2 ? few<kBits, 2, 1>(planes, tables, x, rows, out) : few<kBits, 1, 1>(planes, tables, x, rows, out);
}

template <int kBits, int kParts>
void gemm_of(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
             void* scratch) {
  switch (x.tokens) {
    case 0:
      return;
    case 1:
      return few<kBits, kParts, 1>(planes, tables, x, rows, out);
    case 2:
      return few<kBits, kParts, 2>(planes, tables, x, rows, out);
    case 3:
      return few<kBits, kParts, 3>(planes, tables, x, rows, out);
    case 4:
      return few<kBits, kParts, 4>(planes, tables, x, rows, out);
    default:
      return many<kBits, kParts>(planes, tables, x, rows, out, scratch);
  }
}

template <int kBits>
void gemm(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
          void* scratch) {
  tables.parts == 2 ? gemm_of<kBits, 2>(planes, tables, x, rows, out, scratch)
                    : gemm_of<kBits, 1>(planes, tables, x, rows, out, scratch);
}

}  // namespace

const Kernels& neon_kernels() {
  static constexpr Kernels kernels = {
      "neon",
      128,
      quantize,
      {nullptr, gemv<1>, gemv<2>, gemv<3>, gemv<4>, gemv<5>, gemv<6>, gemv<7>, gemv<8>},
      {nullptr, gemm<1>, gemm<2>, gemm<3>, gemm<4>, gemm<5>, gemm<6>, gemm<7>, gemm<8>},
  };
  return kernels;
}

}  // namespace everybit::engine
