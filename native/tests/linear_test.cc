// Every set of quantized linear kernels that this processor runs, against the plain reference.
//
//   linear_test               all bits x parts x columns x rows x tokens x threads
//   linear_test fuzz SEED N   N random shapes
//
// Everything a kernel reads ends at a page without access, everything it writes lies between two, so an access out of
// bounds crashes; bytes between the rows of the output are compared with what was there before.
#include <sys/mman.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

using Random = std::mt19937_64;

std::vector<const Kernels*> sets_of_this_processor() {
  std::vector<const Kernels*> sets = {&scalar_kernels()};
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2_kernels());
  if (avx512) sets.push_back(&avx512_kernels());
#if defined(EVERYBIT_HAVE_VBMI)
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("gfni"))
    sets.push_back(&avx512_vbmi_kernels());
#endif
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) sets.push_back(&neon_kernels());
#endif
  return sets;
}

// n items whose last (or first) byte borders on a page without access.
template <typename T>
class Guarded {
 public:
  explicit Guarded(std::size_t n, bool at_front = false) : items_(n) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    inside_ = (n * sizeof(T) + page - 1) / page * page;
    total_ = inside_ + 2 * page;
    void* memory = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED ||
        (inside_ && mprotect(static_cast<char*>(memory) + page, inside_, PROT_READ | PROT_WRITE)))
      std::abort();
    memory_ = static_cast<char*>(memory);
    data_ = reinterpret_cast<T*>(memory_ + page + (at_front ? 0 : inside_ - n * sizeof(T)));
  }
  ~Guarded() { munmap(memory_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* data() const { return data_; }
  std::size_t size() const { return items_; }
  T& operator[](std::size_t i) const { return data_[i]; }

 private:
  std::size_t items_, inside_, total_;
  char* memory_;
  T* data_;
};

enum class Values {
  random,
  largest,  // all entries and codes as large as can be: saturation and overflow
  exact,    // codes of -1, 0, 1, scales of 1: every float sum is exact, results must be equal
};

struct Shape {
  int bits, parts;
  std::size_t columns, rows, tokens;
  Values values;
};

// A matrix, its tables in two bases that mean the same, and activations.
class Problem {
 public:
  Problem(const Shape& shape, int base, Random& random, bool at_front)
      : shape(shape),
        blocks((shape.columns + kBlock - 1) / kBlock),
        row_bytes((shape.columns + 7) / 8),
        size(std::size_t{1} << shape.bits),
        stride(static_cast<std::size_t>(shape.parts) * size + random() % 3 * (random() % 64)),
        entries((shape.rows - 1) * stride + static_cast<std::size_t>(shape.parts) * size, at_front),
        reference_entries(entries.size()),
        lines(shape.rows * 2),
        bias(shape.rows),
        codes(shape.tokens * blocks * kBlock),
        scales(shape.tokens * blocks * kGroups),
        sums(shape.tokens) {
    std::uniform_real_distribution<float> real(-1, 1);
    for (int p = 0; p < shape.bits; ++p) {
      planes_.push_back(new Guarded<std::uint8_t>(shape.rows * row_bytes, at_front));
      for (std::size_t i = 0; i < planes_.back()->size(); ++i) {
        std::uint8_t byte = static_cast<std::uint8_t>(random());
        if (i % row_bytes == row_bytes - 1 && shape.columns % 8) byte &= (1 << shape.columns % 8) - 1;
        (*planes_.back())[i] = byte;
      }
    }
    for (std::size_t n = 0; n < shape.rows; ++n) {
      for (std::size_t i = 0; i < size; ++i) {
        const std::size_t high = n * stride + i, low = high + size;
        const int limit = shape.parts == 2 ? base * base : base;
        const int value =
            shape.values == Values::largest ? limit - 1 : static_cast<int>(random() % static_cast<unsigned>(limit));
        if (shape.parts == 2) {
          entries[high] = static_cast<std::uint8_t>(value / base);
          entries[low] = static_cast<std::uint8_t>(value % base);
          reference_entries[high] = static_cast<std::uint8_t>(value / 256);
          reference_entries[low] = static_cast<std::uint8_t>(value % 256);
        } else {
          entries[high] = reference_entries[high] = static_cast<std::uint8_t>(value);
        }
      }
      lines[2 * n] = shape.values == Values::exact ? 1 : 1e-3f * real(random);
      lines[2 * n + 1] = shape.values == Values::exact ? 0 : real(random);
      bias[n] = shape.values == Values::exact ? 0 : real(random);
    }
    for (std::size_t t = 0; t < shape.tokens; ++t) {
      double sum = 0;
      for (std::size_t i = 0; i < blocks * kBlock; ++i) {
        const std::size_t place = t * blocks * kBlock + i, group = i / kBlock * kGroups + i % kBlockBytes / 4;
        float& scale = scales[t * blocks * kGroups + group];
        if (i % kBlock < kBlockBytes && i % 4 == 0)
          scale = shape.values == Values::exact ? 1 : 0.02f * (1 + real(random));
        int code = static_cast<int>(random() % 255) - 127;
        if (shape.values == Values::exact) code = code % 2;
        if (shape.values == Values::largest) code = t % 2 ? 127 : -127;
        if (column(i) >= shape.columns) code = 0;
        codes[place] = static_cast<std::int8_t>(code);
        sum += static_cast<double>(scale) * code;
      }
      sums[t] = static_cast<float>(sum);
    }
  }
  ~Problem() {
    for (auto* plane : planes_) delete plane;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  // Column of place i of a token's codes.
  static std::size_t column(std::size_t i) {
    return i / kBlock * kBlock + i % kBlockBytes * 8 + i % kBlock / kBlockBytes;
  }

  Planes planes() const {
    Planes result{{}, row_bytes, shape.columns};
    for (std::size_t p = 0; p < planes_.size(); ++p) result.plane[p] = planes_[p]->data();
    return result;
  }
  Tables tables(bool reference) const {
    return {shape.bits, shape.parts, (reference ? reference_entries : entries).data(), lines.data(), stride};
  }
  QuantizedRows activations(std::size_t tokens) const {
    return {tokens, blocks, codes.data(), scales.data(), sums.data()};
  }

  const Shape shape;
  const std::size_t blocks, row_bytes, size, stride;
  Guarded<std::uint8_t> entries, reference_entries;
  Guarded<float> lines, bias;
  Guarded<std::int8_t> codes;
  Guarded<float> scales, sums;

 private:
  std::vector<Guarded<std::uint8_t>*> planes_;
};

// y as a double-precision product of dequantized numbers, and the sum of the magnitudes that float arithmetic rounds.
struct Naive {
  std::vector<double> product;    // [tokens][rows], without bias
  std::vector<double> magnitude;  // of scale * entries * x
  std::vector<double> rest;       // of offset * sum and bias
};

Naive naive(const Problem& problem) {
  const Shape& shape = problem.shape;
  const Planes planes = problem.planes();
  const std::size_t length = problem.blocks * kBlock;
  Naive result;
  std::vector<double> x(shape.tokens * shape.columns);
  for (std::size_t t = 0; t < shape.tokens; ++t)
    for (std::size_t i = 0; i < length; ++i)
      if (const std::size_t k = Problem::column(i); k < shape.columns)
        x[t * shape.columns + k] = static_cast<double>(problem.scales[t * problem.blocks * kGroups + k / kGroup]) *
                                   problem.codes[t * length + i];
  result.product.resize(shape.tokens * shape.rows);
  result.magnitude.resize(result.product.size());
  result.rest.resize(result.product.size());
  std::vector<double> entry(shape.columns);
  for (std::size_t n = 0; n < shape.rows; ++n) {
    const double scale = problem.lines[2 * n], offset = problem.lines[2 * n + 1];
    for (std::size_t k = 0; k < shape.columns; ++k) {
      std::size_t index = 0;
      for (int p = 0; p < shape.bits; ++p)
        index |= static_cast<std::size_t>(planes.plane[p][n * planes.row_bytes + k / 8] >> k % 8 & 1) << p;
      const std::uint8_t* table = problem.reference_entries.data() + n * problem.stride;
      entry[k] = shape.parts == 2 ? 256. * table[index] + table[problem.size + index] : table[index];
    }
    for (std::size_t t = 0; t < shape.tokens; ++t) {
      double product = 0, magnitude = 0;
      for (std::size_t k = 0; k < shape.columns; ++k) {
        product += (scale * entry[k] + offset) * x[t * shape.columns + k];
        magnitude += std::abs(scale * entry[k] * x[t * shape.columns + k]);
      }
      result.product[t * shape.rows + n] = product;
      result.magnitude[t * shape.rows + n] = magnitude;
      result.rest[t * shape.rows + n] =
          std::abs(offset) * (std::abs(static_cast<double>(problem.sums[t])) + 0) + std::abs(problem.bias[n]);
    }
  }
  return result;
}

struct Worst {
  double ratio = 0;  // of error to tolerance
  std::string what;
};

class Checker {
 public:
  int failures = 0;
  long long elements = 0;
  Worst worst;

  void element(double found, double wanted, double tolerance, const Kernels& set, const char* function,
               const Shape& shape, std::size_t n, std::size_t t) {
    ++elements;
    const double error = std::abs(found - wanted);
    const double ratio = error == 0 ? 0 : error / tolerance;
    if (ratio <= worst.ratio && std::isfinite(ratio)) return;
    char text[512];
    std::snprintf(text, sizeof text,
                  "%s %s bits %d parts %d K %zu N %zu T %zu values %d, row %zu token %zu: %.9g, not %.9g +- %.3g",
                  set.name, function, shape.bits, shape.parts, shape.columns, shape.rows, shape.tokens,
                  static_cast<int>(shape.values), n, t, found, wanted, tolerance);
    if (!(ratio <= 1)) {
      if (++failures <= 20) std::printf("FAIL %s\n", text);
    }
    if (!(ratio <= worst.ratio)) worst = {ratio, text};
  }
  void require(bool held, const char* what, const Kernels& set, std::size_t columns, int input = -1) {
    if (held) return;
    if (++failures <= 20) std::printf("FAIL %s: %s (K %zu, input %d)\n", set.name, what, columns, input);
  }
};

// Runs rows [0, N) as `threads` threads would and compares. What rounds, with u = 2^-24, in a kernel that adds the
// groups' products in any order: converting a dot and multiplying it by its scale, 2u each, and one addition for each
// of G groups, so (G + 4) u * (sum of magnitudes) with the product by the row's scale, plus another u per part (parts
// may be summed apart, all entries are positive, so the magnitudes stay). Then offset * sum, bias and the old value: at
// most four roundings of a sum that is no larger than all magnitudes together, and the reference's own. Integers are
// exact.
void compare(const Kernels& set, bool gemv, const Problem& problem, const std::vector<double>& reference,
             const Naive& bounds, std::size_t tokens, std::size_t threads, bool add, bool with_bias, Random& random,
             void* scratch, Checker& checker) {
  const Shape& shape = problem.shape;
  const std::size_t stride = shape.rows + random() % 3;
  Guarded<float> out(tokens * stride - (stride - shape.rows));
  std::vector<float> before(out.size());
  std::uniform_real_distribution<float> real(-1, 1);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = before[i] = shape.values == Values::exact ? 0 : real(random);
  const Output output{out.data(), stride, add, with_bias ? problem.bias.data() : nullptr};
  const auto function = (gemv ? set.gemv : set.gemm)[shape.bits];
  const std::size_t grain = threads % 2 ? 1 : 4;
  for (std::size_t i = 0; i < threads; ++i)
    function(problem.planes(), problem.tables(set.base == 256), problem.activations(tokens),
             part_of(shape.rows, {i, threads}, grain), output, scratch);
  const double u = FLT_EPSILON / 2;
  const double groups = static_cast<double>((shape.columns + kGroup - 1) / kGroup);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t n = 0; n < shape.rows; ++n) {
      const std::size_t i = t * shape.rows + n;
      const double old = add ? before[t * stride + n] : 0;
      const double wanted = reference[i] + (with_bias ? static_cast<double>(problem.bias[n]) : 0) + old;
      double tolerance = u * ((groups + 4 + shape.parts) * bounds.magnitude[i] +
                              5 * (bounds.magnitude[i] + bounds.rest[i] + std::abs(old)));
      if (shape.values == Values::exact) tolerance = 0;
      checker.element(out[t * stride + n], wanted, tolerance, set, gemv ? "gemv" : "gemm", shape, n, t);
    }
    for (std::size_t n = shape.rows; n < stride && t * stride + n < out.size(); ++n)
      checker.require(out[t * stride + n] == before[t * stride + n], "wrote beyond the last row", set, shape.columns);
  }
}

