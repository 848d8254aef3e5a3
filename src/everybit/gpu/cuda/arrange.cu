// Before gemm.cu: activations as the images that its stages copy.

// x to images of the stages, [token tiles][chunks][TOKENS][128 bytes], swizzled and in the order that `decode` puts
// columns: of 32 columns, slice f (of 16) holds at place 8h + 2t + e column 8t + 4f + 2h + e. Beyond x there are zeros.
template <int TOKENS>
__device__ __forceinline__ void arrange_group(const u16* x, int x_stride, int tokens, int columns, int chunks,
                                              Vec4* images, int token, int group) {
  u32 words[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = 32 * group + 8 * t;
    Vec4 v{0, 0, 0, 0};
    if (token < tokens && column < columns)
      v = load_cached(reinterpret_cast<const Vec4*>(x + size_t(token) * x_stride + column));
    words[t][0] = v.x, words[t][1] = v.y, words[t][2] = v.z, words[t][3] = v.w;
  }
  const int row = token % TOKENS;
  Vec4* out = images + ((size_t(token / TOKENS) * chunks + group / 2) * TOKENS + row) * 8;
#pragma unroll
  for (int w = 0; w < 4; ++w) {  // w = 2f + h
    const int unit = group % 2 * 4 + w;
    out[unit ^ (row % 8)] = Vec4{words[0][w], words[1][w], words[2][w], words[3][w]};
  }
}

#ifndef KERNEL_EMULATED
extern "C" __global__ void __launch_bounds__(256)
    arrange(const u16* x, int x_stride, int tokens, int columns, int chunks, Vec4* images) {
  after_previous_kernel();
  const int group = blockIdx.y * 64 + threadIdx.x % 64, token = blockIdx.x * 4 + threadIdx.x / 64;
  if (group < chunks * 2) arrange_group<KERNEL_TOKENS>(x, x_stride, tokens, columns, chunks, images, token, group);
}
#endif
