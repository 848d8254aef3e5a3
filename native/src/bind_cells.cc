// The binding of solve_cells: shapes are checked here, outputs are arrays that the caller allocated.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "bindings.h"
#include "everybit/cells.h"

namespace {

using Matrix = Array<const float, 2>;

// centres[i], ladders[i] and steps[i] belong to bits[i].
void bind_solve_cells(const Matrix& weights, const std::optional<Matrix>& sensitivity, const std::vector<int>& bits,
                      const Array<std::uint8_t, 2>& codes, const std::vector<Array<float, 2>>& centres,
                      const std::vector<Array<std::uint8_t, 2>>& ladders, const std::vector<Array<float, 1>>& steps,
                      int threads) {
  const std::size_t rows = weights.shape(0), columns = weights.shape(1);
  require(columns >= 1, "a row needs at least one weight");
  require(!sensitivity || (sensitivity->shape(0) == rows && sensitivity->shape(1) == columns),
          "sensitivity must have the weights' shape");
  require(codes.shape(0) == rows && codes.shape(1) == columns, "codes must have the weights' shape");
  require(std::all_of(codes.data(), codes.data() + codes.size(), [](std::uint8_t c) { return c < everybit::kCells; }),
          "codes must be below 16");
  require(!bits.empty() && bits.front() > everybit::kCellBits && bits.back() <= everybit::kMaxBits,
          "bits must lie in 5..8");
  require(centres.size() == bits.size() && ladders.size() == bits.size() && steps.size() == bits.size(),
          "each precision needs centres, ladders and steps");
  everybit::CellsProblem problem{
      weights.data(), sensitivity ? sensitivity->data() : nullptr, rows, columns, bits, threads, codes.data(), {}};
  for (std::size_t i = 0; i < bits.size(); ++i) {
    require(i == 0 || bits[i - 1] < bits[i], "bits must ascend");
    require(centres[i].shape(0) == rows && centres[i].shape(1) == everybit::kCells, "centres must be [N, 16]");
    require(ladders[i].shape(0) == rows && ladders[i].shape(1) == everybit::kCells, "ladders must be [N, 16]");
    require(steps[i].shape(0) == rows, "steps must be [N]");
    problem.books[static_cast<std::size_t>(bits[i])] = {centres[i].data(), ladders[i].data(), steps[i].data()};
  }
  const nb::gil_scoped_release release;
  everybit::solve_cells(problem);
}

}  // namespace

void bind_cells(nb::module_& m) {
  m.def("solve_cells", &bind_solve_cells, "weights"_a.noconvert(), "sensitivity"_a.noconvert().none(), "bits"_a,
        "codes"_a.noconvert(), "centres"_a.noconvert(), "ladders"_a.noconvert(), "steps"_a.noconvert(), "threads"_a);
}
