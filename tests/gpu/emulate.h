// A CPU in place of machine.cuh: one block at a time, a fiber for each thread, switched at what a warp or block does
// together.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) Vec4 {
  u32 x, y, z, w;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulate {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline ucontext_t home;
inline unsigned current = 0, blocks = 0;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &home); }

// Until all `size` threads of a group have arrived as often as this one.
struct Gate {
  std::vector<u64> arrived;
  void wait(unsigned first, unsigned size) {
    arrived.resize(fibers.size());
    const u64 mine = ++arrived[current];
    for (unsigned i = first; i < first + size; ++i) {
      while (arrived[i] < mine && !fibers[i].done) yield();
    }
  }
};
inline Gate block_gate, warp_gate;
inline void warp_sync() { warp_gate.wait(current / 32 * 32, 32); }

inline void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  block_gate = warp_gate = Gate{}, ++blocks;
  for (Fiber& f : fibers) {
    f.stack = std::make_unique<char[]>(256 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = 256 << 10;
    f.context.uc_link = &home;
    makecontext(
        &f.context,
        [] {
          body();
          fibers[current].done = true;
        },
        0);
  }
  unsigned rounds = 0;
  for (unsigned left = threads; left;) {
    if (++rounds > 1000000) std::fprintf(stderr, "a block of threads waits for itself\n"), std::abort();
    left = 0;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].done) continue;
      ++left;
      threadIdx.x = current;
      swapcontext(&home, &fibers[current].context);
    }
  }
}

inline void launch(Index grid, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

inline float from_half(u16 h) {
  _Float16 v;
  std::memcpy(&v, &h, 2);
  return float(v);
}
inline u16 to_half(double d) {
  const _Float16 v = _Float16(d);
  u16 h;
  std::memcpy(&h, &v, 2);
  return h;
}
inline float from_bfloat(u16 b) {
  const u32 u = u32(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline u16 to_bfloat(double d) {  // by hand, so that a double is rounded once
  if (d == 0 || !std::isfinite(d)) {
    const float f = float(d);
    u32 u;
    std::memcpy(&u, &f, 4);
    return u16(u >> 16);
  }
  int exponent;
  const double mantissa = std::frexp(d, &exponent);
  const float f = float(std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8));
  u32 u;
  std::memcpy(&u, &f, 4);
  return u16(u >> 16);
}

inline float mma_a[64][32][4][2], mma_b[64][32][2][2];  // [warp][lane]

template <class T>
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const unsigned lane = current % 32, warp = current / 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) mma_a[warp][lane][i][e] = T::value(u16(a[i] >> (16 * e)));
  for (int e = 0; e < 2; ++e) {
    mma_b[warp][lane][0][e] = T::value(u16(b0 >> (16 * e)));
    mma_b[warp][lane][1][e] = T::value(u16(b1 >> (16 * e)));
  }
  warp_sync();
  for (int c = 0; c < 4; ++c) {
    const int row = c / 2, column = 2 * t + c % 2;
    double sum = d[c];
    for (int k = 0; k < 16; ++k) {  // k = 8 * part + 2 * quad + e
      const int part = k / 8, quad = k % 8 / 2, e = k % 2;
      sum += double(mma_a[warp][4 * g + quad][row + 2 * part][e]) * mma_b[warp][4 * column + quad][part][e];
    }
    d[c] = float(sum);
  }
  warp_sync();
}

// D[64, 2 * (size of d)] += A[64, 16] B[16, ..] of a warp group; b is the address in `swizzled_rows`.
template <class T, int COUNT>
void group_products(float (&d)[COUNT], const u32 (&a)[4], u64 b) {
  const unsigned lane = current % 32, warp = current / 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) mma_a[warp][lane][i][e] = T::value(u16(a[i] >> (16 * e)));
  warp_sync();
  const char* tile = reinterpret_cast<const char*>(b & ~u64(1023));
  for (int c = 0; c < COUNT; ++c) {
    const int row = c / 2 % 2, column = c / 4 * 8 + 2 * t + c % 2;
    double sum = d[c];
    for (int k = 0; k < 16; ++k) {
      const int part = k / 8, quad = k % 8 / 2, e = k % 2, byte = int(b & 127) + 2 * k;
      u16 x;
      std::memcpy(&x, tile + column * 128 + ((byte / 16) ^ (column % 8)) * 16 + byte % 16, 2);
      sum += double(mma_a[warp][4 * g + quad][row + 2 * part][e]) * T::value(x);
    }
    d[c] = float(sum);
  }
  warp_sync();
}

template <class T>
u32 each(u32 a, u32 b, u32 c, double (*f)(double, double, double)) {
  u32 d = 0;
  for (int s = 0; s < 32; s += 16)
    d |= u32(T::rounded(f(T::value(u16(a >> s)), T::value(u16(b >> s)), T::value(u16(c >> s))))) << s;
  return d;
}

}  // namespace emulate

