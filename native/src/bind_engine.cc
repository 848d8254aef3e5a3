// The engine's Python side: everybit._native.Program, sampling, and what the machine can do. Arguments were checked by
// everybit.engine; what is checked here again is what would otherwise read or write out of bounds.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "everybit/engine/program.h"
#include "everybit/engine/sample.h"

namespace {

using namespace everybit::engine;
using Ints = Array<const std::int32_t, 1>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PlaceTuple = std::tuple<int, std::size_t, std::size_t>;

Place place(const PlaceTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

template <class T>
T one_of(const std::string& name, const std::vector<std::pair<const char*, T>>& known) {
  std::string names;
  for (const auto& [text, value] : known) {
    if (name == text) return value;
    names += names.empty() ? text : std::string(", ") + text;
  }
  throw std::invalid_argument("'" + name + "' arrived, expected one of " + names);
}

Dtype dtype(const std::string& name) {
  return one_of<Dtype>(name, {{"F32", Dtype::f32}, {"F16", Dtype::f16}, {"BF16", Dtype::bf16}});
}

Activation activation(const std::string& name) {
  return one_of<Activation>(name, {{"silu", Activation::silu},
                                   {"gelu", Activation::gelu},
                                   {"gelu_tanh", Activation::gelu_tanh},
                                   {"relu", Activation::relu},
                                   {"relu2", Activation::relu2},
                                   {"swiglu_clamped", Activation::swiglu_clamped}});
}

// A program and the Python arrays it points into.
struct Held {
  Program program;
  std::vector<nb::object> arrays;
};

int add_plain(Held& self, const std::string& name, const Bytes& data, const std::string& type, std::size_t experts,
              std::size_t rows, std::size_t columns, bool transposed) {
  const Dtype kind = dtype(type);
  require(data.size() == experts * rows * columns * (kind == Dtype::f32 ? 4 : 2),
          name + " has " + std::to_string(data.size()) + " bytes, which is not its shape");
  Weight weight{name, experts, rows, columns, false, {data.data(), kind, rows, columns, transposed}, {}, 0, {}};
  self.program.watch(data.data(), data.size());
  self.arrays.push_back(nb::cast(data));
  return self.program.add_weight(std::move(weight));
}

int add_planes(Held& self, const std::string& name, const std::vector<Array<const std::uint8_t, 2>>& planes,
               std::size_t experts, std::size_t columns) {
  require(!planes.empty() && planes.size() <= 8 && experts >= 1, name + ": 1 to 8 planes");
  const std::size_t all_rows = planes.front().shape(0);
  require(all_rows % experts == 0, name + ": rows are not a multiple of the experts");
  Weight weight{name, experts, all_rows / experts, columns, true, {}, {}, static_cast<int>(planes.size()), {}};
  weight.planes.row_bytes = (columns + 7) / 8;
  weight.planes.columns = columns;
  for (std::size_t p = 0; p < planes.size(); ++p) {
    require(planes[p].shape(0) == all_rows && planes[p].shape(1) == weight.planes.row_bytes,
            name + ": plane " + std::to_string(p) + " has another shape than its weight");
    weight.planes.plane[p] = planes[p].data();
    self.program.watch(planes[p].data(), planes[p].size());
    self.arrays.push_back(nb::cast(planes[p]));
  }
  return self.program.add_weight(std::move(weight));
}

Weight& weight_of(Held& self, int id) {
  require(id >= 0 && static_cast<std::size_t>(id) < self.program.weight_count(), "no such weight");
  return self.program.weight(id);
}

void prepare(Held& self, int id, int bits, const Array<const float, 2>& values,
             const std::optional<Array<const float, 1>>& units, int threads) {
  Weight& weight = weight_of(self, id);
  const std::size_t rows = weight.experts * weight.rows;
  require(bits >= 1 && bits <= weight.planes_held && values.shape(0) == rows &&
              values.shape(1) == std::size_t{1} << bits && (!units || units->shape(0) == rows),
          weight.name + ": a table of another shape than its weight");
  const nb::gil_scoped_release release;
  self.program.prepare(id, bits, [&] {
    return std::make_unique<PreparedTables>(values.data(), units ? units->data() : nullptr, rows, bits,
                                            self.program.mode(), *self.program.isa().kernels, threads);
  });
}

void prepare_cells(Held& self, int id, int bits, const Array<const float, 2>& centres,
                   const Array<const std::uint8_t, 2>& ladders, const Array<const float, 1>& steps) {
  Weight& weight = weight_of(self, id);
  const std::size_t rows = weight.experts * weight.rows;
  require(bits >= 5 && bits <= weight.planes_held && centres.shape(0) == rows && centres.shape(1) == 16 &&
              ladders.shape(0) == rows && ladders.shape(1) == 16 && steps.shape(0) == rows &&
              self.program.mode() != Mode::exact,
          weight.name + ": cells of another shape than its weight, or in exact mode");
  const nb::gil_scoped_release release;
  self.program.prepare(id, bits, [&] {
    return std::make_unique<PreparedTables>(centres.data(), ladders.data(), steps.data(), rows, bits,
                                            *self.program.isa().kernels);
  });
}

std::size_t table_bytes(Held& self) {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < self.program.weight_count(); ++i)
    for (const auto& tables : self.program.weight(static_cast<int>(i)).tables) sum += tables ? tables->size_bytes() : 0;
  return sum;
}

void run(Held& self, const Ints& tokens, const Ints& starts, const Ints& past,
         const Array<const std::int32_t, 2>& blocks, const Ints& rows, const Bytes& served,
         const Array<float, 2>& logits) {
  const std::size_t sequences = past.shape(0);
  require(starts.shape(0) == sequences + 1 && blocks.shape(0) == sequences, "starts, past and blocks differ in length");
  require(logits.shape(0) == rows.shape(0), "one row of logits per selected row");
  require(served.shape(0) == self.program.weight_count(), "one precision per weight");
  require(tokens.shape(0) <= self.program.most_tokens() && rows.shape(0) <= self.program.most_tokens(),
          "a step of more tokens or rows than the program has room for");
  require(starts(0) == 0 && static_cast<std::size_t>(starts(sequences)) == tokens.shape(0),
          "starts do not cover tokens");
  for (std::size_t s = 0; s < sequences; ++s) {
    require(starts(s) <= starts(s + 1) && past(s) >= 0, "starts must ascend and past not be negative");
    const std::size_t needed =
        (static_cast<std::size_t>(past(s) + starts(s + 1) - starts(s)) + kBlockTokens - 1) / kBlockTokens;
    require(needed <= blocks.shape(1), "a sequence has fewer blocks than tokens");
    for (std::size_t i = 0; i < needed; ++i)
      require(blocks(s, i) >= 0 && static_cast<std::size_t>(blocks(s, i)) < self.program.kv_blocks(),
              "no such KV block");
  }
  for (std::size_t i = 0; i < rows.shape(0); ++i)
    require(rows(i) >= 0 && static_cast<std::size_t>(rows(i)) < tokens.shape(0), "no such row");
  const Sequences where{sequences, starts.data(), past.data(), blocks.data(), blocks.shape(1)};
  const StepInput input{tokens.shape(0), tokens.data(), where,        rows.shape(0),
                        rows.data(),     served.data(), logits.data()};
  const nb::gil_scoped_release release;
  self.program.run(input);
}

nb::tuple sample_token(const Array<float, 1>& logits, const Ints& tokens, const Ints& generated, float temperature,
                       int top_k, float top_p, float min_p, float repetition, float presence, float frequency,
                       std::uint64_t seed, std::uint64_t position, int top) {
  require(tokens.size() == generated.size(), "history: tokens and counts differ in length");
  const SampleParams params{temperature, top_k, top_p, min_p, repetition, presence, frequency, seed, position};
  const History history{tokens.data(), generated.data(), tokens.size()};
  Sampled result;
  {
    const nb::gil_scoped_release release;
    result = sample(logits.data(), logits.size(), history, params, top);
  }
  std::vector<std::pair<std::int32_t, float>> likely;
  for (const TokenLogprob& item : result.top) likely.emplace_back(item.token, item.logprob);
  return nb::make_tuple(static_cast<int>(result.status), result.token, result.logprob, likely);
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::exception<StepError>(m, "StepError", PyExc_RuntimeError);
  nb::class_<Held>(m, "Program")
      .def(
          "__init__",
          [](Held* self, int threads, const std::vector<int>& pin, const std::string& isa, const std::string& mode,
             bool debug, std::size_t most_tokens, std::size_t layers, std::size_t kv_heads, std::size_t head_dim,
             std::size_t kv_blocks, const std::string& kv_dtype) {
            const Mode how =
                one_of<Mode>(mode, {{"exact", Mode::exact}, {"default", Mode::standard}, {"fast", Mode::fast}});
            const ProgramOptions options{threads, pin, isa, how, debug, most_tokens};
            new (self) Held{{options, layers, kv_heads, head_dim, kv_blocks, dtype(kv_dtype)}, {}};
          },
          "threads"_a, "pin"_a, "isa"_a, "mode"_a, "debug"_a, "most_tokens"_a, "layers"_a, "kv_heads"_a, "head_dim"_a,
          "kv_blocks"_a, "kv_dtype"_a)
      .def_prop_ro("isa", [](Held& self) { return self.program.isa().name; })
      .def_prop_ro("threads", [](Held& self) { return self.program.threads(); })
      .def_prop_ro("kv_bytes", [](Held& self) { return self.program.kv_bytes(); })
      .def_prop_ro("table_bytes", &table_bytes)
      .def("add_buffer", [](Held& self, std::size_t width) { return self.program.add_buffer(width); })
      .def("add_plain", &add_plain)
      .def("add_planes", &add_planes)
      .def("has_tables",
           [](Held& self, int id, int bits) {
             require(bits >= 0 && bits <= 8, "bits must lie in 0..8");
             return weight_of(self, id).tables[static_cast<std::size_t>(bits)] != nullptr;
           })
      .def("prepare", &prepare, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg())
      .def("prepare_cells", &prepare_cells, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
           nb::arg().noconvert())
      .def("add_embed",
           [](Held& self, const std::string& label, PlaceTuple out, int weight, bool positions, std::int64_t offset,
              float scale,
              bool add) { self.program.add_embed(label, place(out), weight, positions, offset, scale, add); })
      .def("add_norm",
           [](Held& self, const std::string& label, PlaceTuple out, PlaceTuple x, std::vector<float> weight,
              std::vector<float> bias, const std::string& kind, float eps, bool unit_offset, std::size_t groups) {
             const NormKind norm = one_of<NormKind>(kind, {{"rms", NormKind::rms}, {"layer", NormKind::layer}});
             self.program.add_norm(label, place(out), place(x), std::move(weight), std::move(bias), norm, eps,
                                   unit_offset, groups);
           })
      .def("add_linear",
           [](Held& self, const std::string& label, PlaceTuple x, const std::vector<PlaceTuple>& outs,
              const std::vector<int>& weights, const std::vector<std::vector<float>>& biases, bool add) {
             std::vector<Place> places;
             for (const PlaceTuple& out : outs) places.push_back(place(out));
             self.program.add_linear(label, place(x), places, weights, biases, add);
           })
      .def("add_rope",
           [](Held& self, const std::string& label, PlaceTuple x, std::size_t heads, const std::vector<float>& inv_freq,
              float scale,
              bool interleaved) { self.program.add_rope(label, place(x), heads, inv_freq, scale, interleaved); })
      .def("add_attention",
           [](Held& self, const std::string& label, PlaceTuple out, PlaceTuple q, PlaceTuple k, PlaceTuple v,
              std::size_t layer, std::size_t heads, float scale, std::size_t window, float softcap,
              std::vector<float> sinks) {
             self.program.add_attention(label, place(out), place(q), place(k), place(v), layer, heads, scale, window,
                                        softcap, std::move(sinks));
           })
      .def("add_activate",
           [](Held& self, const std::string& label, PlaceTuple out, PlaceTuple gate, PlaceTuple up, bool has_up,
              const std::string& kind, float limit) {
             self.program.add_activate(label, place(out), place(gate), place(up), has_up, activation(kind), limit);
           })
      .def("add_add", [](Held& self, const std::string& label, PlaceTuple out, PlaceTuple x,
                         PlaceTuple y) { self.program.add_add(label, place(out), place(x), place(y)); })
      .def("add_softcap", [](Held& self, const std::string& label, PlaceTuple x,
                             float cap) { self.program.add_softcap(label, place(x), cap); })
      .def("add_select", [](Held& self, const std::string& label, PlaceTuple out,
                            PlaceTuple x) { self.program.add_select(label, place(out), place(x)); })
      .def("add_experts",
           [](Held& self, const std::string& label, PlaceTuple out, PlaceTuple x, PlaceTuple scores, int gate_up,
              int down, std::size_t top_k, const std::string& routing, bool normalize, std::vector<float> gate_up_bias,
              std::vector<float> down_bias, const std::string& kind, float limit, bool interleaved, bool add) {
             const Routing how =
                 one_of<Routing>(routing, {{"softmax", Routing::softmax}, {"top_k_softmax", Routing::top_k_softmax}});
             self.program.add_experts(
                 label, {place(out), place(x), place(scores), gate_up, down, top_k, how, normalize,
                         std::move(gate_up_bias), std::move(down_bias), activation(kind), limit, interleaved, add});
           })
      .def("set_logits", [](Held& self, PlaceTuple out) { self.program.set_logits(place(out)); })
      .def("run", &run, "tokens"_a.noconvert(), "starts"_a.noconvert(), "past"_a.noconvert(), "blocks"_a.noconvert(),
           "rows"_a.noconvert(), "served"_a.noconvert(), "logits"_a.noconvert());
  m.attr("BLOCK_TOKENS") = static_cast<int>(kBlockTokens);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : supported_isas()) names.emplace_back(isa.name);
    return names;
  });
  m.def("usable_processors", &usable_processors);
  m.def("sample", &sample_token, "logits"_a.noconvert(), "tokens"_a.noconvert(), "generated"_a.noconvert(),
        "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a, "presence_penalty"_a,
        "frequency_penalty"_a, "seed"_a, "position"_a, "top"_a);
}
