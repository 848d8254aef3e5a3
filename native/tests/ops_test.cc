// Every set of ops this host runs, against loops in double precision, over odd sizes; and: a thread's part is the same
// whatever the number of threads, and attention the same however a sequence was cut into steps, to the last bit.
//
// g++ -std=c++20 -O2 -ffp-contract=off -Iinclude tests/ops_test.cc <objects of src/engine/ops_*.cc> -o ops_test
#include "everybit/engine/ops.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../src/engine/ops-vector-inl.h"  // the plain set's functions, for their errors in ulp

using namespace everybit::engine;

namespace {

constexpr double kEpsilon = 0x1p-24;  // half an ulp of 1
const std::size_t kWidths[] = {1, 3, 8, 105, 172, 352};
const std::size_t kThreads[] = {1, 2, 3, 4};

int failures = 0;
std::size_t checks = 0;

void fail(const std::string& what) {
  std::printf("FAIL %s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

std::string text(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", x);
  return buffer;
}

std::mt19937_64 random_bits(1);

std::vector<float> normal(std::size_t n, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random_bits);
  return x;
}

std::size_t below(std::size_t n) { return random_bits() % n; }

// A buffer with room around its columns; the room must stay as it was.
struct Buffer {
  std::size_t rows, width, stride;
  std::vector<float> data;
  Buffer(std::size_t rows_, std::size_t width_, float scale = 1)
      : rows(rows_), width(width_), stride(width_ + 5), data(normal(rows_ * (width_ + 5) + 3, scale)) {}
  Columns columns() { return {data.data() + 3, stride, width}; }
  float& at(std::size_t t, std::size_t c) { return data[3 + t * stride + c]; }
  float at(std::size_t t, std::size_t c) const { return data[3 + t * stride + c]; }
};

using Reference = std::function<double(std::size_t t, std::size_t c)>;
using Tolerance = std::function<double(std::size_t t, std::size_t c, double want)>;

void compare(const std::string& name, const Buffer& got, const Buffer& before, const Reference& want,
             const Tolerance& tolerance) {
  ++checks;
  double worst = 0;
  std::string where;
  for (std::size_t t = 0; t < got.rows; ++t) {
    for (std::size_t c = 0; c < got.width; ++c) {
      const double w = want(t, c), g = got.at(t, c), error = std::fabs(g - w), allowed = tolerance(t, c, w);
      const double ratio = std::isnan(g) != std::isnan(w) ? 1e30 : error == 0 || std::isnan(g) ? 0 : error / allowed;
      if (!(ratio <= worst)) {
        worst = ratio;
        where = "row " + std::to_string(t) + " column " + std::to_string(c) + ": got " + text(g) + ", expected " +
                text(w) + " within " + text(allowed);
      }
    }
  }
  if (!(worst <= 1)) fail(name + " " + where);
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    const bool inside = i >= 3 && (i - 3) % got.stride < got.width && (i - 3) / got.stride < got.rows;
    if (!inside && std::memcmp(&got.data[i], &before.data[i], 4) != 0)
      return fail(name + " wrote outside its columns, at " + std::to_string(i));
  }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

// Runs f(share) for every share of each thread count, on a fresh copy of `start`; returns the one-thread result.
Buffer run(const std::string& name, const Buffer& start, const std::function<void(Buffer&, Share)>& f) {
  Buffer first = start;
  f(first, {0, 1});
  for (std::size_t count : kThreads) {
    Buffer other = start;
    for (std::size_t i = count; i-- > 0;) f(other, {i, count});
    ++checks;
    if (!same(first.data, other.data)) fail(name + " differs with " + std::to_string(count) + " threads");
  }
  return first;
}

// ------------------------------------------------------------------------------------------------ stored numbers

// x rounded to `mantissa` bits, exponent at least `least`; infinity from `limit` on.
double rounded(double x, int mantissa, int least, double limit) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double quantum = std::ldexp(1.0, std::max(std::ilogb(x), least) - mantissa);
  const double y = std::nearbyint(x / quantum) * quantum;  // ties to even
  return std::fabs(y) >= limit ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
}

double stored(double x, Dtype dtype) {
  return dtype == Dtype::f32 ? x : dtype == Dtype::f16 ? rounded(x, 10, -14, 65536) : rounded(x, 7, -126, 0x1p128);
}

double read_back(const std::uint8_t* p, std::size_t i, Dtype dtype) {
  if (dtype == Dtype::f32) {
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
  }
  std::uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  if (dtype == Dtype::bf16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// Bytes of the given numbers in a dtype, at an odd address: weights come from files with any alignment.
struct Weights {
  Dtype dtype;
  std::vector<std::uint8_t> bytes;
  std::vector<double> values;
  Weights(const std::vector<float>& x, Dtype d) : dtype(d) {
    const std::size_t size = d == Dtype::f32 ? 4 : 2;
    bytes.resize(x.size() * size + 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto value = static_cast<float>(stored(x[i], d));
      values.push_back(value);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (d == Dtype::f32) {
        std::memcpy(&bytes[1 + 4 * i], &bits, 4);
        continue;
      }
      auto half = static_cast<std::uint16_t>(bits >> 16);
      if (d == Dtype::f16) {
        const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
        const auto whole = static_cast<std::uint32_t>(std::ldexp(std::fabs(value), 24));  // exact below 2^8
        half = static_cast<std::uint16_t>(exponent < -14 ? whole : ((exponent + 15) << 10) | (bits >> 13 & 1023));
        half = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000));
      }
      std::memcpy(&bytes[1 + 2 * i], &half, 2);
    }
  }
  const void* data() const { return bytes.data() + 1; }
};

const Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
const char* name_of(Dtype d) { return d == Dtype::f32 ? "f32" : d == Dtype::f16 ? "f16" : "bf16"; }

// ------------------------------------------------------------------------------------------------ tests

// The largest error of f in ulp of the exact value (of 2^-126 at least), over n arguments.
template <typename F, typename G>
void check_ulp(const char* name, F f, G exact, double low, double high, double allowed) {
  ++checks;
  double worst = 0, at = 0;
  constexpr int kSteps = 1000000;
  for (int i = 0; i < kSteps; i += kLanes) {
    float x[kLanes], y[kLanes];
    for (std::size_t j = 0; j < kLanes; ++j)
      x[j] = static_cast<float>(low + (high - low) * (i + static_cast<int>(j)) / kSteps);
    store(y, f(load(x)));
    for (std::size_t j = 0; j < kLanes; ++j) {
      const double want = exact(static_cast<double>(x[j]));
      const double ulp = std::ldexp(1.0, std::max(std::ilogb(want == 0 ? 0x1p-149 : want), -126) - 23);
      const double error = std::fabs(static_cast<double>(y[j]) - want) / ulp;
      if (!(error <= worst)) worst = error, at = x[j];
    }
  }
  std::printf("  %-22s [%g, %g]: %.2f ulp at %.9g (allowed %g)\n", name, low, high, worst, at, allowed);
  if (!(worst <= allowed)) fail(name);
}

void test_functions() {
  const auto e = [](V x) { return everybit::engine::exp(x); };
  const auto e_exact = [](double x) { return std::exp(x); };
  check_ulp("exp", e, e_exact, -87.3, 88.3, 2);
  check_ulp("exp", e, e_exact, -1, 1, 2);
  const auto h = [](V x) { return everybit::engine::tanh(x); };
  check_ulp("tanh", h, [](double x) { return std::tanh(x); }, -10, 10, 2);
  check_ulp("tanh", h, [](double x) { return std::tanh(x); }, -0.7, 0.7, 2);
  const auto f = [](V x) { return one_plus_erf(x); };
  check_ulp("1 + erf, x >= 0", f, [](double x) { return 1 + std::erf(x); }, 0, 6, 2);
  check_ulp("1 + erf, -1 <= x", f, [](double x) { return std::erfc(-x); }, -1, 0, 8);
  check_ulp("1 + erf, -3 <= x", f, [](double x) { return std::erfc(-x); }, -3, -1, 4 + 2 * 9);
  check_ulp("1 + erf, -9 <= x", f, [](double x) { return std::erfc(-x); }, -9, -3, 4 + 2 * 81);
  const float inf = std::numeric_limits<float>::infinity();
  if (e(splat(0))[0] != 1 || e(splat(-inf))[0] != 0 || e(splat(inf))[0] != inf || e(splat(-87.4f))[0] != 0 ||
      e(splat(89))[0] != inf || !std::isnan(e(splat(NAN))[0]) || !std::isnan(h(splat(NAN))[0]) ||
      h(splat(inf))[0] != 1 || h(splat(-inf))[0] != -1 || !std::isnan(f(splat(NAN))[0]) || f(splat(inf))[0] != 2 ||
      f(splat(-inf))[0] != 0)
    fail("exp, tanh or erf of a special number");
}

void test_embed(const Ops& ops) {
  for (std::size_t width : kWidths) {
    for (std::size_t tokens : {1, 2, 17}) {
      for (Dtype dtype : kDtypes) {
        for (bool add : {false, true}) {
          const Weights table(normal(23 * width), dtype);
          std::vector<std::int32_t> indices(tokens);
          for (auto& i : indices) i = static_cast<std::int32_t>(below(20));
          const Buffer start(tokens, width);
          const std::string name = std::string(ops.name) + " embed " + name_of(dtype) + " " + std::to_string(width);
          const Buffer got = run(name, start, [&](Buffer& out, Share share) {
            ops.embed(out.columns(), table.data(), dtype, indices.data(), tokens, 2, 1.25f, add, share);
          });
          compare(
              name, got, start,
              [&](std::size_t t, std::size_t c) {
                const double x = 1.25 * table.values[static_cast<std::size_t>(indices[t] + 2) * width + c];
                return add ? x + static_cast<double>(start.at(t, c)) : x;
              },
              [&](std::size_t t, std::size_t c, double) {
                return kEpsilon * 3 * (std::fabs(static_cast<double>(start.at(t, c))) + 10);
              });
        }
      }
    }
  }
}

void test_norm(const Ops& ops) {
  for (std::size_t part : kWidths) {
    for (std::size_t groups : {1, 3}) {
      for (std::size_t tokens : {1, 2, 3, 17}) {
        for (int variant = 0; variant < 16; ++variant) {
          const NormKind kind = variant & 1 ? NormKind::layer : NormKind::rms;
          const bool in_place = variant & 2, unit = variant & 4, plain = variant & 8;
          const Buffer x(tokens, part * groups, 3);
          const auto weight = normal(part), bias = normal(part);
          const Buffer start = in_place ? x : Buffer(tokens, part * groups);
          const std::string name = std::string(ops.name) + " norm " + std::to_string(part) + "x" +
                                   std::to_string(groups) + " T" + std::to_string(tokens) + " variant " +
                                   std::to_string(variant);
          const float* w = plain ? nullptr : weight.data();
          const float* b = plain || kind == NormKind::rms ? nullptr : bias.data();
          const Buffer got = run(name, start, [&](Buffer& out, Share share) {
            Buffer from = x;
            ops.norm(kind, out.columns(), in_place ? out.columns() : from.columns(), tokens, w, b, 1e-5f, unit, groups,
                     share);
          });
          compare(
              name, got, start,
              [&](std::size_t t, std::size_t c) {
                const std::size_t first = c / part * part;
                double mean = 0, square = 0;
                for (std::size_t i = 0; i < part; ++i) mean += x.at(t, first + i);
                mean = kind == NormKind::layer ? mean / static_cast<double>(part) : 0;
                for (std::size_t i = 0; i < part; ++i) square += std::pow(x.at(t, first + i) - mean, 2);
                double y = (x.at(t, c) - mean) / std::sqrt(square / static_cast<double>(part) + 1e-5f);
                if (w != nullptr) y *= weight[c - first] + (unit ? 1.0 : 0.0);
                return b != nullptr ? y + bias[c - first] : y;
              },
              // Sums of up to 352/4 + 8 rounded additions, halved by the root; the rest are single roundings. A layer
              // norm of one number divides a rounding error by sqrt(eps).
              [&](std::size_t, std::size_t, double want) {
                return kEpsilon * (60 * (std::fabs(want) + 4) + (part < 4 ? 10000 : 0));
              });
        }
      }
    }
  }
}

void test_rope(const Ops& ops) {
  for (std::size_t pairs : {1, 4, 8, 20, 32, 37, 64}) {
    for (std::size_t tokens : {1, 3, 17}) {
      std::vector<std::int32_t> positions(tokens);
      for (auto& p : positions) p = static_cast<std::int32_t>(below(1000000));
      positions[0] = 1048575;
      std::vector<float> inv_freq(pairs);
      for (std::size_t i = 0; i < pairs; ++i)
        inv_freq[i] = static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs)));
      const float scale = 1.1f;
      std::vector<float> cosines(tokens * pairs, 9), sines(tokens * pairs, 9);
      for (std::size_t count : kThreads) {
        std::vector<float> c(tokens * pairs, 7), s(tokens * pairs, 7);
        for (std::size_t i = 0; i < count; ++i)
          ops.rope_table(positions.data(), tokens, inv_freq.data(), pairs, scale, c.data(), s.data(), {i, count});
        if (count == 1) cosines = c, sines = s;
        if (cosines != c || sines != s) fail(std::string(ops.name) + " rope_table differs with the threads");
      }
      for (std::size_t i = 0; i < tokens * pairs; ++i) {
        const double angle = static_cast<double>(positions[i / pairs]) * static_cast<double>(inv_freq[i % pairs]);
        // One rounding to f32; the angle's own error in double is below 1e-10.
        const double allowed = kEpsilon * 1.2 + 1e-9;
        const double wide = scale;
        if (std::fabs(cosines[i] - wide * std::cos(angle)) > allowed ||
            std::fabs(sines[i] - wide * std::sin(angle)) > allowed)
          fail(std::string(ops.name) + " rope_table at angle " + std::to_string(angle));
      }
      for (std::size_t heads : {1, 3}) {
        for (std::size_t beyond : {0, 6}) {
          for (bool interleaved : {false, true}) {
            const std::size_t dim = 2 * pairs + beyond;
            const Buffer start(tokens, heads * dim);
            const std::string name = std::string(ops.name) + " rope " + std::to_string(pairs);
            const Buffer got = run(name, start, [&](Buffer& x, Share share) {
              ops.rope(x.columns(), tokens, heads, cosines.data(), sines.data(), pairs, interleaved, share);
            });
            compare(
                name, got, start,
                [&](std::size_t t, std::size_t c) -> double {
                  const std::size_t head = c / dim * dim, d = c % dim;
                  if (d >= 2 * pairs) return start.at(t, c);
                  const std::size_t i = interleaved ? d / 2 : d % pairs;
                  const bool second = interleaved ? d % 2 : d >= pairs;
                  const double a = start.at(t, head + (interleaved ? 2 * i : i));
                  const double b = start.at(t, head + (interleaved ? 2 * i + 1 : i + pairs));
                  const double cosine = cosines[t * pairs + i], sine = sines[t * pairs + i];
                  return second ? b * cosine + a * sine : a * cosine - b * sine;
                },
                [](std::size_t, std::size_t, double) { return kEpsilon * 30; });  // numbers below 5, 3 roundings
          }
        }
      }
    }
  }
}

