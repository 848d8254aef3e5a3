// From bit-planes to the numbers of a weight, in registers: 16 rows x 256 columns a warp, as mma.m16n8k16 wants A.
//
// The layout (everybit/gpu/layout.py) puts the bits so that no lane needs another's. Lane 4g + t has, of every plane,
// two words of row g and two of row g + 8; a word is 32 columns. A 4x4 transposition of bits inside the nibbles of four
// words gives four words of eight codes each, one a nibble: nibbles 0, 2, 1, 3, 4, 6, 5, 7 are neighbouring columns.
//
// Measured on an H200: a byte permute takes as long as two logic operations, and a shared-memory lookup runs beside
// them. So up to 3 bits a code is looked up by the byte permute, four at a time, if numbers are small integers, and
// otherwise in a table in shared memory that has a column for each lane, free of bank conflicts.
#pragma once

template <int BITS>
struct Shape {
  static constexpr bool kGrid = BITS > 4;  // a number and a width for each cell of 4 bits: formats/grid.py
  static constexpr int kIndexBits = kGrid ? 4 : BITS;
};

// The upper bits of a and the lower bits of b, in the fields of `mask` and its complement, change places.
template <int SHIFT, bool FULL>  // else b is zero
__device__ __forceinline__ void swap_bits(u32 mask, u32 a, u32 b, u32& low, u32& high) {
  if constexpr (FULL) {
    low = select(mask, a, b << SHIFT), high = select(mask, a >> SHIFT, b);
  } else {
    low = a & mask, high = (a >> SHIFT) & mask;
  }
}

// Words of a plane each, most significant plane first, to four words of eight nibbles.
template <int BITS>
__device__ __forceinline__ void to_nibbles(const u32* planes, u32 (&v)[4]) {
  u32 r[4], a[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) r[p] = p < BITS ? planes[p < BITS ? BITS - 1 - p : 0] : 0;
  swap_bits<2, (BITS > 2)>(0x33333333u, r[0], r[2], a[0], a[2]);
  swap_bits<2, (BITS > 3)>(0x33333333u, r[1], r[3], a[1], a[3]);
  swap_bits<1, (BITS > 1)>(0x55555555u, a[0], a[1], v[0], v[1]);
  swap_bits<1, (BITS > 1)>(0x55555555u, a[2], a[3], v[2], v[3]);
}

// The codes of 128 columns' share of a lane in a row, eight a word. Above 4 bits `residual` has the bits that follow
// the index, those of pair m of columns in nibbles m and m + 4, so that one mask makes a pair of them; at 5 bits the
// plane.
template <int BITS>
struct Codes {
  u32 index[4], residual[4];
  // Of half q of a tile, rows g + 8h.
  __device__ __forceinline__ void open(const Vec4 (&tile)[BITS], int q, int h) {
    u32 words[BITS];
#pragma unroll
    for (int p = 0; p < BITS; ++p)
      words[p] = h == 0 ? (q == 0 ? tile[p].x : tile[p].y) : (q == 0 ? tile[p].z : tile[p].w);
    to_nibbles<Shape<BITS>::kIndexBits>(words, index);
    if constexpr (BITS > 5) to_nibbles<BITS - 4>(words + 4, residual);
    if constexpr (BITS == 5) residual[0] = words[4];
  }
};

// 2r + 1 - n of the two residuals in nibbles m and m + 4, exact: near 1024 (BF16: 128) the low bits of a number are
// ones.
__device__ __forceinline__ u32 odd_pair(F16, u32 residual, int m, u32 points) {
  const u32 word = m < 2 ? residual << 1 : residual >> 7, mask = ((points - 1) << 1) * 0x00010001u;
  if (m % 2 == 0) return F16::sub(and_or(word, mask, F16::magic_plus(1)), F16::magic_plus(points));
  return F16::fma(and_or(word, mask << 4, F16::magic_plus(16)), F16::pair(1.f / 16), F16::pair(-64.f - float(points)));
}
__device__ __forceinline__ u32 odd_pair(BF16, u32 residual, int m, u32 points) {
  const u32 word = m == 0 ? residual << 1 : residual >> (4 * m - 1), mask = ((points - 1) << 1) * 0x00010001u;
  return BF16::sub(and_or(word, mask, BF16::magic_plus(1)), BF16::magic_plus(points));
}

// What turns codes into numbers for the 16 rows of one row tile. BYTES: integers of -127 ... 127 + 128, F16, up to 3
// bits.
template <class T, int BITS, bool BYTES>
struct Book {
  static constexpr int kShared = 16 * 2 * 32 * 2 * 4;  // bytes: [row g, g + 8][16 entries][even, odd][32 lanes]
  static constexpr int kRow = 16;                      // u32 in global memory: a number | its width << 16

  u32 base;

  // `memory` begins at a multiple of 4,096.
  __device__ __forceinline__ void open(const u8* memory) { base = shared_address(memory) + threadIdx.x % 32 * 4; }

