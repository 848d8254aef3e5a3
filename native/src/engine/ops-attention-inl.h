// Attention over the paged KV cache, and the writes into it.
//
// A *query* is one head of one row. A tile of up to kTile queries that share a KV head walks over that head's keys in
// chunks of kChunk (always at multiples of kChunk), keeping for each query the running maximum, the sum of exponentials
// (a vector, lane = key modulo kLanes) and the weighted values. Within a tile, kQueries at a time are in registers.
// Every query's own arithmetic is the same sequence whatever stands beside it: masked keys add exact zeros, and a
// maximum that did not move rescales by exactly 1. So results depend neither on the tile, nor on the threads, nor on
// how a sequence was cut into steps.
//
// With many queries, a chunk of K and V is first widened to f32 in scratch (L2) and then read by all of them; with few
// (decode), the stored numbers are widened in registers, once per group of query heads.
#pragma once

#include "ops-vector-inl.h"

namespace everybit::engine {
namespace {

constexpr std::size_t kChunk = 128;  // keys: 8 queries' probabilities are 4 KiB, K and V of D = 128 are 128 KiB
constexpr std::size_t kChunkBlocks = kChunk / kBlockTokens;
constexpr std::size_t kChunkVectors = kChunk / kLanes;
constexpr std::size_t kBlockVectors = kBlockTokens / kLanes;
constexpr std::size_t kTile = 64;                           // queries: widening costs a tenth of their work
constexpr std::size_t kQueries = kRegisters == 32 ? 8 : 4;  // times two vectors of sums
constexpr std::size_t kWide = kLanes > kQueries ? kLanes : kQueries;
constexpr float kNothing = -__builtin_inff();

EVERYBIT_INLINE std::size_t kv_unit_bytes(const KvLayer& cache) {
  return 2 * kBlockTokens * cache.head_dim * size_of(cache.dtype);
}

template <Dtype kDtype>
EVERYBIT_INLINE void store_element(std::uint8_t* p, float x) {
  if constexpr (kDtype == Dtype::f32) {
    __builtin_memcpy(p, &x, 4);
  } else {
    const std::uint16_t half = kDtype == Dtype::f16 ? to_f16(x) : to_bf16(x);
    __builtin_memcpy(p, &half, 2);
  }
}

void append_kv(const KvLayer& cache, Columns k, Columns v, const Sequences& sequences, Share share) {
  const std::size_t dim = cache.head_dim, tokens = static_cast<std::size_t>(sequences.starts[sequences.count]);
  const std::size_t first = static_cast<std::size_t>(sequences.starts[0]);
  const std::size_t unit = kv_unit_bytes(cache), size = size_of(cache.dtype);
  // By head, then token: neighbours in a line of K belong to one thread, as far as possible.
  const Range items = part((tokens - first) * cache.kv_heads, share);
  std::size_t s = 0;
  for (std::size_t item = items.begin; item < items.end; ++item) {
    const std::size_t head = item / (tokens - first), row = first + item % (tokens - first);
    if (row == first) s = 0;
    while (row < static_cast<std::size_t>(sequences.starts[s])) --s;
    while (row >= static_cast<std::size_t>(sequences.starts[s + 1])) ++s;
    const std::size_t at = static_cast<std::size_t>(sequences.past[s]) + row - sequences.starts[s];
    const auto block = static_cast<std::size_t>(sequences.blocks[s * sequences.most + at / kBlockTokens]);
    std::uint8_t* keys = cache.data + block * cache.block_stride + head * unit;
    std::uint8_t* values = keys + unit / 2;
    keys += at % kBlockTokens * size;
    values += at % kBlockTokens * dim * size;
    const float* from_k = k.data + row * k.stride + head * dim;
    const float* from_v = v.data + row * v.stride + head * dim;
    dispatch(cache.dtype, [=](auto as) {
      constexpr Dtype kDtype = decltype(as)::dtype;
      constexpr std::size_t kSize = size_of(kDtype);
      for (std::size_t d = 0; d < dim; ++d) store_element<kDtype>(keys + d * kBlockTokens * kSize, from_k[d]);
      for (std::size_t d = 0; d < dim; ++d) store_element<kDtype>(values + d * kSize, from_v[d]);
    });
  }
}

// One tile's state, in the thread's scratch. D' = D rounded up to whole vectors.
struct Tile {
  float* sums;          // f32[kTile][D'], the values so far
  float* totals;        // f32[kTile][kLanes]
  float* maxima;        // f32[kTile]
  std::int32_t* begin;  // i32[kTile], the keys a query sees
  std::int32_t* end;
  float* queries;        // f32[kTile / kQueries][D][kQueries], scaled
  float* probabilities;  // f32[kQueries][kChunk]
  float* keys;           // f32[kChunkBlocks][D][16]
  float* values;         // f32[kChunk][D']
};

// As the widest set needs it; in floats.
constexpr std::size_t tile_floats(std::size_t dim) {
  const std::size_t padded = (dim + 15) / 16 * 16;
  return kTile * padded + kTile * 16 + 3 * kTile + kTile * padded + 8 * kChunk + 2 * kChunk * padded;
}

EVERYBIT_INLINE Tile lay_out(void* scratch, std::size_t dim) {
  const std::size_t padded = (dim + 15) / 16 * 16;
  float* p = static_cast<float*>(scratch);
  Tile tile;
  tile.sums = p, p += kTile * padded;
  tile.keys = p, p += kChunk * padded;
  tile.values = p, p += kChunk * padded;
  tile.queries = p, p += kTile * padded;
  tile.probabilities = p, p += 8 * kChunk;
  tile.totals = p, p += kTile * 16;
  tile.maxima = p, p += kTile;
  tile.begin = reinterpret_cast<std::int32_t*>(p), p += kTile;
  tile.end = reinterpret_cast<std::int32_t*>(p);
  return tile;
}

// scores[i][key] = q_i . k_key for kN queries and `vectors` vectors of keys, kV at a time. keys[v] points at the first
// dimension of vector v; the next dimension is 16 numbers on. keys[vectors .. vectors+kV-1] are only prefetched.
template <Dtype kDtype, std::size_t kN, std::size_t kV>
void score(const float* queries, const Bytes* keys, std::size_t dim, std::size_t vectors, float* scores) {
  constexpr std::size_t kStep = kBlockTokens * size_of(kDtype);
  for (std::size_t v0 = 0; v0 < vectors; v0 += kV) {
    V sums[kN][kV];
    EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
      EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) sums[i][v] = V{};
    }
    for (std::size_t d = 0; d < dim; ++d) {
      V key[kV];
      EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) {
        key[v] = load_as<kDtype>(keys[v0 + v] + d * kStep);
        // Blocks are pages apart, so the hardware does not see the next one coming. (f32 is scratch, mostly.)
        if constexpr (kDtype != Dtype::f32) __builtin_prefetch(keys[v0 + kV + v] + d * kStep);
      }
      EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
        const V q = splat(queries[d * kQueries + i]);
        EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) sums[i][v] = fma(q, key[v], sums[i][v]);
      }
    }
    EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
      EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) store(scores + i * kChunk + (v0 + v) * kLanes, sums[i][v]);
    }
  }
}

