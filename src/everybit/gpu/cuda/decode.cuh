// From bit-planes to the numbers of a weight, in registers: 16 rows x 256 columns a warp, as mma.m16n8k16 wants A.
//
// The layout (everybit/gpu/layout.py) puts the bits so that no lane needs another's. Lane 4g + t has, of every plane,
// two words of row g and two of row g + 8; a word is 32 columns: bit 4j + i is column 32i + 8t + j of its 128. A 4x4
// transposition of bits inside the nibbles of four words gives four words of eight codes each, one a nibble, and a code
// is then looked up four at a time: the byte permute instruction is a table of eight bytes.
#pragma once

template <int BITS>
struct Shape {
  static constexpr bool kGrid = BITS > 4;  // 16 centres, 16 ladders and a step: formats/grid.py
  static constexpr int kIndexBits = kGrid ? 4 : BITS;
  static constexpr int kWords = kIndexBits <= 2 ? 1 : kIndexBits == 3 ? 2 : 4;  // of a byte table
};

template <int WORDS>
__device__ __forceinline__ void load_words(const u8* at, u32 (&to)[WORDS]) {
  if constexpr (WORDS == 4) {
    const Vec4 v = load_cached(reinterpret_cast<const Vec4*>(at));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) to[i] = reinterpret_cast<const u32*>(at)[i];
  }
}

// How eight nibbles choose from byte tables: `index` into eight bytes, `half` between the two eights of sixteen.
template <int INDEX_BITS>
struct Choice {
  u32 index, half;
  __device__ __forceinline__ explicit Choice(u32 nibbles) : index(nibbles), half(0) {
    if constexpr (INDEX_BITS == 4) {
      index = nibbles & 0x77777777u;
      half = ((nibbles >> 1) & 0x44444444u) | 0x32103210u;
    }
  }
  __device__ __forceinline__ void upper() { index >>= 16, half >>= 16; }

  template <int WORDS>
  __device__ __forceinline__ u32 bytes(const u32 (&table)[WORDS]) const {
    if constexpr (WORDS == 1) return permute(table[0], table[0], index);
    if constexpr (WORDS == 2) return permute(table[0], table[1], index);
    if constexpr (WORDS == 4) return permute(permute(table[0], table[1], index), permute(table[2], table[3], index), half);
  }
};

// One row's numbers, of 16 bits each: a table of their low bytes and a table of their high bytes.
template <class T, int BITS, bool INT8>
struct RowTables {
  static constexpr int kWords = Shape<BITS>::kWords;
  static constexpr int kBytes = (Shape<BITS>::kGrid ? 4 : 2) * 4 * kWords;  // a row
  u32 high[kWords], low[kWords], ladder_high[Shape<BITS>::kGrid ? 4 : 1], ladder_low[Shape<BITS>::kGrid ? 4 : 1];

  __device__ __forceinline__ void load(const u8* row) {
    load_words(row, high);
    load_words(row + 4 * kWords, low);
    if constexpr (Shape<BITS>::kGrid) {
      load_words(row + 32, ladder_high);
      load_words(row + 48, ladder_low);
    }
  }
  template <class C>
  __device__ __forceinline__ void numbers(const C& choice, u32 (&pair)[2]) const {
    join(choice.bytes(high), choice.bytes(low), pair);
  }
  template <class C>
  __device__ __forceinline__ void ladders(const C& choice, u32 (&pair)[2]) const {
    join(choice.bytes(ladder_high), choice.bytes(ladder_low), pair);
  }
  static __device__ __forceinline__ void join(u32 high, u32 low, u32 (&pair)[2]) {
    pair[0] = permute(low, high, 0x5140), pair[1] = permute(low, high, 0x7362);
  }
};

// The same where all numbers are integers of -127 ... 127, stored + 128, and the type is F16: one byte table does, as
// 0x64nn is 1024 + nn; and the low byte of a ladder of 1 ... 8 is zero.
template <int BITS>
struct RowTables<F16, BITS, true> {
  static constexpr int kWords = Shape<BITS>::kWords;
  static constexpr int kBytes = (Shape<BITS>::kGrid ? 2 : 1) * 4 * kWords;
  u32 table[kWords], ladder[Shape<BITS>::kGrid ? 4 : 1];

