#include "everybit/probe.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "everybit/clones.h"

namespace everybit {
namespace {

constexpr std::size_t kLanes = 32;  // floats a step: two of the widest registers, four of the next

EVERYBIT_CLONES float read_part(const float* a, std::size_t n) {
  float sums[4][kLanes] = {};  // independent, so that additions do not wait for each other
  std::size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (std::size_t k = 0; k < 4; ++k)
      for (std::size_t j = 0; j < kLanes; ++j) sums[k][j] += a[i + k * kLanes + j];
  for (; i < n; ++i) sums[0][0] += a[i];
  float sum = 0;
  for (const auto& row : sums)
    for (float value : row) sum += value;
  return sum;
}

// A product and not memcpy, which the compiler would make of a plain copy: memcpy's non-temporal stores spare the read
// of b's lines, and the kernels would not compare.
EVERYBIT_CLONES void copy_part(const float* a, float* __restrict b, std::size_t n, float one) {
  for (std::size_t i = 0; i < n; ++i) b[i] = one * a[i];
}

EVERYBIT_CLONES void triad_part(const float* a, const float* b, float* __restrict c, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) c[i] = a[i] + 3.0f * b[i];
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// Untouched memory, on huge pages where the system has them: what is measured is the memory, not the page tables.
Floats untouched(std::size_t count) {
  constexpr std::size_t kAlign = std::size_t{1} << 21;
  void* memory = std::aligned_alloc(kAlign, (count * sizeof(float) + kAlign - 1) / kAlign * kAlign);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, count * sizeof(float), MADV_HUGEPAGE);  // a wish: where it is refused, small pages do
#endif
  return Floats(static_cast<float*>(memory));
}

std::size_t cache_bytes(const std::string& folder) {
  std::string level, type, size;
  std::ifstream(folder + "/type") >> type;
  std::ifstream(folder + "/size") >> size;
  if (size.empty() || type == "Instruction") return 0;
  const std::size_t unit = size.back() == 'K' ? 1u << 10 : size.back() == 'M' ? 1u << 20 : 1u;
  return std::strtoull(size.c_str(), nullptr, 10) * unit;
}

}  // namespace

Bandwidth measure_bandwidth(Stream kernel, int threads, std::size_t array_bytes, int runs) {
  const std::size_t workers = static_cast<std::size_t>(std::max(1, threads));
  const std::size_t arrays = kernel == Stream::read ? 1 : kernel == Stream::copy ? 2 : 3;
  const std::size_t count = std::max<std::size_t>(array_bytes / sizeof(float) / 1024, workers) * 1024;
  std::vector<Floats> memory;
  for (std::size_t i = 0; i < arrays; ++i) memory.push_back(untouched(count));
  float* const a = memory[0].get();
  float* const b = arrays > 1 ? memory[1].get() : nullptr;
  float* const c = arrays > 2 ? memory[2].get() : nullptr;

  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  Clock::time_point start;
  std::barrier gate(static_cast<std::ptrdiff_t>(workers));
  std::vector<float> sink(workers * 32);  // a cache line each
  const auto work = [&](std::size_t worker) {
    const std::size_t begin = count / 1024 * worker / workers * 1024;
    const std::size_t n = count / 1024 * (worker + 1) / workers * 1024 - begin;
    for (const Floats& array : memory) std::fill_n(array.get() + begin, n, 1.0f);
    for (int run = 0; run <= runs; ++run) {
      gate.arrive_and_wait();
      if (worker == 0) start = Clock::now();
      gate.arrive_and_wait();
      if (kernel == Stream::read) {
        sink[worker * 32] += read_part(a + begin, n);
      } else if (kernel == Stream::copy) {
        copy_part(a + begin, b + begin, n, a[0]);
      } else {
        triad_part(a + begin, b + begin, c + begin, n);
      }
      gate.arrive_and_wait();
      if (worker == 0 && run > 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (std::size_t t = 1; t < workers; ++t) helpers.emplace_back(work, t);
    work(0);
  }
  volatile float used = 0;  // the sums are read, so they are computed
  for (float value : sink) used = used + value;
  std::sort(seconds.begin(), seconds.end());
  const double gigabytes = static_cast<double>(arrays * count * sizeof(float)) * 1e-9;
  return {gigabytes / seconds.front(), gigabytes / seconds[seconds.size() / 2]};
}

std::size_t last_level_cache_bytes() {
  std::size_t largest = 0;
  for (int index = 0; index < 8; ++index)
    largest = std::max(largest, cache_bytes("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index)));
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (largest == 0) largest = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
  return largest;
}

std::size_t stream_array_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  const std::size_t memory = pages > 0 && page > 0 ? static_cast<std::size_t>(pages * page) : 0;
  const std::size_t wanted = std::max<std::size_t>(4 * last_level_cache_bytes(), std::size_t{256} << 20);
  return memory == 0 ? wanted : std::min(wanted, memory / 8);
}

}  // namespace everybit
