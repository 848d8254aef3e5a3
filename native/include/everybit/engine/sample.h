// From logits to a token. The result depends on (logits, history, parameters) and on nothing else: the random number is
// a function of (seed, position), so neither the batch nor the order of requests changes what a request gets.
//
// Order, as in Hugging Face and vLLM: repetition penalty, frequency and presence penalties, temperature, top_k (exactly
// k remain, ties to the lower id), top_p (the shortest run of falling probabilities whose sum reaches top_p, of what
// top_k left, renormalized), min_p (at least min_p times the largest probability). Then one draw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace everybit::engine {

struct SampleParams {
  float temperature = 1.0f;         // 0: the largest logit, ties to the lowest id; the filters below do not matter
  int top_k = 0;                    // 0: off
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  float repetition_penalty = 1.0f;  // of every token of the history: logit > 0 is divided, else multiplied
  float presence_penalty = 0.0f;    // subtracted once from tokens that were generated
  float frequency_penalty = 0.0f;   // subtracted as often as they were generated
  std::uint64_t seed = 0;
  std::uint64_t position = 0;  // of the token being chosen in its sequence
};

// Distinct tokens seen so far (prompt and output), and how often each was *generated*: 0 for prompt only.
struct History {
  const std::int32_t* tokens = nullptr;
  const std::int32_t* generated = nullptr;
  std::size_t size = 0;
};

enum class SampleStatus : std::uint8_t {
  ok,
  not_a_number,  // a logit is NaN or +infinity
  empty,         // every logit is -infinity (or there is none)
};

struct TokenLogprob {
  std::int32_t token;
  float logprob;
};

struct Sampled {
  SampleStatus status;
  std::int32_t token;             // -1 unless ok
  float logprob;                  // of the token, if wanted (else 0)
  std::vector<TokenLogprob> top;  // falling, ties to the lower id
};

// What may be drawn: ids ascending, weights not normalized (their sum is `total`).
struct Distribution {
  std::vector<std::int32_t> tokens;
  std::vector<float> weights;
  double total = 0;
};

// Chooses a token. `logits` f32[vocabulary] is scratch afterwards. Log-probabilities (`top` >= 0: of the token, and of
// the `top` likeliest; -1: none) are those of the logits as they came, before penalties and temperature.
Sampled sample(float* logits, std::size_t vocabulary, const History&, const SampleParams&, int top = -1);

// The filtered distribution itself, for exact speculation; temperature 0 leaves one token. Mutates logits likewise.
SampleStatus distribute(float* logits, std::size_t vocabulary, const History&, const SampleParams&, Distribution*);

// A uniform number in [0, 1) with 53 bits: Philox-4x32-10 with key `seed` and counter (position, stream).
double uniform(std::uint64_t seed, std::uint64_t position, std::uint64_t stream = 0);

// The token at quantile u of the distribution.
std::int32_t draw(const Distribution&, double u);

}  // namespace everybit::engine
