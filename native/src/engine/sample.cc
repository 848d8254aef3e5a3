// The sampler. Costs are passes over the logits, so every pass is a plain loop of independent lanes that the compiler
// vectorizes, and nothing is sorted but what may be drawn.
#include "everybit/engine/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

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

// Vectors of four: every processor has them (wider ones made of these were slower than a loop in gcc 12, even where
// the processor has wider ones).
typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Integers __attribute__((vector_size(16)));
typedef float AnyFloats __attribute__((vector_size(16), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const AnyFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<AnyFloats*>(p) = x; }

// e^x for x <= 0, within 3 ulp; 0 below -87 (a weight of 1e-38 of the largest is never drawn).
inline Floats decay(Floats x) {
  const Floats zero = {}, bounded = x < -87.0f ? zero - 87.0f : x;
  const Floats whole = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to a whole number
  const Floats r = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
  const Floats q =
      4.9999994e-1f + r * (1.66665196e-1f + r * (4.16683927e-2f + r * (8.3687808e-3f + r * 1.3814465e-3f)));
  const Integers scale = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return x < -87.0f ? zero : (1.0f + (r + r * r * q)) * reinterpret_cast<Floats>(scale);
}

float decay(float x) { return decay(Floats{x, x, x, x})[0]; }

// The passes over all logits. n is a multiple of kLanes in each: four vectors, so that one needs not wait for another.

// best[j] = the largest of logits j, j + kLanes, ...; returns whether all are below infinity (and not NaN).
bool find_largest(const float* logits, std::size_t n, float* best) {
  Floats most[4];
  Integers bad[4] = {};
  for (std::size_t v = 0; v < 4; ++v) most[v] = load(best + 4 * v);
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t v = 0; v < 4; ++v) {
      const Floats x = load(logits + i + 4 * v);
      bad[v] |= !(x < kInfinity);
      most[v] = x > most[v] ? x : most[v];
    }
  }
  for (std::size_t v = 0; v < 4; ++v) store(best + 4 * v, most[v]);
  const Integers any = (bad[0] | bad[1]) | (bad[2] | bad[3]);
  return (any[0] | any[1] | any[2] | any[3]) == 0;
}

// weights[i] = e^((logits[i] - top) * sharpness); they may be the same array. sums[j] += weights j, j + kLanes, ...
void find_weights(const float* logits, std::size_t n, float top, float sharpness, float* weights, float* sums) {
  Floats sum[4];
  for (std::size_t v = 0; v < 4; ++v) sum[v] = load(sums + 4 * v);
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t v = 0; v < 4; ++v) {
      const Floats x = decay((load(logits + i + 4 * v) - top) * sharpness);
      store(weights + i + 4 * v, x);
      sum[v] += x;
    }
  }
  for (std::size_t v = 0; v < 4; ++v) store(sums + 4 * v, sum[v]);
}

// sums[j] += values j, j + kLanes, ... that are above `threshold`; returns how many are.
std::size_t sum_above(const float* values, std::size_t n, float threshold, float* sums) {
  const Floats zero = {};
  Floats sum[4];
  Integers count[4] = {};
  for (std::size_t v = 0; v < 4; ++v) sum[v] = load(sums + 4 * v);
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t v = 0; v < 4; ++v) {
      const Floats x = load(values + i + 4 * v);
      sum[v] += x > threshold ? x : zero;
      count[v] -= x > threshold;
    }
  }
  for (std::size_t v = 0; v < 4; ++v) store(sums + 4 * v, sum[v]);
  const Integers all = (count[0] + count[1]) + (count[2] + count[3]);
  return static_cast<std::size_t>(all[0] + all[1] + all[2] + all[3]);
}

// Values that are not above `threshold` become 0. sums[j] += what is left of j, j + kLanes, ...
void clear_below(float* values, std::size_t n, float threshold, float* sums) {
  const Floats zero = {};
  Floats sum[4];
  for (std::size_t v = 0; v < 4; ++v) sum[v] = load(sums + 4 * v);
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t v = 0; v < 4; ++v) {
      const Floats x = load(values + i + 4 * v), left = x > threshold ? x : zero;
      store(values + i + 4 * v, left);
      sum[v] += left;
    }
  }
  for (std::size_t v = 0; v < 4; ++v) store(sums + 4 * v, sum[v]);
}

// The first of `blocks` blocks of kBlock values, from block `from` on, that has one above `threshold`; or `blocks`.
std::size_t next_block(const float* values, std::size_t blocks, std::size_t from, float threshold) {
  for (; from < blocks; ++from) {
    const float* block = values + from * kBlock;
    Integers above[4] = {};
    for (std::size_t j = 0; j < kBlock; j += kLanes)
      for (std::size_t v = 0; v < 4; ++v) above[v] |= load(block + j + 4 * v) > threshold;
    const Integers any = (above[0] | above[1]) | (above[2] | above[3]);
    std::uint64_t words[2];
    __builtin_memcpy(words, &any, sizeof words);
    if ((words[0] | words[1]) != 0) break;
  }
  return from;
}

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

double sum_of(const float* lanes) {
  double sum = 0;
  for (std::size_t j = 0; j < kLanes; ++j) sum += static_cast<double>(lanes[j]);
  return sum;
}

// Weights of n tokens, and the sums of each kRun of them.
struct Weights {
  float* data;
  std::size_t n;
  std::vector<double> runs;
  double total() const { return std::accumulate(runs.begin(), runs.end(), 0.0); }
};

