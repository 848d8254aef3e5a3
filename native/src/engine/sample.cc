// The sampler. Costs are passes over the logits, so every pass is a plain loop of independent lanes that the compiler
// vectorizes, and nothing is sorted but what may be drawn.
#include "everybit/engine/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "everybit/clones.h"

namespace everybit::engine {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kRun = 1024;   // tokens whose weights are summed in single precision before doubles take over
constexpr std::size_t kBlock = 64;   // tokens that are passed over at once when none of them matters
constexpr std::size_t kEdge = 4096;  // tokens around the end of top_p that are worth sorting
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float value;
  std::int32_t token;
};

// The order of everything: falling values, then rising ids.
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

float below(float x) { return std::nextafter(x, -kInfinity); }

// Sixteen numbers, which the compiler lowers to what a clone's instruction set has; every clone computes the same.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float AnyFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// x -> e^x for x <= 0, within 3 ulp; 0 below -87 (a weight of 1e-38 of the largest is never drawn).
inline __attribute__((always_inline)) void decay(Floats& x) {
  const Floats zero = {}, bounded = x < -87.0f ? zero - 87.0f : x;
  const Floats whole = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to a whole number
  const Floats r = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
  const Floats q =
      4.9999994e-1f + r * (1.66665196e-1f + r * (4.16683927e-2f + r * (8.3687808e-3f + r * 1.3814465e-3f)));
  const Integers scale = (__builtin_convertvector(whole, Integers) + 127) << 23;
  x = x < -87.0f ? zero : (1.0f + (r + r * r * q)) * reinterpret_cast<Floats>(scale);
}

float decay(float x) {
  Floats all = {x};
  decay(all);
  return all[0];
}

}  // namespace

// The passes over all logits. n is a multiple of kLanes in each.

// best[j] = the largest of logits j, j + kLanes, ...; returns whether all are below infinity (and not NaN).
EVERYBIT_CLONES
bool find_largest(const float* logits, std::size_t n, float* best) {
  Floats most = *reinterpret_cast<const AnyFloats*>(best);
  Integers good = {};
  good = ~good;
  for (std::size_t i = 0; i < n; i += kLanes) {
    const Floats x = *reinterpret_cast<const AnyFloats*>(logits + i);
    good &= x < kInfinity;
    most = x > most ? x : most;
  }
  *reinterpret_cast<AnyFloats*>(best) = most;
  std::int32_t all = -1;
  for (std::size_t j = 0; j < kLanes; ++j) all &= good[j];
  return all != 0;
}

// weights[i] = e^((logits[i] - top) * sharpness); they may be the same array. sums[j] += weights j, j + kLanes, ...
EVERYBIT_CLONES
void find_weights(const float* logits, std::size_t n, float top, float sharpness, float* weights, float* sums) {
  Floats sum = *reinterpret_cast<const AnyFloats*>(sums);
  for (std::size_t i = 0; i < n; i += kLanes) {
    Floats x = (*reinterpret_cast<const AnyFloats*>(logits + i) - top) * sharpness;
    decay(x);
    *reinterpret_cast<AnyFloats*>(weights + i) = x;
    sum += x;
  }
  *reinterpret_cast<AnyFloats*>(sums) = sum;
}

// sums[j] += values j, j + kLanes, ... that are above `threshold`; returns how many are.
EVERYBIT_CLONES
std::size_t sum_above(const float* values, std::size_t n, float threshold, float* sums) {
  Floats sum = *reinterpret_cast<const AnyFloats*>(sums);
  const Floats zero = {};
  Integers counts = {};
  for (std::size_t i = 0; i < n; i += kLanes) {
    const Floats x = *reinterpret_cast<const AnyFloats*>(values + i);
    sum += x > threshold ? x : zero;
    counts -= x > threshold;
  }
  *reinterpret_cast<AnyFloats*>(sums) = sum;
  std::size_t count = 0;
  for (std::size_t j = 0; j < kLanes; ++j) count += static_cast<std::size_t>(counts[j]);
  return count;
}

// The first of `blocks` blocks of kBlock values, from block `from` on, that has one above `threshold`; or `blocks`.
EVERYBIT_CLONES
std::size_t next_block(const float* values, std::size_t blocks, std::size_t from, float threshold) {
  for (; from < blocks; ++from) {
    Integers above = {};
    for (std::size_t j = 0; j < kBlock; j += kLanes)
      above |= *reinterpret_cast<const AnyFloats*>(values + from * kBlock + j) > threshold;
    std::int64_t words[kLanes / 2], any = 0;
    __builtin_memcpy(words, &above, sizeof words);
    for (std::int64_t word : words) any |= word;
    if (any != 0) break;
  }
  return from;
}

namespace {

// The largest of n logits; NaN if one of them is NaN or +infinity.
float largest(const float* logits, std::size_t n) {
  float best[kLanes];
  std::fill(best, best + kLanes, -kInfinity);
  const std::size_t whole = n / kLanes * kLanes;
  bool good = find_largest(logits, whole, best);
  for (std::size_t i = whole; i < n; ++i) good = good && logits[i] < kInfinity, best[0] = std::max(best[0], logits[i]);
  return good ? *std::max_element(best, best + kLanes) : std::numeric_limits<float>::quiet_NaN();
}

// Calls f(token, value) for the values above `threshold`, in order; f may raise the threshold.
template <typename F>
void for_each_above(const float* values, std::size_t n, float& threshold, F&& f) {
  const std::size_t blocks = n / kBlock;
  const auto look = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
      if (values[i] > threshold) f(static_cast<std::int32_t>(i), values[i]);
  };
  for (std::size_t b = 0; (b = next_block(values, blocks, b, threshold)) < blocks; ++b)
    look(b * kBlock, (b + 1) * kBlock);
  look(blocks * kBlock, n);
}

