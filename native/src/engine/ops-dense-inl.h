// Products with plain weights: y (+)= x W^T + bias, sums in f32.
//
// Stored [N][K]: vectors run along K. A sum is made of kDepth columns at a time: lanes, then a fixed tree over the
// lanes, then added to y. One token reads W straight from memory, eight rows at once; more tokens widen eight rows of
// kDepth columns into scratch (24 KiB, L1) and run kTokens at a time over them. Both do the same additions in the same
// order, so a token's result does not depend on the tokens beside it.
// Stored [K][N]: vectors run along N, and every y is one chain of K multiply-adds in either case.
#pragma once

#include "ops-vector-inl.h"

namespace everybit::engine {
namespace {

constexpr std::size_t kDepth = 768;  // columns
constexpr std::size_t kPanel = 128;  // tokens: x of kDepth columns and this many tokens is 384 KiB (L2)
constexpr std::size_t kRows = 8;     // of W at a time
// Sums in registers are kTokens * kMicro; more tokens than 3 would not leave room for x, fewer read more of L1.
constexpr std::size_t kTokens = 3;
constexpr std::size_t kMicro = kRegisters == 32 ? 8 : 4;  // rows
static_assert(kRows * kDepth * sizeof(float) <= kDenseScratchBytes);
static_assert(kDepth % 16 == 0);

// y[n .. n+count-1] = (first block: bias and, if adding, y) or y, plus four sums.
EVERYBIT_INLINE void emit_four(const Output& out, float* y, std::size_t n, std::size_t count, bool first, V4 sums) {
  if (count >= 4) {
    UnalignedV4* to = reinterpret_cast<UnalignedV4*>(y + n);
    V4 base = first && !out.add ? V4{} : V4(*to);
    if (first && out.bias != nullptr) base += *reinterpret_cast<const UnalignedV4*>(out.bias + n);
    *to = base + sums;
    return;
  }
  for (std::size_t j = 0; j < count; ++j) {
    float base = first && !out.add ? 0.0f : y[n + j];
    if (first && out.bias != nullptr) base += out.bias[n + j];
    y[n + j] = base + sums[j];
  }
}

template <std::size_t kN>
EVERYBIT_INLINE void emit(const Output& out, std::size_t token, std::size_t n, std::size_t count, bool first,
                          const V* sums) {
  float* y = out.data + token * out.stride;
  EVERYBIT_UNROLL for (std::size_t j = 0; j < kN; j += 4) if (count > j)
      emit_four(out, y, n + j, count - j, first, sums_of(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]));
}

template <Dtype kDtype>
void dense_one(const Matrix& w, const float* x, Range rows, const Output& out) {
  constexpr std::size_t kSize = size_of(kDtype);
  const std::size_t columns = w.columns;
  const Bytes data = static_cast<Bytes>(w.data);
  for (std::size_t n = rows.begin; n < rows.end; n += kRows) {
    const std::size_t count = least(kRows, rows.end - n);
    Bytes row[kRows];  // beyond the range: its last row again
    EVERYBIT_UNROLL for (std::size_t j = 0; j < kRows; ++j) row[j] = data + (n + least(j, count - 1)) * columns * kSize;
    for (std::size_t k0 = 0; k0 < columns; k0 += kDepth) {
      const std::size_t k1 = least(columns, k0 + kDepth);
      V sums[kRows];
      EVERYBIT_UNROLL for (std::size_t j = 0; j < kRows; ++j) sums[j] = V{};
      std::size_t k = k0;
      for (; k + kLanes <= k1; k += kLanes) {
        const V xs = load(x + k);
        EVERYBIT_UNROLL for (std::size_t j = 0; j < kRows; ++j) sums[j] =
            fma(xs, load_as<kDtype>(row[j] + k * kSize), sums[j]);
      }
      if (k < k1) {
        const V xs = load_first(x + k, k1 - k);
        EVERYBIT_UNROLL for (std::size_t j = 0; j < kRows; ++j) sums[j] =
            fma(xs, load_first_as<kDtype>(row[j] + k * kSize, k1 - k), sums[j]);
      }
      emit<kRows>(out, 0, n, count, k0 == 0, sums);
    }
  }
}

// Rows n .. n+count-1, columns k0 .. k1-1 of W into tile[kRows][kDepth]; zeros beyond.
template <Dtype kDtype>
void widen_rows(const Matrix& w, std::size_t n, std::size_t count, std::size_t k0, std::size_t k1, float* tile) {
  constexpr std::size_t kSize = size_of(kDtype);
  for (std::size_t j = 0; j < kRows; ++j) {
    float* to = tile + j * kDepth;
    if (j >= count) {
      for (std::size_t k = k0; k < k1; k += kLanes) store(to + k - k0, V{});
      continue;
    }
    const Bytes from = static_cast<Bytes>(w.data) + (n + j) * w.columns * kSize;
    for (std::size_t k = k0; k < k1; k += kLanes) store(to + k - k0, load_up_to_as<kDtype>(from + k * kSize, k1 - k));
  }
}

// One vector of columns of kT tokens and kMicro rows.
template <std::size_t kT>
EVERYBIT_INLINE void multiply_add(const V (&x)[kT], const float* tile, V (&sums)[kT][kMicro]) {
  EVERYBIT_UNROLL for (std::size_t j = 0; j < kMicro; ++j) {
    const V weight = held(load(tile + j * kDepth));
    EVERYBIT_UNROLL for (std::size_t t = 0; t < kT; ++t) sums[t][j] = fma(x[t], weight, sums[t][j]);
  }
}

// The part of `out` that kT tokens and the tile's rows n .. n+count-1 make, from `depth` columns.
template <std::size_t kT>
void multiply(const float* x, std::size_t stride, const float* tile, std::size_t depth, const Output& out,
              std::size_t token, std::size_t n, std::size_t count, bool first) {
  for (std::size_t j0 = 0; j0 < count; j0 += kMicro, tile += kMicro * kDepth) {
    V sums[kT][kMicro], xs[kT];
    EVERYBIT_UNROLL for (std::size_t t = 0; t < kT; ++t) {
      EVERYBIT_UNROLL for (std::size_t j = 0; j < kMicro; ++j) sums[t][j] = V{};
    }
    std::size_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      EVERYBIT_UNROLL for (std::size_t t = 0; t < kT; ++t) xs[t] = load(x + t * stride + k);
      multiply_add<kT>(xs, tile + k, sums);
    }
    if (k < depth) {
      EVERYBIT_UNROLL for (std::size_t t = 0; t < kT; ++t) xs[t] = load_first(x + t * stride + k, depth - k);
      multiply_add<kT>(xs, tile + k, sums);
    }
    EVERYBIT_UNROLL for (std::size_t t = 0; t < kT; ++t) {
      emit<kMicro>(out, token + t, n + j0, count - j0, first, sums[t]);
    }
  }
}

