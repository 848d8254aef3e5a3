// parallel_rows: run a function over rows on several threads.
//
// Each thread makes its own worker (scratch memory) and takes chunks of rows from an atomic counter, so
// uneven rows balance themselves. A row's result depends on that row only: any thread count gives the
// same bytes. The first exception thrown by a worker stops the others and is thrown again to the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace everybit {

constexpr std::size_t kMostThreads = 1024;  // beyond, a system may refuse to make them

// `requested` threads, or one per processor when it is not positive; never more than there are chunks.
inline std::size_t thread_count(int requested, std::size_t chunks) {
  std::size_t threads = requested > 0 ? static_cast<std::size_t>(requested)
                                      : std::max<std::size_t>(1, std::thread::hardware_concurrency());
  return std::max<std::size_t>(1, std::min({threads, chunks, kMostThreads}));
}

// make_worker() -> worker; worker(row) for every row in [0, rows).
template <class MakeWorker>
void parallel_rows(std::size_t rows, std::size_t chunk, int requested, const MakeWorker& make_worker) {
  chunk = std::max<std::size_t>(1, chunk);
  const std::size_t threads = thread_count(requested, (rows + chunk - 1) / chunk);
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  auto run = [&] {
    try {
      auto worker = make_worker();
      for (;;) {
        const std::size_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= rows) return;
        const std::size_t end = std::min(rows, begin + chunk);
        for (std::size_t row = begin; row < end; ++row) worker(row);
      }
    } catch (...) {
      next.store(rows, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::jthread> helpers;
  helpers.reserve(threads - 1);
  for (std::size_t t = 1; t < threads; ++t) helpers.emplace_back(run);
  run();
  helpers.clear();  // joins
  if (failure) std::rethrow_exception(failure);
}

// Rows a thread takes at a time where a row is a few operations per column: some 64 k columns, far more work than
// taking a number from the counter.
inline std::size_t rows_per_chunk(std::size_t columns) { return 65536 / (columns + 1) + 1; }

}  // namespace everybit
