#include "program.h"

#include <sys/mman.h>

#include <new>

namespace everybit::engine {
namespace {

const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

}  // namespace

Program::Program(const ProgramOptions& options, std::size_t layers, std::size_t kv_heads, std::size_t head_dim,
                 std::size_t kv_blocks, Dtype kv_dtype)
    : isa_(choose_isa(options.isa)),
      mode_(options.mode),
      debug_(options.debug),
      most_tokens_(options.most_tokens),
      pool_(options.threads, options.pin),
      layers_(layers),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      kv_blocks_(kv_blocks),
      layer_bytes_(kv_blocks * kv_bytes_per_block(kv_dtype, kv_heads, head_dim)),
      kv_dtype_(kv_dtype) {
  positions_.resize(most_tokens_);
  if (kv_bytes() > 0) {  // last: nothing after it can fail and leave it behind
    void* memory =
        mmap(nullptr, kv_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    kv_ = static_cast<std::uint8_t*>(memory);
  }
}

Program::~Program() {
  for (auto* map : maps_) map->store(Watch::ended, std::memory_order_release);
  if (kv_) munmap(kv_, kv_bytes());
}

int Program::add_buffer(std::size_t width) {
  widths_.push_back(width);
  memory_.push_back(std::make_unique_for_overwrite<float[]>(width * most_tokens_ + 16));
  buffers_.push_back(
      reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory_.back().get()) + 63) & ~std::uintptr_t{63}));
  return static_cast<int>(widths_.size()) - 1;
}

void Program::watch(const void* data, std::size_t bytes) { maps_.push_back(watch_mapping(data, bytes)); }

int Program::add_weight(Weight weight) {
  weights_.push_back(std::make_unique<Weight>(std::move(weight)));
  return static_cast<int>(weights_.size()) - 1;
}

Columns Program::at(const Run& run, Place place) const {
  const auto buffer = static_cast<std::size_t>(place.buffer);
  float* data = place.buffer == logits_.buffer ? run.input.logits : buffers_[buffer];
  return {data + place.start, widths_[buffer], place.width};
}

KvLayer Program::cache(std::size_t layer) const {
  return {kv_ + layer * layer_bytes_, kv_bytes_per_block(kv_dtype_, kv_heads_, head_dim_), kv_dtype_, kv_heads_,
          head_dim_};
}

Program::Node& Program::add_node(const std::string& label, Place out) {
  nodes_.push_back(std::make_unique<Node>(Node{label, out, selected_, {}}));
  return *nodes_.back();
}

void Program::set_logits(Place place) {
  logits_ = place;
  std::size_t widest = 0;  // exact mode dequantizes at least one whole row behind the dense kernels' own scratch
  for (const auto& weight : weights_) widest = std::max(widest, weight->columns);
  scratch_stride_ = std::max({kScratchBytes + PreparedTables::kRoomBytes, attention_scratch_bytes(head_dim_),
                              kDenseScratchBytes + 4 * widest});
  scratch_stride_ = (scratch_stride_ + 4095) / 4096 * 4096;
  scratch_.resize(scratch_stride_ * pool_.size() + 4096);
  scratch_offset_ = (4096 - reinterpret_cast<std::uintptr_t>(scratch_.data()) % 4096) % 4096;
}

void Program::prepare(int id, int bits, const std::function<std::unique_ptr<PreparedTables>()>& build) {
  const std::lock_guard<std::mutex> guard(steps_);
  auto& tables = weight(id).tables[static_cast<std::size_t>(bits)];
  if (!tables) tables = build();
}

void Program::add_embed(const std::string& label, Place out, int weight, bool positions, std::int64_t offset,
                        float scale, bool add) {
  const Weight& table = this->weight(weight);
  add_node(label, out).phases.push_back([=, this, &table](const Run& run, Share share) {
    const std::int32_t* indices = positions ? positions_.data() : run.input.tokens;
    isa_.ops->embed(at(run, out), table.plain.data, table.plain.dtype, indices, run.input.tokens_count, offset, scale,
                    add, share);
  });
}

void Program::add_norm(const std::string& label, Place out, Place x, std::vector<float> weight, std::vector<float> bias,
                       NormKind kind, float eps, bool unit_offset, std::size_t groups) {
  add_node(label, out).phases.push_back([=, this, selected = selected_](const Run& run, Share share) {
    isa_.ops->norm(kind, at(run, out), at(run, x), run.tokens(selected), data_or_null(weight), data_or_null(bias), eps,
                   unit_offset, groups, share);
  });
}

void Program::add_linear(const std::string& label, Place x, const std::vector<Place>& outs,
                         const std::vector<int>& weights, const std::vector<std::vector<float>>& biases, bool add) {
  Node& node = add_node(label, outs.front());
  const bool selected = selected_;
  bool quantized = false;
  std::vector<std::size_t> rows;
  for (const int id : weights) {
    quantized = quantized || weight(id).quantized;
    rows.push_back(weight(id).rows);
  }
  room_.reserve(most_tokens_, x.width);
  if (quantized && mode_ != Mode::exact)
    node.phases.push_back([=, this](const Run& run, Share share) {
      quantize_rows(*isa_.kernels, at(run, x), x.width, room_.rows(0, run.tokens(selected), x.width), share);
    });
  node.phases.push_back([=, this](const Run& run, Share share) {
    const QuantizedRows input = room_.rows(0, run.tokens(selected), x.width);
    share_rows(rows, share, [&](std::size_t i, Range range) {
      const Columns to = at(run, outs[i]);
      const Output out{to.data, to.stride, add, biases.empty() ? nullptr : data_or_null(biases[i])};
      multiply(weight(weights[i]), 0, run.own(weights[i]), mode_, isa_, at(run, x), input, range, out, scratch(share));
    });
  });
}