double activated(Activation kind, double g) {
  switch (kind) {
    case Activation::silu:
      return g / (1 + std::exp(-g));
    case Activation::gelu:
      return 0.5 * g * std::erfc(-g / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return g / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));  // 1 + tanh(u) = 2/(1 + e^-2u)
    case Activation::relu:
      return std::max(g, 0.0);
    case Activation::relu2:
      return std::pow(std::max(g, 0.0), 2);
    default:
      return 0;
  }
}

void test_elementwise(const Ops& ops) {
  for (std::size_t width : kWidths) {
    for (std::size_t tokens : {1, 2, 4, 17}) {
      const std::string size = std::string(" ") + std::to_string(width) + " T" + std::to_string(tokens);
      const Buffer x(tokens, width, 4), y(tokens, width, 4);
      // Errors are relative to the result: a few roundings, and those of the exponent (|g|, g^2 / 2 or 0.07 g^3).
      const Tolerance close = [&](std::size_t t, std::size_t c, double want) {
        const double g = std::fabs(static_cast<double>(x.at(t, c)));
        return kEpsilon * ((8 + 3 * g + 3 * g * g + g * g * g) * std::fabs(want) + 1e-25);
      };
      for (int k = 0; k < 6; ++k) {
        const auto kind = static_cast<Activation>(k);
        for (int form = 0; form < 3; ++form) {  // without up; with up; in place
          if (kind == Activation::swiglu_clamped && form == 0) continue;
          const std::string name = std::string(ops.name) + " activate " + std::to_string(k) + size;
          const Buffer start = form == 2 ? x : Buffer(tokens, width);
          Buffer gate = x, up = y;
          const Buffer got = run(name, start, [&](Buffer& out, Share share) {
            ops.activate(kind, out.columns(), form == 2 ? out.columns() : gate.columns(),
                         form == 0 ? Columns{nullptr, 0, 0} : up.columns(), tokens, 3.5f, share);
          });
          compare(
              name, got, start,
              [&](std::size_t t, std::size_t c) {
                double g = x.at(t, c), u = y.at(t, c);
                if (kind == Activation::swiglu_clamped) {
                  g = std::min(g, 3.5), u = std::clamp(u, -3.5, 3.5);
                  return (u + 1) * g / (1 + std::exp(-static_cast<double>(1.702f) * g));
                }
                return activated(kind, g) * (form == 0 ? 1 : u);
              },
              [&](std::size_t t, std::size_t c, double want) {
                return close(t, c, want) + (kind == Activation::swiglu_clamped ? kEpsilon * 8 : 0);
              });
        }
      }
      {
        Buffer a = x, b = y;
        const Buffer start(tokens, width);
        const Buffer got = run("add", start, [&](Buffer& out, Share share) {
          ops.add(out.columns(), a.columns(), b.columns(), tokens, share);
        });
        compare(
            std::string(ops.name) + " add" + size, got, start,
            [&](std::size_t t, std::size_t c) { return static_cast<double>(x.at(t, c)) + y.at(t, c); },
            [](std::size_t, std::size_t, double want) { return kEpsilon * std::fabs(want); });
        const Buffer in_place = run("add in place", x, [&](Buffer& out, Share share) {
          ops.add(out.columns(), out.columns(), b.columns(), tokens, share);
        });
        compare(
            std::string(ops.name) + " add in place" + size, in_place, x,
            [&](std::size_t t, std::size_t c) { return static_cast<double>(x.at(t, c)) + y.at(t, c); },
            [](std::size_t, std::size_t, double want) { return kEpsilon * std::fabs(want); });
      }
      for (float cap : {0.5f, 30.0f}) {
        const Buffer got =
            run("softcap", x, [&](Buffer& out, Share share) { ops.softcap(out.columns(), tokens, cap, share); });
        compare(
            std::string(ops.name) + " softcap" + size, got, x,
            [&](std::size_t t, std::size_t c) { return cap * std::tanh(static_cast<double>(x.at(t, c)) / cap); },
            [](std::size_t, std::size_t, double want) { return kEpsilon * 8 * std::fabs(want); });
      }
      {
        Buffer from = x;
        std::vector<std::int32_t> rows = {static_cast<std::int32_t>(tokens - 1), 0,
                                          static_cast<std::int32_t>(tokens / 2)};
        const Buffer start(3, width);
        const Buffer got = run("select", start, [&](Buffer& out, Share share) {
          ops.select(out.columns(), from.columns(), rows.data(), 3, share);
        });
        compare(
            std::string(ops.name) + " select" + size, got, start,
            [&](std::size_t t, std::size_t c) { return x.at(static_cast<std::size_t>(rows[t]), c); },
            [](std::size_t, std::size_t, double) { return 0.0; });
      }
      {
        Buffer bad = x;
        if (ops.find_nonfinite(bad.columns(), {0, tokens}) != -1) fail("find_nonfinite finds what is not there");
        for (float value : {NAN, INFINITY, -INFINITY}) {
          const std::size_t row = below(tokens);
          bad = x;
          bad.at(row, below(width)) = value;
          if (ops.find_nonfinite(bad.columns(), {0, tokens}) != static_cast<std::int64_t>(row))
            fail(std::string(ops.name) + " find_nonfinite" + size);
        }
      }
    }
  }
}

