// Vectors of kLanes floats for ops-*-inl.h: loads, stores, conversions, exp, tanh, erfc. Included by one ops_<set>.cc.
//
// The file is compiled once per instruction set with that set's flags. Everything is in an anonymous namespace, and
// nothing of the standard library or of share.h is instantiated: a shared inline function would exist in several
// versions, and the linker could keep the one that this processor does not run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "everybit/engine/ops.h"

#if defined(EVERYBIT_OPS_AVX512) || defined(EVERYBIT_OPS_AVX2)
#include <immintrin.h>
#elif defined(EVERYBIT_OPS_NEON)
#include <arm_neon.h>
#endif

#define EVERYBIT_INLINE inline __attribute__((always_inline))
// Loops of fixed length over arrays of vectors must disappear, or the arrays live in memory.
#define EVERYBIT_UNROLL _Pragma("GCC unroll 16")

namespace everybit::engine {
namespace {

#if defined(EVERYBIT_OPS_AVX512)
constexpr std::size_t kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(EVERYBIT_OPS_AVX2)
constexpr std::size_t kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(EVERYBIT_OPS_NEON)
constexpr std::size_t kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr std::size_t kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef float V4 __attribute__((vector_size(16)));
typedef float UnalignedV __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef float UnalignedV4 __attribute__((vector_size(16), aligned(1), may_alias));
typedef std::uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef std::uint16_t UnalignedH __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));

using Bytes = const std::uint8_t*;

// part_of of share.h, compiled here.
EVERYBIT_INLINE Range part(std::size_t n, Share share, std::size_t grain = 1) {
  const std::size_t grains = (n + grain - 1) / grain;
  const std::size_t begin = grains * share.index / share.count * grain;
  const std::size_t end = grains * (share.index + 1) / share.count * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

EVERYBIT_INLINE std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }
EVERYBIT_INLINE std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

constexpr std::size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }

// ------------------------------------------------------------------------------------------------ arithmetic

EVERYBIT_INLINE V splat(float x) {
#if defined(EVERYBIT_OPS_AVX512)
  return _mm512_set1_ps(x);
#elif defined(EVERYBIT_OPS_AVX2)
  return _mm256_set1_ps(x);
#else
  return V{x, x, x, x};
#endif
}

