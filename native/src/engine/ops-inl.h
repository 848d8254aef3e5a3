// The ops of ops.h for one instruction set. Included once by ops_<set>.cc, which defines EVERYBIT_OPS_<SET> before.
#pragma once

#include "ops-attention-inl.h"
#include "ops-dense-inl.h"
#include "ops-vector-inl.h"

namespace everybit::engine {
namespace {

// This thread's part of a matrix of independent cells: whole rows when there are enough of them, else columns in
// multiples of 16 (a cache line). f(row, begin, end).
template <typename F>
EVERYBIT_INLINE void for_each_row(std::size_t rows, std::size_t width, Share share, F&& f) {
  if (rows >= 4 * share.count) {
    const Range mine = part(rows, share);
    for (std::size_t t = mine.begin; t < mine.end; ++t) f(t, std::size_t{0}, width);
  } else {
    const Range mine = part(width, share, 16);
    if (mine.begin < mine.end)
      for (std::size_t t = 0; t < rows; ++t) f(t, mine.begin, mine.end);
  }
}

EVERYBIT_INLINE float* row_of(Columns x, std::size_t t) { return x.data + t * x.stride; }

// out[c] = f(x[c], y[c]) over whole vectors, then the rest in one more with zeros beyond.
template <typename F>
EVERYBIT_INLINE void map(float* out, const float* x, const float* y, std::size_t begin, std::size_t end, F&& f) {
  std::size_t c = begin;
  for (; c + kLanes <= end; c += kLanes) store(out + c, f(load(x + c), load(y + c)));
  if (c < end) store_first(out + c, f(load_first(x + c, end - c), load_first(y + c, end - c)), end - c);
}

void embed(Columns out, const void* table, Dtype dtype, const std::int32_t* indices, std::size_t tokens,
           std::int64_t offset, float scale, bool add, Share share) {
  dispatch(dtype, [&](auto as) {
    constexpr Dtype kDtype = decltype(as)::dtype;
    for_each_row(tokens, out.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
      const auto index = static_cast<std::size_t>(indices[t] + offset);
      const Bytes from = static_cast<Bytes>(table) + index * out.width * size_of(kDtype);
      float* to = row_of(out, t);
      for (std::size_t c = begin; c < end; c += kLanes) {
        V x = load_up_to_as<kDtype>(from + c * size_of(kDtype), end - c) * scale;
        if (add) x += load_up_to(to + c, end - c);
        store_up_to(to + c, x, end - c);
      }
    });
  });
}

// Sum of (x - mean)^2, or of x - mean when kPower is 1. Four sums, so that one addition need not wait for the last.
template <int kPower>
EVERYBIT_INLINE float moment(const float* x, std::size_t n, float mean) {
  V sums[4] = {V{}, V{}, V{}, V{}};
  const auto term = [=](V value) { return kPower == 1 ? value - mean : (value - mean) * (value - mean); };
  std::size_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes)
    EVERYBIT_UNROLL for (std::size_t i = 0; i < 4; ++i) sums[i] += term(load(x + c + i * kLanes));
  for (; c + kLanes <= n; c += kLanes) sums[0] += term(load(x + c));
  if (c < n) {
    const V rest = term(load_first(x + c, n - c));
    sums[1] += lane_numbers() < static_cast<std::int32_t>(n - c) ? rest : V{};
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void norm(NormKind kind, Columns out, Columns x, std::size_t tokens, const float* weight, const float* bias, float eps,
          bool unit_offset, std::size_t groups, Share share) {
  const std::size_t n = x.width / groups, items = tokens * groups;
  // Few items: every thread sums all of a part and writes some of its columns, unless that would change what the others
  // still read.
  const bool split = items < share.count && out.data != x.data;
  const Range mine = split ? Range{0, items} : part(items, share);
  const Range columns = split ? part(n, share, 16) : Range{0, n};
  const V one = splat(unit_offset ? 1.0f : 0.0f);
  for (std::size_t item = mine.begin; item < mine.end; ++item) {
    const float* from = row_of(x, item / groups) + item % groups * n;
    float* to = row_of(out, item / groups) + item % groups * n;
    const float count = static_cast<float>(n);
    const float mean = kind == NormKind::layer ? moment<1>(from, n, 0.0f) / count : 0.0f;
    const float factor = 1.0f / __builtin_sqrtf(moment<2>(from, n, mean) / count + eps);
    for (std::size_t c = columns.begin; c < columns.end; c += kLanes) {
      const std::size_t left = columns.end - c;
      V y = (load_up_to(from + c, left) - mean) * factor;
      if (weight != nullptr) y *= load_up_to(weight + c, left) + one;
      if (bias != nullptr) y += load_up_to(bias + c, left);
      store_up_to(to + c, y, left);
    }
  }
}

// cos and sin of an angle in double: a multiple of pi/2 is taken off in two parts (the first has 33 bits, so multiples
// up to 2^20 of it are exact, which are angles up to 1.6 million), then Taylor to x^15 and x^16 on |x| <= pi/4 (next
// terms: 5e-17).
EVERYBIT_INLINE void turn(double angle, double* cosine, double* sine) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
  const double quarters = (angle * 0.63661977236758134308 + shift) - shift;
  const double x = (angle - quarters * 1.57079632673412561417) - quarters * 6.07710050650619224932e-11;
  const double z = x * x;
  double s = -1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = s * z * x + x;
  double c = 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = c * z + 1.0;
  const auto quarter = static_cast<std::int64_t>(quarters);
  *cosine = quarter & 1 ? (quarter & 2 ? s : -s) : (quarter & 2 ? -c : c);
  *sine = quarter & 1 ? (quarter & 2 ? -c : c) : (quarter & 2 ? -s : s);
}

void rope_table(const std::int32_t* positions, std::size_t tokens, const float* inv_freq, std::size_t pairs,
                float scale, float* cosines, float* sines, Share share) {
  const Range mine = part(tokens * pairs, share, 16);
  std::size_t t = mine.begin / pairs, i = mine.begin % pairs;
  for (std::size_t at = mine.begin; at < mine.end; ++at) {
    double cosine, sine;
    turn(static_cast<double>(positions[t]) * static_cast<double>(inv_freq[i]), &cosine, &sine);
    cosines[at] = static_cast<float>(cosine * scale), sines[at] = static_cast<float>(sine * scale);
    if (++i == pairs) i = 0, ++t;
  }
}

void rope(Columns x, std::size_t tokens, std::size_t heads, const float* cosines, const float* sines, std::size_t pairs,
          bool interleaved, Share share) {
  const std::size_t dim = x.width / heads;
  const Range mine = part(tokens * heads, share);
  for (std::size_t item = mine.begin; item < mine.end; ++item) {
    const std::size_t t = item / heads;
    float* a = row_of(x, t) + item % heads * dim;
    const float *cosine = cosines + t * pairs, *sine = sines + t * pairs;
    if (interleaved) {
      std::size_t i = 0;
      for (; i + kLanes <= pairs; i += kLanes) {
        const V low = load(a + 2 * i), high = load(a + 2 * i + kLanes), c = load(cosine + i), s = load(sine + i);
        const V even = __builtin_shufflevector(low, high, EVERYBIT_SHUFFLE_EVEN);
        const V odd = __builtin_shufflevector(low, high, EVERYBIT_SHUFFLE_ODD);
        const V u = even * c - odd * s, v = odd * c + even * s;
        store(a + 2 * i, __builtin_shufflevector(u, v, EVERYBIT_SHUFFLE_LOW));
        store(a + 2 * i + kLanes, __builtin_shufflevector(u, v, EVERYBIT_SHUFFLE_HIGH));
      }
      for (; i < pairs; ++i) {
        const float u = a[2 * i], v = a[2 * i + 1];
        a[2 * i] = u * cosine[i] - v * sine[i], a[2 * i + 1] = v * cosine[i] + u * sine[i];
      }
    } else {
      float* b = a + pairs;
      for (std::size_t i = 0; i < pairs; i += kLanes) {
        const std::size_t left = pairs - i;
        const V c = load_up_to(cosine + i, left), s = load_up_to(sine + i, left);
        const V u = load_up_to(a + i, left), v = load_up_to(b + i, left);
        store_up_to(a + i, u * c - v * s, left), store_up_to(b + i, v * c + u * s, left);
      }
    }
  }
}

template <typename F>
EVERYBIT_INLINE void activate_with(Columns out, Columns gate, Columns up, std::size_t tokens, Share share, F&& f) {
  for_each_row(tokens, out.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
    if (up.data != nullptr) {
      map(row_of(out, t), row_of(gate, t), row_of(up, t), begin, end, [&](V g, V u) { return f(g) * u; });
    } else {
      map(row_of(out, t), row_of(gate, t), row_of(gate, t), begin, end, [&](V g, V) { return f(g); });
    }
  });
}

