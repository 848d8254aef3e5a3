"""What every solver promises: nested codes, mean codebooks, falling errors, odd rows, refusals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.errors import EverybitError, PrecisionError, ShapeError, SourceError
from everybit.quantize.solvers import Solution, solve
from everybit.quantize.solvers.reference import codebook

SOLVERS = ("tree", "upscale", "uniform")  # those of one row at a time; guided has tests of its own

ALL = tuple(range(2, 9))
TABLE_SOLVERS = ("tree", "upscale")
BITS = [ALL, (3,), (8,), (2,), (2, 4, 8), (2, 8), (3, 4, 5), (5, 6, 7, 8), (6, 8)]


def gaussian(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    return weights, rng.exponential(size=(rows, columns)).astype(np.float32)


def error(weights: np.ndarray, sensitivity: np.ndarray | None, solution: Solution, bits: int) -> float:
    difference = weights.astype(np.float64) - solution.values_at(bits)
    return float(((1.0 if sensitivity is None else sensitivity) * difference**2).sum())


def check_table(weights: np.ndarray, sensitivity: np.ndarray | None, solution: Solution) -> None:
    """Codes within range, codebooks = the reference's means of these codes, errors that never rise with bits."""
    planes = solution.bits[-1]
    assert solution.codes.shape == weights.shape
    assert int(solution.codes.max(initial=0)) < 2**planes
    for bits in solution.bits:
        table = solution.codebook[f"lut{bits}"]
        assert table.shape == (len(weights), 2**bits)
        assert np.isfinite(table).all()
        for row in range(len(weights)):
            s = None if sensitivity is None else sensitivity[row]
            expected = codebook(weights[row], s, solution.codes[row], bits, planes)
            # Both sum in double and round once: one unit in the last place, relative to the row's reach.
            np.testing.assert_allclose(table[row], expected, rtol=2e-7, atol=2e-7 * np.abs(weights[row]).max())
    errors = [error(weights, sensitivity, solution, bits) for bits in solution.bits]
    scale = float((weights.astype(np.float64) ** 2).sum()) * (1 if sensitivity is None else float(sensitivity.max()))
    assert all(fine <= coarse + 1e-7 * scale for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_codebooks_are_means_and_errors_fall(solver: str, bits: tuple[int, ...], weighted: bool) -> None:
    weights, sensitivity = gaussian(3, 172)
    s = sensitivity if weighted else None
    solution = solve(weights, s, bits, solver)
    assert (solution.kind, solution.bits) == ("table", bits)
    check_table(weights, s, solution)


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 31, 105])
@pytest.mark.parametrize("rows", [1, 3])
def test_short_rows(solver: str, columns: int, rows: int) -> None:
    weights, sensitivity = gaussian(rows, columns, seed=columns)
    for bits in ((2, 3, 4, 8), (5, 8)):
        solution = solve(weights, sensitivity, bits, solver)
        check_table(weights, sensitivity, solution)
        for b in bits:
            if columns <= 2 ** bits[0]:  # no more weights than cells at the lowest level: exact from there on
                assert (solution.values_at(b) == weights).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -1e-30, 1e30, np.float32(1e-45)])
