// Speed of the quantized linear kernels on one thread: weights per second and bytes of planes per second.
//
//   linear_bench [set [bits [parts [tokens]]]]      "all" or 0 for any
//
// Matrices are cycled through so that planes come from memory: EVERYBIT_BENCH_MB of them in all (400; a cache of this
// size must not hold them). 10th percentile of at least EVERYBIT_BENCH_CALLS (100) calls.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::size_t setting(const char* name, std::size_t otherwise) {
  const char* value = std::getenv(name);
  return value ? static_cast<std::size_t>(std::strtoull(value, nullptr, 10)) : otherwise;
}

std::vector<const Kernels*> sets_of_this_processor() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2_kernels());
  if (avx512) sets.push_back(&avx512_kernels());
#if defined(EVERYBIT_HAVE_VBMI)
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("gfni"))
    sets.push_back(&avx512_vbmi_kernels());
#endif
#elif defined(__aarch64__)
  sets.push_back(&neon_kernels());
#endif
  sets.push_back(&scalar_kernels());
  return sets;
}

struct Shape {
  std::size_t rows, columns;
};

// Many tokens: fewer rows, to keep a call short.
std::size_t rows_of(const Shape& shape, std::size_t tokens) {
  return tokens <= 4 ? shape.rows : shape.rows * 4 / tokens;
}

// Seconds of one call: the 10th percentile of `count` calls, over `copies` matrices in turn. A call takes about as long
// as a scheduler's time slice or less, so that other load on the machine shows in the upper percentiles.
double seconds(const Kernels& set, const Shape& shape, int bits, int parts, std::size_t tokens, std::size_t copies,
               std::size_t count, std::uint8_t* const* planes, const std::uint8_t* entries, const float* lines,
               const QuantizedRows& x, float* out, void* scratch) {
  const std::size_t row_bytes = (shape.columns + 7) / 8;
  std::vector<double> times;
  const Range rows{0, rows_of(shape, tokens)};
  for (std::size_t i = 0; i < count; ++i) {
    Planes matrix{{}, row_bytes, shape.columns};
    for (int p = 0; p < bits; ++p) matrix.plane[p] = planes[p] + i % copies * shape.rows * row_bytes;
    const Tables tables{bits, parts, entries, lines, static_cast<std::size_t>(parts) << bits};
    const double start = now();
    (tokens == 1 ? set.gemv : set.gemm)[bits](matrix, tables, x, rows, {out, shape.rows, false, nullptr}, scratch);
    times.push_back(now() - start);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 10];
}

int run(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "all";
  const int only_bits = argc > 2 ? std::atoi(argv[2]) : 0, only_parts = argc > 3 ? std::atoi(argv[3]) : 0;
  const std::size_t only_tokens = argc > 4 ? static_cast<std::size_t>(std::atoi(argv[4])) : 0;
  const std::size_t total = setting("EVERYBIT_BENCH_MB", 400) << 20, calls = setting("EVERYBIT_BENCH_CALLS", 100);
  std::mt19937_64 random(1);
  std::vector<std::uint8_t> memory(total + (std::size_t{8} << 21));  // at least one matrix a plane
  for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
    const std::uint64_t word = random();
    std::memcpy(memory.data() + i, &word, 8);
  }
  void* scratch = std::aligned_alloc(64, kScratchBytes);
  std::memset(scratch, 0, kScratchBytes);
  std::printf("%-12s %9s bits parts tokens  Gweights/s   GB/s  GMAC/s\n", "set", "shape");
  for (const Kernels* set : sets_of_this_processor()) {
    if (wanted != "all" && wanted != set->name) continue;
    if (wanted == "all" && set == &scalar_kernels()) continue;
    for (const Shape& shape : {Shape{4096, 4096}, Shape{2048, 5632}}) {
      const std::size_t row_bytes = (shape.columns + 7) / 8, blocks = (shape.columns + kBlock - 1) / kBlock;
      for (const std::size_t tokens : {1u, 2u, 4u, 8u, 16u, 128u}) {
        if (only_tokens && tokens != only_tokens) continue;
        float* values = static_cast<float*>(std::aligned_alloc(64, shape.columns * 4 + 64));
        auto* codes = static_cast<std::int8_t*>(std::aligned_alloc(64, tokens * blocks * kBlock));
        std::vector<float> scales(tokens * blocks * kGroups), sums(tokens), out(tokens * shape.rows);
        std::normal_distribution<float> normal;
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t k = 0; k < shape.columns; ++k) values[k] = normal(random);
          set->quantize(values, shape.columns, codes + t * blocks * kBlock, scales.data() + t * blocks * kGroups,
                        &sums[t]);
        }
        const QuantizedRows x{tokens, blocks, codes, scales.data(), sums.data()};
        for (int bits = 1; bits <= 8; ++bits) {
          if (only_bits ? bits != only_bits : bits == 1) continue;
          for (int parts = 1; parts <= 2; ++parts) {
            if (only_parts && parts != only_parts) continue;
            std::vector<std::uint8_t> entries(shape.rows * static_cast<std::size_t>(parts) << bits);
            for (auto& entry : entries) entry = static_cast<std::uint8_t>(random() % static_cast<unsigned>(set->base));
            std::vector<float> lines(shape.rows * 2, 0.01f);
            const std::size_t matrix = shape.rows * row_bytes, per_plane = total / static_cast<std::size_t>(bits);
            const std::size_t all = std::max<std::size_t>(1, per_plane / matrix);
            std::uint8_t* planes[8];
            for (int p = 0; p < bits; ++p) planes[p] = memory.data() + static_cast<std::size_t>(p) * all * matrix;
            const std::size_t count = std::max<std::size_t>(5, std::max(all, calls) / std::min<std::size_t>(tokens, 4));
            const double best = seconds(*set, shape, bits, parts, tokens, all, count, planes, entries.data(),
                                        lines.data(), x, out.data(), scratch);
            const double weights = static_cast<double>(rows_of(shape, tokens) * shape.columns) / best;
            std::printf("%-12s %4zux%4zu %4d %5d %6zu  %10.2f %6.2f %7.1f\n", set->name, shape.rows, shape.columns,
                        bits, parts, tokens, weights / 1e9, weights * bits / 8e9,
                        weights * static_cast<double>(tokens) / 1e9);
            std::fflush(stdout);
          }
        }
        std::free(values);
        std::free(codes);
      }
    }
  }
  std::free(scratch);
  return 0;
}

}  // namespace
}  // namespace everybit::engine

int main(int argc, char** argv) { return everybit::engine::run(argc, argv); }
