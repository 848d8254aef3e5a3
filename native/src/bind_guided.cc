// The binding of solve_guided: shapes are checked here, outputs are arrays that the caller allocated.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bindings.h"
#include "everybit/guided.h"

namespace {

using Bytes = Array<std::int8_t, 2>;

// tables[i] belongs to the i-th precision that is not above 4.
void bind_solve_guided(const Array<const float, 2>& weights, const Array<const float, 3>& hessians,
                       const std::vector<int>& bits, const std::vector<float>& importance, int rounds, int sweeps,
                       const Array<std::uint8_t, 2>& codes, const std::vector<Bytes>& tables,
                       const Array<float, 1>& scales, const std::optional<Bytes>& centres,
                       const std::optional<Array<std::uint8_t, 2>>& ladders,
                       const std::optional<Array<float, 1>>& steps, int threads) {
  using everybit::kCells;
  const std::size_t rows = weights.shape(0), columns = weights.shape(1), groups = hessians.shape(0);
  require(columns >= 1, "a row needs at least one weight");
  require(hessians.shape(1) == columns && hessians.shape(2) == columns && groups >= 1 &&
              groups <= std::max<std::size_t>(rows, 1),
          "hessians must be [groups, K, K], with at most one group a row");
  require(codes.shape(0) == rows && codes.shape(1) == columns, "codes must have the weights' shape");
  require(!bits.empty() && bits.front() >= 2 && bits.back() <= everybit::kMaxBits && importance.size() == bits.size(),
          "bits must lie in 2..8, with one importance each");
  require(rounds >= 0 && sweeps >= 0, "rounds and sweeps must not be negative");
  require(scales.shape(0) == rows, "scales must be [N]");
  everybit::GuidedProblem problem{};
  problem.weights = weights.data();
  problem.hessians = hessians.data();
  problem.rows = rows;
  problem.columns = columns;
  problem.groups = groups;
  problem.bits = bits;
  problem.rounds = rounds;
  problem.sweeps = sweeps;
  problem.threads = threads;
  problem.codes = codes.data();
  problem.scales = scales.data();
  std::size_t low = 0;
  for (std::size_t i = 0; i < bits.size(); ++i) {
    require(i == 0 || bits[i - 1] < bits[i], "bits must ascend");
    problem.importance[static_cast<std::size_t>(bits[i])] = importance[i];
    if (bits[i] > everybit::kCellBits) continue;
    require(low < tables.size() && tables[low].shape(0) == rows && tables[low].shape(1) == std::size_t{1} << bits[i],
            "tables must be [N, 2^b] for each precision up to 4");
    problem.tables[static_cast<std::size_t>(bits[i])] = tables[low++].data();
  }
  if (bits.back() > everybit::kCellBits) {
    require(centres && ladders && steps && centres->shape(0) == rows && centres->shape(1) == kCells &&
                ladders->shape(0) == rows && ladders->shape(1) == kCells && steps->shape(0) == rows,
            "centres and ladders must be [N, 16], steps [N]");
    problem.centres = centres->data();
    problem.ladders = ladders->data();
    problem.steps = steps->data();
  }
  const nb::gil_scoped_release release;
  everybit::solve_guided(problem);
}

}  // namespace

void bind_guided(nb::module_& m) {
  m.def("solve_guided", &bind_solve_guided, "weights"_a.noconvert(), "hessians"_a.noconvert(), "bits"_a, "importance"_a,
        "rounds"_a, "sweeps"_a, "codes"_a.noconvert(), "tables"_a.noconvert(), "scales"_a.noconvert(),
        "centres"_a.noconvert().none(), "ladders"_a.noconvert().none(), "steps"_a.noconvert().none(), "threads"_a);
}