void activate(Activation kind, Columns out, Columns gate, Columns up, std::size_t tokens, float limit, Share share) {
  const V zero = V{};
  switch (kind) {
    case Activation::silu:
      return activate_with(out, gate, up, tokens, share, [](V g) { return g / (1.0f + exp(-g)); });
    case Activation::gelu:
      return activate_with(out, gate, up, tokens, share, [](V g) { return 0.5f * g * one_plus_erf(g * 0.707106781f); });
    case Activation::gelu_tanh:  // 1 + tanh(u) = 2 / (1 + e^-2u), without the cancellation
      return activate_with(out, gate, up, tokens, share, [](V g) {
        const V u = 0.797884561f * (g + 0.044715f * g * g * g);
        return g / (1.0f + exp(-2.0f * u));
      });
    case Activation::relu:
      return activate_with(out, gate, up, tokens, share, [=](V g) { return g < zero ? zero : g; });
    case Activation::relu2:
      return activate_with(out, gate, up, tokens, share, [=](V g) {
        const V positive = g < zero ? zero : g;
        return positive * positive;
      });
    case Activation::swiglu_clamped:
      for_each_row(tokens, out.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
        map(row_of(out, t), row_of(gate, t), row_of(up, t), begin, end, [&](V g, V u) {
          const V most = splat(limit);
          g = g > most ? most : g;
          u = u > most ? most : u;
          u = u < -most ? -most : u;
          return (u + 1.0f) * (g * sigmoid(1.702f * g));
        });
      });
      return;
  }
}

