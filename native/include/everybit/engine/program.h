// A model as a list of native ops, run for a step of tokens by all threads of a pool together.
//
// Python (engine/native.py) translates each op of src/everybit/engine/ops.py into one `add_*` call here; from then on a
// step runs without Python: 150 small calls a token would cost more than some of the ops. Every op is one or more
// *phases*, functions that all threads call, with a barrier after each.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "everybit/engine/guard.h"
#include "everybit/engine/pool.h"
#include "everybit/engine/weight.h"

namespace everybit::engine {

// Columns of a buffer of the program.
struct Place {
  int buffer;
  std::size_t start, width;
};

// A failure of the step itself: what it computed is not to be used.
struct StepError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ProgramOptions {
  int threads = 1;
  std::vector<int> pin;
  std::string isa;  // empty: the best
  Mode mode = Mode::standard;
  bool debug = false;             // look for non-finite numbers after every op
  std::size_t most_tokens = 512;  // of one step
};

// What a step works on; all pointers are the caller's. See Step in src/everybit/engine/program.py.
struct StepInput {
  std::size_t tokens_count;
  const std::int32_t* tokens;
  Sequences sequences;
  std::size_t rows_count;
  const std::int32_t* rows;
  const std::uint8_t* served;  // [weights]: which of its own precisions each quantized weight is read at
  float* logits;               // f32[rows_count][vocabulary]
};

class Program {
 public:
  Program(const ProgramOptions& options, std::size_t layers, std::size_t kv_heads, std::size_t head_dim,
          std::size_t kv_blocks, Dtype kv_dtype);
  ~Program();

  const Isa& isa() const { return isa_; }
  Mode mode() const { return mode_; }
  std::size_t threads() const { return pool_.size(); }

  int add_buffer(std::size_t width);
  int add_weight(Weight weight);
  // Memory of a mapped file that weights point into: once a page of it is lost, every step fails.
  void watch(const void* data, std::size_t bytes);
  Weight& weight(int id) { return *weights_[static_cast<std::size_t>(id)]; }
  std::size_t weight_count() const { return weights_.size(); }

  void add_embed(const std::string& label, Place out, int weight, bool positions, std::int64_t offset, float scale,
                 bool add);
  void add_norm(const std::string& label, Place out, Place x, std::vector<float> weight, std::vector<float> bias,
                NormKind kind, float eps, bool unit_offset, std::size_t groups);
  void add_linear(const std::string& label, Place x, const std::vector<Place>& outs, const std::vector<int>& weights,
                  const std::vector<std::vector<float>>& biases, bool add);
  void add_rope(const std::string& label, Place x, std::size_t heads, const std::vector<float>& inv_freq, float scale,
                bool interleaved);
  void add_attention(const std::string& label, Place out, Place q, Place k, Place v, std::size_t layer,
                     std::size_t heads, float scale, std::size_t window, float softcap, std::vector<float> sinks);
  void add_activate(const std::string& label, Place out, Place gate, Place up, bool has_up, Activation kind,
                    float limit);
  void add_add(const std::string& label, Place out, Place x, Place y);
  void add_softcap(const std::string& label, Place x, float cap);
  void add_select(const std::string& label, Place out, Place x);

  struct ExpertsArguments {
    Place out, x, scores;
    int gate_up, down;
    std::size_t top_k;
    Routing routing;
    bool normalize;
    std::vector<float> gate_up_bias, down_bias;  // [E][2I], [E][N], or empty
    Activation kind;
    float limit;
    bool interleaved, add;
  };
  void add_experts(const std::string& label, ExpertsArguments arguments);

  // Computes and appends to the cache. The last buffer written by the last op is the caller's `logits`.
  // Throws std::invalid_argument where a weight has no tables for the precision asked of it.
  // Throws StepError (a file was cut short under its map; in debug mode, a non-finite number: names the op).
  void run(const StepInput& input);

  // Where the logits of a step are: the place the last op writes, of `vocabulary` columns. The last thing said of a
  // program: memory of the threads is sized by what was added before.
  void set_logits(Place place);

  // Puts tables for a weight's own precision in place, made by `build`, unless they are there.
  void prepare(int weight, int bits, const std::function<std::unique_ptr<PreparedTables>()>& build);

  std::size_t kv_bytes() const { return layers_ * layer_bytes_; }
  std::size_t kv_blocks() const { return kv_blocks_; }
  std::size_t most_tokens() const { return most_tokens_; }

 private:
  struct Run;
  struct Node;
  struct RopeTable;
  Node& add_node(const std::string& label, Place out);
  Columns at(const Run& run, Place place) const;
  KvLayer cache(std::size_t layer) const;
  void* scratch(Share share) { return scratch_.data() + share.index * scratch_stride_ + scratch_offset_; }

  const Isa& isa_;
  Mode mode_;
  bool debug_;
  std::size_t most_tokens_;
  Pool pool_;
  std::size_t layers_, kv_heads_, head_dim_, kv_blocks_, layer_bytes_;
  Dtype kv_dtype_;
  std::uint8_t* kv_ = nullptr;  // anonymous map: pages come when they are first written
  bool selected_ = false;       // ops added from now on see the selected rows
  Place logits_{-1, 0, 0};
  std::vector<std::size_t> widths_;
  std::vector<std::unique_ptr<float[]>> memory_;
  std::vector<float*> buffers_;  // in memory_, 64-byte aligned: no vector of a row straddles two cache lines
  std::vector<std::unique_ptr<Weight>> weights_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  QuantizedRoom room_;
  std::vector<std::atomic<Watch>*> maps_;
  std::mutex steps_;  // held by a step and while tables change: one at a time
  std::vector<std::int32_t> positions_;
  std::vector<std::uint8_t> scratch_;
  std::size_t scratch_stride_ = 0, scratch_offset_ = 0;
};

}  // namespace everybit::engine
