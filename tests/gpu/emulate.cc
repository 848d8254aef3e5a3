// The kernels of everybit/gpu/cuda on a CPU, for tests where there is no GPU. Built by tests/gpu/emulator.py.
#define KERNEL_EMULATED
#include "emulate.h"

#include "decode.cuh"

#include "arrange.cu"
#include "gemm.cu"
#include "gemv.cu"
#include "mixed.cu"

namespace {

struct Arguments {
  Weight weight;
  const u16* x;
  int x_stride, columns;
  u16* y;
  int tokens, tile, block;  // the last two of gemm
};

// A kernel's shared memory, at a place that is aligned as shared memory is.
template <class Kernel>
struct Memory {
  using Shared = typename Kernel::Shared;
  Shared* shared = static_cast<Shared*>(std::aligned_alloc(4096, (sizeof(Shared) + 4095) / 4096 * 4096));
  Memory() {
    std::memset(static_cast<void*>(shared), 0x5a, sizeof(Shared));
    shared_memory = reinterpret_cast<const char*>(shared);
  }
  ~Memory() { std::free(shared); }
};

template <class T, int BITS, bool BYTES, int NT>
void few(const Arguments& a) {
  using Kernel = Gemv<T, BITS, BYTES, NT, 3, 4>;
  Memory<Kernel> memory;
  const unsigned blocks = a.weight.row_tiles < 2 ? 1 : 2;  // fewer than row tiles, so that blocks go on to a next one
  emulate::launch({blocks, 1, 1}, 4 * 32,
                  [&] { Kernel::run(*memory.shared, a.weight, a.x, a.x_stride, a.y, a.tokens, nullptr); });
}

template <class T, int BITS, bool BYTES, int TOKENS, int ROWS, int GROUPS>
void many(const Arguments& a) {
  using Kernel = Gemm<T, BITS, BYTES, TOKENS, ROWS, GROUPS, 6>;
  const Weight& w = a.weight;
  const int chunks = w.column_tiles * 4, token_tiles = (a.tokens + TOKENS - 1) / TOKENS;
  std::vector<Vec4> images(size_t(token_tiles) * chunks * TOKENS * 8);
  for (int token = 0; token < token_tiles * TOKENS; ++token)
    for (int group = 0; group < chunks * 2; ++group)
      arrange_group<TOKENS>(a.x, a.x_stride, a.tokens, a.columns, chunks, images.data(), token, group);
  Memory<Kernel> memory;
  emulate::launch({unsigned((w.rows + ROWS - 1) / ROWS), unsigned(token_tiles), 1}, GROUPS * 128 + 128,
                  [&] { Kernel::run(*memory.shared, w, reinterpret_cast<const u8*>(images.data()), a.y, a.tokens); });
}

template <class T, bool BYTES, int NT>
void mixture(const Arguments& a, const Precisions& precisions, const int* chosen) {
  using Kernel = Mixed<T, BYTES, NT>;
  Memory<Kernel> memory;
  emulate::launch({2, 1, 1}, Kernel::kWarps * 32,
                  [&] { Kernel::run(memory.shared, a.weight, precisions, a.x, a.x_stride, a.y, a.tokens, chosen); });
}

template <class T, int BITS, bool BYTES>
bool by_shape(const Arguments& a) {
  if (a.tile == 0) return (a.tokens <= 8 ? few<T, BITS, BYTES, 1>(a) : few<T, BITS, BYTES, 2>(a)), true;
  if (a.tile == 32 && a.block == 64) return many<T, BITS, BYTES, 32, 64, 3>(a), true;
  if (a.tile == 64 && a.block == 128) return many<T, BITS, BYTES, 64, 128, 2>(a), true;
  if (a.tile == 64 && a.block == 64) return many<T, BITS, BYTES, 64, 64, 2>(a), true;
  return false;
}

template <class T, bool BYTES>
bool by_bits(int bits, const Arguments& a) {
  switch (bits) {
    case 2:
      return by_shape<T, 2, BYTES>(a);
    case 3:
      return by_shape<T, 3, BYTES>(a);
  }
  if constexpr (!BYTES) {
    switch (bits) {
      case 4:
        return by_shape<T, 4, BYTES>(a);
      case 5:
        return by_shape<T, 5, BYTES>(a);
      case 6:
        return by_shape<T, 6, BYTES>(a);
      case 7:
        return by_shape<T, 7, BYTES>(a);
      case 8:
        return by_shape<T, 8, BYTES>(a);
    }
  }
  return false;
}

}  // namespace

extern "C" bool emulated(int bits, int bfloat, int bytes, int tile, int block, const Vec4* planes, const u32* tables,
                         const float* scales, int rows, int row_tiles, int column_tiles, const u16* x, int x_stride,
                         int columns, u16* y, int tokens) {
  const Arguments a{
      {planes, tables, scales, rows, row_tiles, column_tiles}, x, x_stride, columns, y, tokens, tile, block};
  allowed_x = {x, x + size_t(tokens) * x_stride};
  if (bfloat) return !bytes && by_bits<BF16, false>(bits, a);
  return bytes ? by_bits<F16, true>(bits, a) : by_bits<F16, false>(bits, a);
}

// At most 16 tokens (more than 8 of F16: with byte tables); precisions by bits, 0 to 8.
extern "C" void emulated_mixture(int bfloat, int bytes, const Vec4* planes, const Precision* precisions, int rows,
                                 int row_tiles, int column_tiles, const u16* x, int x_stride, u16* y, int tokens,
                                 const int* chosen) {
  const Arguments a{{planes, nullptr, nullptr, rows, row_tiles, column_tiles}, x, x_stride, 0, y, tokens, 0, 0};
  Precisions all;
  for (int b = 0; b < 9; ++b) all.of[b] = precisions[b];
  allowed_x = {x, x + size_t(tokens) * x_stride};
  if (tokens > 8) return bfloat ? mixture<BF16, false, 2>(a, all, chosen) : mixture<F16, true, 2>(a, all, chosen);
  if (bfloat) return mixture<BF16, false, 1>(a, all, chosen);
  return bytes ? mixture<F16, true, 1>(a, all, chosen) : mixture<F16, false, 1>(a, all, chosen);
}