// sums[i] = factors[i] * sums[i] + sum over tokens begin .. end-1 of the chunk of p_i * v, for kV vectors of dimensions
// from d0 on. A token's values are `stride` bytes after the last one's within a block; blocks[b] is where block b's
// begin.
template <Dtype kDtype, std::size_t kN, std::size_t kV>
EVERYBIT_INLINE void weigh_columns(const float* probabilities, const float* factors, const Bytes* blocks,
                                   std::size_t stride, std::size_t begin, std::size_t end, std::size_t d0, float* sums,
                                   std::size_t padded) {
  V sum[kN][kV];
  EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
    const V factor = splat(factors[i]);
    EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) {
      sum[i][v] = load(sums + i * padded + d0 + v * kLanes) * factor;
    }
  }
  for (std::size_t t = begin; t < end;) {
    const std::size_t stop = least(end, (t / kBlockTokens + 1) * kBlockTokens);
    Bytes row = blocks[t / kBlockTokens] + t % kBlockTokens * stride + d0 * size_of(kDtype);
    for (; t < stop; ++t, row += stride) {
      V value[kV];
      EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) {
        value[v] = load_as<kDtype>(row + v * kLanes * size_of(kDtype));
      }
      EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
        const V p = splat(probabilities[i * kChunk + t]);
        EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) sum[i][v] = fma(p, value[v], sum[i][v]);
      }
    }
  }
  EVERYBIT_UNROLL for (std::size_t i = 0; i < kN; ++i) {
    EVERYBIT_UNROLL for (std::size_t v = 0; v < kV; ++v) store(sums + i * padded + d0 + v * kLanes, sum[i][v]);
  }
}

