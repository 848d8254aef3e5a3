// The sampler against a plain one that sorts everything in double precision; ties, errors, and the draws' frequencies.
//
// g++ -std=c++20 -O2 -Iinclude tests/sample_test.cc src/engine/sample.cc -o sample_test
#include "everybit/engine/sample.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using namespace everybit::engine;

namespace {

int failures = 0;
std::size_t checks = 0;
const float kInfinity = INFINITY;

void expect(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  std::printf("FAIL %s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

std::mt19937_64 random_bits(1);

std::vector<float> normal(std::size_t n, float scale) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random_bits);
  return x;
}

// What may be drawn, by the definition: (token, probability) by rising ids. `close` receives the distance, as a share
// of the mass, between top_p and the nearest running sum: below rounding errors the choice may differ.
std::vector<std::pair<int, double>> expected(std::vector<float> logits, const History& history, const SampleParams& p,
                                             double* close) {
  *close = 1;
  for (std::size_t i = 0; i < history.size; ++i) {
    float& x = logits[static_cast<std::size_t>(history.tokens[i])];
    x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
    x -= p.frequency_penalty * static_cast<float>(history.generated[i]);
    x -= history.generated[i] > 0 ? p.presence_penalty : 0;
  }
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto at = [&](int token) { return static_cast<double>(logits[static_cast<std::size_t>(token)]); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return at(a) > at(b); });
  if (p.temperature == 0) return {{order[0], 1.0}};
  if (p.top_k > 0 && static_cast<std::size_t>(p.top_k) < order.size()) order.resize(static_cast<std::size_t>(p.top_k));
  std::vector<double> weights;
  for (int token : order) weights.push_back(std::exp((at(token) - at(order[0])) / static_cast<double>(p.temperature)));
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::size_t n = order.size();
  if (p.top_p < 1) {
    double sum = 0;
    n = 0;
    while (n < order.size() && (n == 0 || sum < total * static_cast<double>(p.top_p))) {
      sum += weights[n++];
      *close = std::min(*close, std::fabs(sum / total - static_cast<double>(p.top_p)));
    }
  }
  std::vector<std::pair<int, double>> kept;
  for (std::size_t i = 0; i < n; ++i)
    if (weights[i] >= static_cast<double>(p.min_p) && weights[i] > 1e-37) kept.emplace_back(order[i], weights[i]);
  double left = 0;
  for (const auto& [token, weight] : kept) left += weight;
  for (auto& [token, weight] : kept) weight /= left;
  std::sort(kept.begin(), kept.end());
  return kept;
}

void test_distributions() {
  std::size_t compared = 0, skipped = 0;
  for (std::size_t vocabulary : {1, 2, 17, 64, 100, 1000, 5000, 20000}) {
    for (int round = 0; round < 60; ++round) {
      std::vector<float> logits = normal(vocabulary, round % 3 == 0 ? 0.2f : round % 3 == 1 ? 3 : 10);
      if (round % 4 == 0)  // many ties
        for (float& x : logits) x = std::nearbyint(x);
      if (round % 5 == 0)
        for (std::size_t i = 0; i < vocabulary / 2; ++i) logits[random_bits() % vocabulary] = -kInfinity;
      logits[random_bits() % vocabulary] = 1;
      SampleParams p;
      const int form = round % 12;
      p.temperature = form == 0 ? 0.0f : form % 3 == 1 ? 0.7f : 1.3f;
      if (form == 1 || form == 2 || form == 5 || form == 9) p.top_k = 1 + static_cast<int>(random_bits() % 60);
      if (form == 2 || form == 3 || form == 6 || form == 9 || form == 10)
        p.top_p = 0.01f + static_cast<float>(random_bits() % 98) / 100;
      if (form == 4 || form == 5 || form == 6 || form == 9) p.min_p = 0.03f;
      std::vector<std::int32_t> seen, generated;
      for (std::size_t i = 0; i < std::min<std::size_t>(vocabulary, 20); ++i)
        seen.push_back(static_cast<std::int32_t>(i * 7 % vocabulary)),
            generated.push_back(static_cast<std::int32_t>(i % 3));
      std::sort(seen.begin(), seen.end());
      seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
      if (form >= 7) p.repetition_penalty = 1.2f, p.presence_penalty = 0.3f, p.frequency_penalty = 0.1f;
      const History history{seen.data(), generated.data(), seen.size()};
      double close;
      const auto want = expected(logits, history, p, &close);
      std::vector<float> scratch = logits;
      Distribution got;
      const std::string name = "vocabulary " + std::to_string(vocabulary) + " round " + std::to_string(round);
      expect(distribute(scratch.data(), vocabulary, history, p, &got) == SampleStatus::ok, name + " status");
      // Weights have errors of 3 ulp and the exponent's rounding: |x| / T < 100 of them.
      if (close < 2e-5) {
        ++skipped;
        continue;
      }
      ++compared;
      bool same = want.size() == got.tokens.size();
      for (std::size_t i = 0; same && i < want.size(); ++i)
        same = want[i].first == got.tokens[i] &&
               std::fabs(static_cast<double>(got.weights[i]) / got.total - want[i].second) <= 2e-5 * want[i].second;
      expect(same,
             name + ": " + std::to_string(got.tokens.size()) + " tokens, expected " + std::to_string(want.size()));
      for (int d = 0; d < 4; ++d) {
        scratch = logits, p.position = static_cast<std::uint64_t>(d), p.seed = static_cast<std::uint64_t>(round);
        const Sampled once = sample(scratch.data(), vocabulary, history, p);
        scratch = logits;
        const Sampled twice = sample(scratch.data(), vocabulary, history, p, 3);
        expect(once.token == twice.token, name + ": the draw depends on the log-probabilities");
        expect(std::binary_search(got.tokens.begin(), got.tokens.end(), once.token), name + ": drew a filtered token");
      }
    }
  }
  std::printf("distributions: %zu compared, %zu too close to a boundary\n", compared, skipped);
  expect(skipped * 4 < compared, "most cases are compared");
}

