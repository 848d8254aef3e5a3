"""What the solvers promise with codebook compact: near free tables, exact where int8 can be, odd rows, nested grids."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.formats import CODEBOOKS
from everybit.quantize.solvers import Solution, codebook_kind, solve
from tests.unit.test_solvers import ALL, BITS, TABLE_SOLVERS, error, gaussian


def compact(
    weights: np.ndarray, sensitivity: np.ndarray | None, bits: tuple[int, ...], solver: str = "tree"
) -> Solution:
    return solve(weights, sensitivity, bits, solver, codebook="compact")


def test_the_kind_of_each_solver() -> None:
    assert [codebook_kind(solver) for solver in ("tree", "upscale", "uniform")] == ["compact", "compact", "affine"]
    assert [codebook_kind(solver, "table") for solver in ("tree", "upscale", "uniform")] == ["table", "table", "affine"]


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_codes_up_to_four_bits_are_those_of_tables(solver: str, bits: tuple[int, ...]) -> None:
    weights, sensitivity = gaussian(3, 172)
    solution = compact(weights, sensitivity, bits, solver)
    lower = tuple(b for b in bits if b <= 4)
    assert (solution.kind, solution.bits) == ("compact", bits)
    assert set(solution.codebook) == {"scale", *(f"lut{b}" for b in lower), *(["cells"] if bits[-1] > 4 else [])}
    assert int(solution.codes.max()) < 2 ** bits[-1]
    plain = solve(weights, sensitivity, sorted({*lower, 4}) if bits[-1] > 4 else bits, solver)
    for b in lower:
        assert (solution.codes_at(b) == plain.codes_at(b)).all()
        half = solution.codebook["scale"] * np.float32(0.5000001)
        assert (np.abs(solution.table_at(b) - plain.table_at(b)) <= half).all()  # rounded to the nearest, none clipped
    errors = [error(weights, sensitivity, solution, b) for b in bits]
    assert all(fine < coarse for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [384, 4096])
def test_errors_lie_between_free_tables_and_an_even_grid(weighted: bool, columns: int) -> None:
    """Bell-shaped rows. Measured: up to 4 bits int8 costs 0.04 to 0.7 %; at 5 bits the grid that all share costs 19 to
    34 %, and at 5 to 8 bits it has 0.63 to 0.86 of an even grid's error.
    """
    weights, sensitivity = gaussian(16, columns)
    s = sensitivity if weighted else None
    ours, free, even = compact(weights, s, ALL), solve(weights, s, ALL), solve(weights, s, ALL, "uniform")
    for b in (2, 3, 4):
        assert error(weights, s, ours, b) < 1.012 * error(weights, s, free, b)
    assert error(weights, s, ours, 5) < 1.45 * error(weights, s, free, 5)
    for b in (5, 6, 7, 8):
        assert error(weights, s, ours, b) < 0.9 * error(weights, s, even, b)


@pytest.mark.parametrize("bits", [(5,), (6,), (5, 8), (4, 7)], ids=str)
def test_every_weight_has_the_nearest_point_of_its_cell(bits: tuple[int, ...]) -> None:
    weights, _ = gaussian(3, 300)
    solution = compact(weights, None, bits)
    top = bits[-1]
    grid = CODEBOOKS["compact"].expand(solution.codebook, top).reshape(3, 16, -1)
    cell = (solution.codes >> (top - 4)).astype(np.intp)
    best = np.abs(np.take_along_axis(grid, cell[:, :, None], axis=1) - weights[:, :, None]).min(axis=2)
    # Ties and the rounding of the values: one part in 2^22 of the row's reach.
    assert (np.abs(solution.values_at(top) - weights) <= best + 2.0**-22 * np.abs(weights).max()).all()


def test_an_outlier_costs_the_others_little() -> None:
    weights, _ = gaussian(4, 2000)
    weights[:, 7] = 30
    solution = compact(weights, None, ALL)
    rest = np.delete(weights.astype(np.float64) - solution.values_at(8), 7, axis=1)
    assert (rest**2).mean() < 2e-3
    assert (solution.values_at(4)[:, 7] == 30).all()


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", [0.0421, 1.9999, 3.1e-5, 1.0], ids=str)
def test_three_symmetric_values_are_exact(solver: str, weighted: bool, value: float) -> None:
    rng = np.random.default_rng(1)
    weights = rng.choice(np.array([-value, 0, value], np.float32), (4, 300))
    sensitivity = rng.exponential(size=weights.shape).astype(np.float32) if weighted else None
    for bits in (ALL, (2,), (5, 8), (8,)):
        solution = compact(weights, sensitivity, bits, solver)
        for b in bits:
            assert (solution.values_at(b) == weights).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 3e38, -3e38, 1e-45, 1e-44])
@pytest.mark.parametrize("columns", [1, 3, 40])
def test_rows_of_one_value_are_exact(value: float, columns: int) -> None:
    weights = np.full((2, columns), value, np.float32)
    for bits in (ALL, (2,), (8,)):
        solution = compact(weights, None, bits)
        for b in bits:
            np.testing.assert_array_equal(solution.values_at(b), weights)


@pytest.mark.parametrize(("columns", "bits"), [(1, ALL), (4, ALL), (9, (4, 5, 8)), (16, (5, 6, 7, 8)), (16, (8,))])
def test_cells_of_one_value_are_exact_up_to_int8(columns: int, bits: tuple[int, ...]) -> None:
    weights, sensitivity = gaussian(3, columns, seed=columns)
    solution = compact(weights, sensitivity, bits)
    half = solution.codebook["scale"] * np.float32(0.5000001)
    for b in set(bits) - {2, 3, 4}:
        assert (np.abs(solution.values_at(b) - weights) <= half).all()


@pytest.mark.parametrize("bits", [ALL, (5, 7), (8,), (2, 3)], ids=str)
def test_any_thread_count_gives_the_same_bytes(bits: tuple[int, ...]) -> None:
    weights, sensitivity = gaussian(21, 105)
    first = solve(weights, sensitivity, bits, threads=1, codebook="compact")
    for threads in (2, 3, 0):
        other = solve(weights, sensitivity, bits, threads=threads, codebook="compact")
        assert (other.codes == first.codes).all()
        assert all((other.codebook[suffix] == array).all() for suffix, array in first.codebook.items())


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=60), st.data())
def test_any_row_is_solved(values: list[float], data: st.DataObject) -> None:
    weights = np.array([values], np.float32)
    strengths = st.floats(0, 2.0**100, width=32)
    sensitivity = np.array([data.draw(st.lists(strengths, min_size=len(values), max_size=len(values)))], np.float32)
    bits = data.draw(st.sampled_from(BITS))
    solution = compact(weights, sensitivity, bits)
    assert int(solution.codes.max()) < 2 ** bits[-1]
    reach = float(weights.max()) - float(weights.min()) + float(np.abs(weights).max()) / 64
    for b in bits:
        found = solution.values_at(b).astype(np.float64)
        assert np.isfinite(found).all()
        assert np.abs(found - weights).max() <= reach + 1e-44


def test_a_matrix_without_rows_is_fine() -> None:
    for bits in ((2, 3), (2, 8)):
        assert compact(np.zeros((0, 8), np.float32), None, bits).codes.shape == (0, 8)