@pytest.mark.parametrize("columns", [1, 2, 9, 100])
def test_constant_rows_are_exact(solver: str, value: float, columns: int) -> None:
    weights = np.full((2, columns), value, np.float32)
    solution = solve(weights, None, ALL, solver)
    for bits in ALL:
        assert (solution.values_at(bits) == weights).all()


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_three_distinct_values_are_exact_at_every_precision(solver: str, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    weights = rng.choice(np.array([-0.7, 1e-9, 0.30000001], np.float32), (4, 300))
    sensitivity = rng.exponential(size=weights.shape).astype(np.float32) if weighted else None
    solution = solve(weights, sensitivity, ALL, solver)
    for bits in ALL:
        assert (solution.values_at(bits) == weights).all()


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
def test_seventeen_values_are_exact_at_eight_bits(solver: str) -> None:
    weights = np.random.default_rng(2).choice(np.linspace(-1, 1, 17).astype(np.float32), (3, 400))
    solution = solve(weights, None, ALL, solver)
    assert (solution.values_at(8) == weights).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_without_sensitivity_are_solved_unweighted(solver: str) -> None:
    weights, sensitivity = gaussian(3, 105)
    sensitivity[1] = 0
    solution = solve(weights, sensitivity, ALL, solver)
    plain = solve(weights, None, ALL, solver)
    assert (solution.codes[1] == plain.codes[1]).all()
    for bits in ALL:
        np.testing.assert_allclose(solution.table_at(bits)[1], plain.table_at(bits)[1], rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("columns", [64, 1000])
def test_mostly_zero_sensitivities(solver: str, columns: int) -> None:
    """Only every 20th weight counts: those must come out well, the others stay finite and near."""
    weights, sensitivity = gaussian(4, columns)
    sensitivity[:, np.arange(columns) % 20 != 0] = 0
    solution = solve(weights, sensitivity, ALL, solver)
    if solver != "uniform":
        check_table(weights, sensitivity, solution)
    for bits in ALL:
        assert np.abs(weights - solution.values_at(bits)).max() < 6  # the rows' own reach is about 3
    assert error(weights, sensitivity, solution, 8) < 1e-3 * (sensitivity * weights**2).sum()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_extreme_scales_change_nothing(solver: str, scale: float) -> None:
    weights, sensitivity = gaussian(2, 105)
    ordinary = solve(weights, sensitivity, ALL, solver)
    power = np.float32(2.0 ** round(np.log2(scale)))  # a power of two moves no rounding
    scaled = solve(weights * power, sensitivity * (1 / power), ALL, solver)
    agree = (scaled.codes == ordinary.codes).mean()
    assert agree > 0.99
    assert all(np.isfinite(book).all() for book in scaled.codebook.values())


@pytest.mark.parametrize("solver", TABLE_SOLVERS)
def test_an_outlier_does_not_spoil_the_rest(solver: str) -> None:
    weights, _ = gaussian(2, 500)
    weights[:, 7] = 1e6
    solution = solve(weights, None, ALL, solver)
    assert (solution.values_at(2)[:, 7] == 1e6).all()
    rest = np.delete(weights - solution.values_at(8), 7, axis=1)
    assert (rest**2).mean() < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bits", [ALL, (5, 6, 7, 8), (3,)], ids=str)
def test_any_thread_count_gives_the_same_bytes(solver: str, bits: tuple[int, ...]) -> None:
    weights, sensitivity = gaussian(21, 105)
    first = solve(weights, sensitivity, bits, solver, seed=5, threads=1)
    for threads in (2, 3, 4, 0):
        other = solve(weights, sensitivity, bits, solver, seed=5, threads=threads)
        assert (other.codes == first.codes).all()
        assert all((other.codebook[suffix] == book).all() for suffix, book in first.codebook.items())


def test_rows_are_independent_of_each_other() -> None:
    weights, sensitivity = gaussian(5, 172)
    whole = solve(weights, sensitivity, ALL)
    alone = solve(weights[3:4], sensitivity[3:4], ALL)
    assert (whole.codes[3] == alone.codes[0]).all()


def test_upscale_depends_on_its_seed_only() -> None:
    weights, sensitivity = gaussian(8, 172)
    a, b, c = (solve(weights, sensitivity, ALL, "upscale", seed=s) for s in (1, 1, 2))
    assert (a.codes == b.codes).all()
    assert (a.codes != c.codes).any()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_any_finite_row_is_solved(values: list[float], data: st.DataObject) -> None:
    weights = np.array([values], np.float32)
    strengths = st.floats(0, 2.0**100, width=32)
    sensitivity = np.array([data.draw(st.lists(strengths, min_size=len(values), max_size=len(values)))], np.float32)
    bits = data.draw(st.sampled_from(BITS))
    for solver in SOLVERS:
        solution = solve(weights, sensitivity, bits, solver)
        assert int(solution.codes.max()) < 2 ** bits[-1]
        for b in bits:
            table = solution.codebook[f"{'lut' if solution.kind == 'table' else 'affine'}{b}"]
            assert np.isfinite(table).all()
            if solution.kind == "table":
                assert table.min() >= weights.min()
                assert table.max() <= weights.max()


def test_a_matrix_without_rows_is_fine() -> None:
    assert solve(np.zeros((0, 8), np.float32), None, (2, 3)).codes.shape == (0, 8)


def test_an_unknown_codebook_is_refused() -> None:
    with pytest.raises(SourceError, match="unknown codebook 'nf4': expected compact or table"):
        solve(GOOD, None, (3,), codebook="nf4")


GOOD = np.ones((3, 4), np.float32)


def spoiled(value: float) -> np.ndarray:
    bad = GOOD.copy()
    bad[2, 1] = value
    return bad


@pytest.mark.parametrize(
    ("weights", "sensitivity", "bits", "kind", "message"),
    [
        (GOOD.astype(np.float64), None, (3,), ShapeError, r"weights arrived as float64\[3, 4\]"),
        (GOOD[0], None, (3,), ShapeError, r"expected float32\[N, K\]"),
        (GOOD[:, :0], None, (3,), ShapeError, "at least one weight"),
        (GOOD, GOOD[:2], (3,), ShapeError, r"sensitivity has shape \[2, 4\], expected the weights' \[3, 4\]"),
        (spoiled(np.nan), None, (3,), SourceError, "row 2 has a weight that is not finite"),
        (spoiled(-np.inf), None, (3,), SourceError, "row 2 has a weight that is not finite"),
        (GOOD, spoiled(-1e-9), (3,), SourceError, "row 2 has a sensitivity that is not finite and not negative"),
        (GOOD, spoiled(np.nan), (3,), SourceError, "row 2 has a sensitivity"),
        (GOOD, spoiled(np.inf), (3,), SourceError, "row 2 has a sensitivity"),
        (GOOD, None, (), PrecisionError, r"bits \[\] arrived, expected a list"),
        (GOOD, None, (1, 2), PrecisionError, "integers from 2 to 8"),
        (GOOD, None, (8, 9), PrecisionError, "integers from 2 to 8"),
        (GOOD, None, (4, 3), PrecisionError, "ascending"),
        (GOOD, None, (3, 3), PrecisionError, "different"),
    ],
)
def test_refusals_say_what_arrived(
    weights: np.ndarray, sensitivity: np.ndarray, bits: tuple[int, ...], kind: type[EverybitError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        solve(weights, sensitivity, bits)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(SourceError, match="unknown solver 'lloyd'; choose one of tree, upscale, uniform"):
        solve(GOOD, None, (3,), "lloyd")