// a * b + c, rounded once where the set has it.
EVERYBIT_INLINE V fma(V a, V b, V c) {
#if defined(EVERYBIT_OPS_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(EVERYBIT_OPS_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(EVERYBIT_OPS_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Holds x in a register. gcc otherwise reads a number that several multiply-adds share from memory for each of them,
// and loads become the limit.
EVERYBIT_INLINE V held(V x) {
#if defined(EVERYBIT_OPS_AVX512) || defined(EVERYBIT_OPS_AVX2)
  asm("" : "+v"(x));
#endif
  return x;
}

EVERYBIT_INLINE V bits_to_float(U x) { return reinterpret_cast<V>(x); }
EVERYBIT_INLINE U float_to_bits(V x) { return reinterpret_cast<U>(x); }
EVERYBIT_INLINE V larger(V a, V b) { return a > b ? a : b; }
EVERYBIT_INLINE V magnitude(V x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
EVERYBIT_INLINE V with_sign_of(V x, V sign) {
  return bits_to_float(float_to_bits(x) | (float_to_bits(sign) & 0x80000000u));
}

#if defined(EVERYBIT_OPS_AVX512)
#define EVERYBIT_SHUFFLE_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define EVERYBIT_SHUFFLE_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define EVERYBIT_SHUFFLE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define EVERYBIT_SHUFFLE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVERYBIT_QUAD_EVEN 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define EVERYBIT_QUAD_ODD 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
EVERYBIT_INLINE V iota() { return V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#elif defined(EVERYBIT_OPS_AVX2)
#define EVERYBIT_SHUFFLE_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define EVERYBIT_SHUFFLE_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define EVERYBIT_SHUFFLE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define EVERYBIT_SHUFFLE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define EVERYBIT_QUAD_EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define EVERYBIT_QUAD_ODD 1, 3, 9, 11, 5, 7, 13, 15
EVERYBIT_INLINE V iota() { return V{0, 1, 2, 3, 4, 5, 6, 7}; }
#else
#define EVERYBIT_SHUFFLE_EVEN 0, 2, 4, 6
#define EVERYBIT_SHUFFLE_ODD 1, 3, 5, 7
#define EVERYBIT_SHUFFLE_LOW 0, 4, 1, 5
#define EVERYBIT_SHUFFLE_HIGH 2, 6, 3, 7
#define EVERYBIT_QUAD_EVEN 0, 2, 4, 6
#define EVERYBIT_QUAD_ODD 1, 3, 5, 7
EVERYBIT_INLINE V iota() { return V{0, 1, 2, 3}; }
#endif

EVERYBIT_INLINE I lane_numbers() { return __builtin_convertvector(iota(), I); }

// Lane i of each quarter: the sums of that quarter of a (i = 0, 1) and b (2, 3), by neighbours.
EVERYBIT_INLINE V add_neighbours(V a, V b) {
  return __builtin_shufflevector(a, b, EVERYBIT_QUAD_EVEN) + __builtin_shufflevector(a, b, EVERYBIT_QUAD_ODD);
}

// The four sums over all lanes.
EVERYBIT_INLINE V4 sums_of(V a, V b, V c, V d) {
  const V quads = add_neighbours(add_neighbours(a, b), add_neighbours(c, d));
#if defined(EVERYBIT_OPS_AVX512)
  const auto halves = __builtin_shufflevector(quads, quads, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(quads, quads, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
#elif defined(EVERYBIT_OPS_AVX2)
  return __builtin_shufflevector(quads, quads, 0, 1, 2, 3) + __builtin_shufflevector(quads, quads, 4, 5, 6, 7);
#else
  return quads;
#endif
}

EVERYBIT_INLINE float sum_of(V x) { return sums_of(x, x, x, x)[0]; }

EVERYBIT_INLINE float largest_of(V x) {
#if defined(EVERYBIT_OPS_AVX512)
  const V half = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  const V rest = larger(half, __builtin_shufflevector(half, half, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
#elif defined(EVERYBIT_OPS_AVX2)
  const V rest = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 4, 5, 6, 7));
#else
  const V rest = x;
#endif
  const float a = rest[0] > rest[1] ? rest[0] : rest[1], b = rest[2] > rest[3] ? rest[2] : rest[3];
  return a > b ? a : b;
}

// ------------------------------------------------------------------------------------------------ memory

EVERYBIT_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
EVERYBIT_INLINE void store(float* p, V x) { *reinterpret_cast<UnalignedV*>(p) = x; }

// The first n < kLanes lanes; the others are zero, their memory is not touched.
EVERYBIT_INLINE V load_first(const float* p, std::size_t n) {
#if defined(EVERYBIT_OPS_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  float lanes[kLanes] = {};
  for (std::size_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

EVERYBIT_INLINE void store_first(float* p, V x, std::size_t n) {
#if defined(EVERYBIT_OPS_AVX512)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  for (std::size_t i = 0; i < n; ++i) p[i] = x[i];
#endif
}

EVERYBIT_INLINE V load_up_to(const float* p, std::size_t n) { return n >= kLanes ? load(p) : load_first(p, n); }
EVERYBIT_INLINE void store_up_to(float* p, V x, std::size_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_first(p, x, n);
  }
}

EVERYBIT_INLINE V from_bf16(H x) { return bits_to_float(__builtin_convertvector(x, U) << 16); }

EVERYBIT_INLINE V from_f16(H x) {
#if defined(EVERYBIT_OPS_AVX512)
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x));  // the plain one warns in gcc 12
#elif defined(EVERYBIT_OPS_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#elif defined(EVERYBIT_OPS_NEON)
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(x));
#else
  // The exponent is rebased by a multiplication, which also normalizes the small ones.
  const U wide = __builtin_convertvector(x, U), rest = (wide & 0x7fffu) << 13;
  const U finite = float_to_bits(bits_to_float(rest) * splat(0x1p112f));
  const U special = rest | 0x7f800000u;
  return bits_to_float((rest >= (0x7c00u << 13) ? special : finite) | (wide & 0x8000u) << 16);
#endif
}

// To nearest, ties to even; NaN stays NaN.
EVERYBIT_INLINE std::uint16_t to_bf16(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

EVERYBIT_INLINE std::uint16_t to_f16(float x) {
#if defined(EVERYBIT_OPS_AVX512) || defined(EVERYBIT_OPS_AVX2)
  return static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(EVERYBIT_OPS_NEON)
  return __builtin_bit_cast(std::uint16_t, static_cast<__fp16>(x));
#else
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x), sign = bits >> 16 & 0x8000u;
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 2^16 and more
  if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the mantissa
    const float moved = __builtin_bit_cast(float, rest) + 0.5f;
    return static_cast<std::uint16_t>(sign | (__builtin_bit_cast(std::uint32_t, moved) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13);
#endif
}

// kLanes numbers of a stored dtype.
template <Dtype kDtype>
EVERYBIT_INLINE V load_as(Bytes p) {
  if constexpr (kDtype == Dtype::f32) {
    return *reinterpret_cast<const UnalignedV*>(p);
  } else if constexpr (kDtype == Dtype::f16) {
    return from_f16(*reinterpret_cast<const UnalignedH*>(p));
  } else {
    return from_bf16(*reinterpret_cast<const UnalignedH*>(p));
  }
}

// The first n < kLanes of them, zeros beyond. Bytes, because p has any alignment.
template <Dtype kDtype>
EVERYBIT_INLINE V load_first_as(Bytes p, std::size_t n) {
#if defined(EVERYBIT_OPS_AVX512)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (kDtype == Dtype::f32) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const H half = reinterpret_cast<H>(_mm256_maskz_loadu_epi16(mask, p));
    return kDtype == Dtype::f16 ? from_f16(half) : from_bf16(half);
  }
#else
  std::uint8_t lanes[kLanes * size_of(kDtype)] = {};
  for (std::size_t i = 0; i < n * size_of(kDtype); ++i) lanes[i] = p[i];
  return load_as<kDtype>(lanes);
#endif
}

template <Dtype kDtype>
EVERYBIT_INLINE V load_up_to_as(Bytes p, std::size_t n) {
  return n >= kLanes ? load_as<kDtype>(p) : load_first_as<kDtype>(p, n);
}

// f(As<dtype>{}) for the dtype at hand.
template <Dtype kDtype>
struct As {
  static constexpr Dtype dtype = kDtype;
};

template <typename F>
EVERYBIT_INLINE void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(As<Dtype::f32>{});
    case Dtype::f16:
      return f(As<Dtype::f16>{});
    case Dtype::bf16:
      return f(As<Dtype::bf16>{});
    case Dtype::i8:
      return;
  }
}

// ------------------------------------------------------------------------------------------------ functions
// The polynomials were fitted by weighted least squares, reweighted towards the minimax error (Lawson). Errors are the
// worst over a million arguments, in units of the last place: ops_test.cc asserts them.

// e^x, within 2 ulp; exactly 1 at 0, 0 below -87.33 (no subnormals: they are slow and nobody misses them), infinity
// above 88.37.
EVERYBIT_INLINE V exp(V x) {
  const V bounded = x > splat(89.0f) ? splat(89.0f) : x;  // comparisons keep NaN
  const V shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which the last bits then hold
  const V shifted = fma(bounded, splat(1.44269504f), shift), whole = shifted - shift;
  V r = fma(whole, splat(-0.693145752f), bounded);  // ln 2 in two parts, the first of 16 bits: whole * it is exact
  r = fma(whole, splat(-1.42860677e-6f), r);
  V q = splat(1.3814465e-3f);
  q = fma(q, r, splat(8.3687808e-3f));
  q = fma(q, r, splat(4.16683927e-2f));
  q = fma(q, r, splat(1.66665196e-1f));
  q = fma(q, r, splat(4.9999994e-1f));
  const V y = fma(q, r * r, r) + 1.0f;
  const V scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return x < splat(-87.33f) ? V{} : y * scale;
}

EVERYBIT_INLINE V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

// Within 2 ulp.
EVERYBIT_INLINE V tanh(V x) {
  const V a = magnitude(x), z = x * x;
  V q = splat(-5.71703678e-3f);
  q = fma(q, z, splat(2.06505787e-2f));
  q = fma(q, z, splat(-5.37434965e-2f));
  q = fma(q, z, splat(1.33314908e-1f));
  q = fma(q, z, splat(-3.33332837e-1f));
  const V small = fma(q * z, x, x);
  const V large = with_sign_of(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  return a < splat(0.625f) ? small : large;  // NaN takes `large`, which is NaN
}

// 1 + erf(x) without cancellation: within 2 ulp for x >= 0, 8 ulp for x >= -1, (4 + 2 x^2) ulp below (the rounding of
// x^2).
EVERYBIT_INLINE V one_plus_erf(V x) {
  const V t = magnitude(x), z = x * x;
  V q = splat(4.71779844e-3f);
  q = fma(q, z, splat(-2.67571006e-2f));
  q = fma(q, z, splat(1.12828217e-1f));
  q = fma(q, z, splat(-3.76126081e-1f));
  q = fma(q, z, splat(1.12837911f));
  const V small = fma(q, x, splat(1.0f));
  // erfc(t) = e^(-t^2) g(t), and g(t) * (1 + t/2) is smooth in s = 1/(1 + t/2) up to t = infinity.
  const V s = 1.0f / fma(t, splat(0.5f), splat(1.0f));
  V g = splat(-6.0725674e-2f);
  g = fma(g, s, splat(2.94198126e-1f));
  g = fma(g, s, splat(-5.08490026e-1f));
  g = fma(g, s, splat(3.02488238e-1f));
  g = fma(g, s, splat(-4.27831747e-2f));
  g = fma(g, s, splat(2.0904845e-1f));
  g = fma(g, s, splat(2.41643369e-1f));
  g = fma(g, s, splat(2.82554328e-1f));
  g = fma(g, s, splat(2.82077432e-1f));
  const V tail = exp(-z) * (g * s);
  const V large = x < splat(0.0f) ? tail : 2.0f - tail;
  return t < splat(0.5f) ? small : large;
}

}  // namespace
}  // namespace everybit::engine