void test_route(const Ops& ops) {
  for (std::size_t experts : {1, 4, 8, 60, 128}) {
    for (std::size_t top_k : {1, 2, 4, 8}) {
      if (top_k > experts) continue;
      for (int variant = 0; variant < 3; ++variant) {
        const std::size_t tokens = 17;
        Buffer scores(tokens, experts, 2);
        for (std::size_t t = 0; t < tokens; t += 2)  // ties
          for (std::size_t e = 0; e < experts; ++e) scores.at(t, e) = static_cast<float>(below(3));
        const Routing routing = variant == 2 ? Routing::top_k_softmax : Routing::softmax;
        std::vector<std::int32_t> first;
        std::vector<float> first_p;
        for (std::size_t count : kThreads) {
          std::vector<std::int32_t> chosen(tokens * top_k, -1);
          std::vector<float> p(tokens * top_k, -1);
          for (std::size_t i = 0; i < count; ++i)
            ops.route(scores.columns(), tokens, top_k, routing, variant == 1, chosen.data(), p.data(), {i, count});
          if (count == 1) first = chosen, first_p = p;
          if (first != chosen || first_p != p) fail("route differs with the threads");
        }
        for (std::size_t t = 0; t < tokens; ++t) {
          std::vector<std::int32_t> order(experts);
          double all = 0, kept = 0;
          for (std::size_t e = 0; e < experts; ++e)
            order[e] = static_cast<std::int32_t>(e), all += std::exp(scores.at(t, e));
          std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
            return scores.at(t, static_cast<std::size_t>(a)) > scores.at(t, static_cast<std::size_t>(b));
          });
          for (std::size_t i = 0; i < top_k; ++i) kept += std::exp(scores.at(t, static_cast<std::size_t>(order[i])));
          for (std::size_t i = 0; i < top_k; ++i) {
            const double want =
                std::exp(scores.at(t, static_cast<std::size_t>(order[i]))) / (variant == 0 ? all : kept);
            ++checks;
            if (first[t * top_k + i] != order[i] || std::fabs(first_p[t * top_k + i] - want) > kEpsilon * 200 * want)
              fail(std::string(ops.name) + " route");
          }
        }
      }
    }
  }
}

