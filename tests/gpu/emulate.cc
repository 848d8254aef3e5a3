// The kernels of everybit/gpu/cuda on a CPU, for tests where there is no GPU. Built by tests/gpu/emulator.py.
#include "emulate.h"

#define KERNEL_EMULATED
#define KERNEL_TYPE F16
#define KERNEL_BITS 3
#define KERNEL_INT8 true
#define KERNEL_TILES 1
#define KERNEL_WARPS 4

#include "decode.cuh"
namespace small {
#include "gemv.cu"
}
namespace large {
#include "arrange.cu"
#include "gemm.cu"
}
using small::kWarps;
using small::Weight;

namespace {

struct Arguments {
  Weight weight;
  const u16* x;
  int x_stride;
  u16* y;
  int tokens;
};

template <class T, int BITS, bool INT8, int NT>
void run(const Arguments& a) {
  emulate::launch({unsigned(a.weight.row_tiles), 1, 1}, kWarps * 32, [&] {
    static float shared[kWarps * NT * 8 * 16];
    small::rows_times<T, BITS, INT8, NT>(a.weight, a.x, a.x_stride, a.y, a.tokens, nullptr, shared);
  });
}

template <class T, int BITS, bool INT8>
void by_tokens(const Arguments& a) {
  if (a.tokens <= 8) return run<T, BITS, INT8, 1>(a);
  return run<T, BITS, INT8, 2>(a);
}

template <class T, bool INT8>
bool by_bits(int bits, const Arguments& a) {
  switch (bits) {
    case 1: return by_tokens<T, 1, INT8>(a), true;
    case 2: return by_tokens<T, 2, INT8>(a), true;
    case 3: return by_tokens<T, 3, INT8>(a), true;
    case 4: return by_tokens<T, 4, INT8>(a), true;
    case 5: return by_tokens<T, 5, INT8>(a), true;
    case 6: return by_tokens<T, 6, INT8>(a), true;
    case 7: return by_tokens<T, 7, INT8>(a), true;
    case 8: return by_tokens<T, 8, INT8>(a), true;
  }
  return false;
}

template <class T, int BITS, bool INT8>
bool many(const Weight& weight, const u16* x, int x_stride, int columns, u16* y, int tokens) {
  constexpr int kTokens = 64;
  using Kernel = large::Gemm<T, BITS, INT8, kTokens, 3>;
  const large::Weight w{weight.planes, weight.tables, weight.steps, weight.scales, weight.rows, weight.row_tiles, weight.column_tiles};
  const int chunks = w.column_tiles * 4, token_tiles = (tokens + kTokens - 1) / kTokens;
  std::vector<Vec4> images(size_t(token_tiles) * chunks * kTokens * 8);
  for (int token = 0; token < token_tiles * kTokens; ++token)
    for (int group = 0; group < chunks * 2; ++group)
      large::arrange_group<kTokens>(x, x_stride, tokens, columns, chunks, images.data(), token, group);
  auto* shared = static_cast<typename Kernel::Shared*>(std::aligned_alloc(1024, sizeof(typename Kernel::Shared)));
  emulate::launch({unsigned(w.row_tiles + 7) / 8, unsigned(token_tiles), 1}, large::kConsumers + 128,
                  [&] { Kernel::run(*shared, w, reinterpret_cast<const u8*>(images.data()), y, tokens); });
  std::free(shared);
  return true;
}

template <class T, bool INT8>
bool many_by_bits(int bits, const Weight& w, const u16* x, int x_stride, int columns, u16* y, int tokens) {
  switch (bits) {
    case 1: return many<T, 1, INT8>(w, x, x_stride, columns, y, tokens);
    case 2: return many<T, 2, INT8>(w, x, x_stride, columns, y, tokens);
    case 3: return many<T, 3, INT8>(w, x, x_stride, columns, y, tokens);
    case 4: return many<T, 4, INT8>(w, x, x_stride, columns, y, tokens);
    case 5: return many<T, 5, INT8>(w, x, x_stride, columns, y, tokens);
    case 6: return many<T, 6, INT8>(w, x, x_stride, columns, y, tokens);
    case 7: return many<T, 7, INT8>(w, x, x_stride, columns, y, tokens);
    case 8: return many<T, 8, INT8>(w, x, x_stride, columns, y, tokens);
  }
  return false;
}

}  // namespace

extern "C" bool emulated_gemm(int bits, int bfloat, int int8, const Vec4* planes, const u8* tables, const u16* steps,
                              const float* scales, int rows, int row_tiles, int column_tiles, const u16* x, int x_stride,
                              int columns, u16* y, int tokens) {
  const Weight w{planes, tables, steps, scales, rows, row_tiles, column_tiles};
  if (bfloat) return !int8 && many_by_bits<BF16, false>(bits, w, x, x_stride, columns, y, tokens);
  return int8 ? many_by_bits<F16, true>(bits, w, x, x_stride, columns, y, tokens)
              : many_by_bits<F16, false>(bits, w, x, x_stride, columns, y, tokens);
}

extern "C" bool emulated_gemv(int bits, int bfloat, int int8, const Vec4* planes, const u8* tables, const u16* steps,
                              const float* scales, int rows, int row_tiles, int column_tiles, const u16* x, int x_stride,
                              u16* y, int tokens) {
  const Arguments a{{planes, tables, steps, scales, rows, row_tiles, column_tiles}, x, x_stride, y, tokens};
  if (bfloat) return !int8 && by_bits<BF16, false>(bits, a);
  return int8 ? by_bits<F16, true>(bits, a) : by_bits<F16, false>(bits, a);
}
