// gemv where each token names its precision on the device, so that a captured graph serves any mixture. Planes are read
// once for every precision that occurs. Compiled after gemv.cu, whose kernel is not used.

struct Precision {
  const u32* tables;
  const float* scales;
};
struct Precisions {
  Precision of[9];  // by bits; tables of those that the weight does not have are null
};

template <class T, bool BYTES, int NT>
struct Mixed {
  static constexpr int kDepth = 2, kWarps = 4;
  template <int BITS>
  using Kernel = Gemv<T, BITS, BYTES && BITS <= 3, NT, kDepth, kWarps>;
  using Shared = typename Kernel<8>::Shared;

  template <int BITS>
  static __device__ __forceinline__ void serve(void* memory, Weight w, const Precisions& all, const u16* x,
                                               int x_stride, u16* y, int tokens, const int* chosen) {
    static_assert(sizeof(typename Kernel<BITS>::Shared) <= sizeof(Shared), "one memory for all");
    bool wanted = false;
    for (int token = 0; token < tokens; ++token) wanted |= chosen[token] == BITS;
    if (!wanted || all.of[BITS].tables == nullptr) return;
    w.tables = all.of[BITS].tables, w.scales = all.of[BITS].scales;
    Kernel<BITS>::run(*static_cast<typename Kernel<BITS>::Shared*>(memory), w, x, x_stride, y, tokens, chosen);
    __syncthreads();
  }
  static __device__ __forceinline__ void run(void* memory, const Weight& w, const Precisions& all, const u16* x,
                                             int x_stride, u16* y, int tokens, const int* chosen) {
    after_previous_kernel();
    serve<2>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<3>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<4>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<5>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<6>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<7>(memory, w, all, x, x_stride, y, tokens, chosen);
    serve<8>(memory, w, all, x, x_stride, y, tokens, chosen);
  }
};

#ifndef KERNEL_EMULATED
extern "C" __global__ void __launch_bounds__(128, 1)
    mixed(const Vec4* planes, const Precision* precisions, int rows, int row_tiles, int column_tiles, const u16* x,
          int x_stride, u16* y, int tokens, const int* chosen) {
  using Kernel = Mixed<KERNEL_TYPE, KERNEL_BYTES, KERNEL_TILES>;
  extern __shared__ u8 memory[];
  const Weight w{planes, nullptr, nullptr, rows, row_tiles, column_tiles};
  Precisions all;
  for (int b = 0; b < 9; ++b) all.of[b] = precisions[b];
  Kernel::run(memory + (-shared_address(memory) & 4095), w, all, x, x_stride, y, tokens, chosen);
}
#endif