void test_dense(const Ops& ops) {
  std::vector<float> scratch(kDenseScratchBytes / 4 + 16);
  void* aligned = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64 / 4;
  for (std::size_t columns : {1, 3, 8, 105, 352, 768, 1700}) {
    for (std::size_t rows : {1, 3, 8, 29}) {
      for (std::size_t tokens : {1, 2, 3, 4, 17}) {
        for (Dtype dtype : kDtypes) {
          for (int variant = 0; variant < 4; ++variant) {
            const bool transposed = variant & 1, add = variant & 2;
            const Weights weights(normal(rows * columns), dtype);
            const auto bias = normal(rows);
            Buffer x(tokens, columns);
            const Buffer start(tokens, rows);
            const Matrix w{weights.data(), dtype, rows, columns, transposed};
            const std::string name = std::string(ops.name) + " dense " + name_of(dtype) + " N" + std::to_string(rows) +
                                     " K" + std::to_string(columns) + " T" + std::to_string(tokens) + " variant " +
                                     std::to_string(variant);
            const auto go = [&](Buffer& out, Share share) {
              const std::size_t begin = rows * share.index / share.count, end = rows * (share.index + 1) / share.count;
              const Columns to = out.columns();
              ops.dense(w, x.columns(), tokens, {begin, end}, {to.data, to.stride, add, add ? nullptr : bias.data()},
                        aligned);
            };
            const Buffer got = run(name, start, go);
            const auto term = [&](std::size_t t, std::size_t n, std::size_t k) {
              return x.at(t, k) * weights.values[transposed ? k * rows + n : n * columns + k];
            };
            compare(
                name, got, start,
                [&](std::size_t t, std::size_t n) {
                  double sum = add ? static_cast<double>(start.at(t, n)) : static_cast<double>(bias[n]);
                  for (std::size_t k = 0; k < columns; ++k) sum += term(t, n, k);
                  return sum;
                },
                // Every addition and product rounds a partial sum: at most sum |x w| each, K/4 + 10 in a chain.
                [&](std::size_t t, std::size_t n, double) {
                  double sum = 5;
                  for (std::size_t k = 0; k < columns; ++k) sum += std::fabs(term(t, n, k));
                  const double chain = static_cast<double>(transposed ? columns : columns / 4) + 10;
                  return kEpsilon * 2 * chain * sum;
                });
            // A token alone gives the same numbers.
            Buffer alone(1, rows), one(1, columns);
            for (std::size_t n = 0; n < rows; ++n) alone.at(0, n) = start.at(tokens - 1, n);
            for (std::size_t k = 0; k < columns; ++k) one.at(0, k) = x.at(tokens - 1, k);
            const Columns to = alone.columns();
            ops.dense(w, one.columns(), 1, {0, rows}, {to.data, to.stride, add, add ? nullptr : bias.data()}, aligned);
            for (std::size_t n = 0; n < rows; ++n)
              if (alone.at(0, n) != got.at(tokens - 1, n)) return fail(name + " depends on the tokens beside");
          }
        }
      }
    }
  }
}

