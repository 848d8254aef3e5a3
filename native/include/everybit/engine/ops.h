// The ops of a model other than its quantized products: norm, rope, attention over paged KV, activations, routing, and
// products with plain (unquantized) weights. Definitions: src/everybit/engine/ops.py.
//
// A function that takes a `Share` is called by every thread of the pool with the same arguments and does its own part;
// there is no barrier inside, none is needed before it other than that its inputs are complete, and the caller has one
// after it. Results do not depend on the number of threads: only independent outputs are divided, never a sum.
// The sets differ in the last bits from one another (lane counts, fused multiply-add).
//
// Nobody checks here: shapes, indices and dtypes were validated when the program was loaded and the step accepted.
// Shape letters: T tokens, H heads, D head size, E experts, N out-features, K in-features, S sequences.
#pragma once

#include <cstddef>
#include <cstdint>

#include "everybit/engine/linear.h"
#include "everybit/engine/share.h"

namespace everybit::engine {

// How numbers are stored. i8 is reserved for the KV cache (with scales) and not executed yet.
enum class Dtype : std::uint8_t { f32, f16, bf16, i8 };

// Columns of a buffer f32: row t starts at data + t * stride and has `width` numbers.
struct Columns {
  float* data;
  std::size_t stride, width;
};

// A plain weight as it lies in the mapped file, any alignment: [N][K], or [K][N] when transposed, row-major and dense.
struct Matrix {
  const void* data;
  Dtype dtype;                // f32, f16, bf16
  std::size_t rows, columns;  // N, K whether transposed or not
  bool transposed;
};

enum class NormKind : std::uint8_t { rms, layer };
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };
enum class Routing : std::uint8_t { softmax, top_k_softmax };

// ---------------------------------------------------------------------------------------------------- KV cache
// One layer's cache: blocks of kBlockTokens tokens. A block is [kv_head] of a *unit*, and a unit is
// K [D][16 tokens], then V [16 tokens][D]. K lies transposed so that one vector holds the scores of several tokens and
// needs no horizontal sum; K and V of a head are neighbours so that one head's part of a block is one contiguous run.
// (i8 will append f32 scales to a unit: K [16], V [16].)
constexpr std::size_t kBlockTokens = 16;

struct KvLayer {
  std::uint8_t* data;        // block b starts at data + b * block_stride, 64-byte aligned
  std::size_t block_stride;  // bytes; at least kv_bytes_per_block
  Dtype dtype;               // f16, bf16, or f32 (exact, for references)
  std::size_t kv_heads, head_dim;
};

// Of one layer: 2 * 16 * D * kv_heads numbers (and scales).
std::size_t kv_bytes_per_block(Dtype dtype, std::size_t kv_heads, std::size_t head_dim);

// The sequences of a step, as in program.py: sequence s owns rows starts[s] .. starts[s+1]-1 and has past[s] tokens in
// the cache already; its KV blocks are blocks[s * most ..].
struct Sequences {
  std::size_t count;           // S
  const std::int32_t* starts;  // [S + 1]
  const std::int32_t* past;    // [S]
  const std::int32_t* blocks;  // [S][most]
  std::size_t most;
};

struct AttentionArguments {
  Columns out;         // [T, H*D]
  Columns q;           // [T, H*D]
  KvLayer cache;       // the step's own k, v are appended already (append_kv, then a barrier)
  std::size_t heads;   // H, a multiple of kv_heads
  float scale;         // of q.k
  std::size_t window;  // 0: none
  float softcap;       // 0: none
  const float* sinks;  // f32[H] or null
};

// Of one thread, 64-byte aligned.
std::size_t attention_scratch_bytes(std::size_t head_dim);
constexpr std::size_t kDenseScratchBytes = std::size_t{64} << 10;

// ---------------------------------------------------------------------------------------------------- the table
struct Ops {
  const char* name;

  // out[t] (+)= scale * table[indices[t] + offset]; `indices` are token ids or positions, table is [V][out.width].
  void (*embed)(Columns out, const void* table, Dtype, const std::int32_t* indices, std::size_t tokens,
                std::int64_t offset, float scale, bool add, Share);

  // Each of `groups` equal parts of a row by itself. out may be x (the same columns), else they must not overlap.
  // weight, bias: f32[width / groups] or null; unit_offset: 1 + weight. bias is added whatever the kind, if given.
  void (*norm)(NormKind, Columns out, Columns x, std::size_t tokens, const float* weight, const float* bias, float eps,
               bool unit_offset, std::size_t groups, Share);

  // cosines, sines f32[T][pairs] = scale * cos, sin(position * inv_freq). The angle is formed and reduced in double, so
  // that the result has the rounding to f32 only, for angles up to 1.6 million.
  void (*rope_table)(const std::int32_t* positions, std::size_t tokens, const float* inv_freq, std::size_t pairs,
                     float scale, float* cosines, float* sines, Share);
  // Rotate the first 2 * pairs numbers of each of `heads` heads, in place.
  void (*rope)(Columns x, std::size_t tokens, std::size_t heads, const float* cosines, const float* sines,
               std::size_t pairs, bool interleaved, Share);

  // The new tokens' k, v f32[T, kv_heads*D] into the cache, rounded to nearest even.
  void (*append_kv)(const KvLayer&, Columns k, Columns v, const Sequences&, Share);
  // Causal attention. A row's result depends neither on the rows beside it nor on how a sequence was cut into steps.
  // `scratch` is this thread's own, attention_scratch_bytes(D) long.
  void (*attention)(const AttentionArguments&, const Sequences&, void* scratch, Share);

  // out = f(gate) * up, or f(gate) when up.data is null. out may be gate or up. `limit` is swiglu_clamped's.
  void (*activate)(Activation, Columns out, Columns gate, Columns up, std::size_t tokens, float limit, Share);
  void (*add)(Columns out, Columns x, Columns y, std::size_t tokens, Share);               // out may be x or y
  void (*softcap)(Columns x, std::size_t tokens, float cap, Share);                        // in place
  void (*select)(Columns out, Columns x, const std::int32_t* rows, std::size_t n, Share);  // out[i] = x[rows[i]]

  // scores [T, E] -> experts i32[T][top_k], by falling score, ties to the lower expert; probabilities f32[T][top_k].
  void (*route)(Columns scores, std::size_t tokens, std::size_t top_k, Routing, bool normalize, std::int32_t* experts,
                float* probabilities, Share);

  // The first row of `rows` with a NaN or an infinity, or -1. One thread.
  std::int64_t (*find_nonfinite)(Columns x, Range rows);

  // out (+)= x W^T + bias for rows [rows.begin, rows.end) of W (this thread's; a multiple of 8 is best) and all tokens.
  // x is [T, K]. Sums in f32. A token's result does not depend on the tokens beside it, nor on the range.
  // `scratch` is this thread's own, kDenseScratchBytes long, 64-byte aligned.
  void (*dense)(const Matrix&, Columns x, std::size_t tokens, Range rows, const Output&, void* scratch);
};

// Every set that was compiled in; the caller knows what this processor runs.
const Ops& scalar_ops();
#if defined(__x86_64__)
const Ops& avx2_ops();    // AVX2, FMA, F16C
const Ops& avx512_ops();  // AVX-512 F, BW, VL, DQ, CD; FMA, F16C
#elif defined(__aarch64__)
const Ops& neon_ops();  // Armv8 (conversions of half precision are in the base set)
#endif

}  // namespace everybit::engine
