// The pool and whole programs with it: the same bytes for any number of threads, steps cut in any way, and (built with
// -fsanitize=thread) no data race. Exits non-zero on a failure.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "everybit/engine/program.h"

namespace {

using namespace everybit::engine;

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

// Every thread adds its index to its own cell, then, after a barrier, reads everybody's.
void test_pool(int threads) {
  Pool pool(threads);
  std::vector<long> cells(pool.size()), sums(pool.size());
  for (long round = 1; round <= 2000; ++round) {
    pool.run([&](Share share) {
      cells[share.index] = round * static_cast<long>(share.index + 1);
      pool.barrier();
      long sum = 0;
      for (const long cell : cells) sum += cell;
      sums[share.index] = sum;
    });
    const long n = static_cast<long>(pool.size());
    for (const long sum : sums) check(sum == round * n * (n + 1) / 2, "a barrier let a thread through early");
  }
}

struct Planes8 {
  std::vector<std::uint8_t> bytes[8];
  std::vector<float> table;
};

// A random quantized weight of 4 planes, kept alive by `keep`.
Weight random_weight(std::mt19937& random, std::vector<std::unique_ptr<Planes8>>& keep, const char* name,
                     std::size_t experts, std::size_t rows, std::size_t columns, Mode mode, const Kernels& kernels) {
  auto held = std::make_unique<Planes8>();
  Weight weight{name, experts, rows, columns, true, {}, {}, 4, {}};
  weight.planes.row_bytes = (columns + 7) / 8;
  weight.planes.columns = columns;
  for (int p = 0; p < 4; ++p) {
    held->bytes[p].resize(experts * rows * weight.planes.row_bytes);
    for (auto& byte : held->bytes[p]) byte = static_cast<std::uint8_t>(random());
    weight.planes.plane[p] = held->bytes[p].data();
  }
  std::normal_distribution<float> normal(0, 0.05f);
  held->table.resize(experts * rows * 16);
  for (float& value : held->table) value = normal(random);
  weight.tables[4] = std::make_unique<PreparedTables>(held->table.data(), nullptr, experts * rows, 4, mode, kernels, 1);
  keep.push_back(std::move(held));
  return weight;
}

// Two layers with every op but softcap, 24 tokens in steps of the given lengths -> logits of all tokens.
std::vector<float> run_program(int threads, Mode mode, const std::vector<int>& steps) {
  constexpr std::size_t kWidth = 64, kHeads = 4, kKvHeads = 2, kHead = 16, kInner = 40, kExperts = 3, kVocabulary = 50;
  std::mt19937 random(7);
  std::vector<std::unique_ptr<Planes8>> keep;
  ProgramOptions options;
  options.threads = threads;
  options.mode = mode;
  options.debug = true;
  options.most_tokens = 32;
  Program program(options, 2, kKvHeads, kHead, 4, Dtype::f16);
  const Kernels& kernels = *program.isa().kernels;
  const auto buffer = [&](std::size_t width) { return Place{program.add_buffer(width), 0, width}; };
  const auto weight = [&](const char* name, std::size_t experts, std::size_t rows, std::size_t columns) {
    return program.add_weight(random_weight(random, keep, name, experts, rows, columns, mode, kernels));
  };
  const Place x = buffer(kWidth), h = buffer(kWidth), q = buffer(kHeads * kHead), k = buffer(kKvHeads * kHead),
              v = buffer(kKvHeads * kHead), o = buffer(kHeads * kHead), scores = buffer(kExperts),
              last = buffer(kWidth), logits = buffer(kVocabulary);
  std::vector<float> embedding(kVocabulary * kWidth), ones(kWidth, 1.0f);
  std::normal_distribution<float> normal(0, 1);
  for (float& value : embedding) value = normal(random);
  Weight plain{"embed", 1, kVocabulary, kWidth, false, {embedding.data(), Dtype::f32, kVocabulary, kWidth, false},
               {},      0, {}};
  const int table = program.add_weight(std::move(plain));
  program.add_embed("embed", x, table, false, 0, 1.0f, false);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    program.add_norm("norm", h, x, ones, {}, NormKind::rms, 1e-5f, false, 1);
    program.add_linear(
        "qkv", h, {q, k, v},
        {weight("q", 1, q.width, kWidth), weight("k", 1, k.width, kWidth), weight("v", 1, v.width, kWidth)}, {}, false);
    const std::vector<float> frequencies = {1.0f, 0.5f, 0.25f, 0.1f};
    program.add_rope("rope q", q, kHeads, frequencies, 1.0f, false);
    program.add_rope("rope k", k, kKvHeads, frequencies, 1.0f, false);
    program.add_attention("attention", o, q, k, v, layer, kHeads, 0.25f, layer ? 9 : 0, 0.0f, {});
    program.add_linear("o", o, {x}, {weight("o", 1, kWidth, o.width)}, {}, true);
    program.add_norm("norm", h, x, ones, {}, NormKind::rms, 1e-5f, false, 1);
    program.add_linear("router", h, {scores}, {weight("router", 1, kExperts, kWidth)}, {}, false);
    program.add_experts("experts", {x,
                                    h,
                                    scores,
                                    weight("gate_up", kExperts, 2 * kInner, kWidth),
                                    weight("down", kExperts, kWidth, kInner),
                                    2,
                                    Routing::softmax,
                                    true,
                                    {},
                                    {},
                                    Activation::silu,
                                    0.0f,
                                    false,
                                    true});
  }
  program.add_select("select", last, x);
  program.add_linear("head", last, {logits}, {table}, {}, false);
  program.set_logits(logits);

  const std::vector<std::uint8_t> served(program.weight_count(), 4);
  std::vector<float> all;
  std::int32_t past = 0;
  const std::int32_t blocks[2] = {3, 1};
  for (const int count : steps) {
    std::vector<std::int32_t> tokens, rows;
    for (int i = 0; i < count; ++i) {
      tokens.push_back((past + i) * 7 % static_cast<int>(kVocabulary));
      rows.push_back(i);
    }
    const std::int32_t starts[2] = {0, count};
    std::vector<float> out(static_cast<std::size_t>(count) * kVocabulary);
    program.run({tokens.size(),
                 tokens.data(),
                 {1, starts, &past, blocks, 2},
                 rows.size(),
                 rows.data(),
                 served.data(),
                 out.data()});
    all.insert(all.end(), out.begin(), out.end());
    past += count;
  }
  return all;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 4, 7}) test_pool(threads);
  for (const Mode mode : {Mode::exact, Mode::standard, Mode::fast}) {
    const std::vector<float> wanted = run_program(1, mode, {24});
    for (const int threads : {2, 3, 4, 8})
      check(same(run_program(threads, mode, {24}), wanted), "threads change bytes");
    const std::vector<float> cut = run_program(2, mode, {5, 1, 1, 17});
    float worst = 0, most = 0;
    for (std::size_t i = 0; i < cut.size(); ++i) {
      worst = std::max(worst, std::abs(cut[i] - wanted[i]));
      most = std::max(most, std::abs(wanted[i]));
    }
    // One token and many run other kernels, which sum floats in another order.
    check(worst < 1e-4f * most, "how a sequence is cut into steps changes its logits");
  }
  std::printf(failures ? "program_test: %d failures\n" : "program_test: ok\n", failures);
  return failures != 0;
}