template <Dtype kDtype, std::size_t kN, std::size_t kV>
void weigh(const float* probabilities, const float* factors, const Bytes* blocks, std::size_t stride, std::size_t begin,
           std::size_t end, float* sums, std::size_t padded) {
  std::size_t d = 0;
  for (; d + kV * kLanes <= padded; d += kV * kLanes)
    weigh_columns<kDtype, kN, kV>(probabilities, factors, blocks, stride, begin, end, d, sums, padded);
  for (; d < padded; d += kLanes)
    weigh_columns<kDtype, kN, 1>(probabilities, factors, blocks, stride, begin, end, d, sums, padded);
}

// Scores of one query in place, capped and masked -> its running maximum.
EVERYBIT_INLINE float find_maximum(const Tile& tile, std::size_t query, float* scores, std::size_t vectors,
                                   std::int32_t first, float softcap) {
  const std::int32_t begin = tile.begin[query], end = tile.end[query];
  if (softcap != 0)
    for (std::size_t v = 0; v < vectors; ++v)
      store(scores + v * kLanes, splat(softcap) * tanh(load(scores + v * kLanes) / softcap));
  V largest = splat(kNothing);
  if (begin > first || end < first + static_cast<std::int32_t>(vectors * kLanes)) {
    for (std::size_t v = 0; v < vectors; ++v) {
      const I key = lane_numbers() + (first + static_cast<std::int32_t>(v * kLanes));
      const V seen = ((key >= begin) & (key < end)) ? load(scores + v * kLanes) : splat(kNothing);
      store(scores + v * kLanes, seen);
      largest = larger(seen, largest);
    }
  } else {
    for (std::size_t v = 0; v < vectors; ++v) largest = larger(load(scores + v * kLanes), largest);
  }
  const float here = largest_of(largest), before = tile.maxima[query];
  return here > before ? here : before;
}

// Scores of queries group .. group+n-1 in place -> probabilities relative to their running maxima. factors[i] is what
// the values so far must be multiplied by.
EVERYBIT_INLINE void soften(const Tile& tile, std::size_t group, std::size_t n, float* scores, std::size_t vectors,
                            std::int32_t first, float softcap, float* factors) {
  alignas(64) float bases[kWide] = {};
  for (std::size_t i = 0; i < n; ++i) {
    const float now = find_maximum(tile, group + i, scores + i * kChunk, vectors, first, softcap);
    factors[i] = tile.maxima[group + i], tile.maxima[group + i] = now;
    bases[i] = now == kNothing ? 0.0f : now;  // nothing seen yet: all exponentials are zero, not NaN
  }
  for (std::size_t i = 0; i < kWide; i += kLanes) store(factors + i, exp(load(factors + i) - load(bases + i)));
  for (std::size_t i = 0; i < n; ++i) {
    float* p = scores + i * kChunk;
    float* totals = tile.totals + (group + i) * kLanes;
    const V base = splat(bases[i]);
    V total = load(totals) * splat(factors[i]);
    for (std::size_t v = 0; v < vectors; ++v) {
      const V e = exp(load(p + v * kLanes) - base);
      store(p + v * kLanes, e);
      total += e;
    }
    store(totals, total);
  }
}

// One chunk for queries group .. group+n-1 (n <= kN; the state of the others is never read).
template <Dtype kDtype, std::size_t kN>
EVERYBIT_INLINE void visit(const Tile& tile, std::size_t group, std::size_t n, const Bytes* keys, const Bytes* values,
                           std::size_t stride, std::int32_t first, std::size_t dim, std::size_t padded, float softcap) {
  std::int32_t begin = tile.begin[group], end = tile.end[group];
  for (std::size_t i = 1; i < n; ++i) {
    begin = tile.begin[group + i] < begin ? tile.begin[group + i] : begin;
    end = tile.end[group + i] > end ? tile.end[group + i] : end;
  }
  const auto last = first + static_cast<std::int32_t>(kChunk);
  begin = begin > first ? begin - first : 0, end = end < last ? end - first : last - first;
  if (begin >= end) return;
  constexpr std::size_t kV = kN <= 2 ? 4 : 2;
  const std::size_t vectors = round_up(static_cast<std::size_t>(end), kV * kLanes) / kLanes;
  float* scores = tile.probabilities;
  alignas(64) float factors[kWide] = {};
  score<kDtype, kN, kV>(tile.queries + group * dim, keys, dim, vectors, scores);
  soften(tile, group, n, scores, vectors, first, softcap, factors);
  weigh<kDtype, kN, kV>(scores, factors, values, stride, static_cast<std::size_t>(begin), static_cast<std::size_t>(end),
                        tile.sums + group * padded, padded);
}