void add(Columns out, Columns x, Columns y, std::size_t tokens, Share share) {
  for_each_row(tokens, out.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
    map(row_of(out, t), row_of(x, t), row_of(y, t), begin, end, [](V a, V b) { return a + b; });
  });
}

void softcap(Columns x, std::size_t tokens, float cap, Share share) {
  for_each_row(tokens, x.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
    map(row_of(x, t), row_of(x, t), row_of(x, t), begin, end, [&](V a, V) { return cap * tanh(a / cap); });
  });
}

void select(Columns out, Columns x, const std::int32_t* rows, std::size_t n, Share share) {
  for_each_row(n, out.width, share, [&](std::size_t t, std::size_t begin, std::size_t end) {
    const float* from = row_of(x, static_cast<std::size_t>(rows[t]));
    map(row_of(out, t), from, from, begin, end, [](V a, V) { return a; });
  });
}

void route(Columns scores, std::size_t tokens, std::size_t top_k, Routing routing, bool normalize,
           std::int32_t* experts, float* probabilities, Share share) {
  const Range mine = part(tokens, share);
  for (std::size_t t = mine.begin; t < mine.end; ++t) {
    const float* score = row_of(scores, t);
    std::int32_t* chosen = experts + t * top_k;
    float* p = probabilities + t * top_k;
    for (std::size_t e = 0, held = 0; e < scores.width; ++e) {
      std::size_t at = held;
      while (at > 0 && score[e] > p[at - 1]) --at;  // equal: the earlier one stays before
      if (at == top_k) continue;
      held = held < top_k ? held + 1 : held;
      for (std::size_t i = held - 1; i > at; --i) p[i] = p[i - 1], chosen[i] = chosen[i - 1];
      p[at] = score[e], chosen[at] = static_cast<std::int32_t>(e);
    }
    const float largest = p[0];
    float sum = 0;
    if (routing == Routing::softmax)
      for (std::size_t e = 0; e < scores.width; ++e) sum += __builtin_expf(score[e] - largest);
    float kept = 0;
    for (std::size_t i = 0; i < top_k; ++i) kept += p[i] = __builtin_expf(p[i] - largest);
    const float divisor = routing == Routing::softmax && !normalize ? sum : kept;
    for (std::size_t i = 0; i < top_k; ++i) p[i] /= divisor;
  }
}

std::int64_t find_nonfinite(Columns x, Range rows) {
  for (std::size_t t = rows.begin; t < rows.end; ++t) {
    U found = U{};
    for (std::size_t c = 0; c < x.width; c += kLanes) {
      const U exponent = float_to_bits(load_up_to(row_of(x, t) + c, x.width - c)) & 0x7f800000u;
      found |= reinterpret_cast<U>(exponent == 0x7f800000u);
    }
    for (std::size_t i = 0; i < kLanes; ++i)
      if (found[i] != 0) return static_cast<std::int64_t>(t);
  }
  return -1;
}

constexpr Ops make_ops(const char* name) {
  return {name,     embed, norm,    rope_table, rope,  append_kv,      attention,
          activate, add,   softcap, select,     route, find_nonfinite, dense};
}

}  // namespace
}  // namespace everybit::engine
