// Quantized linear layers: activations in groups of int8, weights as bit-planes with a table per row.
//
// The layout is that of the container (docs/spec.md): plane p is u8[N][ceil(K/8)], bit t of byte l = weight 8l + t.
// A *block* is 512 weights: 64 bytes of each plane. Rotating the bytes of the merged planes right by t leaves in the
// low bits of byte l the index of weight 8l + t; *step* t of a block therefore works on the 64 weights 8l + t, l =
// 0..63, and activations are permuted once per token to match: byte 64t + l of a block is x[8l + t]. A four-byte dot
// product then leaves in 32-bit lane j, summed over the eight steps, exactly the 32 consecutive weights 32j .. 32j+31,
// so the scale of an activation group is applied once per block.
//
// Shape letters: T tokens, N out-features, K in-features; blocks = ceil(K/512).
#pragma once

#include <cstddef>
#include <cstdint>

#include "everybit/engine/share.h"

namespace everybit::engine {

constexpr std::size_t kBlock = 512;               // weights
constexpr std::size_t kBlockBytes = kBlock / 8;   // of one plane
constexpr std::size_t kGroup = 32;                // activations with one scale
constexpr std::size_t kGroups = kBlock / kGroup;  // of a block

// One matrix, as it lies in the mapped file. Reading beyond a plane's last byte is never allowed.
struct Planes {
  const std::uint8_t* plane[8];  // each u8[N][row_bytes], plane 0 the most significant
  std::size_t row_bytes;         // ceil(K/8)
  std::size_t columns;           // K
};

// The tables of one precision in the kernels' form. Entry i of a table belongs to the code whose bit in plane p is bit
// p of i (the container's code, bit-reversed: one rotation per plane builds the index at every precision). value =
// scale * (base * high[i] + low[i]) + offset with two parts, scale * high[i] + offset with one.
struct Tables {
  int bits;                     // 1..8
  int parts;                    // 2: sixteen-bit tables (or fourteen, see Kernels::base); 1: bytes
  const std::uint8_t* entries;  // u8[N][parts][2^bits], the high part first
  const float* lines;           // f32[N][2]: scale, offset
  std::size_t stride;           // bytes from row to row of entries, at least parts * 2^bits
};

// One row's codebook of cells at one precision, 5 to 8 bits. Index i has its cell in bits 0..3 (as everywhere, bit p is
// plane p) and, above them, the residual: value = centre[i & 15] + step * ladder[i & 15] * grid, where the grid is the
// odd multiple of 16/n in (-16, 16) that the n = 2^(bits-4) residuals count up, bit-reversed likewise.
struct Cells {
  float centre[16];
  std::int8_t ladder[16];  // 1..8
  float step;
  float scale, offset;  // of the table's sixteen- (or fourteen-)bit entries
};

// Activations of T tokens. Columns beyond K are zero in `codes`.
struct QuantizedRows {
  std::size_t tokens;
  std::size_t blocks;
  std::int8_t* codes;  // i8[T][blocks][512], permuted as above; |code| <= 127
  float* scales;       // f32[T][blocks][16]; x = scale * code
  float* sums;         // f32[T]: sum of scale * code over the row
};

// Where results go: out[t * stride + n], overwritten or added to.
struct Output {
  float* data;
  std::size_t stride;
  bool add;
  const float* bias;  // f32[N] or null

  // The same for a matrix whose first row is this one's `row`.
  Output from(std::size_t row) const { return {data + row, stride, add, bias ? bias + row : nullptr}; }
};

// Rows [begin, end) of a quantized matrix times all tokens of x. `scratch` is this thread's own, kScratchBytes long,
// 64-byte aligned. Cost: reads `bits` planes of those rows once.
using LinearFunction = void (*)(const Planes&, const Tables&, const QuantizedRows& x, Range rows, const Output&,
                                void* scratch);
constexpr std::size_t kScratchBytes = std::size_t{1} << 20;

// The kernels of one instruction set; null where it has none of its own.
struct Kernels {
  const char* name;
  int base;  // 256, or 128 where the byte product saturates and both parts have 7 bits (entries <= 127)
  // x f32[K] -> codes i8[blocks][512], scales f32[blocks][16], the row's sum. Groups of zeros get scale 0. Round to
  // nearest, ties to even; scale = max|x| / 127.
  void (*quantize)(const float* x, std::size_t columns, std::int8_t* codes, float* scales, float* sum);
  LinearFunction gemv[9];  // by bits: one token
  LinearFunction gemm[9];  // by bits: any number of tokens
  // The two-part table of one row of cells -> entries u8[2][2^bits]; null: plain C++ will do.
  void (*make_table)(const Cells&, int bits, std::uint8_t* entries) = nullptr;
};

// Of residual index r (bit-reversed) at `bits`: the factor of step * ladder.
inline int cell_grid(unsigned r, int bits) {
  const unsigned n = 1u << (bits - 4);
  unsigned plain = 0;
  for (int i = 0; i < bits - 4; ++i) plain |= ((r >> i) & 1u) << (bits - 5 - i);
  return (2 * static_cast<int>(plain) + 1 - static_cast<int>(n)) * static_cast<int>(16 / n);
}

// Every set that was compiled in; `supported` says whether this processor runs it.
const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();         // AVX2, FMA: maddubs with 7-bit parts
const Kernels& avx512_kernels();       // AVX-512 F/BW/VL/DQ without VNNI, VBMI, GFNI
const Kernels& avx512_vbmi_kernels();  // + VNNI, VBMI, GFNI (Ice Lake, Zen 4 and newer)
#elif defined(__aarch64__)
const Kernels& neon_kernels();  // Armv8.2 dot product
#endif

}  // namespace everybit::engine
