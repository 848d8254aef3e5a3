// The plain reference of quantized linear layers: every other set of kernels is compared with this one.
//
// Integer dot products of a group are exact; scale * dot is accumulated over the groups of a row in double, in order,
// and rounded to float once, after scale, offset and bias. No other kernel is as accurate, so none needs an allowance
// for this one. Needs: tables of base 256.
#include <cmath>
#include <cstring>

#include "everybit/engine/linear.h"

namespace everybit::engine {
namespace {

constexpr int kBase = 256;
constexpr std::size_t kTile = 16;  // tokens that share one expansion of a block

// Quantizes groups of 32 by their largest magnitude: scale = max / 127, code = round(x * (127 / max)), ties to even.
// A group whose largest magnitude is below 2^-100 counts as zeros: 127 / max would overflow not far below, and
// nothing that small matters. A group with an infinity or a NaN gets scale NaN and codes 0, so that every result
// computed from it is NaN rather than a plausible number. The sum is accumulated in double over the groups, in order.
void quantize(const float* x, std::size_t columns, std::int8_t* codes, float* scales, float* sum) {
  const std::size_t blocks = (columns + kBlock - 1) / kBlock;
  std::memset(codes, 0, blocks * kBlock);
  double total = 0;
  for (std::size_t g = 0; g < blocks * kGroups; ++g) {
    const std::size_t begin = g * kGroup, end = begin + kGroup < columns ? begin + kGroup : columns;
    float largest = 0;
    bool finite = true;
    for (std::size_t k = begin; k < end; ++k) {
      finite = finite && std::isfinite(x[k]);
      largest = std::fmax(largest, std::fabs(x[k]));
    }
    scales[g] = !finite ? NAN : largest < 0x1p-100f ? 0 : largest / 127;
    if (scales[g] > 0) {
      const float inverse = 127 / largest;
      int group = 0;
      for (std::size_t k = begin; k < end; ++k) {
        const int code = static_cast<int>(std::nearbyint(x[k] * inverse));
        codes[k / kBlock * kBlock + k % 8 * kBlockBytes + k % kBlock / 8] = static_cast<std::int8_t>(code);
        group += code;
      }
      total += static_cast<double>(scales[g]) * group;
    } else {
      total += scales[g];
    }
  }
  *sum = static_cast<float>(total);
}

// The entries of the 512 weights of a block, in the order of the activations; 0 beyond the last column.
void expand(const Planes& planes, const Tables& tables, std::size_t row, std::size_t block, std::int32_t* entries) {
  const std::size_t size = std::size_t{1} << tables.bits;
  const std::uint8_t* high = tables.entries + row * tables.stride;
  for (std::size_t i = 0; i < kBlock; ++i) {
    const std::size_t column = block * kBlock + i;
    std::int32_t& entry = entries[i % 8 * kBlockBytes + i / 8];
    entry = 0;
    if (column >= planes.columns) continue;
    unsigned index = 0;
    for (int p = 0; p < tables.bits; ++p)
      index |= (planes.plane[p][row * planes.row_bytes + column / 8] >> column % 8 & 1u) << p;
    entry = tables.parts == 2 ? kBase * high[index] + high[size + index] : high[index];
  }
}

void linear(const Planes& planes, const Tables& tables, const QuantizedRows& x, Range rows, const Output& out, void*) {
  for (std::size_t first = 0; first < x.tokens; first += kTile) {
    const std::size_t tokens = x.tokens - first < kTile ? x.tokens - first : kTile;
    for (std::size_t n = rows.begin; n < rows.end; ++n) {
      double sums[kTile] = {};
      for (std::size_t block = 0; block < x.blocks; ++block) {
        std::int32_t entries[kBlock];
        expand(planes, tables, n, block, entries);
        for (std::size_t t = 0; t < tokens; ++t) {
          const std::size_t place = (first + t) * x.blocks + block;
          std::int32_t dots[kGroups] = {};  // at most 32 * 65535 * 127 < 2^31
          for (std::size_t i = 0; i < kBlock; ++i)
            dots[i % kBlockBytes / 4] += entries[i] * x.codes[place * kBlock + i];
          for (std::size_t g = 0; g < kGroups; ++g)
            sums[t] += static_cast<double>(x.scales[place * kGroups + g]) * dots[g];
        }
      }
      const double scale = tables.lines[2 * n], offset = tables.lines[2 * n + 1];
      for (std::size_t t = 0; t < tokens; ++t) {
        const double bias = out.bias ? out.bias[n] : 0.0;
        const float y = static_cast<float>(scale * sums[t] + offset * x.sums[first + t] + bias);
        float& place = out.data[(first + t) * out.stride + n];
        place = out.add ? place + y : y;
      }
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static constexpr Kernels kernels = {
      "scalar",
      kBase,
      quantize,
      {nullptr, linear, linear, linear, linear, linear, linear, linear, linear},
      {nullptr, linear, linear, linear, linear, linear, linear, linear, linear},
  };
  return kernels;
}

}  // namespace everybit::engine
