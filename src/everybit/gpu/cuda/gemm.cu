// y = x W' for many tokens on sm_90a. KERNEL_GROUPS warp groups decode weights into registers while the tensor cores
// multiply what they decoded before; one more brings x, which `arrange` laid out as stages. A block is KERNEL_TOKENS
// tokens x KERNEL_ROWS rows, 64 for a group; where rows are for fewer groups, several share the columns of the same
// rows.

constexpr int kChunk = 64;      // columns of x in one stage: rows of 128 bytes
constexpr int kPitch = 64 + 8;  // of a token in the output's staging, in numbers

template <class T, int BITS, bool BYTES, int TOKENS, int ROWS, int GROUPS, int STAGES>
struct Gemm {
  using B = Book<T, BITS, BYTES>;
  static constexpr int kThreads = GROUPS * 128;        // that multiply
  static constexpr int kShare = GROUPS / (ROWS / 64);  // groups for the same rows: column tile c is of group c % kShare
  struct Shared {
    alignas(4096) u8 tables[B::kShared ? ROWS / 16 : 1][B::kShared ? B::kShared : 16];
    alignas(1024) u8 stages[STAGES][TOKENS * kChunk * 2];
    Barrier full[STAGES], empty[STAGES];
  };
  static_assert(kShare >= 1 && (kShare == 1 || ROWS == 64), "groups share the rows of a whole block");
  static_assert(ROWS / 64 * TOKENS * kPitch * 2 <= STAGES * TOKENS * kChunk * 2, "the output is staged there too");
  static_assert((kShare - 1) * TOKENS * 64 * 4 <= STAGES * TOKENS * kChunk * 2, "and the sums of other groups");

  // Stages are brought in the order that groups need them: chunk 0 of kShare column tiles, then chunk 1 of them, ...
  static __device__ __forceinline__ void produce(Shared& shared, const u8* images, int column_tiles) {
    after_previous_kernel();
    for (int first = 0, at = 0; first < column_tiles; first += kShare) {
      const int width = sharers(first, column_tiles);
      for (int i = 0; i < 4 * width; ++i, ++at) {
        const int stage = at % STAGES, chunk = (first + i % width) * 4 + i / width;
        shared.empty[stage].wait(at / STAGES % 2 ^ 1);
        shared.full[stage].copy(shared.stages[stage], images + size_t(chunk) * sizeof(shared.stages[0]),
                                sizeof(shared.stages[0]));
      }
    }
  }
  // Groups that have one of the column tiles from `first` on.
  static __device__ __forceinline__ int sharers(int first, int column_tiles) {
    return column_tiles - first < kShare ? column_tiles - first : kShare;
  }

  static __device__ __forceinline__ void load(Vec4 (&tile)[BITS], const Weight& w, int row_tile, int column_tile) {
    const Vec4* source = w.tile(row_tile, column_tile);
    const size_t plane = w.plane();
#pragma unroll
    for (int p = 0; p < BITS; ++p) tile[p] = load_cached(source + p * plane);
  }

  static __device__ __forceinline__ void consume(Shared& shared, const Weight& w, u16* y, int tokens) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int block = group / kShare, share = group % kShare;  // of 64 rows; of the columns
    const int tile_of_block = block * 4 + warp % 4, wanted = blockIdx.x * (ROWS / 16) + tile_of_block;
    const int row_tile = wanted < w.row_tiles ? wanted : w.row_tiles - 1;
    Vec4 tile[BITS], next[BITS];
    if (share < w.column_tiles) load(next, w, row_tile, share);
    B book;
    if constexpr (BYTES) {
      book.open(w.tables, row_tile);
    } else {
#pragma unroll 1
      for (int part = share; part < 8; part += kShare) {  // the warps of a row tile make its table together
        u32 held[4];
        B::template fetch<8>(w.tables, row_tile, part, held);
        B::template store<8>(shared.tables[tile_of_block], part, held);
      }
      sync_some(1, kThreads);
      book.open(shared.tables[tile_of_block]);
    }
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0;

