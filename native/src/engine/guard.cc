#include "everybit/engine/guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace everybit::engine {
namespace {

// A list that the handler can walk without locks: nodes are published by one atomic store and never freed.
struct Watched {
  std::uintptr_t begin, end;
  Watched* next;
  std::atomic<Watch> state{Watch::intact};
};

std::atomic<Watched*> watched{nullptr};
std::uintptr_t page_bytes = 4096;
struct sigaction before;

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (Watched* w = info->si_code == BUS_ADRERR ? watched.load(std::memory_order_acquire) : nullptr; w; w = w->next) {
    if (address < w->begin || address >= w->end || w->state.load(std::memory_order_acquire) == Watch::ended) continue;
    void* page = reinterpret_cast<void*>(address & ~(page_bytes - 1));
    if (mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
    w->state.store(Watch::lost, std::memory_order_release);
    return;
  }
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
  sigaction(SIGBUS, &before, nullptr);  // the default: returning raises the fault again, without us
}

}  // namespace

std::atomic<Watch>* watch_mapping(const void* data, std::size_t bytes) {
  static std::once_flag installed;
  std::call_once(installed, [] {
    page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
  });
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  auto* node = new Watched{begin, begin + bytes, watched.load(std::memory_order_relaxed), Watch::intact};
  while (!watched.compare_exchange_weak(node->next, node, std::memory_order_release)) {
  }
  return &node->state;
}

}  // namespace everybit::engine
