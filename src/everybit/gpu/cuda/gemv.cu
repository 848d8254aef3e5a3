// y = x W' for a few tokens. A block takes row tiles one after another; its warps share the columns, and the numbers of
// W never leave registers. Compiled at first use for one KERNEL_TYPE, KERNEL_BYTES, KERNEL_BITS, KERNEL_TILES (of 8
// tokens).

template <class T, int BITS, bool BYTES, int NT, int DEPTH, int kWarps>
struct Gemv {
  using B = Book<T, BITS, BYTES>;
  static constexpr int kPitch = 20;  // of a token's 16 rows: no two lanes write to one bank
  struct Shared {  // two of tables and sums: a block prepares the next row tile while some warps finish this one
    alignas(4096) u8 tables[2][B::kShared ? B::kShared : 16];
    Vec4 ring[DEPTH][BITS][kWarps * 32];  // each thread's own
    float sums[2][kWarps][NT * 8][kPitch];
  };

  // The tiles of a warp: those of its columns in the block's row tiles, one after another.
  struct Tiles {
    const Weight& w;
    int row_tile, column_tile, slot;

    __device__ __forceinline__ void load(Shared& shared) {  // the next one, or nothing
      if (row_tile < w.row_tiles && column_tile < w.column_tiles) {
        const Vec4* source = w.tile(row_tile, column_tile);
        const size_t plane = w.plane();
#pragma unroll
        for (int p = 0; p < BITS; ++p) copy_ahead(&shared.ring[slot][p][threadIdx.x], source + p * plane);
        step();
      }
      end_group();
    }
    __device__ __forceinline__ void step() {
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
      column_tile += kWarps;
      if (column_tile >= w.column_tiles) column_tile = threadIdx.x / 32, row_tile += gridDim.x;
    }
  };

  // x holds whole column tiles. Where `chosen` is given, only tokens of this precision are written.
  static __device__ __forceinline__ void run(Shared& shared, const Weight& w, const u16* x, int x_stride, u16* y,
                                             int tokens, const int* chosen) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    Tiles ahead{w, int(blockIdx.x), warp, 0};
#pragma unroll
    for (int d = 0; d < DEPTH - 1; ++d) ahead.load(shared);
    B book;
    u32 held[32 / kWarps];
    if constexpr (!BYTES) {
      B::template fetch<kWarps>(w.tables, blockIdx.x, warp, held);
      B::template store<kWarps>(shared.tables[0], warp, held);
    }
    after_previous_kernel();
    if constexpr (!BYTES) __syncthreads();
    // lanes of no token hold anything: a column of B that is no token's makes a column of the product that is not
    // written
    const Vec4* in = reinterpret_cast<const Vec4*>(x + size_t(g) * x_stride + 8 * t);
    const int eight = x_stride;  // Vec4 between tokens 8 apart
    Book<T, BITS, BYTES> coming;
    if constexpr (BYTES) coming.open(w.tables, blockIdx.x);
    int slot = 0, turn = 0;
    for (int row_tile = blockIdx.x; row_tile < w.row_tiles; turn ^= 1, row_tile += gridDim.x) {
      const int following = row_tile + gridDim.x;
      if constexpr (BYTES) {
        book = coming;
        if (following < w.row_tiles) coming.open(w.tables, following);
      } else {
        book.open(shared.tables[turn]);
        if (following < w.row_tiles) B::template fetch<kWarps>(w.tables, following, warp, held);
      }
      const float scale = w.scales[row_tile * 16 + threadIdx.x % 16];
      float sums[NT][4];
#pragma unroll
      for (int n = 0; n < NT; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
      for (int c = warp; c < w.column_tiles; c += kWarps) {
        ahead.load(shared);
        wait_groups<DEPTH - 1>();
        Vec4 tile[BITS];
#pragma unroll
        for (int p = 0; p < BITS; ++p) tile[p] = shared.ring[slot][p][threadIdx.x];
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        accumulate(book, tile, in + 32 * c, eight, tokens - g, sums);
      }
      // sums[n]: row g of tokens 8n + 2t and 8n + 2t + 1, then row g + 8 of them
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) shared.sums[turn][warp][8 * n + 2 * t + e % 2][g + e / 2 * 8] = sums[n][e];
      }
      if constexpr (!BYTES) B::template store<kWarps>(shared.tables[turn ^ 1], warp, held);
      __syncthreads();
      for (int at = threadIdx.x; at < NT * 8 * 16; at += kWarps * 32) {
        const int token = at / 16, row = row_tile * 16 + at % 16;
        if (token >= tokens || row >= w.rows || (chosen && chosen[token] != BITS)) continue;
        float sum = 0;
#pragma unroll
        for (int s = 0; s < kWarps; ++s) sum += shared.sums[turn][s][token][at % 16];
        y[size_t(token) * w.rows + row] = T::round(scale * sum);
      }
    }
  }

  // `in` is this lane's token of the first eight, of which `left` (0 or less: none) and more tokens 8 apart are there.
  static __device__ __forceinline__ void accumulate(const B& book, const Vec4 (&tile)[BITS], const Vec4* in, int eight,
                                                    int left, float (&sums)[NT][4]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      Codes<BITS> codes[2];
      codes[0].open(tile, q, 0), codes[1].open(tile, q, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 first[4], second[4];
        Slice<B, BITS> slice;
        slice.look(book, codes, 2 * i), slice.finish(codes, 2 * i, first);
        slice.look(book, codes, 2 * i + 1), slice.finish(codes, 2 * i + 1, second);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const Vec4 v = load_if(left > 8 * n, in + size_t(n) * eight + 16 * q + 4 * i);
          T::mma(sums[n], first, v.x, v.y);
          T::mma(sums[n], second, v.z, v.w);
        }
      }
    }
  }
};

#ifdef KERNEL_BITS
extern "C" __global__ void __launch_bounds__(KERNEL_WARPS * 32, KERNEL_BLOCKS)
    gemv(const Vec4* planes, const u32* tables, const float* scales, int rows, int row_tiles, int column_tiles,
         const u16* x, int x_stride, u16* y, int tokens) {
  using Kernel = Gemv<KERNEL_TYPE, KERNEL_BITS, KERNEL_BYTES, KERNEL_TILES, KERNEL_DEPTH, KERNEL_WARPS>;
  extern __shared__ u8 memory[];
  const Weight w{planes, tables, scales, rows, row_tiles, column_tiles};
  Kernel::run(*reinterpret_cast<typename Kernel::Shared*>(memory + (-shared_address(memory) & 4095)), w, x, x_stride, y,
              tokens, nullptr);
}
#endif
