// The Python module everybit._native: shapes are checked here once, the GIL is released, the work is
// done by the plain C++ functions beside this file. Outputs are arrays that the caller allocated.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "everybit/planes.h"
#include "everybit/solver.h"

void bind_cells(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_guided(nb::module_& m);
void bind_probe(nb::module_& m);

namespace {

using Codes = Array<const std::uint8_t, 2>;
using PlaneList = std::vector<Codes>;

std::string shape_of(std::size_t rows, std::size_t columns) {
  std::string text = "[";  // += because gcc 12 warns falsely (-Wrestrict) about "[" + std::string
  text += std::to_string(rows);
  text += ", ";
  text += std::to_string(columns);
  return text += "]";
}

// One pointer per plane after checking that each is [rows, ceil(columns/8)].
std::vector<const std::uint8_t*> plane_pointers(const PlaneList& planes, std::size_t rows, std::size_t columns) {
  require(planes.size() >= 1 && planes.size() <= 8, "expected 1 to 8 planes, got " + std::to_string(planes.size()));
  std::vector<const std::uint8_t*> pointers;
  for (const Codes& plane : planes) {
    require(plane.shape(0) == rows && plane.shape(1) == (columns + 7) / 8,
            "a plane has shape " + shape_of(plane.shape(0), plane.shape(1)) + ", expected " +
                shape_of(rows, (columns + 7) / 8));
    pointers.push_back(plane.data());
  }
  return pointers;
}

void bind_pack_planes(const Codes& codes, const Array<std::uint8_t, 3>& packed, int threads) {
  const std::size_t rows = codes.shape(0), columns = codes.shape(1), planes = packed.shape(0);
  require(planes >= 1 && planes <= 8 && packed.shape(1) == rows && packed.shape(2) == (columns + 7) / 8,
          "packed must be [1..8, " + std::to_string(rows) + ", " + std::to_string((columns + 7) / 8) + "]");
  const nb::gil_scoped_release release;
  everybit::pack_planes(codes.data(), rows, columns, static_cast<int>(planes), packed.data(), threads);
}

void bind_unpack_codes(const PlaneList& planes, const Array<std::uint8_t, 2>& codes, int threads) {
  const auto pointers = plane_pointers(planes, codes.shape(0), codes.shape(1));
  const nb::gil_scoped_release release;
  everybit::unpack_codes(pointers, codes.shape(0), codes.shape(1), codes.data(), threads);
}

void bind_dequantize(const PlaneList& planes, const Array<const float, 2>& table, const Array<float, 2>& values,
                     int threads) {
  const std::size_t rows = values.shape(0), columns = values.shape(1);
  const auto pointers = plane_pointers(planes, rows, columns);
  require(table.shape(0) == rows && table.shape(1) == std::size_t{1} << planes.size(),
          "table has shape " + shape_of(table.shape(0), table.shape(1)) + ", expected " +
              shape_of(rows, std::size_t{1} << planes.size()));
  const nb::gil_scoped_release release;
  everybit::dequantize(pointers, table.data(), rows, columns, values.data(), threads);
}

using Matrix = Array<const float, 2>;

// codebooks[i] belongs to bits[i] and has `width(bits)` columns.
template <void (*kSolve)(const everybit::Problem&), bool kAffine>
void bind_solve(const Matrix& weights, const std::optional<Matrix>& sensitivity, const std::vector<int>& bits,
                std::uint64_t seed, const Array<std::uint8_t, 2>& codes, const std::vector<Array<float, 2>>& codebooks,
                int threads) {
  const std::size_t rows = weights.shape(0), columns = weights.shape(1);
  require(columns >= 1, "a row needs at least one weight");
  require(!sensitivity || (sensitivity->shape(0) == rows && sensitivity->shape(1) == columns),
          "sensitivity must have the weights' shape " + shape_of(rows, columns));
  require(codes.shape(0) == rows && codes.shape(1) == columns, "codes must be " + shape_of(rows, columns));
  require(!bits.empty() && bits.front() >= 2 && bits.back() <= everybit::kMaxBits && codebooks.size() == bits.size(),
          "bits must lie in 2..8, with one codebook each");
  everybit::Problem problem{weights.data(),
                            sensitivity ? sensitivity->data() : nullptr,
                            rows,
                            columns,
                            bits,
                            seed,
                            threads,
                            codes.data(),
                            {}};
  for (std::size_t i = 0; i < bits.size(); ++i) {
    require(i == 0 || bits[i - 1] < bits[i], "bits must ascend");
    const std::size_t width = kAffine ? 2 : std::size_t{1} << bits[i];
    require(codebooks[i].shape(0) == rows && codebooks[i].shape(1) == width,
            "the codebook of " + std::to_string(bits[i]) + " bits must be " + shape_of(rows, width));
    problem.codebooks[static_cast<std::size_t>(bits[i])] = codebooks[i].data();
  }
  const nb::gil_scoped_release release;
  kSolve(problem);
}

std::int64_t bind_find_bad_row(const Matrix& values, bool refuse_negative, int threads) {
  const nb::gil_scoped_release release;
  return everybit::find_bad_row(values.data(), values.shape(0), values.shape(1), refuse_negative, threads);
}

template <void (*kSolve)(const everybit::Problem&), bool kAffine>
void define_solver(nb::module_& m, const char* name) {
  m.def(name, &bind_solve<kSolve, kAffine>, "weights"_a.noconvert(), "sensitivity"_a.noconvert().none(), "bits"_a,
        "seed"_a, "codes"_a.noconvert(), "codebooks"_a.noconvert(), "threads"_a);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "C++ kernels of everybit; call them through everybit.kernels and everybit.quantize.solvers.";
  m.def("pack_planes", &bind_pack_planes, "codes"_a.noconvert(), "packed"_a.noconvert(), "threads"_a);
  m.def("unpack_codes", &bind_unpack_codes, "planes"_a.noconvert(), "codes"_a.noconvert(), "threads"_a);
  m.def("dequantize", &bind_dequantize, "planes"_a.noconvert(), "table"_a.noconvert(), "values"_a.noconvert(),
        "threads"_a);
  define_solver<everybit::solve_upscale, false>(m, "solve_upscale");
  define_solver<everybit::solve_tree, false>(m, "solve_tree");
  define_solver<everybit::solve_uniform, true>(m, "solve_uniform");
  m.def("find_bad_row", &bind_find_bad_row, "values"_a.noconvert(), "refuse_negative"_a, "threads"_a);
  bind_cells(m);
  bind_engine(m);
  bind_guided(m);
  bind_probe(m);
}