void dense_many(const Matrix& w, Columns x, std::size_t tokens, Range rows, const Output& out, float* tile) {
  for (std::size_t panel = 0; panel < tokens; panel += kPanel) {
    const std::size_t stop = least(tokens, panel + kPanel);
    for (std::size_t k0 = 0; k0 < w.columns; k0 += kDepth) {
      const std::size_t depth = least(w.columns - k0, kDepth);
      const float* column = x.data + k0;
      for (std::size_t n = rows.begin; n < rows.end; n += kRows) {
        const std::size_t count = least(kRows, rows.end - n);
        dispatch(w.dtype, [&](auto as) { widen_rows<decltype(as)::dtype>(w, n, count, k0, k0 + depth, tile); });
        std::size_t t = panel;
        for (; t + kTokens <= stop; t += kTokens)
          multiply<kTokens>(column + t * x.stride, x.stride, tile, depth, out, t, n, count, k0 == 0);
        for (; t < stop; ++t) multiply<1>(column + t * x.stride, x.stride, tile, depth, out, t, n, count, k0 == 0);
      }
    }
  }
}

// y[0 .. count-1] += x[0..kK-1] times kK consecutive rows of a [K][N] matrix, in that order.
template <Dtype kDtype, std::size_t kK>
EVERYBIT_INLINE void add_rows(const float* x, Bytes w, std::size_t stride, std::size_t count, float* y) {
  constexpr std::size_t kSize = size_of(kDtype);
  std::size_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    V sum = load(y + j);
    EVERYBIT_UNROLL for (std::size_t k = 0; k < kK; ++k) {
      sum = fma(splat(x[k]), load_as<kDtype>(w + k * stride + j * kSize), sum);
    }
    store(y + j, sum);
  }
  if (j < count) {
    V sum = load_first(y + j, count - j);
    EVERYBIT_UNROLL for (std::size_t k = 0; k < kK; ++k) {
      sum = fma(splat(x[k]), load_first_as<kDtype>(w + k * stride + j * kSize, count - j), sum);
    }
    store_first(y + j, sum, count - j);
  }
}

template <Dtype kDtype>
void dense_transposed(const Matrix& w, Columns x, std::size_t tokens, Range rows, const Output& out) {
  constexpr std::size_t kSize = size_of(kDtype);
  const std::size_t stride = w.rows * kSize;
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t n = rows.begin; n < rows.end; ++n) {
      float& y = out.data[t * out.stride + n];
      y = (out.add ? y : 0.0f) + (out.bias != nullptr ? out.bias[n] : 0.0f);
    }
  }
  // One token: whole rows of W, as they lie in memory. Several: 1024 columns by eight rows stay in L1 for all of them.
  const std::size_t strip = tokens == 1 ? rows.end - rows.begin : 1024;
  for (std::size_t n = rows.begin; n < rows.end; n += strip) {
    const std::size_t count = least(strip, rows.end - n);
    std::size_t k = 0;
    for (; k + 8 <= w.columns; k += 8)
      for (std::size_t t = 0; t < tokens; ++t)
        add_rows<kDtype, 8>(x.data + t * x.stride + k, static_cast<Bytes>(w.data) + k * stride + n * kSize, stride,
                            count, out.data + t * out.stride + n);
    for (; k < w.columns; ++k)
      for (std::size_t t = 0; t < tokens; ++t)
        add_rows<kDtype, 1>(x.data + t * x.stride + k, static_cast<Bytes>(w.data) + k * stride + n * kSize, stride,
                            count, out.data + t * out.stride + n);
  }
}

void dense(const Matrix& w, Columns x, std::size_t tokens, Range rows, const Output& out, void* scratch) {
  if (rows.begin >= rows.end || tokens == 0) return;
  if (w.transposed) {
    dispatch(w.dtype, [&](auto as) { dense_transposed<decltype(as)::dtype>(w, x, tokens, rows, out); });
  } else if (tokens == 1) {
    dispatch(w.dtype, [&](auto as) { dense_one<decltype(as)::dtype>(w, x.data, rows, out); });
  } else {
    dense_many(w, x, tokens, rows, out, static_cast<float*>(scratch));
  }
}

}  // namespace
}  // namespace everybit::engine
