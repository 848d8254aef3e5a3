// The sampler. Costs are passes over the logits, so every pass is a plain loop of independent lanes that the compiler
// vectorizes, and nothing is sorted but what may be drawn.
#include "everybit/engine/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace everybit::engine {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kRun = 1024;  // tokens whose weights are summed in single precision before doubles take over
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float value;
  std::int32_t token;
};

// The order of everything: falling values, then rising ids.
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

// The largest of n logits; NaN if one of them is NaN or +infinity.
float largest(const float* logits, std::size_t n) {
  float best[kLanes];
  std::uint32_t bad[kLanes] = {};
  std::fill(best, best + kLanes, -kInfinity);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) {
      const float x = logits[i + j];
      bad[j] |= x < kInfinity ? 0u : 1u;
      best[j] = x > best[j] ? x : best[j];
    }
  }
  for (; i < n; ++i) {
    bad[0] |= logits[i] < kInfinity ? 0u : 1u;
    best[0] = logits[i] > best[0] ? logits[i] : best[0];
  }
  for (std::size_t j = 1; j < kLanes; ++j) {
    bad[0] |= bad[j];
    best[0] = best[j] > best[0] ? best[j] : best[0];
  }
  return bad[0] != 0 ? std::numeric_limits<float>::quiet_NaN() : best[0];
}

std::int32_t first_equal(const float* logits, std::size_t n, float value) {
  return static_cast<std::int32_t>(std::find(logits, logits + n, value) - logits);
}

// e^x for x <= 0, within 3 ulp; 0 below -87 (a weight of 1e-38 of the largest is never drawn).
inline float decay(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float whole = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
  const float q = 4.9999994e-1f + r * (1.66665196e-1f + r * (4.16683927e-2f + r * (8.3687808e-3f + r * 1.3814465e-3f)));
  const float scale = std::bit_cast<float>((static_cast<std::int32_t>(whole) + 127) << 23);
  const float y = (1.0f + (r + r * r * q)) * scale;
  return x < -87.0f ? 0.0f : y;
}

// weights[i] = e^((logits[i] - top) * sharpness), and their sum. weights may be logits, or null for the sum alone.
// `runs` receives the sum of each kRun of them.
double weigh(const float* logits, std::size_t n, float top, float sharpness, float* weights,
             std::vector<double>* runs = nullptr) {
  double total = 0;
  float rest[kRun];
  for (std::size_t start = 0; start < n; start += kRun) {
    const std::size_t count = std::min(kRun, n - start);
    float* to = weights != nullptr ? weights + start : rest;
    const float* from = logits + start;
    for (std::size_t i = 0; i < count; ++i) to[i] = decay((from[i] - top) * sharpness);
    float sums[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (std::size_t j = 0; j < kLanes; ++j) sums[j] += to[i + j];
    for (; i < count; ++i) sums[0] += to[i];
    double sum = 0;
    for (float part : sums) sum += static_cast<double>(part);
    if (runs != nullptr) runs->push_back(sum);
    total += sum;
  }
  return total;
}

// The k first of all finite values, in order. Keeps a threshold: the k-th best value of what was seen so far. An equal
// value further on has a higher id and loses, so only larger ones are looked at.
std::vector<Candidate> first_k(const float* values, std::size_t n, std::size_t k) {
  std::vector<Candidate> kept;
  if (k == 0) return kept;
  k = std::min(k, n);
  const std::size_t room = 2 * k + 256;
  kept.reserve(room + kLanes);
  float threshold = -kInfinity;
  const auto shrink = [&] {
    if (kept.size() <= k) return;
    std::nth_element(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(k - 1), kept.end(), before);
    kept.resize(k);
    threshold = kept[k - 1].value;
  };
  const auto look = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
      if (values[i] > threshold) kept.push_back({values[i], static_cast<std::int32_t>(i)});
    if (kept.size() >= room) shrink();
  };
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    std::uint32_t above[kLanes], any = 0;
    for (std::size_t j = 0; j < kLanes; ++j) above[j] = values[i + j] > threshold ? 1u : 0u;
    for (std::size_t j = 0; j < kLanes; ++j) any |= above[j];
    if (any != 0) look(i, i + kLanes);
  }
  look(i, n);
  shrink();
  std::sort(kept.begin(), kept.end(), before);
  return kept;
}