// The scalar's result without bias in double, from float: bias is added by the caller.
std::vector<double> reference_of(const Problem& problem, void* scratch) {
  const Shape& shape = problem.shape;
  std::vector<float> out(shape.tokens * shape.rows);
  const Output output{out.data(), shape.rows, false, nullptr};
  scalar_kernels().gemm[shape.bits](problem.planes(), problem.tables(true), problem.activations(shape.tokens),
                                    {0, shape.rows}, output, scratch);
  return {out.begin(), out.end()};
}

void check_shape(const std::vector<const Kernels*>& sets, const Shape& shape, const std::vector<std::size_t>& tokens,
                 Random& random, void* scratch, Checker& checker) {
  for (const int base : {256, 128}) {
    const bool at_front = random() % 2;
    const Problem problem(shape, base, random, at_front);
    const Naive bounds = naive(problem);
    const std::vector<double> reference = reference_of(problem, scratch);
    // The reference rounds to float once; offset times the float sum of x is its only other rounding: 1 + K u at most
    // against sums of K products, whose own magnitudes are in `rest` only as a sum, hence the recomputation here.
    for (std::size_t t = 0; t < shape.tokens; ++t) {
      double magnitude = 0;
      for (std::size_t i = 0; i < problem.blocks * kBlock; ++i)
        magnitude +=
            std::abs(static_cast<double>(problem.codes[t * problem.blocks * kBlock + i]) *
                     problem.scales[t * problem.blocks * kGroups + i / kBlock * kGroups + i % kBlockBytes / 4]);
      for (std::size_t n = 0; n < shape.rows; ++n) {
        const std::size_t i = t * shape.rows + n;
        const double offset = std::abs(problem.lines[2 * n + 1]);
        const double tolerance = FLT_EPSILON * (bounds.magnitude[i] + offset * magnitude);
        checker.element(reference[i], bounds.product[i], tolerance, scalar_kernels(), "against naive", shape, n, t);
      }
    }
    for (const Kernels* set : sets) {
      if (set->base != base) continue;
      for (const std::size_t count : tokens) {
        if (count > shape.tokens) continue;
        for (std::size_t threads = 1; threads <= 4; ++threads) {
          if (count > 4 && threads != 1 + count % 4) continue;
          const bool add = random() % 2, with_bias = random() % 2;
          compare(*set, false, problem, reference, bounds, count, threads, add, with_bias, random, scratch, checker);
          if (count == 1)
            compare(*set, true, problem, reference, bounds, count, threads, add, with_bias, random, scratch, checker);
        }
      }
    }
  }
}

