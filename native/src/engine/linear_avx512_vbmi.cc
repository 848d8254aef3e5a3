// Quantized linear layers for AVX-512 with VBMI, GFNI and VNNI (Ice Lake, Zen 4 and newer). Layout and terms: linear.h.
//
// Per block and row: rotate plane p left by p (one GFNI each), merge pairs and quads of planes by bit-select, so that
// the vector for step t holds the index of weight 8l + t in bits t .. t+b-1 of byte l, cyclically. Rotating right by t
// brings it down; bits above b are dirt, and tables are repeated to 64 entries, so that dirt selects an equal entry
// (7 and 8 bits use all bits of the index). vpermb looks up, vpdpbusd multiplies unsigned table bytes by signed
// activations, exactly: 32 * 255 * 127 < 2^21, and 256 times that < 2^31.
// Cost of a block at 3 bits and two parts: 3 loads, 2 + 2 + 4 for the merge, 7 rotations, 16 lookups, 16 dot products.
// gcc 12 calls the undefined operands inside its own AVX-512 headers uninitialized.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

using V = __m512i;
// Bytes of a plane fetched ahead with one token. Measured from memory, 4096 x 2048 rows, one thread, Gweights/s at 3
// bits: none 29.7, 512 32.0, 1024 35.9, 2048 36.4, 4096 36.8.
constexpr std::size_t kGemvAhead = 2048;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// GFNI computes bit i of a byte as the parity of (row byte 7-i AND x): rotation matrices are the identity's rows,
// moved.
constexpr long long rotation(int left) {
  unsigned long long matrix = 0;
  for (int i = 0; i < 8; ++i) {
    const int from = ((i - left) % 8 + 8) % 8;
    matrix |= (1ULL << from) << (8 * (7 - i));
  }
  return static_cast<long long>(matrix);
}

template <int kLeft>
inline V rotate_left(V x) {
  if constexpr (kLeft % 8 == 0) return x;
  return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(rotation(kLeft)), 0);
}

// Bits of `mask` from a, the others from b.
inline V select(V a, V b, unsigned char mask) {
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xCA);
}

inline V load(const std::uint8_t* at, __mmask64 bytes) { return _mm512_maskz_loadu_epi8(bytes, at); }
inline V load(const std::uint8_t* at) { return _mm512_loadu_si512(at); }

// Planes p0 .. p3 (kCount of them, plane i already rotated left by first + i) -> quad[j]: indices of the steps
// t = j and j + 4 in bits t .. t+3, the first plane at bit t.
template <int kCount>
inline void merge_quad(const V* planes, V* quad) {
  if constexpr (kCount == 1) {
    quad[0] = quad[1] = quad[2] = quad[3] = planes[0];
  } else {
    const V even01 = select(planes[0], planes[1], 0x55), odd01 = select(planes[0], planes[1], 0xAA);
    if constexpr (kCount == 2) {
      quad[0] = quad[2] = even01;
      quad[1] = quad[3] = odd01;
    } else {
      V even23 = planes[2], odd23 = planes[2];
      if constexpr (kCount == 4) {
        even23 = select(planes[2], planes[3], 0x55);
        odd23 = select(planes[2], planes[3], 0xAA);
      }
      quad[0] = select(even01, even23, 0x33);
      quad[1] = select(odd01, odd23, 0x66);
      quad[2] = select(even01, even23, 0xCC);
      quad[3] = select(odd01, odd23, 0x99);
    }
  }
}

// `ahead` bytes further on are fetched while we are here (0: nothing). The hardware follows each plane, but not far
// enough across pages and with this much arithmetic between two loads.
template <int kBits, int kPlane = 0>
inline void load_planes(const std::uint8_t* const* at, std::size_t offset, std::size_t ahead, __mmask64 bytes,
                        bool whole, V* planes) {
  if constexpr (kPlane < kBits) {
    if (ahead) _mm_prefetch(reinterpret_cast<const char*>(at[kPlane] + offset + ahead), _MM_HINT_T0);
    planes[kPlane] = rotate_left<kPlane>(whole ? load(at[kPlane] + offset) : load(at[kPlane] + offset, bytes));
    load_planes<kBits, kPlane + 1>(at, offset, ahead, bytes, whole, planes);
  }
}