void test_frequencies() {
  // Pearson's statistic over 20 000 draws: with n - 1 degrees of freedom it exceeds n + 5 sqrt(2n) by chance less than
  // once in a thousand runs, and the draws are fixed by the seed.
  for (int form = 0; form < 3; ++form) {
    const std::size_t n = 30;
    const std::vector<float> logits = normal(n, 1);
    SampleParams p;
    p.seed = 42, p.temperature = 0.8f;
    if (form == 1) p.top_k = 12;
    if (form == 2) p.top_p = 0.8f;
    double close;
    const auto want = expected(logits, {}, p, &close);
    std::vector<int> counts(n);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) {
      std::vector<float> scratch = logits;
      p.position = static_cast<std::uint64_t>(i);
      ++counts[static_cast<std::size_t>(sample(scratch.data(), n, {}, p).token)];
    }
    double statistic = 0;
    for (const auto& [token, probability] : want)
      statistic += std::pow(counts[static_cast<std::size_t>(token)] - kDraws * probability, 2) / (kDraws * probability);
    const double k = static_cast<double>(want.size());
    std::printf("frequencies %d: chi-square %.1f over %zu tokens\n", form, statistic, want.size());
    expect(statistic < k + 5 * std::sqrt(2 * k), "frequencies");
  }
  // A second stream and the next position are other numbers; the mean of uniform numbers is 1/2 (sd 0.29 / 100).
  double mean = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) mean += uniform(7, i) / 10000;
  expect(std::fabs(mean - 0.5) < 0.015, "mean of uniform");
  expect(uniform(7, 0) != uniform(7, 1) && uniform(7, 0) != uniform(7, 0, 1) && uniform(7, 0) != uniform(8, 0),
         "streams");
  // Known answer of Philox-4x32-10 with key and counter zero (Random123's kat_vectors): 6627e8d5 e169c58d ...
  expect(uniform(0, 0) == static_cast<double>(0x6627e8d5e169c58dull >> 11) * 0x1p-53, "Philox known answer");
}

void test_edges() {
  SampleParams greedy;
  greedy.temperature = 0;
  for (std::size_t n : {1, 5, 64, 1000, 4097}) {
    for (float bad : {NAN, kInfinity}) {
      for (const SampleParams& p : {greedy, SampleParams{}}) {
        std::vector<float> logits = normal(n, 1);
        logits[random_bits() % n] = bad;
        expect(sample(logits.data(), n, {}, p).status == SampleStatus::not_a_number, "not a number");
      }
    }
    std::vector<float> nothing(n, -kInfinity);
    expect(sample(nothing.data(), n, {}, greedy).status == SampleStatus::empty, "empty");
    std::vector<float> one = nothing;
    one[n / 2] = -5;
    for (SampleParams p : {greedy, SampleParams{}, SampleParams{.top_k = 3}, SampleParams{.top_p = 0.5f}}) {
      std::vector<float> scratch = one;
      const Sampled s = sample(scratch.data(), n, {}, p, 5);
      expect(s.token == static_cast<int>(n / 2) && s.logprob == 0 && s.top.size() == 1, "the only token");
    }
    std::vector<float> flat(n, 2);
    expect(sample(flat.data(), n, {}, greedy).token == 0, "a tie goes to the lowest id");
    for (int k : {1, 3, 50}) {
      std::fill(flat.begin(), flat.end(), 2.0f);
      Distribution d;
      distribute(flat.data(), n, {}, {.top_k = k}, &d);
      expect(d.tokens.size() == std::min<std::size_t>(n, static_cast<std::size_t>(k)) &&
                 d.tokens.back() == static_cast<int>(d.tokens.size()) - 1,
             "top_k of ties: the lowest ids");
    }
    std::fill(flat.begin(), flat.end(), 2.0f);
    Distribution d;
    distribute(flat.data(), n, {}, {.top_p = 0.5f}, &d);
    expect(d.tokens.size() == (n + 1) / 2 && d.tokens.back() == static_cast<int>(d.tokens.size()) - 1, "top_p of ties");
    std::vector<float> spread(n);
    for (std::size_t i = 0; i < n; ++i) spread[i] = static_cast<float>(i);
    expect(sample(spread.data(), n, {}, {.temperature = 1e-40f}).token == static_cast<int>(n - 1), "tiny temperature");
  }
  expect(sample(nullptr, 0, {}, greedy).status == SampleStatus::empty, "no vocabulary");
  // Log-probabilities are those of the logits as they came.
  std::vector<float> logits = normal(3000, 2), scratch = logits;
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x));
  const std::int32_t token = 5, count = 2;
  const Sampled s = sample(scratch.data(), 3000, {&token, &count, 1}, {.temperature = 0.3f, .presence_penalty = 9}, 20);
  std::vector<int> order(3000);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  expect(s.top.size() == 20, "number of log-probabilities");
  const auto close = [&](float got, int id) {
    return std::fabs(static_cast<double>(got) -
                     (static_cast<double>(logits[static_cast<std::size_t>(id)]) - std::log(sum))) < 2e-6;
  };
  for (std::size_t i = 0; i < 20; ++i)
    expect(s.top[i].token == order[i] && close(s.top[i].logprob, order[i]), "top log-probabilities");
  expect(close(s.logprob, s.token), "log-probability");
}

}  // namespace

int main() {
  test_distributions();
  test_frequencies();
  test_edges();
  std::printf("%zu checks, %d failures\n", checks, failures);
  return failures != 0;
}
