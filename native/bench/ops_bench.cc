// Times of the ops, one thread and two: medians of repeated runs, over memory larger than the caches where noted.
//
// g++ -std=c++20 -O2 -pthread -Iinclude tests/ops_bench.cc <objects of src/engine/{ops_*,sample}.cc> -o ops_bench
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "everybit/engine/ops.h"
#include "everybit/engine/sample.h"

using namespace everybit::engine;

namespace {

// One thread is timed by its own CPU time, which does not count what other processes took; several by the wall clock.
double now(bool alone) {
  timespec t;
  clock_gettime(alone ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Time {
  double median, best;
};

// Seconds of f(share) on `threads` threads that start together; f(share, repetition).
Time measure(std::size_t threads, int repetitions, const std::function<void(Share, int)>& f) {
  std::vector<double> times;
  std::atomic<int> arrived{0}, go{-1};
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < threads; ++i) {
    others.emplace_back([&, i] {
      for (int r = 0; r < repetitions; ++r) {
        while (go.load() < r) {
        }
        f({i, threads}, r);
        ++arrived;
      }
    });
  }
  for (int r = 0; r < repetitions; ++r) {
    arrived = 0;
    const double start = now(threads == 1);
    go = r;
    f({0, threads}, r);
    while (arrived.load() < static_cast<int>(threads) - 1) {
    }
    times.push_back(now(threads == 1) - start);
  }
  for (std::thread& t : others) t.join();
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[0]};
}

void* aligned(std::size_t bytes) {
  void* p = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::memset(p, 0, bytes);
  return p;
}

// Buffers of activations are aligned to cache lines, as the engine's are.
struct Floats {
  explicit Floats(std::size_t n) : p(static_cast<float*>(aligned(n * sizeof(float)))) {}
  Floats(Floats&& other) : p(std::exchange(other.p, nullptr)) {}
  ~Floats() { std::free(p); }
  float* data() { return p; }
  float& operator[](std::size_t i) { return p[i]; }
  float operator[](std::size_t i) const { return p[i]; }
  float* p;
};

Floats normal(std::size_t n) {
  std::mt19937 bits(1);
  std::normal_distribution<float> distribution;
  Floats all(n);
  for (std::size_t i = 0; i < n; ++i) all[i] = i < (1 << 20) ? distribution(bits) : all[i - (1 << 20)];
  return all;
}

void attention(const Ops& ops, std::size_t heads, std::size_t kv_heads, std::size_t dim, std::size_t past,
               std::size_t rows, std::size_t threads) {
  // As many caches as make 256 MiB when decoding: a model's layers do not stay in a cache either.
  const std::size_t blocks = (past + rows + 15) / 16, stride = kv_bytes_per_block(Dtype::f16, kv_heads, dim);
  const std::size_t copies = rows == 1 ? std::max<std::size_t>(1, (std::size_t{256} << 20) / (blocks * stride)) : 1;
  auto* data = static_cast<std::uint8_t*>(aligned(blocks * stride * copies));
  std::vector<std::int32_t> table(blocks);
  for (std::size_t b = 0; b < blocks; ++b) table[b] = static_cast<std::int32_t>((b * 7) % blocks);
  if (blocks % 7 == 0)
    for (std::size_t b = 0; b < blocks; ++b) table[b] = static_cast<std::int32_t>(b);
  auto kv = normal((past + rows) * kv_heads * dim), q = normal(rows * heads * dim);
  Floats out(rows * heads * dim);
  const std::int32_t all[2] = {0, static_cast<std::int32_t>(past + rows)},
                     fresh[2] = {0, static_cast<std::int32_t>(rows)};
  const std::int32_t zero = 0, before = static_cast<std::int32_t>(past);
  const Columns k{kv.data(), kv_heads * dim, kv_heads * dim};
  for (std::size_t c = 0; c < copies; ++c)
    ops.append_kv({data + c * blocks * stride, stride, Dtype::f16, kv_heads, dim}, k, k,
                  {1, all, &zero, table.data(), blocks}, {0, 1});
  void* scratch[4];
  for (auto& s : scratch) s = aligned(attention_scratch_bytes(dim));
  const Time t = measure(threads, rows == 1 ? 200 : 7, [&](Share share, int r) {
    const std::size_t c = static_cast<std::size_t>(r) % copies;
    const AttentionArguments a{{out.data(), heads * dim, heads * dim},
                               {q.data(), heads * dim, heads * dim},
                               {data + c * blocks * stride, stride, Dtype::f16, kv_heads, dim},
                               heads,
                               0.125f,
                               0,
                               0,
                               nullptr};
    ops.attention(a, {1, fresh, &before, table.data(), blocks}, scratch[share.index], share);
  });
  if (rows == 1) {
    const double bytes = 2.0 * static_cast<double>(past + 1) * static_cast<double>(kv_heads * dim) * 2;
    std::printf("%-7s attention decode %zu/%zu x %zu, context %4zu, %zu threads: %7.1f us (best %7.1f), %5.1f GB/s\n",
                ops.name, heads, kv_heads, dim, past, threads, t.median * 1e6, t.best * 1e6, bytes / t.median / 1e9);
  } else {
    const double flops = 4.0 * static_cast<double>(heads * dim) * static_cast<double>(rows) *
                         (static_cast<double>(past) + static_cast<double>(rows + 1) / 2);
    std::printf(
        "%-7s attention prefill %zu/%zu x %zu, T %zu after %zu, %zu threads: %7.2f ms, %6.1f GFLOP/s (best %.1f)\n",
        ops.name, heads, kv_heads, dim, rows, past, threads, t.median * 1e3, flops / t.median / 1e9,
        flops / t.best / 1e9);
  }
  std::free(data);
  for (auto s : scratch) std::free(s);
}

void dense(const Ops& ops, std::size_t n, std::size_t k, std::size_t tokens, Dtype dtype, std::size_t threads) {
  const std::size_t size = dtype == Dtype::f32 ? 4 : 2, bytes = n * k * size;
  const std::size_t copies = tokens == 1 ? (std::size_t{384} << 20) / bytes + 1 : 1;
  auto* w = static_cast<std::uint8_t*>(aligned(bytes * copies));
  std::mt19937 bits(2);
  for (std::size_t i = 0; i < bytes * copies; i += 2) {
    const auto h = static_cast<std::uint16_t>(0x3c00 + (bits() & 0x83ff));
    std::memcpy(w + i, &h, 2);
  }
  auto x = normal(tokens * k);
  Floats y(tokens * n);
  void* scratch[4];
  for (auto& s : scratch) s = aligned(kDenseScratchBytes);
  const Time t = measure(threads, tokens == 1 ? 20 : 7, [&](Share share, int r) {
    const Matrix m{w + static_cast<std::size_t>(r) % copies * bytes, dtype, n, k, false};
    ops.dense(m, {x.data(), k, k}, tokens, part_of(n, share, 8), {y.data(), n, false, nullptr}, scratch[share.index]);
  });
  std::printf("%-7s dense %s %zux%zu, T %3zu, %zu threads: %8.3f ms, %5.1f GB/s, %6.1f GFLOP/s (best %.1f)\n", ops.name,
              dtype == Dtype::f32   ? "f32"
              : dtype == Dtype::f16 ? "f16"
                                    : "bf16",
              n, k, tokens, threads, t.median * 1e3, static_cast<double>(bytes) / t.median / 1e9,
              2.0 * static_cast<double>(n * k * tokens) / t.median / 1e9,
              2.0 * static_cast<double>(n * k * tokens) / t.best / 1e9);
  std::free(w);
  for (auto s : scratch) std::free(s);
}

// What plain reading reaches: sums of 64-bit words.
void read_memory(std::size_t threads) {
  const std::size_t bytes = std::size_t{384} << 20;
  auto* data = static_cast<std::uint64_t*>(aligned(bytes));
  std::memset(data, 1, bytes);
  std::uint64_t sums[4 * 64] = {};
  const Time t = measure(threads, 7, [&](Share share, int) {
    const Range mine = part_of(bytes / 8, share, 8);
    std::uint64_t sum[8] = {};
    for (std::size_t i = mine.begin; i < mine.end; i += 8)
      for (std::size_t j = 0; j < 8; ++j) sum[j] += data[i + j];
    for (std::size_t j = 0; j < 8; ++j) sums[share.index * 64] += sum[j];
  });
  std::printf("read loop, %zu threads: %.1f GB/s (best %.1f) [%llu]\n", threads,
              static_cast<double>(bytes) / t.median / 1e9, static_cast<double>(bytes) / t.best / 1e9,
              static_cast<unsigned long long>(sums[0] & 1));
  std::free(data);
}

// How fast the machine multiplies and adds from L1: a dense product that fits.
void peak(const Ops& ops, std::size_t threads) {
  auto x = normal(48 * 192), w = normal(32 * 192);
  Floats y(4 * 48 * 32);
  void* scratch[4];
  for (auto& s : scratch) s = aligned(kDenseScratchBytes);
  const Time t = measure(threads, 300, [&](Share share, int) {
    for (int i = 0; i < 10; ++i)
      ops.dense({w.data(), Dtype::f32, 32, 192, false}, {x.data(), 192, 192}, 48, {0, 32},
                {y.data() + share.index * 48 * 32, 32, false, nullptr}, scratch[share.index]);
  });
  const double flops = 2.0 * 32 * 192 * 48 * 10 * static_cast<double>(threads);
  std::printf("%-7s dense from L1, %zu threads: %.1f GFLOP/s (best %.1f)\n", ops.name, threads, flops / t.median / 1e9,
              flops / t.best / 1e9);
  for (auto s : scratch) std::free(s);
}

void small(const Ops& ops) {
  auto x = normal(128 * 5632), y = normal(128 * 5632), w = normal(5632);
  Floats out(128 * 5632);
  for (std::size_t tokens : {1, 128}) {
    const Columns o{out.data(), 2048, 2048}, a{x.data(), 2048, 2048};
    const Time t = measure(
        1, 2000, [&](Share s, int) { ops.norm(NormKind::rms, o, a, tokens, w.data(), nullptr, 1e-5f, false, 1, s); });
    std::printf("%-7s norm 2048, T %zu: %.2f us\n", ops.name, tokens, t.median * 1e6);
    const Columns o2{out.data(), 5632, 5632}, g{x.data(), 5632, 5632}, u{y.data(), 5632, 5632};
    const char* names[] = {"silu", "gelu", "gelu_tanh"};
    for (int kind = 0; kind < 3; ++kind) {
      const Time s = measure(
          1, 500, [&](Share share, int) { ops.activate(static_cast<Activation>(kind), o2, g, u, tokens, 0, share); });
      std::printf("%-7s %s * up 5632, T %zu: %.2f us\n", ops.name, names[kind], tokens, s.median * 1e6);
    }
  }
  std::vector<std::int32_t> positions(512, 12345);
  std::vector<float> inv_freq(64, 0.3f), c(512 * 64), s(512 * 64);
  for (std::size_t tokens : {1, 512}) {
    const Time t = measure(1, 200, [&](Share share, int) {
      ops.rope_table(positions.data(), tokens, inv_freq.data(), 32, 1, c.data(), s.data(), share);
    });
    const Time r = measure(1, 200, [&](Share share, int) {
      ops.rope({x.data(), 2048, 2048}, std::min<std::size_t>(tokens, 128), 32, c.data(), s.data(), 32, false, share);
    });
    std::printf("%-7s rope_table 32 pairs, T %zu: %.2f us; rope 32 x 64, T %zu: %.2f us\n", ops.name, tokens,
                t.median * 1e6, std::min<std::size_t>(tokens, 128), r.median * 1e6);
  }
}

void sampling() {
  const std::size_t vocabulary = 152000;
  const auto logits = normal(vocabulary);
  struct Case {
    const char* name;
    SampleParams params;
    float spread;
    int top;
  };
  const Case cases[] = {{"greedy", {.temperature = 0}, 3, -1},
                        {"top_k 50, top_p 0.9", {.top_k = 50, .top_p = 0.9f}, 3, -1},
                        {"top_p 0.9", {.top_p = 0.9f}, 3, -1},
                        {"top_p 0.9, flat logits", {.top_p = 0.9f}, 0.1f, -1},
                        {"min_p 0.05", {.min_p = 0.05f}, 3, -1},
                        {"no filter", {}, 3, -1},
                        {"greedy + 20 logprobs", {.temperature = 0}, 3, 20}};
  for (const Case& c : cases) {
    std::vector<double> times;
    std::vector<float> copy(vocabulary);
    for (int r = 0; r < 101; ++r) {
      for (std::size_t i = 0; i < vocabulary; ++i) copy[i] = c.spread * logits[i];
      SampleParams p = c.params;
      p.position = static_cast<std::uint64_t>(r);
      const double start = now(true);
      sample(copy.data(), vocabulary, {}, p, c.top);
      times.push_back(now(true) - start);
    }
    std::sort(times.begin(), times.end());
    std::printf("sample %-24s V 152000: %.0f us (best %.0f)\n", c.name, times[50] * 1e6, times[0] * 1e6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string wanted = argc > 1 ? argv[1] : "";
  const std::size_t most = argc > 2 ? static_cast<std::size_t>(std::atoi(argv[2])) : 2;  // threads, at most 4
  std::vector<const Ops*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512dq") && wanted != "avx2" && wanted != "scalar") sets.push_back(&avx512_ops());
  if (__builtin_cpu_supports("avx2") && wanted != "avx512" && wanted != "scalar") sets.push_back(&avx2_ops());
#elif defined(__aarch64__)
  sets.push_back(&neon_ops());
#endif
  if (wanted == "scalar" || wanted == "all") sets.push_back(&scalar_ops());
  sampling();
  for (std::size_t threads = 1; threads <= most; ++threads) read_memory(threads);
  for (const Ops* ops : sets) {
    small(*ops);
    for (std::size_t threads = 1; threads <= most; ++threads) {
      peak(*ops, threads);
      for (std::size_t context : {128, 1024, 4096}) {
        attention(*ops, 32, 4, 64, context, 1, threads);
        attention(*ops, 32, 32, 128, context, 1, threads);
      }
      attention(*ops, 32, 4, 64, 0, 512, threads);
      attention(*ops, 32, 32, 128, 0, 512, threads);
      attention(*ops, 32, 4, 64, 3584, 512, threads);
      for (Dtype d : {Dtype::bf16, Dtype::f16, Dtype::f32}) dense(*ops, 32000, 2048, 1, d, threads);
      for (std::size_t tokens : {2, 8, 128, 512}) dense(*ops, 2048, 2048, tokens, Dtype::bf16, threads);
      dense(*ops, 2048, 5632, 128, Dtype::bf16, threads);
      dense(*ops, 2048, 2048, 128, Dtype::f32, threads);
    }
  }
}