// The eight index vectors of a block; only the low kBits bits of each byte mean something.
template <int kBits>
inline void block_indices(const std::uint8_t* const* at, std::size_t offset, std::size_t ahead, __mmask64 bytes,
                          bool whole, V* index) {
  V planes[8];
  load_planes<kBits>(at, offset, ahead, bytes, whole, planes);
  V low[4];
  merge_quad<(kBits < 4 ? kBits : 4)>(planes, low);
  if constexpr (kBits <= 4) {
    for (int t = 0; t < 8; ++t) index[t] = low[t & 3];
  } else {
    V high[4];
    merge_quad<kBits - 4>(planes + 4, high);  // plane 4 is at bits t+4 of the steps t = j and j + 4 alike
    index[0] = select(low[0], high[0], 0x0F);
    index[4] = select(low[0], high[0], 0xF0);
    index[1] = select(low[1], high[1], 0x1E);
    index[5] = select(low[1], high[1], 0xE1);
    index[2] = select(low[2], high[2], 0x3C);
    index[6] = select(low[2], high[2], 0xC3);
    index[3] = select(low[3], high[3], 0x78);
    index[7] = select(low[3], high[3], 0x87);
  }
  index[1] = rotate_left<7>(index[1]);
  index[2] = rotate_left<6>(index[2]);
  index[3] = rotate_left<5>(index[3]);
  index[4] = rotate_left<4>(index[4]);
  index[5] = rotate_left<3>(index[5]);
  index[6] = rotate_left<2>(index[6]);
  index[7] = rotate_left<1>(index[7]);
}

// One table of 2^kBits bytes, in registers.
template <int kBits>
struct Lookup {
  static constexpr int kRegisters = kBits <= 6 ? 1 : (kBits == 7 ? 2 : 4);
  V part[kRegisters];

  explicit Lookup(const std::uint8_t* e) {
    if constexpr (kBits == 1) part[0] = _mm512_set1_epi16(static_cast<short>(e[0] | (e[1] << 8)));
    if constexpr (kBits == 2 || kBits == 3) {
      unsigned long long bytes = 0;
      __builtin_memcpy(&bytes, e, std::size_t{1} << kBits);
      part[0] =
          kBits == 2 ? _mm512_set1_epi32(static_cast<int>(bytes)) : _mm512_set1_epi64(static_cast<long long>(bytes));
    }
    if constexpr (kBits == 4) part[0] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(e)));
    if constexpr (kBits == 5) part[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(e)));
    if constexpr (kBits >= 6)
      for (int i = 0; i < kRegisters; ++i) part[i] = load(e + 64 * i);
  }
  V operator()(V index) const {
    if constexpr (kBits <= 6) return _mm512_permutexvar_epi8(index, part[0]);
    if constexpr (kBits == 7) return _mm512_permutex2var_epi8(part[0], index, part[1]);
    if constexpr (kBits == 8)
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), _mm512_permutex2var_epi8(part[0], index, part[1]),
                                    _mm512_permutex2var_epi8(part[2], index, part[3]));
    return index;
  }
};

// sum + four-byte dot products of unsigned table bytes with signed activations. In assembler because gcc 12 copies
// every accumulator of a tile in every step when it meets the intrinsic in a loop.
inline V dot(V sum, V table_bytes, V activations) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(table_bytes), "v"(activations));
  return sum;
}

inline __mmask64 tail_mask(std::size_t bytes) { return bytes >= 64 ? ~0ULL : (1ULL << bytes) - 1; }

inline V activations(const std::int8_t* at) { return _mm512_load_si512(at); }

inline void finish(const Output& out, std::size_t token, std::size_t row, float value) {
  float* at = out.data + token * out.stride + row;
  if (out.bias) value += out.bias[row];
  *at = out.add ? *at + value : value;
}

template <int kBits>
struct RowPointers {
  const std::uint8_t* at[8];
  RowPointers(const Planes& planes, std::size_t row) {
    for (int p = 0; p < kBits; ++p) at[p] = planes.plane[p] + row * planes.row_bytes;
  }
};

// ---- one token --------------------------------------------------------------------------------------------------

template <int kBits, int kParts>
inline V block_product(const Lookup<kBits>& high, const Lookup<kBits>& low, const std::uint8_t* const* at,
                       std::size_t offset, __mmask64 bytes, bool whole, const std::int8_t* x) {
  V index[8];
  block_indices<kBits>(at, offset, kGemvAhead, bytes, whole, index);
  V sum_high = _mm512_setzero_si512(), sum_low = _mm512_setzero_si512();
  for (int t = 0; t < 8; ++t) {
    const V step = activations(x + 64 * t);
    sum_high = dot(sum_high, high(index[t]), step);
    if constexpr (kParts == 2) sum_low = dot(sum_low, low(index[t]), step);
  }
  return kParts == 2 ? _mm512_add_epi32(_mm512_slli_epi32(sum_high, 8), sum_low) : sum_high;
}