struct Shape {
  std::size_t kv_heads, group, dim, window;
  float softcap;
  bool sinks;
  Dtype dtype;
};

// Sequences with `past` tokens and `fresh` new ones each; the whole history is appended, attention is over the new.
void test_attention_of(const Ops& ops, const Shape& shape, const std::vector<std::size_t>& past,
                       const std::vector<std::size_t>& fresh) {
  const std::size_t heads = shape.kv_heads * shape.group, dim = shape.dim, count = past.size();
  std::size_t most = 0, all_rows = 0, new_rows = 0, blocks = 1;
  std::vector<std::int32_t> starts{0}, new_starts{0}, zeros(count, 0), pasts;
  for (std::size_t s = 0; s < count; ++s) {
    most = std::max(most, (past[s] + fresh[s] + kBlockTokens - 1) / kBlockTokens);
    all_rows += past[s] + fresh[s], new_rows += fresh[s];
    starts.push_back(static_cast<std::int32_t>(all_rows)), new_starts.push_back(static_cast<std::int32_t>(new_rows));
    pasts.push_back(static_cast<std::int32_t>(past[s]));
    blocks += (past[s] + fresh[s] + kBlockTokens - 1) / kBlockTokens;
  }
  std::vector<std::int32_t> pool(blocks), table(count * most, -1);  // a block beyond a sequence's is never touched
  for (std::size_t b = 0; b < blocks; ++b) pool[b] = static_cast<std::int32_t>(b);
  std::shuffle(pool.begin(), pool.end(), random_bits);
  for (std::size_t s = 0, next = 0; s < count; ++s)
    for (std::size_t b = 0; b * kBlockTokens < past[s] + fresh[s]; ++b) table[s * most + b] = pool[next++];

  const std::size_t stride = kv_bytes_per_block(shape.dtype, shape.kv_heads, dim) + 64;
  std::vector<std::uint8_t> memory(blocks * stride + 64, 0xff);  // all bits set: NaN in every dtype
  std::uint8_t* data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  const KvLayer cache{data, stride, shape.dtype, shape.kv_heads, dim};
  Buffer k(all_rows, shape.kv_heads * dim), v(all_rows, shape.kv_heads * dim), q(new_rows, heads * dim);
  const Sequences history{count, starts.data(), zeros.data(), table.data(), most};
  for (std::size_t i = 0; i < 3; ++i) ops.append_kv(cache, k.columns(), v.columns(), history, {i, 3});

  const std::string name = std::string(ops.name) + " attention " + name_of(shape.dtype) + " kv" +
                           std::to_string(shape.kv_heads) + " group" + std::to_string(shape.group) + " D" +
                           std::to_string(dim) + " window" + std::to_string(shape.window) + " rows" +
                           std::to_string(new_rows) + " past" + std::to_string(past[0]);
  const std::size_t size = shape.dtype == Dtype::f32 ? 4 : 2;
  const auto key = [&](std::size_t s, std::size_t at, std::size_t head, std::size_t d, bool value) {
    const std::uint8_t* unit =
        data + static_cast<std::size_t>(table[s * most + at / 16]) * stride + head * 2 * 16 * dim * size;
    return value ? read_back(unit + 16 * dim * size, at % 16 * dim + d, shape.dtype)
                 : read_back(unit, d * 16 + at % 16, shape.dtype);
  };
  for (std::size_t s = 0; s < count; ++s)
    for (std::size_t at = 0; at < past[s] + fresh[s]; ++at)
      for (std::size_t c = 0; c < shape.kv_heads * dim; ++c) {
        const std::size_t row = static_cast<std::size_t>(starts[s]) + at;
        if (key(s, at, c / dim, c % dim, false) != stored(k.at(row, c), shape.dtype) ||
            key(s, at, c / dim, c % dim, true) != stored(v.at(row, c), shape.dtype))
          return fail(name + ": append_kv");
      }

  const auto sinks = normal(heads);
  const Sequences step{count, new_starts.data(), pasts.data(), table.data(), most};
  std::vector<float> scratch(attention_scratch_bytes(dim) / 4 + 16);
  void* aligned = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64 / 4;
  AttentionArguments a{{},
                       q.columns(),
                       cache,
                       heads,
                       1 / std::sqrt(static_cast<float>(dim)) * 1.5f,
                       shape.window,
                       shape.softcap,
                       shape.sinks ? sinks.data() : nullptr};
  const Buffer start(new_rows, heads * dim);
  const Buffer got = run(name, start, [&](Buffer& out, Share share) {
    a.out = out.columns();
    ops.attention(a, step, aligned, share);
  });
  const auto sequence_of = [&](std::size_t t) {
    std::size_t s = 0;
    while (t >= static_cast<std::size_t>(new_starts[s + 1])) ++s;
    return s;
  };
  std::vector<double> weights;
  std::size_t done_row = SIZE_MAX, done_head = 0;
  compare(
      name, got, start,
      [&](std::size_t t, std::size_t c) {
        const std::size_t s = sequence_of(t), head = c / dim, kv = head / shape.group;
        const std::size_t end = past[s] + t - static_cast<std::size_t>(new_starts[s]) + 1;
        const std::size_t begin = shape.window != 0 && end > shape.window ? end - shape.window : 0;
        if (done_row != t || done_head != head) {
          done_row = t, done_head = head;
          weights.assign(end, 0);
          double total = shape.sinks ? std::exp(static_cast<double>(sinks[head])) : 0;
          for (std::size_t at = begin; at < end; ++at) {
            double score = 0;
            for (std::size_t d = 0; d < dim; ++d) score += q.at(t, head * dim + d) * key(s, at, kv, d, false);
            score *= static_cast<double>(a.scale);
            if (shape.softcap != 0) score = shape.softcap * std::tanh(score / shape.softcap);
            total += weights[at] = std::exp(score);
          }
          for (double& w : weights) w /= total;
        }
        double sum = 0;
        for (std::size_t at = begin; at < end; ++at) sum += weights[at] * key(s, at, kv, c % dim, true);
        return sum;
      },
      // Scores stay below about 10 with errors of sqrt(D) roundings of them, the same relative errors then hold for
      // the probabilities, and values are below 5.
      [&](std::size_t, std::size_t, double) { return kEpsilon * 5 * 10 * (4 + std::sqrt(static_cast<double>(dim))); });

  // One row at a time: the very same numbers.
  Buffer single = start;
  a.out = single.columns();
  for (std::size_t t = 0; t < new_rows; ++t) {
    const std::size_t s = sequence_of(t);
    const std::int32_t rows[2] = {static_cast<std::int32_t>(t), static_cast<std::int32_t>(t + 1)};
    const auto before = static_cast<std::int32_t>(past[s] + t - static_cast<std::size_t>(new_starts[s]));
    ops.attention(a, {1, rows, &before, table.data() + s * most, most}, aligned, {0, 1});
  }
  ++checks;
  if (!same(single.data, got.data)) fail(name + ": rows together differ from rows alone");
}

