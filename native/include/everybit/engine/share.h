// How an op's work is shared among the threads that run it together.
#pragma once

#include <cstddef>

namespace everybit::engine {

// Thread `index` of `count`; every op function is called by all of them with the same arguments.
struct Share {
  std::size_t index, count;
};

struct Range {
  std::size_t begin, end;
};

// This thread's contiguous part of n items, in whole multiples of `grain` but for the last.
inline Range part_of(std::size_t n, Share share, std::size_t grain = 1) {
  const std::size_t grains = (n + grain - 1) / grain;
  const std::size_t begin = grains * share.index / share.count * grain;
  const std::size_t end = grains * (share.index + 1) / share.count * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

}  // namespace everybit::engine