// The sums of the lanes of four vectors, in order.
inline __m128 reduce_four(const __m512* v) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The sum of the lanes of one vector, added in the order of reduce_four.
inline float reduce_one(__m512 v) {
  const __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4E));
  const __m512 fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
  return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

template <int kBits, int kParts>
inline __m512 row_product(const Planes& planes, const Tables& tables, const QuantizedRows& x, std::size_t row) {
  const std::size_t whole = planes.row_bytes / kBlockBytes, tail = planes.row_bytes % kBlockBytes;
  const std::uint8_t* entries = tables.entries + row * tables.stride;
  const Lookup<kBits> high(entries), low(entries + (kParts - 1) * (std::size_t{1} << kBits));
  const RowPointers<kBits> pointers(planes, row);
  __m512 sum = _mm512_setzero_ps();
  std::size_t block = 0;
  for (; block < whole; ++block) {
    const V product =
        block_product<kBits, kParts>(high, low, pointers.at, block * kBlockBytes, 0, true, x.codes + block * kBlock);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_loadu_ps(x.scales + block * kGroups), sum);
  }
  if (tail) {
    const V product = block_product<kBits, kParts>(high, low, pointers.at, block * kBlockBytes, tail_mask(tail), false,
                                                   x.codes + block * kBlock);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_loadu_ps(x.scales + block * kGroups), sum);
  }
  return sum;
}

// Four rows share one reduction of their lanes: rows are short (4 blocks at K = 2048).
template <int kBits, int kParts>
void gemv(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out, void*) {
  for (std::size_t row = rows.begin; row < rows.end; row += 4) {
    const std::size_t count = rows.end - row < 4 ? rows.end - row : 4;
    __m512 sums[4] = {};
    for (std::size_t r = 0; r < count; ++r) sums[r] = row_product<kBits, kParts>(planes, tables, x, row + r);
    const __mmask8 used = static_cast<__mmask8>((1u << count) - 1);
    const __m256 lines = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << (2 * count)) - 1), tables.lines + 2 * row);
    const __m128 first = _mm256_castps256_ps128(lines), second = _mm256_extractf128_ps(lines, 1);
    const __m128 scale = _mm_shuffle_ps(first, second, 0x88), offset = _mm_shuffle_ps(first, second, 0xDD);
    __m128 y = _mm_fmadd_ps(scale, reduce_four(sums), _mm_mul_ps(offset, _mm_set1_ps(x.sums[0])));
    if (out.bias) y = _mm_add_ps(y, _mm_maskz_loadu_ps(used, out.bias + row));
    if (out.add) y = _mm_add_ps(y, _mm_maskz_loadu_ps(used, out.data + row));
    _mm_mask_storeu_ps(out.data + row, used, y);
  }
}

// ---- many tokens ------------------------------------------------------------------------------------------------

// Table bytes of one block of one row -> [kParts][8 steps][64]. Fetches the block `ahead` bytes further on.
template <int kBits, int kParts>
void expand_block(const Planes& planes, const Tables& tables, std::size_t row, std::size_t block, std::size_t ahead,
                  std::uint8_t* to) {
  const std::uint8_t* entries = tables.entries + row * tables.stride;
  const Lookup<kBits> high(entries), low(entries + (kParts - 1) * (std::size_t{1} << kBits));
  const RowPointers<kBits> pointers(planes, row);
  const std::size_t offset = block * kBlockBytes;
  const bool whole = offset + kBlockBytes <= planes.row_bytes;
  V index[8];
  block_indices<kBits>(pointers.at, offset, ahead, whole ? 0 : tail_mask(planes.row_bytes - offset), whole, index);
  for (int t = 0; t < 8; ++t) {
    _mm512_store_si512(to + 64 * t, high(index[t]));
    if constexpr (kParts == 2) _mm512_store_si512(to + kBlock + 64 * t, low(index[t]));
  }
}