void test_attention(const Ops& ops) {
  for (std::size_t dim : {8, 16, 64, 80, 128, 256}) {
    for (std::size_t group = 1; group <= 8; ++group) {
      const Dtype dtype = kDtypes[(dim / 8 + group) % 3];
      const Shape shape{
          2, group, dim, group % 3 == 1 ? std::size_t{7} : 0, group % 4 == 2 ? 5.0f : 0, group % 2 == 0, dtype};
      test_attention_of(ops, shape, {0}, {1});
      test_attention_of(ops, shape, {140}, {1});
      test_attention_of(ops, shape, {3, 0, 31, 127}, {1, 1, 1, 1});
      test_attention_of(ops, shape, {130, 0, 5}, {2, 17, 1});
    }
  }
  for (Dtype dtype : kDtypes) {
    for (std::size_t window : {0, 1, 16, 33, 150}) {
      test_attention_of(ops, {1, 2, 64, window, 0, false, dtype}, {0, 260}, {70, 33});
      test_attention_of(ops, {2, 1, 40, window, 3, true, dtype}, {127}, {66});
    }
    test_attention_of(ops, {1, 71, 16, 0, 0, false, dtype}, {20}, {3});  // more heads than a tile (Falcon 7B)
    test_attention_of(ops, {3, 5, 36, 20, 0, true, dtype}, {300, 17}, {1, 1});
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_functions();
  std::vector<const Ops*> sets{&scalar_ops()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(&avx2_ops());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    sets.push_back(&avx512_ops());
#elif defined(__aarch64__)
  sets.push_back(&neon_ops());
#endif
  for (const Ops* ops : sets) {
    test_embed(*ops);
    test_norm(*ops);
    test_rope(*ops);
    test_elementwise(*ops);
    test_route(*ops);
    test_dense(*ops);
    test_attention(*ops);
    std::printf("%s: %zu checks so far, %d failures\n", ops->name, checks, failures);
  }
  return failures != 0;
}
