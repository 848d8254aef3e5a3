// The insides of Program, shared by program.cc and experts.cc.
#pragma once

#include <algorithm>
#include <cstring>

#include "everybit/engine/program.h"

namespace everybit::engine {

struct Program::Run {
  const StepInput& input;
  int own(int weight) const { return input.served[weight]; }
  std::size_t tokens(bool selected) const { return selected ? input.rows_count : input.tokens_count; }
};

struct Program::Node {
  std::string label;
  Place out;
  bool selected;
  std::vector<std::function<void(const Run&, Share)>> phases;
};

// Cosines and sines of the step's positions for one set of frequencies, made once and used by every layer.
struct Program::RopeTable {
  std::vector<float> inv_freq;
  float scale;
  std::vector<float> cosines, sines;
};

// Divides the rows of several weights, laid end to end, among the threads: f(weight index, rows of that weight).
template <class F>
void share_rows(const std::vector<std::size_t>& rows, Share share, const F& f) {
  std::size_t total = 0;
  for (const std::size_t n : rows) total += n;
  const Range mine = part_of(total, share, 8);
  std::size_t first = 0;
  for (std::size_t i = 0; i < rows.size(); first += rows[i], ++i) {
    const std::size_t begin = std::max(mine.begin, first), end = std::min(mine.end, first + rows[i]);
    if (begin < end) f(i, Range{begin - first, end - first});
  }
}

// This thread's tokens of x [T, columns] in int8.
inline void quantize_rows(const Kernels& kernels, Columns x, std::size_t columns, const QuantizedRows& to,
                          Share share) {
  const Range mine = part_of(to.tokens, share);
  for (std::size_t t = mine.begin; t < mine.end; ++t)
    kernels.quantize(x.data + t * x.stride, columns, to.codes + t * to.blocks * kBlock,
                     to.scales + t * to.blocks * kGroups, to.sums + t);
}

}  // namespace everybit::engine