// Adds one block of kRows expanded rows (row_stride apart) times kTokens tokens to the float sums. Up to 24 integer
// accumulators, kRows weights and 1 activation vector fill the 32 registers; the sums lie in L1.
template <int kParts, int kRows, int kTokens>
inline void tile_block(const std::uint8_t* weights, std::size_t row_stride, const QuantizedRows& x, std::size_t token,
                       std::size_t block, __m512 (&sums)[kRows][kTokens]) {
  V products[kRows][kTokens];
  for (auto& line : products)
    for (auto& product : line) product = _mm512_setzero_si512();
  const std::size_t token_stride = x.blocks * kBlock;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    if (part == 1)
      for (auto& line : products)
        for (auto& product : line) product = _mm512_slli_epi32(product, 8);
    const std::uint8_t* w = weights + static_cast<std::size_t>(part) * kBlock;
    const std::int8_t* a = x.codes + token * token_stride + block * kBlock;
#pragma GCC unroll 1
    for (int t = 0; t < 8; ++t, w += 64, a += 64) {
      V row_bytes[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) row_bytes[r] = _mm512_load_si512(w + r * row_stride);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
        const V step = activations(a + m * token_stride);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) products[r][m] = dot(products[r][m], row_bytes[r], step);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const __m512 scale = _mm512_loadu_ps(x.scales + ((token + m) * x.blocks + block) * kGroups);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][m]), scale, sums[r][m]);
  }
}

using ExpandBlock = void (*)(const Planes&, const Tables&, std::size_t row, std::size_t block, std::size_t ahead,
                             std::uint8_t* to);

// Where the rows of a tile come from: expanded as a whole beforehand (many tokens), or block by block into a corner of
// L1, just before they are used (few tokens: each block is used once, and expanding overlaps with multiplying).
struct Expanded {
  const std::uint8_t* weights;
  std::size_t row_stride, block_stride;
};
struct OnTheFly {
  ExpandBlock expand;
  const Planes& planes;
  const Tables& tables;
  std::uint8_t* corner;
};

template <int kParts, int kRows, int kTokens, class Source>
void tile(const Source& source, std::size_t row, const Tables& tables, const QuantizedRows& x, std::size_t token,
          const Output& out) {
  __m512 sums[kRows][kTokens];
  for (auto& line : sums)
    for (auto& sum : line) sum = _mm512_setzero_ps();
  for (std::size_t block = 0; block < x.blocks; ++block) {
    if constexpr (requires { source.expand; }) {
      // The rows of a tile are visited in turns of 64 bytes, which no prefetcher follows: fetch the next tile's.
      for (int r = 0; r < kRows; ++r)
        source.expand(source.planes, source.tables, row + static_cast<std::size_t>(r), block,
                      kRows * source.planes.row_bytes, source.corner + r * kParts * kBlock);
      tile_block<kParts, kRows, kTokens>(source.corner, kParts * kBlock, x, token, block, sums);
    } else {
      tile_block<kParts, kRows, kTokens>(source.weights + block * source.block_stride, source.row_stride, x, token,
                                         block, sums);
    }
  }
  for (int m = 0; m < kTokens; ++m)
    for (int r = 0; r < kRows; ++r) {
      const std::size_t n = row + static_cast<std::size_t>(r), t = token + static_cast<std::size_t>(m);
      const float other = tables.lines[2 * n + 1] * x.sums[t];
      finish(out, t, n, __builtin_fmaf(tables.lines[2 * n], reduce_one(sums[r][m]), other));
    }
}

// Rows of a tile for m tokens: 18 to 24 accumulators.
constexpr std::size_t tile_rows(std::size_t m) { return m <= 4 ? 6 : (m <= 6 ? 4 : 3); }
constexpr std::size_t kTileTokens = 8;  // of a tile that is expanded on the fly
constexpr std::size_t kManyTokens = 6;  // of one whose rows are expanded: 4 rows and 6 tokens of K = 4096 share L1

// All tiles of rows [row, row + count) with kTokens tokens.
template <int kParts, int kTokens, class Source>
void tile_column(Source source, std::size_t row, std::size_t count, const Tables& tables, const QuantizedRows& x,
                 std::size_t token, const Output& out) {
  constexpr std::size_t kRows = tile_rows(kTokens);
  std::size_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    tile<kParts, kRows, kTokens>(source, row + r, tables, x, token, out);
    if constexpr (!requires { source.expand; }) source.weights += kRows * source.row_stride;
  }
  for (; r < count; ++r) {
    tile<kParts, 1, kTokens>(source, row + r, tables, x, token, out);
    if constexpr (!requires { source.expand; }) source.weights += source.row_stride;
  }
}

