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
// standard: int8 activations in groups of 32; sixteen-bit tables from 3 bits on, bytes below, and bytes for prompts at up
// to kBytePrefillBits. fast: byte tables everywhere.
enum class Mode : std::uint8_t { exact, standard, fast };

// With so many tokens a step is a prompt, bound by arithmetic: at low precisions one byte per table entry halves the
// work and adds under 1 % of a row's spread, an order below the quantization error (docs/design/0002).
constexpr std::size_t kPrefillTokens = 32;
constexpr int kBytePrefillBits = 4;

// The tables of one weight at one precision.
class PreparedTables {
 public:
  // values f32[rows][2^bits], in the container's code order. Needs: finite. Cost: rows * 2^bits * (1 or 2) bytes, and
  // in exact mode 4.
  PreparedTables(const float* values, std::size_t rows, int bits, Mode mode, const Kernels& kernels, int threads);

  Tables standard(std::size_t row) const;  // from `row` on
  Tables bytes(std::size_t row) const;     // the high parts alone
  const float* values(std::size_t row) const { return values_.data() + (row << bits_); }
  std::size_t size_bytes() const;

 private:
  int bits_, parts_;
  std::vector<std::uint8_t> entries_;
  std::vector<float> lines_, byte_lines_, values_;
};

struct Weight {
  std::string name;
  std::size_t experts, rows, columns;  // rows of one expert
  bool quantized;
  Matrix plain;                      // of all experts, one after another
  Planes planes;                     // likewise
  int planes_held;                   // how many of planes.plane there are
  std::array<int, 9> served;         // the weight's own precision when the model runs at b; 0: not served
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
// the same in int8 (unused in exact mode and for plain weights).
void multiply(const Weight& weight, std::size_t expert, int bits, Mode mode, const Isa& isa, Columns x,
              const QuantizedRows& quantized, Range rows, const Output& out, void* scratch);

}  // namespace everybit::engine
