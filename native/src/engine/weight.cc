#include "everybit/engine/weight.h"

#include <algorithm>
#include <cmath>

#include "everybit/planes.h"
#include "everybit/threads.h"

namespace everybit::engine {
namespace {

// The lowest `bits` bits of code, last first: where the kernels look for the value of that code.
unsigned reversed(unsigned code, int bits) {
  unsigned result = 0;
  for (int i = 0; i < bits; ++i) result |= ((code >> i) & 1u) << (bits - 1 - i);
  return result;
}

int parts_of(Mode mode, int bits) { return mode == Mode::standard && bits >= 3 ? 2 : 1; }

// The multiple of `unit` nearest to `value`, as an integer.
long multiple(float value, float unit) { return unit > 0 ? std::lrint(value / unit) : 0; }

// Whether the multiples that a row's values are of its unit span no more than one byte part can hold.
bool fits_a_byte(const float* values, const float* units, std::size_t rows, std::size_t count, int base) {
  for (std::size_t row = 0; row < rows; ++row) {
    const auto [least, greatest] = std::minmax_element(values + row * count, values + (row + 1) * count);
    if (multiple(*greatest, units[row]) - multiple(*least, units[row]) >= base) return false;
  }
  return true;
}

// What Kernels::make_table does, in plain C++.
void make_table(const Cells& cells, int bits, int base, std::uint8_t* entries) {
  const std::size_t count = std::size_t{1} << bits;
  const float inverse = cells.scale > 0 ? 1.0f / cells.scale : 0.0f, most = static_cast<float>(base * base - 1);
  for (std::size_t i = 0; i < count; ++i) {
    const int factor = cells.ladder[i & 15] * cell_grid(static_cast<unsigned>(i >> 4), bits);
    const float value = cells.centre[i & 15] + cells.step * static_cast<float>(factor);
    const float steps = std::min((value - cells.offset) * inverse, most);
    const int entry = steps > 0 ? static_cast<int>(std::lrint(steps)) : 0;
    entries[i] = static_cast<std::uint8_t>(entry / base);
    entries[count + i] = static_cast<std::uint8_t>(entry % base);
  }
}

// Rows dequantized at a time in exact mode: within the first level of cache, or, where many tokens share them, enough
// rows for the dense kernel to reuse its activations.
constexpr std::size_t kExactBytes = std::size_t{24} << 10, kExactPromptBytes = std::size_t{512} << 10;

}  // namespace

PreparedTables::PreparedTables(const float* values, const float* units, std::size_t rows, int bits, Mode mode,
                               const Kernels& kernels, int threads)
    : bits_(bits), parts_(parts_of(mode, bits)), kernels_(kernels) {
  const std::size_t count = std::size_t{1} << bits;
  if (mode == Mode::exact) {
    values_.assign(values, values + rows * count);
    return;
  }
  const int base = kernels.base;
  const bool whole = units && fits_a_byte(values, units, rows, count, base);
  if (whole) parts_ = 1;
  const int parts = parts_;
  const float most = static_cast<float>(parts == 2 ? base * base - 1 : base - 1);
  entries_.resize(rows * static_cast<std::size_t>(parts) * count);
  lines_.resize(2 * rows);
  if (parts == 2) byte_lines_.resize(2 * rows);
  std::array<std::uint8_t, 256> place{};
  for (unsigned code = 0; code < count; ++code) place[code] = static_cast<std::uint8_t>(reversed(code, bits));
  parallel_rows(rows, rows_per_chunk(count), threads, [&] {
    return [&](std::size_t row) {
      const float* from = values + row * count;
      std::uint8_t* high = entries_.data() + row * static_cast<std::size_t>(parts) * count;
      std::uint8_t* low = high + (parts - 1) * count;
      const auto [least, greatest] = std::minmax_element(from, from + count);
      const float offset = *least, scale = whole ? units[row] : (*greatest - offset) / most;
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;  // inf where scale is denormal: clamped below
      const long first = whole ? multiple(offset, scale) : 0;
      for (std::size_t code = 0; code < count; ++code) {
        const float steps = std::min((from[code] - offset) * inverse, most);
        const int entry = whole       ? static_cast<int>(multiple(from[code], scale) - first)
                          : steps > 0 ? static_cast<int>(std::lrint(steps))
                                      : 0;
        if (parts == 2) low[place[code]] = static_cast<std::uint8_t>(entry % base);
        high[place[code]] = static_cast<std::uint8_t>(parts == 2 ? entry / base : entry);
      }
      lines_[2 * row] = scale;
      lines_[2 * row + 1] = offset;
      if (parts == 2) {  // the low part is replaced by the middle of what it can be
        byte_lines_[2 * row] = scale * static_cast<float>(base);
        byte_lines_[2 * row + 1] = offset + scale * static_cast<float>(base - 1) / 2;
      }
    };
  });
}

PreparedTables::PreparedTables(const float* centres, const std::uint8_t* ladders, const float* steps, std::size_t rows,
                               int bits, const Kernels& kernels)
    : bits_(bits), parts_(2), kernels_(kernels), cells_(rows) {
  const int most_grid = cell_grid((1u << (bits - 4)) - 1, bits);  // all residual bits set: the largest
  for (std::size_t row = 0; row < rows; ++row) {
    Cells& cells = cells_[row];
    cells.step = steps[row];
    float least = 0, greatest = 0;
    for (unsigned c = 0; c < 16; ++c) {
      const float centre = centres[16 * row + c];
      const int ladder = ladders[16 * row + c];
      const unsigned place = reversed(c, 4);
      cells.centre[place] = centre;
      cells.ladder[place] = static_cast<std::int8_t>(ladder);
      const float reach = cells.step * static_cast<float>(ladder * most_grid);
      least = c ? std::min(least, centre - reach) : centre - reach;
      greatest = c ? std::max(greatest, centre + reach) : centre + reach;
    }
    cells.scale = (greatest - least) / static_cast<float>(kernels.base * kernels.base - 1);
    cells.offset = least;
  }
}

Tables PreparedTables::kept(std::size_t row, bool bytes) const {
  const std::size_t stride = static_cast<std::size_t>(parts_) << bits_;
  const std::vector<float>& lines = bytes && parts_ == 2 ? byte_lines_ : lines_;
  return {bits_, bytes ? 1 : parts_, entries_.data() + row * stride, lines.data() + 2 * row, stride};
}

Tables PreparedTables::make(std::size_t row, std::size_t count, bool bytes, void* room) const {
  auto* lines = static_cast<float*>(room);
  auto* entries = reinterpret_cast<std::uint8_t*>(lines + 2 * kMadeRows);
  const std::size_t stride = std::size_t{2} << bits_;
  const auto base = static_cast<float>(kernels_.base);
  for (std::size_t r = 0; r < count; ++r) {
    const Cells& cells = cells_[row + r];
    if (kernels_.make_table)
      kernels_.make_table(cells, bits_, entries + r * stride);
    else
      make_table(cells, bits_, kernels_.base, entries + r * stride);
    lines[2 * r] = bytes ? cells.scale * base : cells.scale;
    lines[2 * r + 1] = bytes ? cells.offset + cells.scale * (base - 1) / 2 : cells.offset;
  }
  return {bits_, bytes ? 1 : 2, entries, lines, stride};
}

std::size_t PreparedTables::size_bytes() const {
  return entries_.size() + 4 * (lines_.size() + byte_lines_.size() + values_.size()) + cells_.size() * sizeof(Cells);
}

Planes Weight::planes_at(std::size_t row) const {
  Planes moved = planes;
  for (int p = 0; p < planes_held; ++p) moved.plane[p] += row * planes.row_bytes;
  return moved;
}

Matrix Weight::plain_at(std::size_t expert) const {
  Matrix moved = plain;
  const std::size_t item = plain.dtype == Dtype::f32 ? 4 : 2;
  moved.data = static_cast<const std::uint8_t*>(plain.data) + expert * rows * columns * item;
  return moved;
}

void QuantizedRoom::reserve(std::size_t tokens, std::size_t columns) {
  const std::size_t blocks = (columns + kBlock - 1) / kBlock;
  if (codes.size() < tokens * blocks * kBlock + 64) codes.resize(tokens * blocks * kBlock + 64);
  if (scales.size() < tokens * blocks * kGroups) scales.resize(tokens * blocks * kGroups);
  if (sums.size() < tokens) sums.resize(tokens);
}

QuantizedRows QuantizedRoom::rows(std::size_t first, std::size_t tokens, std::size_t columns) {
  const std::size_t blocks = (columns + kBlock - 1) / kBlock;
  const auto base = (reinterpret_cast<std::uintptr_t>(codes.data()) + 63) & ~std::uintptr_t{63};
  return {tokens, blocks, reinterpret_cast<std::int8_t*>(base) + first * blocks * kBlock,
          scales.data() + first * blocks * kGroups, sums.data() + first};
}

void multiply(const Weight& weight, std::size_t expert, int own, Mode mode, const Isa& isa, Columns x,
              const QuantizedRows& quantized, Range rows, const Output& out, void* scratch) {
  if (rows.begin >= rows.end) return;
  const std::size_t tokens = quantized.tokens;
  if (!weight.quantized) return isa.ops->dense(weight.plain_at(expert), x, tokens, rows, out, scratch);
  const PreparedTables& tables = *weight.tables[static_cast<std::size_t>(own)];
  const std::size_t first = expert * weight.rows;
  const Planes planes = weight.planes_at(first);
  if (mode != Mode::exact) {
    const bool bytes = mode == Mode::fast || tokens >= (own < kWideBits ? kPrefillTokens : 2);
    const LinearFunction multiply_rows = (tokens == 1 ? isa.kernels->gemv : isa.kernels->gemm)[own];
    if (!tables.made_on_the_fly())
      return multiply_rows(planes, tables.kept(first, bytes), quantized, rows, out, scratch);
    void* room = static_cast<std::uint8_t*>(scratch) + kScratchBytes;
    for (std::size_t row = rows.begin; row < rows.end; row += PreparedTables::kMadeRows) {
      const std::size_t count = std::min(PreparedTables::kMadeRows, rows.end - row);
      multiply_rows(weight.planes_at(first + row), tables.make(first + row, count, bytes, room), quantized, {0, count},
                    out.from(row), scratch);
    }
    return;
  }
  float* values = reinterpret_cast<float*>(static_cast<std::uint8_t*>(scratch) + kDenseScratchBytes);
  const std::size_t most = std::max<std::size_t>(
      1, (tokens < kPrefillTokens ? kExactBytes : kExactPromptBytes) / (4 * weight.columns) / 8 * 8);
  for (std::size_t row = rows.begin; row < rows.end; row += most) {
    const std::size_t count = std::min(most, rows.end - row);
    dequantize_rows(planes.plane, own, tables.values(first), {row, row + count}, weight.columns, values);
    const Matrix matrix{values, Dtype::f32, count, weight.columns, false};
    isa.ops->dense(matrix, x, tokens, {0, count}, out.from(row), scratch);
  }
}

}  // namespace everybit::engine