template <int kParts, class Source>
void tile_columns(const Source& source, std::size_t row, std::size_t count, const Tables& tables,
                  const QuantizedRows& x, std::size_t token, std::size_t tokens, const Output& out) {
  switch (tokens) {
    case 8:
      return tile_column<kParts, 8>(source, row, count, tables, x, token, out);
    case 7:
      return tile_column<kParts, 7>(source, row, count, tables, x, token, out);
    case 6:
      return tile_column<kParts, 6>(source, row, count, tables, x, token, out);
    case 5:
      return tile_column<kParts, 5>(source, row, count, tables, x, token, out);
    case 4:
      return tile_column<kParts, 4>(source, row, count, tables, x, token, out);
    case 3:
      return tile_column<kParts, 3>(source, row, count, tables, x, token, out);
    case 2:
      return tile_column<kParts, 2>(source, row, count, tables, x, token, out);
    default:
      return tile_column<kParts, 1>(source, row, count, tables, x, token, out);
  }
}

template <int kParts>
void gemm(ExpandBlock expand, const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows,
          const Output& out, void* scratch) {
  std::uint8_t* expanded = static_cast<std::uint8_t*>(scratch);
  const std::size_t row_stride = x.blocks * kParts * kBlock;
  if (x.tokens <= kTileTokens || row_stride > kScratchBytes) {
    for (std::size_t token = 0; token < x.tokens; token += kTileTokens) {
      const std::size_t m = x.tokens - token < kTileTokens ? x.tokens - token : kTileTokens;
      tile_columns<kParts>(OnTheFly{expand, planes, tables, expanded}, rows.begin, rows.end - rows.begin, tables, x,
                           token, m, out);
    }
    return;
  }
  // Rows expanded at once: some 32 KiB, whole tiles, which stay in L1 while the tokens pass by.
  const std::size_t tile = tile_rows(kManyTokens);
  std::size_t group = (std::size_t{32} << 10) / row_stride / tile * tile;
  if (group < tile) group = row_stride * tile <= kScratchBytes ? tile : 1;
  for (std::size_t first = rows.begin; first < rows.end; first += group) {
    const std::size_t count = rows.end - first < group ? rows.end - first : group;
    for (std::size_t r = 0; r < count; ++r)
      for (std::size_t block = 0; block < x.blocks; ++block)
        expand(planes, tables, first + r, block, 0, expanded + r * row_stride + block * kParts * kBlock);
    for (std::size_t token = 0; token < x.tokens;) {
      std::size_t m = x.tokens - token;
      // 8 tokens as 4 + 4: two even tiles beat a full one and a sliver.
      if (m > kManyTokens) m = m < 2 * kManyTokens ? (m + 1) / 2 : kManyTokens;
      tile_columns<kParts>(Expanded{expanded, row_stride, kParts * kBlock}, first, count, tables, x, token, m, out);
      token += m;
    }
  }
}

// ---- activations ------------------------------------------------------------------------------------------------

constexpr float kLeast = 0x1p-100f;  // a group below is zero: 127 / max must not overflow