// How many candidates, in order, reach `mass`; they are moved to the front. Halves the range that holds the end, so
// the cost is linear; a sort of a flat distribution over 150 000 tokens would take 10 ms.
std::size_t reach(std::vector<Candidate>* all, double mass) {
  auto begin = all->begin(), end = all->end();
  while (end - begin > 64) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    double sum = 0;
    for (auto it = begin; it != middle; ++it) sum += static_cast<double>(it->value);
    if (sum >= mass) {
      end = middle;
    } else {
      mass -= sum, begin = middle;
    }
  }
  std::sort(begin, end, before);
  while (begin != end && mass > 0) mass -= static_cast<double>(begin++->value);
  return std::max<std::size_t>(static_cast<std::size_t>(begin - all->begin()), 1);
}

void penalize(float* logits, std::size_t vocabulary, const History& history, const SampleParams& params) {
  for (std::size_t i = 0; i < history.size; ++i) {
    if (history.tokens[i] < 0 || static_cast<std::size_t>(history.tokens[i]) >= vocabulary) continue;
    float& x = logits[history.tokens[i]];
    x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    const std::int32_t count = history.generated != nullptr ? history.generated[i] : 0;
    x -= params.frequency_penalty * static_cast<float>(count) + (count > 0 ? params.presence_penalty : 0.0f);
  }
}

bool penalizes(const History& history, const SampleParams& params) {
  return history.size != 0 &&
         (params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0);
}

// Penalties, and the largest logit after them.
SampleStatus prepare(float* logits, std::size_t vocabulary, const History& history, const SampleParams& params,
                     float* top) {
  *top = largest(logits, vocabulary);
  if (penalizes(history, params) && !std::isnan(*top)) {
    penalize(logits, vocabulary, history, params);
    *top = largest(logits, vocabulary);
  }
  if (std::isnan(*top)) return SampleStatus::not_a_number;
  return *top == -kInfinity ? SampleStatus::empty : SampleStatus::ok;
}

float sharpness_of(const SampleParams& params) {
  return std::min(1.0f / params.temperature, std::numeric_limits<float>::max());
}

bool filters(std::size_t vocabulary, const SampleParams& params) {
  return (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary) || params.top_p < 1 ||
         params.min_p > 0;
}

// Every token whose weight is at least `least` times the largest (which is 1).
std::vector<Candidate> at_least(const float* weights, std::size_t n, float least, double* mass) {
  std::vector<Candidate> kept;
  *mass = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (weights[i] < least || weights[i] == 0) continue;
    kept.push_back({weights[i], static_cast<std::int32_t>(i)});
    *mass += static_cast<double>(weights[i]);
  }
  return kept;
}

// What the filters leave; values are weights.
std::vector<Candidate> filter(float* logits, std::size_t vocabulary, float top, const SampleParams& params) {
  const float sharpness = sharpness_of(params);
  std::vector<Candidate> kept;
  double mass = 0;
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary) {
    kept = first_k(logits, vocabulary, static_cast<std::size_t>(params.top_k));
    for (Candidate& c : kept) c.value = decay((c.value - top) * sharpness), mass += static_cast<double>(c.value);
    if (params.top_p < 1) {
      double left = mass * static_cast<double>(params.top_p);
      std::size_t n = 0;
      while (n < kept.size() && left > 0) left -= static_cast<double>(kept[n++].value);
      kept.resize(std::max<std::size_t>(n, 1));
    }
  } else {
    const double total = weigh(logits, vocabulary, top, sharpness, logits);
    if (params.top_p < 1) {
      // Few tokens hold nearly all of the mass, if the model knows what it says; else look at more.
      const double wanted = total * static_cast<double>(params.top_p);
      for (float least : {0x1p-10f, 0x1p-16f, 0.0f}) {
        kept = at_least(logits, vocabulary, least, &mass);
        if (mass >= wanted) break;
      }
      kept.resize(reach(&kept, wanted));
    } else {
      kept = at_least(logits, vocabulary, params.min_p, &mass);
    }
  }
  std::erase_if(kept, [&](const Candidate& c) { return c.value < params.min_p || c.value == 0; });
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return kept;
}