template <Dtype kDtype>
void visit_all(const Tile& tile, std::size_t queries, const Bytes* keys, const Bytes* values, std::size_t stride,
               std::int32_t first, std::size_t dim, std::size_t padded, float softcap) {
  for (std::size_t group = 0; group < queries; group += kQueries) {
    const std::size_t n = least(kQueries, queries - group);
    if (n == 1) {
      visit<kDtype, 1>(tile, group, n, keys, values, stride, first, dim, padded, softcap);
    } else if (n == 2) {
      visit<kDtype, 2>(tile, group, n, keys, values, stride, first, dim, padded, softcap);
    } else if (n <= 4) {
      visit<kDtype, 4>(tile, group, n, keys, values, stride, first, dim, padded, softcap);
    } else {
      visit<kDtype, kQueries>(tile, group, n, keys, values, stride, first, dim, padded, softcap);
    }
  }
}

// Numbers of one block widened to f32.
template <Dtype kDtype>
void widen_block(Bytes keys, Bytes values, std::size_t dim, std::size_t padded, float* wide_keys, float* wide_values) {
  constexpr std::size_t kSize = size_of(kDtype);
  for (std::size_t i = 0; i < dim * kBlockTokens; i += kLanes) store(wide_keys + i, load_as<kDtype>(keys + i * kSize));
  for (std::size_t t = 0; t < kBlockTokens; ++t)
    for (std::size_t d = 0; d < padded; d += kLanes)
      store(wide_values + t * padded + d, load_up_to_as<kDtype>(values + (t * dim + d) * kSize, dim - d));
}

// Which queries a tile holds: rows row .. row+rows-1 of sequence s, heads head .. head+heads-1 of one KV head.
struct Job {
  std::size_t sequence, kv_head, row, rows, head, heads;
};

void attend(const AttentionArguments& a, const Sequences& sequences, const Job& job, void* scratch) {
  const KvLayer& cache = a.cache;
  const std::size_t dim = cache.head_dim, padded = round_up(dim, kLanes), queries = job.rows * job.heads;
  const Tile tile = lay_out(scratch, dim);
  const std::size_t past = static_cast<std::size_t>(sequences.past[job.sequence]) + job.row -
                           static_cast<std::size_t>(sequences.starts[job.sequence]);
  std::size_t begin = past + job.rows, end = 0;
  for (std::size_t i = 0; i < queries; ++i) {
    const std::size_t row = i / job.heads, head = job.head + i % job.heads;
    const std::size_t stop = past + row + 1, start = a.window != 0 && stop > a.window ? stop - a.window : 0;
    tile.begin[i] = static_cast<std::int32_t>(start), tile.end[i] = static_cast<std::int32_t>(stop);
    begin = least(begin, start), end = stop;
    tile.maxima[i] = a.sinks != nullptr ? a.sinks[head] : kNothing;
    V total = V{};
    if (a.sinks != nullptr) total[0] = 1.0f;  // exp(sink - maximum)
    store(tile.totals + i * kLanes, total);
    for (std::size_t d = 0; d < padded; d += kLanes) store(tile.sums + i * padded + d, V{});
    const float* q = a.q.data + (job.row + row) * a.q.stride + head * dim;
    if (i + 2 < queries) {  // rows are far apart: no hardware prefetcher follows
      const std::size_t ahead = i + 2;
      const float* next = a.q.data + (job.row + ahead / job.heads) * a.q.stride + (job.head + ahead % job.heads) * dim;
      for (std::size_t d = 0; d < dim; d += 16) __builtin_prefetch(next + d);
    }
    float* to = tile.queries + i / kQueries * kQueries * dim + i % kQueries;
    for (std::size_t d = 0; d < dim; ++d) to[d * kQueries] = q[d] * a.scale;
  }
  // Lanes of the last group that hold no query are computed and dropped.
  for (std::size_t i = queries; i % kQueries != 0; ++i) {
    float* to = tile.queries + i / kQueries * kQueries * dim + i % kQueries;
    for (std::size_t d = 0; d < dim; ++d) to[d * kQueries] = 0;
    for (std::size_t d = 0; d < padded; d += kLanes) store(tile.sums + i * padded + d, V{});
  }

  const std::size_t unit = kv_unit_bytes(cache), size = size_of(cache.dtype);
  const std::int32_t* blocks = sequences.blocks + job.sequence * sequences.most;
  const bool widen = padded != dim || (cache.dtype != Dtype::f32 && queries > 2 * kQueries);
  for (std::size_t first = begin / kChunk * kChunk; first < end; first += kChunk) {
    Bytes keys[kChunkVectors + 4 * kBlockVectors], values[kChunkBlocks + 4];
    for (std::size_t b = 0; b < kChunkBlocks + 4; ++b) {
      // Beyond the sequence: its last block again, whose scores are masked. Before the window: a block that may have
      // been given back, so the window's first.
      std::size_t at = first / kBlockTokens + b;
      at = least(at, (end - 1) / kBlockTokens);
      at = at < begin / kBlockTokens ? begin / kBlockTokens : at;
      Bytes key = cache.data + static_cast<std::size_t>(blocks[at]) * cache.block_stride + job.kv_head * unit;
      Bytes value = key + unit / 2;
      std::size_t key_size = size;
      if (widen) {
        float* wide_keys = tile.keys + b * dim * kBlockTokens;
        float* wide_values = tile.values + b * padded * kBlockTokens;
        if (b < kChunkBlocks && first + b * kBlockTokens < end)
          dispatch(cache.dtype,
                   [=](auto as) { widen_block<decltype(as)::dtype>(key, value, dim, padded, wide_keys, wide_values); });
        key = reinterpret_cast<Bytes>(wide_keys), value = reinterpret_cast<Bytes>(wide_values), key_size = 4;
      }
      values[b] = value;
      for (std::size_t v = 0; v < kBlockVectors; ++v) keys[b * kBlockVectors + v] = key + v * kLanes * key_size;
    }
    const auto from = static_cast<std::int32_t>(first);
    if (widen) {
      visit_all<Dtype::f32>(tile, queries, keys, values, padded * 4, from, dim, padded, a.softcap);
    } else {
      dispatch(cache.dtype, [&](auto as) {
        visit_all<decltype(as)::dtype>(tile, queries, keys, values, dim * size, from, dim, padded, a.softcap);
      });
    }
  }
  for (std::size_t i = 0; i < queries; ++i) {
    const V share = splat(sum_of(load(tile.totals + i * kLanes)));
    float* out = a.out.data + (job.row + i / job.heads) * a.out.stride + (job.head + i % job.heads) * dim;
    for (std::size_t d = 0; d < dim; d += kLanes)
      store_up_to(out + d, load(tile.sums + i * padded + d) / share, dim - d);
  }
}

