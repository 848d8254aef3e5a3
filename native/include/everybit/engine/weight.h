// One parameter as linear layers use it: bit-planes with tables per precision, or plain numbers.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "everybit/engine/isa.h"

namespace everybit::engine {

// How accurately quantized weights are multiplied (docs/design/0002). exact: float activations and float values.
// standard: int8 activations in groups of 32; sixteen-bit tables from 3 bits on, bytes below, in prompts, and in
// batches at kWideBits and more. fast: byte tables everywhere.
enum class Mode : std::uint8_t { exact, standard, fast };

// With so many tokens a step is a prompt, bound by arithmetic: one byte per table entry halves the work and adds under
// 1 % of a row's spread, about what int8 activations add (docs/design/0002).
constexpr std::size_t kPrefillTokens = 32;
// From so many bits on a lookup takes two or four registers of table, and arithmetic is the bound from two tokens on.
constexpr int kWideBits = 7;

// The tables of one weight at one precision: kept as the kernels want them, or, where a codebook says them as even
// grids in 16 cells a row, made for a few rows at a time just before these are multiplied (512 bytes a row of an 8-bit
// table would be a quarter of what is read). What is made so is the same, entry for entry, as what would be kept.
class PreparedTables {
 public:
  // values f32[rows][2^bits], in the container's code order; units f32[rows] or null: of which a row's values are
  // integer multiples. One byte part then holds them without rounding where each row's multiples span less than
  // Kernels::base, and is used instead of two. Needs: finite. Cost: rows * 2^bits * (1 or 2) bytes, in exact mode 4.
  PreparedTables(const float* values, const float* units, std::size_t rows, int bits, Mode mode, const Kernels& kernels,
                 int threads);
  // centres f32[rows][16], ladders u8[rows][16], steps f32[rows], in the container's order (docs/spec.md).
  // Needs: bits 5..8, mode not exact; finite values, ladders 1..8.
  PreparedTables(const float* centres, const std::uint8_t* ladders, const float* steps, std::size_t rows, int bits,
                 const Kernels& kernels);

  bool made_on_the_fly() const { return !cells_.empty(); }
  // Kept tables from `row` on; `bytes`: the high parts alone.
  Tables kept(std::size_t row, bool bytes) const;
  // Tables of rows [row, row + count), made in `room`; entry 0 belongs to `row`.
  Tables make(std::size_t row, std::size_t count, bool bytes, void* room) const;
  static constexpr std::size_t kMadeRows = 24;  // whole tiles of every kernel, and 12 KiB of tables in L1
  static constexpr std::size_t kRoomBytes = kMadeRows * (512 + 8);

  const float* values(std::size_t row) const { return values_.data() + (row << bits_); }
  std::size_t size_bytes() const;

 private:
  int bits_, parts_;
  const Kernels& kernels_;
  std::vector<std::uint8_t> entries_;
  std::vector<float> lines_, byte_lines_, values_;
  std::vector<Cells> cells_;
};

struct Weight {
  std::string name;
  std::size_t experts, rows, columns;  // rows of one expert
  bool quantized;
  Matrix plain;                                           // of all experts, one after another
  Planes planes;                                          // likewise
  int planes_held;                                        // how many of planes.plane there are
  std::array<std::unique_ptr<PreparedTables>, 9> tables;  // by the weight's own precision

  Planes planes_at(std::size_t row) const;
  Matrix plain_at(std::size_t expert) const;
};

// Room for one linear layer's activations in int8, shared by all layers of a program.
struct QuantizedRoom {
  std::vector<std::int8_t> codes;
  std::vector<float> scales, sums;
  void reserve(std::size_t tokens, std::size_t columns);
  // The rows [first, first + tokens) of a matrix with `columns` columns.
  QuantizedRows rows(std::size_t first, std::size_t tokens, std::size_t columns);
};

// out (+)= x W^T + bias for rows [rows.begin, rows.end) of expert `expert`. `x` are the float activations, `quantized`
// the same in int8 (unused in exact mode and for plain weights); `own` is the weight's precision, whose tables are
// there.
void multiply(const Weight& weight, std::size_t expert, int own, Mode mode, const Isa& isa, Columns x,
              const QuantizedRows& quantized, Range rows, const Output& out, void* scratch);

}  // namespace everybit::engine
