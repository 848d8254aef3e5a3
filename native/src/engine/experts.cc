// Routed experts: tokens are sorted by expert, so that each expert's weights are read once a step.
#include "program.h"

namespace everybit::engine {
namespace {

// One routed (token, expert) choice is a *pair*; pairs of an expert lie together, tokens ascending.
struct Pairs {
  std::vector<std::int32_t> experts;         // [T][top_k], as routed
  std::vector<float> probabilities;          // likewise
  std::vector<std::size_t> next;             // [E]: where sort_pairs puts the next one
  std::vector<float> apart;                  // [threads][2I]: an interleaved row taken apart
  std::vector<std::size_t> starts;           // [E + 1]: pairs of expert e are starts[e] .. starts[e+1]-1
  std::vector<std::size_t> token_of;         // [pairs]
  std::vector<std::size_t> place_of;         // [T][top_k] -> pair
  std::unique_ptr<float[]> x, hidden, down;  // f32[pairs][K], [pairs][3I], [pairs][N]; pages come as they are used
  QuantizedRoom room_x, room_hidden;
};

void sort_pairs(Pairs& pairs, std::size_t tokens, std::size_t top_k, std::size_t experts) {
  std::fill(pairs.starts.begin(), pairs.starts.end(), 0);
  for (std::size_t i = 0; i < tokens * top_k; ++i) ++pairs.starts[static_cast<std::size_t>(pairs.experts[i]) + 1];
  for (std::size_t e = 0; e < experts; ++e) pairs.starts[e + 1] += pairs.starts[e];
  std::copy(pairs.starts.begin(), pairs.starts.end() - 1, pairs.next.begin());
  for (std::size_t i = 0; i < tokens * top_k; ++i) {
    const std::size_t pair = pairs.next[static_cast<std::size_t>(pairs.experts[i])]++;
    pairs.place_of[i] = pair;
    pairs.token_of[pair] = i / top_k;
  }
}

}  // namespace

void Program::add_experts(const std::string& label, ExpertsArguments arguments) {
  const Weight& gate_up = weight(arguments.gate_up);
  const Weight& down = weight(arguments.down);
  const std::size_t inner = down.columns, experts = gate_up.experts, top_k = arguments.top_k;
  const std::size_t width = arguments.x.width, most = most_tokens_ * top_k;
  auto state = std::make_shared<Pairs>();
  state->experts.resize(most);
  state->probabilities.resize(most);
  state->starts.resize(experts + 1);
  state->next.resize(experts);
  if (arguments.interleaved) state->apart.resize(pool_.size() * 2 * inner);
  state->token_of.resize(most);
  state->place_of.resize(most);
  state->x = std::make_unique_for_overwrite<float[]>(most * width);
  // gate and up as the weight has them, then the activated product
  state->hidden = std::make_unique_for_overwrite<float[]>(most * 3 * inner);
  state->down = std::make_unique_for_overwrite<float[]>(most * down.rows);
  const bool quantized_x = gate_up.quantized && mode_ != Mode::exact;
  const bool quantized_hidden = down.quantized && mode_ != Mode::exact;
  if (quantized_x) state->room_x.reserve(most, width);
  if (quantized_hidden) state->room_hidden.reserve(most, inner);
  Node& node = add_node(label, arguments.out);
  const bool selected = selected_;

  node.phases.push_back([=, this](const Run& run, Share share) {
    isa_.ops->route(at(run, arguments.scores), run.tokens(selected), top_k, arguments.routing, arguments.normalize,
                    state->experts.data(), state->probabilities.data(), share);
  });
  node.phases.push_back([=](const Run& run, Share share) {
    if (share.index == 0) sort_pairs(*state, run.tokens(selected), top_k, experts);
  });
  node.phases.push_back([=, this](const Run& run, Share share) {
    const Range mine = part_of(run.tokens(selected) * top_k, share);
    const Columns x = at(run, arguments.x);
    for (std::size_t pair = mine.begin; pair < mine.end; ++pair) {
      float* row = state->x.get() + pair * width;
      std::memcpy(row, x.data + state->token_of[pair] * x.stride, width * sizeof(float));
      if (quantized_x)
        quantize_rows(*isa_.kernels, {row, width, width}, width, state->room_x.rows(pair, 1, width), {0, 1});
    }
  });
  // One expert after another, all threads on its rows.
  const auto multiply_all = [=, this](const Weight& weight, float* from, std::size_t from_stride,
                                      std::size_t from_start, float* to, std::size_t to_stride,
                                      const std::vector<float>& bias, QuantizedRoom& room, int own, Share share) {
    const Range mine = part_of(weight.rows, share, 8);
    for (std::size_t e = 0; e < experts; ++e) {
      const std::size_t first = state->starts[e], count = state->starts[e + 1] - first;
      if (count == 0) continue;
      const Columns x{from + first * from_stride + from_start, from_stride, weight.columns};
      const QuantizedRows input = room.rows(first, count, weight.columns);
      const Output out{to + first * to_stride, to_stride, false,
                       bias.empty() ? nullptr : bias.data() + e * weight.rows};
      multiply(weight, e, own, mode_, isa_, x, input, mine, out, scratch(share));
    }
  };
  node.phases.push_back([=, this, &gate_up](const Run& run, Share share) {
    multiply_all(gate_up, state->x.get(), width, 0, state->hidden.get(), 3 * inner, arguments.gate_up_bias,
                 state->room_x, run.own(arguments.gate_up), share);
  });
  node.phases.push_back([=, this](const Run& run, Share share) {
    const Range mine = part_of(run.tokens(selected) * top_k, share);
    float* apart = state->apart.data() + (arguments.interleaved ? share.index * 2 * inner : 0);
    for (std::size_t pair = mine.begin; pair < mine.end; ++pair) {
      float* row = state->hidden.get() + pair * 3 * inner;
      if (arguments.interleaved) {
        for (std::size_t i = 0; i < inner; ++i) {
          apart[i] = row[2 * i];
          apart[inner + i] = row[2 * i + 1];
        }
        std::memcpy(row, apart, 2 * inner * sizeof(float));
      }
      const std::size_t stride = 3 * inner;
      isa_.ops->activate(arguments.kind, {row + 2 * inner, stride, inner}, {row, stride, inner},
                         {row + inner, stride, inner}, 1, arguments.limit, {0, 1});
      if (quantized_hidden)
        quantize_rows(*isa_.kernels, {row + 2 * inner, stride, inner}, inner, state->room_hidden.rows(pair, 1, inner),
                      {0, 1});
    }
  });
  node.phases.push_back([=, this, &down](const Run& run, Share share) {
    multiply_all(down, state->hidden.get(), 3 * inner, 2 * inner, state->down.get(), down.rows, arguments.down_bias,
                 state->room_hidden, run.own(arguments.down), share);
  });
  node.phases.push_back([=, this, rows = down.rows](const Run& run, Share share) {
    const Columns out = at(run, arguments.out);
    const Range mine = part_of(rows, share, 8);
    for (std::size_t t = 0; t < run.tokens(selected); ++t) {
      float* to = out.data + t * out.stride;
      if (!arguments.add) std::fill(to + mine.begin, to + mine.end, 0.0f);
      for (std::size_t k = 0; k < top_k; ++k) {
        const float p = state->probabilities[t * top_k + k];
        const float* from = state->down.get() + state->place_of[t * top_k + k] * rows;
        for (std::size_t n = mine.begin; n < mine.end; ++n) to[n] += p * from[n];
      }
    }
  });
}

}  // namespace everybit::engine