void quantize(const float* x, std::size_t columns, std::int8_t* codes, float* scales, float* sum) {
  // Transposes 64 x 8 bytes: byte 8l + t goes to 64t + l. First within each register (8 bytes l = 0..7 of 8 steps),
  // then across: register i holds weights 64i .. 64i+63, so l = 8i .. 8i+7, and its qword t after the permutation is
  // step t.
  alignas(64) static constexpr std::uint8_t kTranspose[64] = {
      0,  8,  16, 24, 32, 40, 48, 56, 1,  9,  17, 25, 33, 41, 49, 57, 2,  10, 18, 26, 34, 42,
      50, 58, 3,  11, 19, 27, 35, 43, 51, 59, 4,  12, 20, 28, 36, 44, 52, 60, 5,  13, 21, 29,
      37, 45, 53, 61, 6,  14, 22, 30, 38, 46, 54, 62, 7,  15, 23, 31, 39, 47, 55, 63};
  const V transpose = _mm512_load_si512(kTranspose);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  double total = 0;
  for (std::size_t begin = 0; begin < columns; begin += kBlock, codes += kBlock, scales += kGroups) {
    alignas(64) std::uint64_t qwords[8][8];
    for (std::size_t i = 0; i < 8; ++i) {
      V bytes = _mm512_setzero_si512();
      for (std::size_t half = 0; half < 2; ++half) {
        const std::size_t at = begin + 64 * i + 32 * half;
        const std::size_t left = at < columns ? columns - at : 0;
        const __mmask16 m0 = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        const __mmask16 m1 = left >= 32 ? 0xffff : (left > 16 ? static_cast<__mmask16>((1u << (left - 16)) - 1) : 0);
        const __m512 a = _mm512_maskz_loadu_ps(m0, x + at), b = _mm512_maskz_loadu_ps(m1, x + at + 16);
        // The largest magnitude by its bits: a NaN is above infinity.
        const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_epi32(_mm512_castps_si512(a), magnitude),
                                                                  _mm512_and_epi32(_mm512_castps_si512(b), magnitude)));
        const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
        const bool finite = bits < 0x7f800000, some = finite && most >= kLeast;
        const __m512 inverse = _mm512_set1_ps(some ? 127.0f / most : 0.0f);
        const __mmask16 used = some ? 0xffff : 0;
        const __m512i qa = _mm512_maskz_cvtps_epi32(used, _mm512_mul_ps(a, inverse));
        const __m512i qb = _mm512_maskz_cvtps_epi32(used, _mm512_mul_ps(b, inverse));
        const int ints = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
        const float scale = some ? most / 127.0f : (finite ? 0.0f : __builtin_nanf(""));
        scales[2 * i + half] = scale;
        total += static_cast<double>(scale) * ints;
        const __m256i packed =
            _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(qa)), _mm512_cvtsepi32_epi8(qb), 1);
        bytes = half ? _mm512_inserti64x4(bytes, packed, 1) : _mm512_inserti64x4(bytes, packed, 0);
      }
      _mm512_store_si512(qwords[i], _mm512_permutexvar_epi8(transpose, bytes));
    }
    for (int t = 0; t < 8; ++t)
      for (int i = 0; i < 8; ++i) __builtin_memcpy(codes + 64 * t + 8 * i, &qwords[i][t], 8);
  }
  *sum = static_cast<float>(total);
}

// ---- tables of cells ------------------------------------------------------------------------------------------------

void make_table(const Cells& cells, int bits, std::uint8_t* entries) {
  const std::size_t count = std::size_t{1} << bits;
  const __m512 centre = _mm512_loadu_ps(cells.centre), offset = _mm512_set1_ps(cells.offset);
  const __m512 ladder =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(cells.ladder))));
  const __m512 inverse = _mm512_set1_ps(cells.scale > 0 ? 1.0f / cells.scale : 0.0f);
  const __m512 least = _mm512_setzero_ps(), most = _mm512_set1_ps(65535.0f), step = _mm512_set1_ps(cells.step);
  for (std::size_t i = 0; i < count; i += 16) {
    const __m512 factor =
        _mm512_mul_ps(ladder, _mm512_set1_ps(static_cast<float>(cell_grid(static_cast<unsigned>(i >> 4), bits))));
    // Rounded after the product, as the container says: a fused one would differ from the kept tables.
    const __m512 value = _mm512_add_ps(centre, _mm512_mul_round_ps(step, factor, kNearest));
    const __m512 steps =
        _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(value, offset), inverse), most), least);
    const V entry = _mm512_cvtps_epi32(steps);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(entries + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(entry, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(entries + count + i), _mm512_cvtepi32_epi8(entry));
  }
}

template <int kBits>
void gemv_any(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
              void* scratch) {
  tables.parts == 2 ? gemv<kBits, 2>(planes, tables, x, rows, out, scratch)
                    : gemv<kBits, 1>(planes, tables, x, rows, out, scratch);
}

template <int kBits>
void gemm_any(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out,
              void* scratch) {
  tables.parts == 2 ? gemm<2>(expand_block<kBits, 2>, planes, tables, x, rows, out, scratch)
                    : gemm<1>(expand_block<kBits, 1>, planes, tables, x, rows, out, scratch);
}

}  // namespace

const Kernels& avx512_vbmi_kernels() {
  static constexpr Kernels kKernels = {
      "avx512_vbmi",
      256,
      quantize,
      {nullptr, gemv_any<1>, gemv_any<2>, gemv_any<3>, gemv_any<4>, gemv_any<5>, gemv_any<6>, gemv_any<7>, gemv_any<8>},
      {nullptr, gemm_any<1>, gemm_any<2>, gemm_any<3>, gemm_any<4>, gemm_any<5>, gemm_any<6>, gemm_any<7>, gemm_any<8>},
      make_table};
  return kKernels;
}

}  // namespace everybit::engine