struct Barrier {
  unsigned count = 0, left = 0, phase = 0;
  void init(u32 n) { count = left = n, phase = 0; }
  void arrive() {
    if (--left == 0) left = count, ++phase;
  }
  void copy(void* to, const void* from, u32 bytes) { std::memcpy(to, from, bytes), arrive(); }
  void wait(u32 parity) {
    while (phase % 2 == parity) emulate::yield();
  }
};
inline void publish_barriers() {}
inline void sync_some(int barrier, int threads) {
  static std::vector<emulate::Gate> gates(16);
  static unsigned of = 0;
  if (of != emulate::blocks) gates = std::vector<emulate::Gate>(16), of = emulate::blocks;
  gates[barrier].wait(emulate::current / threads * threads, threads);
}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
inline void products_fence() {}
inline void products_commit() {}
template <int LEFT>
void products_wait() {}
inline u64 swizzled_rows(const void* start) { return reinterpret_cast<u64>(start); }
template <class T>
struct Products {
  template <int TOKENS>
  static void times(float (&d)[TOKENS / 2], const u32 (&a)[4], u64 b) {
    emulate::group_products<T>(d, a, b);
  }
};
inline void store_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
  static u32 held[64][32][4];
  static void* rows[64][32];
  const unsigned lane = emulate::current % 32, warp = emulate::current / 32;
  const u32 mine[4] = {a, b, c, d};
  std::memcpy(held[warp][lane], mine, 16), rows[warp][lane] = row;
  emulate::warp_sync();
  for (int c = 0; c < 8; ++c) {  // this lane's row r of matrix m is column r of the fragments
    const int m = lane / 8, r = lane % 8;
    static_cast<u16*>(rows[warp][lane])[c] = u16(held[warp][4 * c + r / 2][m] >> (16 * (r % 2)));
  }
  emulate::warp_sync();
}

inline void __syncthreads() { emulate::block_gate.wait(0, unsigned(emulate::fibers.size())); }

inline u32 permute(u32 a, u32 b, u32 sel) {
  const u64 bytes = u64(b) << 32 | a;
  u32 d = 0;
  for (int n = 0; n < 4; ++n) {
    const u32 s = sel >> (4 * n) & 15;
    if (s > 7) std::fprintf(stderr, "permute: bit 3 of a selector is set\n"), std::abort();
    d |= u32(bytes >> (8 * s) & 255) << (8 * n);
  }
  return d;
}
inline const char* shared_memory = nullptr;  // addresses are relative to it
inline u32 shared_address(const void* p) { return u32(static_cast<const char*>(p) - shared_memory); }
template <int OFFSET>
u32 load_shared(u32 address) {
  u32 v;
  std::memcpy(&v, shared_memory + address + OFFSET, 4);
  return v;
}
inline u32 select(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }
inline u32 and_or(u32 a, u32 mask, u32 ones) { return (a & mask) | ones; }
inline u32 flip(u32 a, u32 b, u32 mask) { return a ^ (b & mask); }
inline u32 upper_half(u32 a) { return a >> 16; }
inline u32 funnel(u32 a, u32 b) { return a >> 16 | b << 16; }
inline void after_previous_kernel() {}
inline void __syncwarp() { emulate::warp_sync(); }
// What a thread copies ahead arrives when it waits for it, not before.
struct Copies {
  std::vector<std::vector<std::pair<Vec4*, Vec4>>> groups{1};
  unsigned of = 0;  // block
};
inline std::vector<Copies> copies;
inline Copies& own_copies() {
  copies.resize(std::max(copies.size(), emulate::fibers.size()));
  Copies& mine = copies[emulate::current];
  if (mine.of != emulate::blocks) mine = Copies{}, mine.of = emulate::blocks;
  return mine;
}
inline void copy_ahead(Vec4* to, const Vec4* from) { own_copies().groups.back().push_back({to, *from}); }
inline void end_group() { own_copies().groups.emplace_back(); }
template <int LEFT>
void wait_groups() {
  auto& groups = own_copies().groups;
  while (groups.size() > LEFT + 1) {
    for (auto& [to, value] : groups.front()) *to = value;
    groups.erase(groups.begin());
  }
}
inline std::pair<const u16*, const u16*> allowed_x;
inline Vec4 load_cached(const Vec4* p) { return *p; }
inline Vec4 load_if(bool wanted, const Vec4* p) {
  if (!wanted) return Vec4{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0};  // NaN in both types
  const u16* at = reinterpret_cast<const u16*>(p);
  if (at < allowed_x.first || at + 8 > allowed_x.second)
    std::fprintf(stderr, "x is read beyond its end\n"), std::abort();
  return *p;
}

template <class T, u32 MAGIC>
struct Emulated {
  static u32 magic_plus(u32 n) { return (MAGIC + n) * 0x00010001u; }
  static u16 round(float v) { return T::rounded(v); }
  static u32 pair(float v) { return T::rounded(v) * 0x00010001u; }
  static u32 sub(u32 a, u32 b) {
    return emulate::each<T>(a, b, b, [](double x, double y, double) { return x - y; });
  }
  static u32 fma(u32 a, u32 b, u32 c) {
    return emulate::each<T>(a, b, c, [](double x, double y, double z) { return x * y + z; });
  }
  static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulate::mma<T>(d, a, b0, b1); }
};
struct F16 : Emulated<F16, 0x6400u> {
  static float value(u16 h) { return emulate::from_half(h); }
  static u16 rounded(double d) { return emulate::to_half(d); }
};
struct BF16 : Emulated<BF16, 0x4300u> {
  static float value(u16 b) { return emulate::from_bfloat(b); }
  static u16 rounded(double d) { return emulate::to_bfloat(d); }
};