std::int32_t first_equal(const float* logits, std::size_t n, float value) {
  const float threshold = below(value);
  std::size_t i = next_block(logits, n / kBlock, 0, threshold) * kBlock;
  while (logits[i] != value) ++i;
  return static_cast<std::int32_t>(i);
}

// Weights (see find_weights) and the sum of all; `runs` receives the sums of kRun each.
double weigh(const float* logits, std::size_t n, float top, float sharpness, float* weights,
             std::vector<double>* runs = nullptr) {
  double total = 0;
  for (std::size_t start = 0; start < n; start += kRun) {
    const std::size_t count = std::min(kRun, n - start), whole = count / kLanes * kLanes;
    float* to = weights + start;
    float sums[kLanes] = {};
    find_weights(logits + start, whole, top, sharpness, to, sums);
    for (std::size_t i = whole; i < count; ++i) sums[0] += to[i] = decay((logits[start + i] - top) * sharpness);
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
  kept.reserve(room);
  float threshold = -kInfinity;
  const auto shrink = [&] {
    if (kept.size() <= k) return;
    std::nth_element(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(k - 1), kept.end(), before);
    kept.resize(k);
    threshold = kept[k - 1].value;
  };
  for_each_above(values, n, threshold, [&](std::int32_t token, float value) {
    kept.push_back({value, token});
    if (kept.size() == room) shrink();
  });
  shrink();
  std::sort(kept.begin(), kept.end(), before);
  return kept;
}

double mass_above(const float* weights, std::size_t n, float threshold, std::size_t* count) {
  double total = 0;
  *count = 0;
  for (std::size_t start = 0; start < n; start += kRun) {
    const std::size_t size = std::min(kRun, n - start), whole = size / kLanes * kLanes;
    float sums[kLanes] = {};
    *count += sum_above(weights + start, whole, threshold, sums);
    for (std::size_t i = start + whole; i < start + size; ++i)
      if (weights[i] > threshold) sums[0] += weights[i], ++*count;
    for (float part : sums) total += static_cast<double>(part);
  }
  return total;
}

// The last candidate, in order, of those that reach `mass` (not all of them do more than once: mass <= their sum).
// Halves the interval of weights that holds it, by their bits, until few enough are left to sort: a dozen passes,
// whatever the distribution. Sorting a flat one over 150 000 tokens would take 10 ms.
Candidate find_end(const float* weights, std::size_t n, double mass) {
  // All above `low` reach the mass, those above `high` do not.
  std::uint32_t low = 0, high = std::bit_cast<std::uint32_t>(1.0f);
  std::size_t inside = n, above = 0, count;
  double sum = 0;
  while (inside > kEdge && high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    const double here = mass_above(weights, n, std::bit_cast<float>(middle), &count);
    if (here >= mass) {
      low = middle, inside = count - above;
    } else {
      high = middle, inside -= count - above, above = count, sum = here;
    }
  }
  std::vector<Candidate> edge;
  edge.reserve(inside);
  float threshold = std::bit_cast<float>(low);
  const float most = std::bit_cast<float>(high);
  for_each_above(weights, n, threshold, [&](std::int32_t token, float value) {
    if (value <= most) edge.push_back({value, token});
  });
  if (high - low > 1) std::sort(edge.begin(), edge.end(), before);  // else all are equal, and in order
  Candidate end{threshold, std::numeric_limits<std::int32_t>::max()};
  for (const Candidate& c : edge) {
    end = c, sum += static_cast<double>(c.value);
    if (sum >= mass) break;
  }
  return end;
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

// What the filters leave, by rising ids; values are weights.
std::vector<Candidate> filter(float* logits, std::size_t vocabulary, float top, const SampleParams& params) {
  const float sharpness = sharpness_of(params);
  const auto enough = [&](float weight) { return weight >= params.min_p && weight > 0; };
  std::vector<Candidate> kept;
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary) {
    kept = first_k(logits, vocabulary, static_cast<std::size_t>(params.top_k));
    double mass = 0;
    for (Candidate& c : kept) c.value = decay((c.value - top) * sharpness), mass += static_cast<double>(c.value);
    if (params.top_p < 1) {
      double left = mass * static_cast<double>(params.top_p);
      std::size_t n = 0;
      while (n < kept.size() && (n == 0 || left > 0)) left -= static_cast<double>(kept[n++].value);
      kept.resize(n);
    }
    std::erase_if(kept, [&](const Candidate& c) { return !enough(c.value); });
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    return kept;
  }
  const double total = weigh(logits, vocabulary, top, sharpness, logits);
  Candidate end{0, 0};
  if (params.top_p < 1) end = find_end(logits, vocabulary, total * static_cast<double>(params.top_p));
  float threshold = std::max(below(std::max(end.value, params.min_p)), 0.0f);
  for_each_above(logits, vocabulary, threshold, [&](std::int32_t token, float weight) {
    if (enough(weight) && (weight > end.value || token <= end.token)) kept.push_back({weight, token});
  });
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
    const double norm = static_cast<double>(most) + std::log(weigh(raw.data(), vocabulary, most, 1.0f, logits));
    const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - norm); };
    result.logprob = logprob(raw[static_cast<std::size_t>(result.token)]);
    for (const Candidate& c : first_k(raw.data(), vocabulary, static_cast<std::size_t>(top)))
      result.top.push_back({c.token, logprob(c.value)});
  }
  return result;
}

}  // namespace everybit::engine