Distribution distribution_of(const std::vector<Candidate>& kept) {
  Distribution all;
  all.tokens.reserve(kept.size()), all.weights.reserve(kept.size());
  for (const Candidate& c : kept) {
    all.tokens.push_back(c.token), all.weights.push_back(c.value);
    all.total += static_cast<double>(c.value);
  }
  return all;
}

// The place in weights[begin, end) where the running sum exceeds `target`; the last positive one if rounding ran past.
std::size_t walk(const float* weights, std::size_t begin, std::size_t end, double target) {
  std::size_t last = begin;
  for (std::size_t i = begin; i < end; ++i) {
    if (weights[i] == 0) continue;
    last = i;
    target -= static_cast<double>(weights[i]);
    if (target < 0) return i;
  }
  return last;
}

// A draw from all tokens, without a list of them.
std::int32_t draw_unfiltered(float* logits, std::size_t vocabulary, float top, const SampleParams& params, double u) {
  std::vector<double> runs;
  runs.reserve(vocabulary / kRun + 1);
  double target = u * weigh(logits, vocabulary, top, sharpness_of(params), logits, &runs);
  std::size_t run = 0, last = 0;
  for (; run < runs.size(); ++run) {
    if (runs[run] > 0) last = run;
    if (target < runs[run]) break;
    target -= runs[run];
  }
  if (run == runs.size()) run = last;
  return static_cast<std::int32_t>(walk(logits, run * kRun, std::min(vocabulary, (run + 1) * kRun), target));
}

}  // namespace

double uniform(std::uint64_t seed, std::uint64_t position, std::uint64_t stream) {
  // Philox-4x32-10. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c[4] = {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
                        static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0], b = std::uint64_t{0xCD9E8D57u} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return static_cast<double>((std::uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

std::int32_t draw(const Distribution& distribution, double u) {
  const std::vector<float>& weights = distribution.weights;
  return distribution.tokens[walk(weights.data(), 0, weights.size(), u * distribution.total)];
}

SampleStatus distribute(float* logits, std::size_t vocabulary, const History& history, const SampleParams& params,
                        Distribution* out) {
  *out = {};
  float top;
  const SampleStatus status = prepare(logits, vocabulary, history, params, &top);
  if (status != SampleStatus::ok) return status;
  if (!(params.temperature > 0)) {
    out->tokens = {first_equal(logits, vocabulary, top)}, out->weights = {1.0f}, out->total = 1;
    return status;
  }
  *out = distribution_of(filter(logits, vocabulary, top, params));
  return status;
}

Sampled sample(float* logits, std::size_t vocabulary, const History& history, const SampleParams& params, int top) {
  Sampled result{SampleStatus::ok, -1, 0, {}};
  std::vector<float> raw;
  if (top >= 0) raw.assign(logits, logits + vocabulary);
  float peak;
  result.status = prepare(logits, vocabulary, history, params, &peak);
  if (result.status != SampleStatus::ok) return result;
  if (!(params.temperature > 0)) {
    result.token = first_equal(logits, vocabulary, peak);
  } else {
    const double u = uniform(params.seed, params.position);
    if (filters(vocabulary, params)) {
      result.token = draw(distribution_of(filter(logits, vocabulary, peak, params)), u);
    } else {
      result.token = draw_unfiltered(logits, vocabulary, peak, params, u);
    }
  }
  if (top >= 0) {
    const float most = largest(raw.data(), vocabulary);
    const double norm = static_cast<double>(most) + std::log(weigh(raw.data(), vocabulary, most, 1.0f, nullptr));
    const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - norm); };
    result.logprob = logprob(raw[static_cast<std::size_t>(result.token)]);
    for (const Candidate& c : first_k(raw.data(), vocabulary, static_cast<std::size_t>(top)))
      result.top.push_back({c.token, logprob(c.value)});
  }
  return result;
}

}  // namespace everybit::engine