  // COUNT warps share the work of one table: entries are loaded early and stored when the table is free.
  template <int COUNT>
  static __device__ __forceinline__ void fetch(const u32* tables, int row_tile, int warp, u32 (&held)[32 / COUNT]) {
    const u32* from = tables + (size_t(row_tile) * 16 + threadIdx.x % 32 / 4) * kRow;
#pragma unroll
    for (int s = 0; s < 32 / COUNT; ++s) {
      const int at = warp + s * COUNT;  // 16h + entry
      held[s] = from[at / 16 * 8 * kRow + at % 16];
    }
  }
  template <int COUNT>
  static __device__ __forceinline__ void store(u8* memory, int warp, const u32 (&held)[32 / COUNT]) {
    u32* to = reinterpret_cast<u32*>(memory) + warp * 64 + threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < 32 / COUNT; ++s) {
      to[s * COUNT * 64] = held[s], to[s * COUNT * 64 + 32] = held[s] << 16 | held[s] >> 16;
    }
  }

  // Four numbers of row g + 8H: of word i the nibbles of `half`. Two steps, as a lookup takes a while.
  struct Found {
    u32 even[2], odd[2];
  };
  template <int H>
  __device__ __forceinline__ Found look(const Codes<BITS>& codes, int i, int half) const {
    const u32 v = half ? upper_half(codes.index[i]) : codes.index[i];
    return {{entry<H, 0>(v << 8), entry<H, 0>(v << 4)}, {entry<H, 1>(v), entry<H, 1>(v >> 4)}};
  }
  static __device__ __forceinline__ void finish(const Found& found, const Codes<BITS>& codes, int i, int half, u32& a,
                                                u32& b) {
    u32 out[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int m = 2 * half + p;
      out[p] = select(0xffffu, found.even[p], found.odd[p]);
      if constexpr (Shape<BITS>::kGrid) {
        const u32 width = funnel(found.even[p], found.odd[p]);
        if constexpr (BITS == 5) {  // 2r - 1 is a sign
          out[p] = T::sub(out[p], flip(width, codes.residual[0] << (15 - 4 * m - i), 0x80008000u));
        } else {
          out[p] = T::fma(odd_pair(T{}, codes.residual[i], m, 1u << (BITS - 4)), width, out[p]);
        }
      }
    }
    a = out[0], b = out[1];
  }

  // The entry of bits 8 ... 11.
  template <int H, int ODD>
  __device__ __forceinline__ u32 entry(u32 v) const {
    return load_shared<H * 4096 + ODD * 128>((v & 0xf00u) | base);
  }
};

template <int BITS>
struct Book<F16, BITS, true> {
  static constexpr int kShared = 0;
  static constexpr int kRow = BITS == 3 ? 2 : 1;  // u32 in global memory
  static_assert(BITS <= 3, "eight bytes are two registers");

  u32 table[2][kRow];

  __device__ __forceinline__ void open(const u32* tables, int row_tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < kRow; ++i)
        table[h][i] = tables[(size_t(row_tile) * 16 + threadIdx.x % 32 / 4 + 8 * h) * kRow + i];
    }
  }

  struct Found {
    u32 bytes;
  };
  template <int H>
  __device__ __forceinline__ Found look(const Codes<BITS>& codes, int i, int half) const {
    return {permute(table[H][0], table[H][kRow - 1], half ? codes.index[i] >> 16 : codes.index[i])};
  }
  static __device__ __forceinline__ void finish(const Found& found, const Codes<BITS>&, int, int, u32& a, u32& b) {
    a = F16::sub(and_or(found.bytes, 0x00ff00ffu, 0x64006400u), F16::magic_plus(128));
    b = F16::sub(and_or(found.bytes >> 8, 0x00ff00ffu, 0x64006400u), F16::magic_plus(128));
  }
};

// A's fragment of 16 columns, slice s of a tile: word s / 2 % 4 of half s / 8, and of that the nibbles of half s % 2.
template <class B, int BITS>
struct Slice {
  typename B::Found upper, lower;
  __device__ __forceinline__ void look(const B& book, const Codes<BITS> (&codes)[2], int s) {
    upper = book.template look<0>(codes[0], s / 2 % 4, s % 2);
    lower = book.template look<1>(codes[1], s / 2 % 4, s % 2);
  }
  __device__ __forceinline__ void finish(const Codes<BITS> (&codes)[2], int s, u32 (&out)[4]) const {
    B::finish(upper, codes[0], s / 2 % 4, s % 2, out[0], out[2]);
    B::finish(lower, codes[1], s / 2 % 4, s % 2, out[1], out[3]);
  }
};

struct Weight {
  const Vec4* planes;   // [B][row tiles][column tiles][32 lanes]
  const u32* tables;    // [row tiles * 16][Book::kRow] of one precision
  const float* scales;  // [row tiles * 16]
  int rows, row_tiles, column_tiles;

  __device__ __forceinline__ size_t plane() const { return size_t(row_tiles) * column_tiles * 32; }
  __device__ __forceinline__ const Vec4* tile(int row_tile, int column_tile) const {
    return planes + (size_t(row_tile) * column_tiles + column_tile) * 32 + threadIdx.x % 32;
  }
};
