// A persistent pool of threads that run one function together, with barriers inside it.
//
// Waiting spins briefly (a decode step has some 150 barriers, each a fraction of a microsecond apart), then parks on a
// futex: with more runnable threads than processors a spinning waiter would keep the thread it waits for off the core.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "everybit/engine/share.h"

namespace everybit::engine {

class Pool {
 public:
  // `threads` in all, the caller of `run` among them. `pin`: processor of each thread; empty leaves it to the system.
  explicit Pool(int threads, const std::vector<int>& pin = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t size() const { return count_; }

  // Whether this is another process than the one that made the pool: its threads are not here.
  bool forked() const;

  // Runs task(share) on every thread and returns when all are done. One caller at a time (others wait). The task must
  // not throw: report through your own state.
  void run(const std::function<void(Share)>& task);

  // Inside a task: returns when every thread has arrived; what they wrote before is visible after.
  void barrier();

 private:
  void work(std::size_t index, int processor);

  void end();

  const std::size_t count_;
  const int process_;
  std::mutex callers_;
  const std::function<void(Share)>* task_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // a new task, or the end
  alignas(64) std::atomic<std::uint32_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

// Processors this process may use: the affinity mask, not the machine.
int usable_processors();

}  // namespace everybit::engine