  __device__ __forceinline__ void load(const u8* row) {
    load_words(row, table);
    if constexpr (Shape<BITS>::kGrid) load_words(row + 16, ladder);
  }
  template <class C>
  __device__ __forceinline__ void numbers(const C& choice, u32 (&pair)[2]) const {
    const u32 bytes = choice.bytes(table);
    pair[0] = F16::sub(permute(bytes, 0x64646464u, 0x4140), F16::magic_plus(128));
    pair[1] = F16::sub(permute(bytes, 0x64646464u, 0x4342), F16::magic_plus(128));
  }
  template <class C>
  __device__ __forceinline__ void ladders(const C& choice, u32 (&pair)[2]) const {
    const u32 bytes = choice.bytes(ladder);
    pair[0] = permute(bytes, 0, 0x1404), pair[1] = permute(bytes, 0, 0x3424);
  }
};

// Words of a plane each, most significant plane first, to four words of eight nibbles.
template <int BITS>
__device__ __forceinline__ void to_nibbles(const u32* planes, u32 (&v)[4]) {
  u32 r[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) r[p] = p < BITS ? planes[p < BITS ? BITS - 1 - p : 0] : 0;
  const u32 a0 = (r[0] & 0x33333333u) | ((r[2] << 2) & 0xccccccccu), a2 = ((r[0] >> 2) & 0x33333333u) | (r[2] & 0xccccccccu);
  const u32 a1 = (r[1] & 0x33333333u) | ((r[3] << 2) & 0xccccccccu), a3 = ((r[1] >> 2) & 0x33333333u) | (r[3] & 0xccccccccu);
  v[0] = (a0 & 0x55555555u) | ((a1 << 1) & 0xaaaaaaaau), v[1] = ((a0 >> 1) & 0x55555555u) | (a1 & 0xaaaaaaaau);
  v[2] = (a2 & 0x55555555u) | ((a3 << 1) & 0xaaaaaaaau), v[3] = ((a2 >> 1) & 0x55555555u) | (a3 & 0xaaaaaaaau);
}

// Eight codes of a row, by nibble: their index and, above 4 bits, their residual. Residual nibbles lie in another order,
// those of pair m in nibbles m and m + 4, so that one mask makes a pair of them.
template <int BITS>
struct Codes {
  u32 index[4], residual[4];
  __device__ __forceinline__ explicit Codes(const u32 (&words)[BITS]) {
    to_nibbles<Shape<BITS>::kIndexBits>(words, index);
    if constexpr (BITS > 5) to_nibbles<BITS - 4>(words + 4, residual);
    if constexpr (BITS == 5) residual[0] = words[4];
  }
};

// 2r + 1 - n of the two residuals in nibbles m and m + 4, exact: near 1024 (BF16: 128) the low bits of a number are ones.
__device__ __forceinline__ u32 odd_pair(F16, u32 residual, int m, u32 points) {
  const u32 word = m < 2 ? residual << 1 : residual >> 7, mask = ((points - 1) << 1) * 0x00010001u;
  if (m % 2 == 0) return F16::sub((word & mask) | F16::magic_plus(1), F16::magic_plus(points));
  return F16::fma((word & (mask << 4)) | F16::magic_plus(16), F16::pair(1.f / 16), F16::pair(-64.f - float(points)));
}
__device__ __forceinline__ u32 odd_pair(BF16, u32 residual, int m, u32 points) {
  const u32 word = m == 0 ? residual << 1 : residual >> (4 * m - 1), mask = ((points - 1) << 1) * 0x00010001u;
  return BF16::sub((word & mask) | BF16::magic_plus(1), BF16::magic_plus(points));
}

// The eight numbers of codes i as four pairs. Above 4 bits: centre + step * ladder * (2r + 1 - n), rounded once.
template <class T, int BITS, bool INT8>
__device__ __forceinline__ void decode(const RowTables<T, BITS, INT8>& row, const Codes<BITS>& codes, int i, u32 step,
                                       u32 (&out)[4]) {
  Choice<Shape<BITS>::kIndexBits> choice(codes.index[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half) choice.upper();
    u32 pair[2];
    row.numbers(choice, pair);
    if constexpr (Shape<BITS>::kGrid) {
      u32 ladders[2];
      row.ladders(choice, ladders);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int m = 2 * half + p;
        u32 offset;
        if constexpr (BITS == 5) {  // 2r - 1 is a sign
          offset = ladders[p] ^ (~(codes.residual[0] << (15 - 4 * m - i)) & 0x80008000u);
        } else {
          offset = T::mul(odd_pair(T{}, codes.residual[i], m, 1u << (BITS - 4)), ladders[p]);
        }
        pair[p] = T::fma(offset, step, pair[p]);
      }
    }
    out[2 * half] = pair[0], out[2 * half + 1] = pair[1];
  }
}