// Codes and scales are the scalar's to the bit; x = scale * code to half a step.
void check_quantize(const std::vector<const Kernels*>& sets, std::size_t columns, Random& random, Checker& checker) {
  const std::size_t blocks = (columns + kBlock - 1) / kBlock;
  // Inputs: 0 normal, 1 ties, 2 of all magnitudes, 3 groups of zeros, 4 denormal, 5 the largest, 6 NaN, 7 infinity.
  for (int kind = 0; kind < 8; ++kind) {
    Guarded<float> x(columns);
    std::normal_distribution<float> normal;
    for (std::size_t k = 0; k < columns; ++k) {
      x[k] = normal(random);
      if (kind == 1) x[k] = static_cast<float>(static_cast<int>(random() % 255) - 127) / 2;  // ties
      if (kind == 1 && k % kGroup == 3) x[k] = 127;
      if (kind == 2) x[k] *= std::ldexp(1.0f, static_cast<int>(random() % 250) - 125);
      if (kind == 3) x[k] = k / kGroup % 2 ? 0 : x[k];
      if (kind == 4) x[k] *= 1e-38f;
      if (kind == 5) x[k] = FLT_MAX * (random() % 2 ? 1 : -1);
      if (kind == 6 && random() % 40 == 0) x[k] = std::numeric_limits<float>::quiet_NaN() * (random() % 2 ? 1 : -1);
      if (kind == 7 && random() % 40 == 0) x[k] = std::numeric_limits<float>::infinity() * (random() % 2 ? 1 : -1);
    }
    std::vector<std::int8_t> wanted(blocks * kBlock, 55);
    std::vector<float> wanted_scales(blocks * kGroups, 55);
    float wanted_sum = 55;
    scalar_kernels().quantize(x.data(), columns, wanted.data(), wanted_scales.data(), &wanted_sum);
    double sum = 0, magnitude = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const std::size_t k = Problem::column(i);
      const float scale = wanted_scales[k / kGroup];
      checker.require(std::abs(static_cast<int>(wanted[i])) <= 127, "a code beyond 127", scalar_kernels(), columns);
      if (k >= columns) {
        checker.require(wanted[i] == 0, "a code beyond K", scalar_kernels(), columns);
        continue;
      }
      // Half a step, and a few roundings of numbers up to 127 steps.
      if (std::isfinite(scale))
        checker.require(
            std::abs(static_cast<double>(scale) * wanted[i] - x[k]) <= scale * (0.5 + 127 * 4 * FLT_EPSILON) + 0x1p-100,
            "a code is not the nearest", scalar_kernels(), columns);
      else
        checker.require(kind >= 6 && wanted[i] == 0, "a scale is not finite", scalar_kernels(), columns);
      sum += static_cast<double>(scale) * wanted[i];
      magnitude += std::abs(static_cast<double>(scale) * wanted[i]);
    }
    if (kind == 6 || kind == 7) {
      bool finite = true;
      for (std::size_t k = 0; k < columns; ++k) finite = finite && std::isfinite(x[k]);
      checker.require(finite == std::isfinite(wanted_sum), "an infinity or NaN does not reach the sum",
                      scalar_kernels(), columns);
    }
    for (const Kernels* set : sets) {
      Guarded<std::int8_t> codes(blocks * kBlock);
      Guarded<float> scales(blocks * kGroups);
      float found_sum = 55;
      std::memset(codes.data(), 55, codes.size());
      set->quantize(x.data(), columns, codes.data(), scales.data(), &found_sum);
      checker.require(std::memcmp(codes.data(), wanted.data(), wanted.size()) == 0, "other codes than scalar", *set,
                      columns, kind);
      bool same = true;
      for (std::size_t g = 0; g < scales.size(); ++g)
        same = same && (scales[g] == wanted_scales[g] || (std::isnan(scales[g]) && std::isnan(wanted_scales[g])));
      checker.require(same, "other scales than scalar", *set, columns, kind);
      const double groups = static_cast<double>(blocks * kGroups);
      const bool close = std::isfinite(wanted_sum)
                             ? std::abs(found_sum - sum) <= (groups + 4) * FLT_EPSILON / 2 * magnitude
                             : !std::isfinite(found_sum);
      checker.require(close, "another sum", *set, columns, kind);
    }
  }
}

