#include "everybit/engine/pool.h"

#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace everybit::engine {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 20 to 50 us on current processors (a pause takes 10 to 140 cycles): longer than any gap between two barriers of
// a step that runs undisturbed, shorter than a scheduler's time slice.
constexpr int kSpins = 1000;

// Waits until `value` is no longer `old`.
void wait_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void pin_to(int processor) {
  if (processor < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(processor), &set);
  sched_setaffinity(0, sizeof set, &set);  // refused processors were found by the constructor
}

}  // namespace

int usable_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return static_cast<int>(std::thread::hardware_concurrency());
  return CPU_COUNT(&set);
}

Pool::Pool(int threads, const std::vector<int>& pin)
    : count_(static_cast<std::size_t>(threads)), process_(static_cast<int>(getpid())) {
  if (threads < 1) throw std::invalid_argument("a pool needs at least one thread, got " + std::to_string(threads));
  cpu_set_t usable;
  if (!pin.empty() && sched_getaffinity(0, sizeof usable, &usable) == 0)
    for (const int processor : pin)
      if (processor < 0 || processor >= CPU_SETSIZE || !CPU_ISSET(static_cast<unsigned>(processor), &usable))
        throw std::invalid_argument("processor " + std::to_string(processor) +
                                    " is not among those this process may use; see taskset -p");
  try {
    for (std::size_t i = 1; i < count_; ++i)
      workers_.emplace_back([this, i, processor = pin.empty() ? -1 : pin[i % pin.size()]] { work(i, processor); });
  } catch (const std::system_error&) {
    end();
    throw std::invalid_argument("the system starts no more threads (" + std::to_string(count_) + " asked for)");
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  if (forked()) {  // there is nobody to join
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::forked() const { return process_ != static_cast<int>(getpid()); }

void Pool::run(const std::function<void(Share)>& task) {
  const std::lock_guard<std::mutex> guard(callers_);
  if (count_ == 1) return task({0, 1});
  task_ = &task;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  task({0, count_});
  barrier();
}

void Pool::barrier() {
  if (count_ == 1) return;
  const std::uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_change(phase_, phase);
  }
}

void Pool::work(std::size_t index, int processor) {
  pin_to(processor);
  std::uint32_t seen = 0;
  for (;;) {
    wait_change(generation_, seen);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    (*task_)({index, count_});
    barrier();
  }
}

}  // namespace everybit::engine
