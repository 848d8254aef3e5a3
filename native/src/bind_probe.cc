// The probe's Python side: memory bandwidth and cache size.
#include "bindings.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <utility>

#include "everybit/probe.h"

namespace {

using everybit::Bandwidth;
using everybit::Stream;
constexpr int kRuns = 7;  // of a quick measurement: the median bears three disturbed ones
constexpr int kMostThreads = 1024;

Bandwidth measure(const std::string& kernel, int threads, std::size_t array_bytes, int runs) {
  require(kernel == "read" || kernel == "copy" || kernel == "triad", "the kernels are read, copy and triad");
  require(threads >= 1 && threads <= kMostThreads && runs >= 1, "at least one thread and one run");
  const Stream which = kernel == "read" ? Stream::read : kernel == "copy" ? Stream::copy : Stream::triad;
  const nb::gil_scoped_release release;
  return everybit::measure_bandwidth(which, threads, array_bytes, runs);
}

}  // namespace

void bind_probe(nb::module_& m) {
  m.def(
      "measure_bandwidth",
      [](const std::string& kernel, int threads, std::size_t array_bytes, int runs) {
        const Bandwidth found = measure(kernel, threads, array_bytes, runs);
        return std::pair{found.best_gbps, found.median_gbps};
      },
      "kernel"_a, "threads"_a, "array_bytes"_a, "runs"_a);
  m.def(
      "read_bandwidth",
      [](int threads) { return measure("read", threads, everybit::stream_array_bytes(), kRuns).median_gbps; },
      "threads"_a);
  m.def("last_level_cache", &everybit::last_level_cache_bytes);
  m.def("stream_array_bytes", &everybit::stream_array_bytes);
}
