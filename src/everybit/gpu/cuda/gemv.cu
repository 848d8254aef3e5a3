// y = x W' for a few tokens. A block is 16 rows of W, its warps share K, and the numbers of W never leave registers.
// Compiled at first use for one KERNEL_TYPE, KERNEL_INT8, KERNEL_BITS, KERNEL_TILES (of 8 tokens), KERNEL_WARPS.

constexpr int kWarps = KERNEL_WARPS;

struct Weight {
  const Vec4* planes;   // [B][row tiles][column tiles][32 lanes]
  const u8* tables;     // [row tiles * 16][RowTables::kBytes]
  const u16* steps;     // [row tiles * 16], above 4 bits: in units of the scale, at this precision
  const float* scales;  // [row tiles * 16]
  int rows, row_tiles, column_tiles;
};

template <class T, int BITS, bool INT8, int NT>
__device__ __forceinline__ void accumulate(const RowTables<T, BITS, INT8> (&tables)[2], const u32 (&steps)[2],
                                           const Vec4 (&tile)[BITS], const Vec4* (&x)[NT], float (&sums)[NT][4]) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    u32 words[2][BITS];
#pragma unroll
    for (int p = 0; p < BITS; ++p) {
      words[0][p] = q == 0 ? tile[p].x : tile[p].y;
      words[1][p] = q == 0 ? tile[p].z : tile[p].w;
    }
    const Codes<BITS> upper(words[0]), lower(words[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 a[4], b[4];  // of rows g and g + 8
      decode<T, BITS, INT8>(tables[0], upper, i, steps[0], a);
      decode<T, BITS, INT8>(tables[1], lower, i, steps[1], b);
      const u32 first[4] = {a[0], b[0], a[1], b[1]}, second[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4 v = load_cached(x[n] + 16 * q + 4 * i);
        T::mma(sums[n], first, v.x, v.y);
        T::mma(sums[n], second, v.z, v.w);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) x[n] += kWarps * 32;
}

// Rows of this block for all tokens; where `chosen` is given, only tokens of this precision are written.
template <class T, int BITS, bool INT8, int NT>
__device__ __forceinline__ void rows_times(const Weight& w, const u16* x, int x_stride, u16* y, int tokens, const int* chosen,
                                           float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const size_t plane = size_t(w.row_tiles) * w.column_tiles * 32;
  const Vec4* source = w.planes + (size_t(blockIdx.x) * w.column_tiles + warp) * 32 + lane;
  Vec4 tile[BITS], next[BITS];
  int left = (w.column_tiles - warp + kWarps - 1) / kWarps;
  if (left > 0) {
#pragma unroll
    for (int p = 0; p < BITS; ++p) tile[p] = load_stream(source + p * plane);
  }
  RowTables<T, BITS, INT8> tables[2];
  u32 steps[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const size_t row = blockIdx.x * 16 + g + 8 * h;
    tables[h].load(w.tables + row * RowTables<T, BITS, INT8>::kBytes);
    if constexpr (Shape<BITS>::kGrid) steps[h] = w.steps[row] * 0x00010001u;
  }
  const Vec4* in[NT];
  float sums[NT][4];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int token = 8 * n + g < tokens ? 8 * n + g : tokens - 1;
    in[n] = reinterpret_cast<const Vec4*>(x + size_t(token) * x_stride + warp * 256 + 8 * t);
    sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
  }
  for (; left > 0; --left) {
    source += kWarps * 32;
    if (left > 1) {
#pragma unroll
      for (int p = 0; p < BITS; ++p) next[p] = load_stream(source + p * plane);
    }
    accumulate<T, BITS, INT8, NT>(tables, steps, tile, in, sums);
#pragma unroll
    for (int p = 0; p < BITS; ++p) tile[p] = next[p];
  }
  // sums[n]: row g of tokens 8n + 2t and 8n + 2t + 1, then row g + 8 of them. Shared: [warp][token][16 rows]
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) shared[((warp * NT + n) * 8 + 2 * t + e % 2) * 16 + g + e / 2 * 8] = sums[n][e];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < NT * 8 * 16; at += kWarps * 32) {
    const int token = at / 16, row = blockIdx.x * 16 + at % 16;
    if (token >= tokens || row >= w.rows || (chosen && chosen[token] != BITS)) continue;
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kWarps; ++s) sum += shared[s * NT * 8 * 16 + at];
    y[size_t(token) * w.rows + row] = T::round(w.scales[row] * sum);
  }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32)
    gemv(const Vec4* planes, const u8* tables, const u16* steps, const float* scales, int rows, int row_tiles,
         int column_tiles, const u16* x, int x_stride, u16* y, int tokens) {
  __shared__ float shared[kWarps * KERNEL_TILES * 8 * 16];
  const Weight w{planes, tables, steps, scales, rows, row_tiles, column_tiles};
  rows_times<KERNEL_TYPE, KERNEL_BITS, KERNEL_INT8, KERNEL_TILES>(w, x, x_stride, y, tokens, nullptr, shared);
}