int run(int argc, char** argv) {
  const auto sets = sets_of_this_processor();
  for (const Kernels* set : sets) std::printf("%s (base %d)\n", set->name, set->base);
  Guarded<char> scratch(kScratchBytes);
  Checker checker;
  if (argc == 4 && std::string(argv[1]) == "fuzz") {
    Random random(std::strtoull(argv[2], nullptr, 10));
    const auto below = [&random](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    for (long i = 0; i < std::atol(argv[3]) && checker.failures == 0; ++i) {
      Shape shape{static_cast<int>(1 + below(8)),    static_cast<int>(1 + below(2)),
                  1 + below(below(4) ? 1200 : 9000), 1 + below(40),
                  1 + below(below(8) ? 20 : 160),    static_cast<Values>(below(2))};
      check_shape(sets, shape, {1, shape.tokens}, random, scratch.data(), checker);
      check_quantize(sets, shape.columns, random, checker);
    }
  } else if (argc == 1) {
    Random random(1);
    const std::vector<std::size_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33};
    for (const std::size_t columns : {1u, 7u, 8u, 9u, 31u, 105u, 172u, 352u, 512u, 520u, 896u, 2048u, 11008u}) {
      check_quantize(sets, columns, random, checker);
      for (int bits = 1; bits <= 8; ++bits)
        for (const int parts : {1, 2})
          for (const std::size_t rows : {1u, 3u, 17u}) {
            check_shape(sets, {bits, parts, columns, rows, 33, Values::random}, tokens, random, scratch.data(),
                        checker);
            if (columns <= 256 || rows == 3)  // 2^16 * 256 = 2^24; 14-bit tables would allow four times as many columns
              for (const Values values : {Values::largest, Values::exact})
                if (values == Values::largest || columns <= 256)
                  check_shape(sets, {bits, parts, columns, rows, 33, values}, tokens, random, scratch.data(), checker);
          }
    }
    // Rows whose activations do not fit into scratch at once.
    for (const int parts : {1, 2})
      check_shape(sets, {3, parts, 140001, 6, 6, Values::random}, {1, 2, 4, 6}, random, scratch.data(), checker);
    // Many tokens once: tiles of a prefill and their remainders.
    for (const std::size_t count : {64u, 129u, 515u})
      for (int bits = 1; bits <= 8; ++bits)
        for (const int parts : {1, 2})
          check_shape(sets, {bits, parts, 700, 9, count, Values::random}, {count}, random, scratch.data(), checker);
  } else {
    std::fprintf(stderr, "usage: linear_test [fuzz SEED ITERATIONS]\n");
    return 2;
  }
  std::printf("%lld elements; worst, at %.3f of its tolerance: %s\n", checker.elements, checker.worst.ratio,
              checker.worst.what.c_str());
  if (checker.failures) std::printf("%d FAILURES\n", checker.failures);
  return checker.failures ? 1 : 0;
}

}  // namespace
}  // namespace everybit::engine

int main(int argc, char** argv) { return everybit::engine::run(argc, argv); }