// See find_weights; `data` may be the logits.
Weights weigh(const float* logits, std::size_t n, float top, float sharpness, float* data) {
  Weights weights{data, n, {}};
  weights.runs.reserve(n / kRun + 1);
  for (std::size_t start = 0; start < n; start += kRun) {
    const std::size_t count = std::min(kRun, n - start), whole = count / kLanes * kLanes;
    float* to = data + start;
    float sums[kLanes] = {};
    find_weights(logits + start, whole, top, sharpness, to, sums);
    for (std::size_t i = whole; i < count; ++i) sums[0] += to[i] = decay((logits[start + i] - top) * sharpness);
    weights.runs.push_back(sum_of(sums));
  }
  return weights;
}

// Leaves what is not after `end` in the order and at least `least`.
void narrow(Weights* weights, const Candidate& end, float least) {
  const float from = below(std::max(least, 0x1p-126f));
  const auto token = static_cast<std::size_t>(end.token);
  for (std::size_t run = 0; run < weights->runs.size(); ++run) {
    const std::size_t start = run * kRun, count = std::min(kRun, weights->n - start), stop = start + count;
    float* w = weights->data + start;
    float sums[kLanes] = {};
    if (stop <= token || start > token) {  // of equal weights the earlier ones remain
      const float threshold = std::max(stop <= token ? below(end.value) : end.value, from);
      const std::size_t whole = count / kLanes * kLanes;
      clear_below(w, whole, threshold, sums);
      for (std::size_t i = whole; i < count; ++i) sums[0] += w[i] = w[i] > threshold ? w[i] : 0.0f;
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const bool kept = w[i] > from && (w[i] > end.value || (w[i] == end.value && start + i <= token));
        sums[0] += w[i] = kept ? w[i] : 0.0f;
      }
    }
    weights->runs[run] = sum_of(sums);
  }
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
    total += sum_of(sums);
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
  // First guess: a model that knows what it says has few tokens within a thousandth of the likeliest.
  for (std::uint32_t middle = std::bit_cast<std::uint32_t>(0x1p-10f); inside > kEdge && high - low > 1;
       middle = low + (high - low) / 2) {
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

bool limits(std::size_t vocabulary, const SampleParams& params) {
  return params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary;
}

// What top_k and the other filters leave, by rising ids; values are weights.
Distribution filter_few(const float* logits, std::size_t vocabulary, float top, const SampleParams& params) {
  std::vector<Candidate> kept = first_k(logits, vocabulary, static_cast<std::size_t>(params.top_k));
  double mass = 0;
  for (Candidate& c : kept) {
    c.value = decay((c.value - top) * sharpness_of(params));
    mass += static_cast<double>(c.value);
  }
  if (params.top_p < 1) {
    double left = mass * static_cast<double>(params.top_p);
    std::size_t n = 0;
    while (n < kept.size() && (n == 0 || left > 0)) left -= static_cast<double>(kept[n++].value);
    kept.resize(n);
  }
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  Distribution all;
  for (const Candidate& c : kept) {
    if (c.value < params.min_p || c.value == 0) continue;
    all.tokens.push_back(c.token), all.weights.push_back(c.value);
    all.total += static_cast<double>(c.value);
  }
  return all;
}

// What the filters other than top_k leave, in place of the logits.
Weights filter_all(float* logits, std::size_t vocabulary, float top, const SampleParams& params) {
  Weights weights = weigh(logits, vocabulary, top, sharpness_of(params), logits);
  if (params.top_p < 1 || params.min_p > 0) {
    Candidate end{0, std::numeric_limits<std::int32_t>::max()};
    if (params.top_p < 1) end = find_end(logits, vocabulary, weights.total() * static_cast<double>(params.top_p));
    narrow(&weights, end, params.min_p);
  }
  return weights;
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

std::int32_t draw(const Weights& weights, double u) {
  double target = u * weights.total();
  std::size_t run = 0, last = 0;
  for (; run < weights.runs.size(); ++run) {
    if (weights.runs[run] > 0) last = run;
    if (target < weights.runs[run]) break;
    target -= weights.runs[run];
  }
  if (run == weights.runs.size()) run = last;
  const std::size_t end = std::min(weights.n, (run + 1) * kRun);
  return static_cast<std::int32_t>(walk(weights.data, run * kRun, end, target));
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
  if (limits(vocabulary, params)) {
    *out = filter_few(logits, vocabulary, top, params);
    return status;
  }
  const Weights weights = filter_all(logits, vocabulary, top, params);
  for (std::size_t i = 0; i < vocabulary; ++i) {
    if (logits[i] == 0) continue;
    out->tokens.push_back(static_cast<std::int32_t>(i)), out->weights.push_back(logits[i]);
  }
  out->total = weights.total();
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
    result.token = limits(vocabulary, params) ? draw(filter_few(logits, vocabulary, peak, params), u)
                                              : draw(filter_all(logits, vocabulary, peak, params), u);
  }
  if (top >= 0) {
    const float most = largest(raw.data(), vocabulary);
    const double norm = static_cast<double>(most) + std::log(weigh(raw.data(), vocabulary, most, 1.0f, logits).total());
    const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - norm); };
    result.logprob = logprob(raw[static_cast<std::size_t>(result.token)]);
    for (const Candidate& c : first_k(raw.data(), vocabulary, static_cast<std::size_t>(top)))
      result.top.push_back({c.token, logprob(c.value)});
  }
  return result;
}

}  // namespace everybit::engine