// Calls f(job, cost) for every tile of the step, in a fixed order.
template <typename F>
EVERYBIT_INLINE void for_each_job(const AttentionArguments& a, const Sequences& sequences, std::size_t heads_at_once,
                                  F&& f) {
  const std::size_t group = a.heads / a.cache.kv_heads, rows_at_once = kTile / heads_at_once;
  for (std::size_t s = 0; s < sequences.count; ++s) {
    const auto start = static_cast<std::size_t>(sequences.starts[s]);
    const auto stop = static_cast<std::size_t>(sequences.starts[s + 1]);
    const auto past = static_cast<std::size_t>(sequences.past[s]);
    for (std::size_t kv_head = 0; kv_head < a.cache.kv_heads; ++kv_head) {
      for (std::size_t head = 0; head < group; head += heads_at_once) {
        const std::size_t heads = least(heads_at_once, group - head);
        for (std::size_t row = start; row < stop; row += rows_at_once) {
          const std::size_t rows = least(rows_at_once, stop - row), end = past + row - start + rows;
          const std::size_t keys = a.window != 0 ? least(end, a.window + rows) : end;
          // Reading a key costs about as much as scoring it for eight queries.
          f(Job{s, kv_head, row, rows, kv_head * group + head, heads}, keys * (rows * heads + 8));
        }
      }
    }
  }
}

void attention(const AttentionArguments& a, const Sequences& sequences, void* scratch, Share share) {
  std::size_t heads_at_once = least(a.heads / a.cache.kv_heads, kTile);
  std::size_t total = 0, jobs = 0;
  while (true) {
    total = jobs = 0;
    for_each_job(a, sequences, heads_at_once, [&](const Job&, std::size_t cost) { total += cost, ++jobs; });
    if (jobs >= share.count || heads_at_once == 1) break;
    heads_at_once = (heads_at_once + 1) / 2;  // more threads than KV heads: some read the same keys
  }
  std::size_t sum = 0;
  for_each_job(a, sequences, heads_at_once, [&](const Job& job, std::size_t cost) {
    const std::size_t owner = (2 * sum + cost) * share.count / (2 * total);  // by the middle of its cost
    sum += cost;
    if (owner == share.index) attend(a, sequences, job, scratch);
  });
}

}  // namespace
}  // namespace everybit::engine
