// What memory this machine has, measured: a STREAM of our own (McCalpin 1995), because tokens per second are bytes per
// second and a roofline needs its roof.
#pragma once

#include <cstddef>

namespace everybit {

enum class Stream {
  read,   // sum += a[i]           counts one array
  copy,   // b[i] = a[i]           counts two
  triad,  // c[i] = a[i] + s b[i]  counts three
};

struct Bandwidth {
  double best_gbps;    // 1e9 bytes a second
  double median_gbps;  // of all runs
};

// Runs a kernel over arrays of `array_bytes` on `threads` threads, `runs` times after one that is not counted. Every
// thread touches its part of each array first, so that it lies in its own memory node. Writes are counted once, as in
// STREAM, although most processors read a line before they write it.
Bandwidth measure_bandwidth(Stream kernel, int threads, std::size_t array_bytes, int runs);

// Bytes of the largest cache of processor 0, 0 where the system does not say.
std::size_t last_level_cache_bytes();

// An array size that no cache holds: four times the last level, at least 256 MB, at most an eighth of memory.
std::size_t stream_array_bytes();

}  // namespace everybit
