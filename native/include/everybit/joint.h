// Choosing the cells of several precisions at once: cuts of the finest joint level, by dynamic programming.
//
// A level-l cell is the union of 2^(base-l) neighbouring base cells, and the objective is the sum over levels
// of importance_l * (weighted squared error at level l). Both searches are exact within their candidates:
// `CoarseSearch` over a few dozen edges of the row, `WindowSearch` over 16 places around each current cut.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "everybit/solver.h"
#include "everybit/sorted_row.h"

namespace everybit {

// An order that cannot be: a cell that ends before it begins. Larger than any sum of errors (each <= 1,
// times an importance <= 4^8), small enough that adding a few stays finite.
constexpr float kForbidden = 1e30f;

struct JointLevels {
  int low = 0, base = 0;                         // roots are level-`low` cells, leaves level-`base` cells
  std::array<float, kMaxBits + 1> importance{};  // of each level low..base; 0 where nobody asks for it

  std::size_t roots() const { return std::size_t{1} << low; }
  std::size_t leaves() const { return std::size_t{1} << base; }
};

// Splits the row into `bins` parts of equal cube-root density mass: edges [bins + 1], ascending, in points.
void compand(const SortedRow& row, std::size_t bins, std::vector<std::uint32_t>& edges, std::vector<float>& mass);

class CoarseSearch {
 public:
  // The best cuts among the edges.
  void cut(const SortedRow& row, const JointLevels& levels, const std::vector<std::uint32_t>& edges,
           std::vector<std::uint32_t>& cuts);

 private:
  void trace(const JointLevels& levels, int level, std::size_t cell, std::size_t stride);

  std::vector<double> sums_;
  std::vector<float> error_, chain_;
  std::array<std::vector<float>, kMaxBits + 1> table_;  // [edges, edges] per level: best objective inside a cell
  std::vector<std::size_t> chosen_;
};

inline constexpr std::size_t kWindow = 16;  // candidates per cut: one 512-bit register of floats

class WindowSearch {
 public:
  // Moves all cuts together to the best of kWindow places `stride` points apart around each; true if one moved.
  bool improve(const SortedRow& row, const JointLevels& levels, std::size_t stride, std::vector<std::uint32_t>& cuts);

 private:
  using Block = std::array<float, kWindow * kWindow>;  // [left candidate, right candidate]
  void place(const SortedRow& row, std::size_t stride, const std::vector<std::uint32_t>& cuts);
  void errors(const SortedRow& row, const std::vector<std::uint32_t>& cuts, std::size_t left, std::size_t right,
              float importance, bool add, float* block) const;
  void trace(const JointLevels& levels, int level, std::size_t cell);

  std::vector<std::uint32_t> places_;                    // [cuts, kWindow]
  std::array<std::vector<Block>, kMaxBits + 1> blocks_;  // per level and cell: best objective inside
  std::vector<std::array<float, kWindow>> chain_;
  std::vector<std::size_t> chosen_;
};

}  // namespace everybit
