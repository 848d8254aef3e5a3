// y = x W' for many tokens on sm_90a. A block is 128 rows of W x KERNEL_TOKENS tokens; two warp groups decode 64 rows each
// into registers while the tensor cores multiply what they decoded before; a third brings x. `arrange` runs before.

struct Weight {
  const Vec4* planes;   // [B][row tiles][column tiles][32 lanes]
  const u8* tables;     // [row tiles * 16][RowTables::kBytes]
  const u16* steps;     // [row tiles * 16]
  const float* scales;  // [row tiles * 16]
  int rows, row_tiles, column_tiles;
};

constexpr int kChunk = 64;        // columns of x in one stage: rows of 128 bytes
constexpr int kConsumers = 256;   // threads
constexpr int kPitch = 64 + 8;    // of a token in the output's staging, in numbers

template <class T, int BITS, bool INT8, int TOKENS, int STAGES>
struct Gemm {
  struct Shared {
    alignas(1024) u8 stages[STAGES][TOKENS * kChunk * 2];
    Barrier full[STAGES], empty[STAGES];
  };
  static_assert(kConsumers / 128 * TOKENS * kPitch * 2 <= STAGES * TOKENS * kChunk * 2, "the output is staged there too");

  static __device__ __forceinline__ void produce(Shared& shared, const u8* images, int chunks) {
    for (int c = 0; c < chunks; ++c) {
      const int stage = c % STAGES, round = c / STAGES;
      shared.empty[stage].wait(round % 2 ^ 1);
      shared.full[stage].copy(shared.stages[stage], images + size_t(c) * sizeof(shared.stages[0]), sizeof(shared.stages[0]));
    }
  }

  static __device__ __forceinline__ void consume(Shared& shared, const Weight& w, u16* y, int tokens, int row_block) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const int wanted = row_block * 8 + warp, row_tile = wanted < w.row_tiles ? wanted : w.row_tiles - 1;
    const size_t plane = size_t(w.row_tiles) * w.column_tiles * 32;
    const Vec4* source = w.planes + size_t(row_tile) * w.column_tiles * 32 + lane;
    Vec4 tile[BITS], next[BITS];
#pragma unroll
    for (int p = 0; p < BITS; ++p) next[p] = load_cached(source + p * plane);
    RowTables<T, BITS, INT8> tables[2];
    u32 steps[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const size_t row = row_tile * 16 + g + 8 * h;
      tables[h].load(w.tables + row * RowTables<T, BITS, INT8>::kBytes);
      if constexpr (Shape<BITS>::kGrid) steps[h] = w.steps[row] * 0x00010001u;
    }
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0;

    int chunk = 0;
    for (int c = 0; c < w.column_tiles; ++c) {
#pragma unroll
      for (int p = 0; p < BITS; ++p) tile[p] = next[p];
      source += 32;
      if (c + 1 < w.column_tiles) {
#pragma unroll
        for (int p = 0; p < BITS; ++p) next[p] = load_cached(source + p * plane);
      }
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
          u32 a[4], b[4];
          decode<T, BITS, INT8>(tables[0], upper, i, steps[0], a);
          decode<T, BITS, INT8>(tables[1], lower, i, steps[1], b);
          const u32 first[4] = {a[0], b[0], a[1], b[1]}, second[4] = {a[2], b[2], a[3], b[3]};
          const int stage = chunk % STAGES;
          if (i % 2 == 0) shared.full[stage].wait(chunk / STAGES % 2);
          const u8* x = shared.stages[stage] + i % 2 * 64;
          products_fence();
          Products<T>::template times<TOKENS>(sums, first, swizzled_rows(x));
          Products<T>::template times<TOKENS>(sums, second, swizzled_rows(x + 32));
          products_commit();
          products_wait<1>();
          if (i % 2 == 0 && chunk > 0 && lane == 0) shared.empty[(chunk - 1) % STAGES].arrive();
          if (i % 2 == 1) ++chunk;
        }
      }
    }
    products_wait<0>();
    write(shared, w, y, tokens, row_block, sums);
  }

  // sums[4n ...]: row g of tokens 8n + 2t and 8n + 2t + 1, then row g + 8 of them; turned in shared memory.
  static __device__ __forceinline__ void write(Shared& shared, const Weight& w, u16* y, int tokens, int row_block,
                                               const float (&sums)[TOKENS / 2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4, g = lane / 4;
    const int first_row = row_block * 128 + group * 64;
    sync_some(1, kConsumers);  // the other group may still read x there
    u16* staging = reinterpret_cast<u16*>(&shared.stages[0][0]) + group * TOKENS * kPitch;
    const int row = first_row + warp % 4 * 16 + g, last = w.row_tiles * 16 - 1;
    const float upper = w.scales[row < last ? row : last], lower = w.scales[row + 8 < last ? row + 8 : last];
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
      u32 packed[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {  // token eights n, n + 1; rows g, g + 8 of each
        const float* s = sums + 4 * (n + m / 2) + m % 2 * 2;
        const float scale = m % 2 ? lower : upper;
        packed[m] = u32(T::round(scale * s[0])) | u32(T::round(scale * s[1])) << 16;
      }
      const int m = lane / 8;
      store_transposed(staging + (8 * (n + m / 2) + lane % 8) * kPitch + warp % 4 * 16 + m % 2 * 8, packed[0], packed[1],
                       packed[2], packed[3]);
    }
    sync_some(2 + group, 128);
    const int thread = threadIdx.x % 128, first_token = blockIdx.y * TOKENS;
    for (int at = thread; at < TOKENS * 8; at += 128) {
      const int token = first_token + at / 8, from = first_row + at % 8 * 8;
      if (token >= tokens) continue;
      const u16* in = staging + at / 8 * kPitch + at % 8 * 8;
      u16* out = y + size_t(token) * w.rows + from;
      if (w.rows % 8 == 0 && from + 8 <= w.rows) {
        *reinterpret_cast<Vec4*>(out) = *reinterpret_cast<const Vec4*>(in);
      } else {
        for (int e = 0; e < 8 && from + e < w.rows; ++e) out[e] = in[e];
      }
    }
  }

  static __device__ __forceinline__ void run(Shared& shared, const Weight& w, const u8* images, u16* y, int tokens) {
    const int chunks = w.column_tiles * (256 / kChunk);
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; ++s) shared.full[s].init(1), shared.empty[s].init(kConsumers / 32);
      publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
      give_registers<40>();
      if (threadIdx.x == kConsumers) produce(shared, images + blockIdx.y * size_t(chunks) * sizeof(shared.stages[0]), chunks);
    } else {
      take_registers<232>();
      consume(shared, w, y, tokens, blockIdx.x);
    }
  }
};

#ifndef KERNEL_EMULATED
extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    gemm(const Vec4* planes, const u8* tables, const u16* steps, const float* scales, int rows, int row_tiles,
         int column_tiles, const u8* images, u16* y, int tokens) {
  using Kernel = Gemm<KERNEL_TYPE, KERNEL_BITS, KERNEL_INT8, KERNEL_TOKENS, KERNEL_STAGES>;
  extern __shared__ u8 memory[];
  const u32 ahead = -shared_address(memory) % 1024;
  const Weight w{planes, tables, steps, scales, rows, row_tiles, column_tiles};
  Kernel::run(*reinterpret_cast<typename Kernel::Shared*>(memory + ahead), w, images, y, tokens);
}
#endif