void Program::add_rope(const std::string& label, Place x, std::size_t heads, const std::vector<float>& inv_freq,
                       float scale, bool interleaved) {
  auto found = std::find_if(ropes_.begin(), ropes_.end(),
                            [&](const auto& rope) { return rope->inv_freq == inv_freq && rope->scale == scale; });
  if (found == ropes_.end()) {
    const std::size_t count = most_tokens_ * inv_freq.size();
    ropes_.push_back(
        std::make_unique<RopeTable>(RopeTable{inv_freq, scale, std::vector<float>(count), std::vector<float>(count)}));
    found = ropes_.end() - 1;
  }
  const RopeTable* table = found->get();
  add_node(label, x).phases.push_back([=, this](const Run& run, Share share) {
    isa_.ops->rope(at(run, x), run.input.tokens_count, heads, table->cosines.data(), table->sines.data(),
                   table->inv_freq.size(), interleaved, share);
  });
}

void Program::add_attention(const std::string& label, Place out, Place q, Place k, Place v, std::size_t layer,
                            std::size_t heads, float scale, std::size_t window, float softcap,
                            std::vector<float> sinks) {
  Node& node = add_node(label, out);
  node.phases.push_back([=, this](const Run& run, Share share) {
    isa_.ops->append_kv(cache(layer), at(run, k), at(run, v), run.input.sequences, share);
  });
  node.phases.push_back([=, this](const Run& run, Share share) {
    const AttentionArguments arguments{at(run, out), at(run, q), cache(layer), heads,
                                       scale,        window,     softcap,      data_or_null(sinks)};
    isa_.ops->attention(arguments, run.input.sequences, scratch(share), share);
  });
}

void Program::add_activate(const std::string& label, Place out, Place gate, Place up, bool has_up, Activation kind,
                           float limit) {
  add_node(label, out).phases.push_back([=, this, selected = selected_](const Run& run, Share share) {
    const Columns none{nullptr, 0, 0};
    isa_.ops->activate(kind, at(run, out), at(run, gate), has_up ? at(run, up) : none, run.tokens(selected), limit,
                       share);
  });
}

void Program::add_add(const std::string& label, Place out, Place x, Place y) {
  add_node(label, out).phases.push_back([=, this, selected = selected_](const Run& run, Share share) {
    isa_.ops->add(at(run, out), at(run, x), at(run, y), run.tokens(selected), share);
  });
}

void Program::add_softcap(const std::string& label, Place x, float cap) {
  add_node(label, x).phases.push_back([=, this, selected = selected_](const Run& run, Share share) {
    isa_.ops->softcap(at(run, x), run.tokens(selected), cap, share);
  });
}

void Program::add_select(const std::string& label, Place out, Place x) {
  selected_ = true;
  add_node(label, out).phases.push_back([=, this](const Run& run, Share share) {
    isa_.ops->select(at(run, out), at(run, x), run.input.rows, run.input.rows_count, share);
  });
}

void Program::run(const StepInput& input) {
  const std::lock_guard<std::mutex> guard(steps_);
  if (pool_.forked()) throw StepError("the model was opened before this process was forked: open it again");
  for (std::size_t i = 0; i < weights_.size(); ++i)
    if (weights_[i]->quantized && (input.served[i] > 8 || !weights_[i]->tables[input.served[i]]))
      throw std::invalid_argument(weights_[i]->name + " has no tables for " + std::to_string(input.served[i]) +
                                  " bits");
  const Sequences& sequences = input.sequences;
  for (std::size_t s = 0; s < sequences.count; ++s)
    for (std::int32_t row = sequences.starts[s]; row < sequences.starts[s + 1]; ++row)
      positions_[static_cast<std::size_t>(row)] = sequences.past[s] + row - sequences.starts[s];
  const Run run{input};
  const Node* failed = nullptr;
  std::int64_t failed_row = -1;
  // Nothing in here may throw: the other threads would wait for ever. What allocates did so when it was added.
  pool_.run([&](Share share) noexcept {
    for (const auto& rope : ropes_)
      isa_.ops->rope_table(positions_.data(), input.tokens_count, rope->inv_freq.data(), rope->inv_freq.size(),
                           rope->scale, rope->cosines.data(), rope->sines.data(), share);
    pool_.barrier();
    for (const auto& node : nodes_) {
      if (node->selected && input.rows_count == 0) continue;
      for (const auto& phase : node->phases) {
        phase(run, share);
        pool_.barrier();
      }
      if (debug_ && share.index == 0 && !failed) {
        failed_row = isa_.ops->find_nonfinite(at(run, node->out), {0, run.tokens(node->selected)});
        if (failed_row >= 0) failed = node.get();
      }
      if (debug_) pool_.barrier();
    }
  });
  if (std::any_of(maps_.begin(), maps_.end(),
                  [](const auto* map) { return map->load(std::memory_order_acquire) == Watch::lost; }))
    throw StepError("a weight file was cut short while it was in use: restore the file and load the model again");
  if (failed) throw StepError(failed->label + ": row " + std::to_string(failed_row) + " of its output is not finite");
}

}  // namespace everybit::engine