    int before = -1;  // the stage of the chunk before
    for (int c = share; c < w.column_tiles; c += kShare) {
#pragma unroll
      for (int p = 0; p < BITS; ++p) tile[p] = next[p];
      if (c + kShare < w.column_tiles) load(next, w, row_tile, c + kShare);
      int at = (c - share) * 4 + share;  // of the chunk in the order of `produce`
      Codes<BITS> codes[2][2];
      codes[0][0].open(tile, 0, 0), codes[0][1].open(tile, 0, 1);
      Slice<B, BITS> slice, coming;
      slice.look(book, codes[0], 0);
#pragma unroll
      for (int s = 0; s < 16; ++s) {
        const int stage = at % STAGES;
        if (s == 7) codes[1][0].open(tile, 1, 0), codes[1][1].open(tile, 1, 1);
        if (s < 15) coming.look(book, codes[(s + 1) / 8], s + 1);
        u32 a[4];
        slice.finish(codes[s / 8], s, a);
        if (s % 4 == 0) shared.full[stage].wait(at / STAGES % 2);
        products_fence();
        Products<T>::template times<TOKENS>(sums, a, swizzled_rows(shared.stages[stage] + s % 4 * 32));
        products_commit();
        products_wait<1>();  // all but this: the chunk before is read, and the next fragment may be written
        if (s % 4 == 1 && before >= 0 && lane == 0) shared.empty[before].arrive();
        if (s % 4 == 3) before = stage, at += sharers(c - share, w.column_tiles);
        slice = coming;
      }
    }
    products_wait<0>();
    if (before >= 0 && lane == 0) shared.empty[before].arrive();  // other groups may still wait for its place
    sync_some(1, kThreads);                                       // all have read x: its place is free
    if constexpr (kShare > 1) {
      float* others = reinterpret_cast<float*>(&shared.stages[0][0]) + threadIdx.x % 128;
      if (share > 0) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) others[((share - 1) * (TOKENS / 2) + i) * 128] = sums[i];
      }
      sync_some(1, kThreads);
      if (share > 0) return;
#pragma unroll 1
      for (int s = 0; s < kShare - 1; ++s) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sums[i] += others[(s * (TOKENS / 2) + i) * 128];
      }
      sync_some(2, 128);
    }
    write(shared, w, y, tokens, block, sums);
  }

  // sums[4n ...]: row g of tokens 8n + 2t and 8n + 2t + 1, then row g + 8 of them; turned in shared memory.
  static __device__ __forceinline__ void write(Shared& shared, const Weight& w, u16* y, int tokens, int block,
                                               const float (&sums)[TOKENS / 2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4;
    const int first_row = blockIdx.x * ROWS + block * 64;
    u16* staging = reinterpret_cast<u16*>(&shared.stages[0][0]) + block * TOKENS * kPitch;
    const int row = first_row + warp * 16 + g, last = w.row_tiles * 16 - 1;
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
      store_transposed(staging + (8 * (n + m / 2) + lane % 8) * kPitch + warp * 16 + m % 2 * 8, packed[0], packed[1],
                       packed[2], packed[3]);
    }
    sync_some(2 + block, 128);
    const int first_token = blockIdx.y * TOKENS;
    for (int at = threadIdx.x % 128; at < TOKENS * 8; at += 128) {
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
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; ++s) shared.full[s].init(1), shared.empty[s].init(4 * (ROWS / 64));
      publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= kThreads) {
      if constexpr (GROUPS == 2) give_registers<40>();
      const u8* of_tokens = images + blockIdx.y * size_t(w.column_tiles) * (256 / kChunk) * sizeof(shared.stages[0]);
      if (threadIdx.x == kThreads) produce(shared, of_tokens, w.column_tiles);
    } else {
      if constexpr (GROUPS == 2) take_registers<232>();
      consume(shared, w, y, tokens);
    }
  }
};

#ifndef KERNEL_EMULATED
extern "C" __global__ void __launch_bounds__(KERNEL_GROUPS * 128 + 128, 1)
    gemm(const Vec4* planes, const u32* tables, const float* scales, int rows, int row_tiles, int column_tiles,
         const u8* images, u16* y, int tokens) {
  using Kernel = Gemm<KERNEL_TYPE, KERNEL_BITS, KERNEL_BYTES, KERNEL_TOKENS, KERNEL_ROWS, KERNEL_GROUPS, KERNEL_STAGES>;
  extern __shared__ u8 memory[];
  const Weight w{planes, tables, scales, rows, row_tiles, column_tiles};
  Kernel::run(*reinterpret_cast<typename Kernel::Shared*>(memory + (-shared_address(memory) & 4095)), w, images, y,
              tokens);
}
#endif
