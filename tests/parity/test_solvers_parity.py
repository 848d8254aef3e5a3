"""Native solvers against plain numpy: exact optima, exact splits, the original's statistics, the same grid."""

from __future__ import annotations

import numpy as np
import pytest

from everybit import _native
from everybit.formats.grid import Grid
from everybit.quantize.solvers import reference, reference_cells, solve

COLUMNS = [1, 2, 3, 7, 8, 9, 31, 105, 172, 352]
IMPORTANCE = {2: 4.0**2, 3: 4.0**3, 4: 1.1 * 4.0**4}  # native/src/tree.cc, joint_levels


def rows_of(kind: str, columns: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(columns)
    shape = (count, columns)
    weights = {
        "gaussian": rng.standard_normal(shape),
        "heavy": rng.standard_t(3, shape),
        "rounded": np.round(rng.standard_normal(shape), 1),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.4),
    }[kind.removesuffix("+")]
    sensitivity = rng.chisquare(1, shape).astype(np.float32) if kind.endswith("+") else None
    return weights.astype(np.float32), sensitivity


def sensitivity_row(sensitivity: np.ndarray | None, row: int) -> np.ndarray | None:
    return None if sensitivity is None else sensitivity[row]


def error(weights: np.ndarray, sensitivity: np.ndarray | None, values: np.ndarray) -> float:
    square = (weights.astype(np.float64) - values) ** 2
    return float((square if sensitivity is None else sensitivity * square).sum())


KINDS = ["gaussian", "gaussian+", "heavy", "heavy+", "rounded", "sparse+"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_tree_reaches_the_exact_joint_optimum(kind: str, columns: int) -> None:
    """Within 0.3 % of the exact dynamic program per row, and never below it.

    Up to 192 points the search is exact; beyond, only around its first cuts (0.05 % was measured over real rows).
    """
    weights, sensitivity = rows_of(kind, columns, 3)
    solution = solve(weights, sensitivity, (2, 3, 4))
    for row in range(len(weights)):
        s = sensitivity_row(sensitivity, row)
        points = reference.Points.of(weights[row], s)
        best = reference.joint_objective(points, IMPORTANCE)
        found = sum(i * error(weights[row], s, solution.values_at(b)[row]) for b, i in IMPORTANCE.items())
        # Values are float32: a rounding of 2^-24 of the row's reach per weight is not the solver's error.
        reach = float(np.abs(weights[row]).max())
        rounding = 400 * columns * (2.0**-24 * reach) ** 2 * (1.0 if s is None else float(s.max()))
        assert best * (1 - 1e-6) - rounding <= found <= best * 1.003 + rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_one_precision_is_optimal_kmeans(kind: str, bits: int) -> None:
    weights, sensitivity = rows_of(kind, 172, 3)
    solution = solve(weights, sensitivity, (bits,))
    for row in range(len(weights)):
        s = sensitivity_row(sensitivity, row)
        best = reference.optimal_errors(reference.Points.of(weights[row], s), [bits])[bits]
        assert best * (1 - 1e-6) - 1e-9 <= error(weights[row], s, solution.values_at(bits)[row]) <= best * 1.005 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_higher_levels_are_the_best_splits(kind: str, columns: int) -> None:
    """Every 4-bit cell is cut where the reference cuts it (or as well), level after level."""
    weights, sensitivity = rows_of(kind, columns, 3)
    bits = (4, 5, 6, 7, 8)
    solution = solve(weights, sensitivity, bits)
    for row in range(len(weights)):
        points = reference.Points.of(weights[row], sensitivity_row(sensitivity, row))
        code_of_point = np.zeros(len(points.value), np.uint8)
        code_of_point[points.index] = solution.codes[row]
        errors = points.errors()
        for level in bits[:-1]:
            cells, finer = code_of_point >> (8 - level), code_of_point >> (7 - level)
            for cell in np.unique(cells):
                (inside,) = np.nonzero(cells == cell)
                i, j = int(inside[0]), int(inside[-1]) + 1
                cut = i + int((finer[i:j] % 2 == 0).sum())
                best = reference.best_split(points, i, j)
                found, wanted = errors[i, cut] + errors[cut, j], errors[i, best] + errors[best, j]
                assert found <= wanted * (1 + 1e-6) + 1e-12 * errors[0, -1] + 1e-15


@pytest.mark.parametrize("kind", ["gaussian", "gaussian+", "heavy+"])
@pytest.mark.parametrize("seed_bits", [2, 3])
def test_upscale_has_the_errors_of_the_plain_pipeline(kind: str, seed_bits: int) -> None:
    """Same algorithm, other random numbers: mean errors over 96 rows agree within the noise of k-means++.

    One run of one row scatters by about 11 % (measured), so the difference of two means by 1.6 %; 4 of those.
    """
    weights, sensitivity = rows_of(kind, 352, 96)
    bits = (seed_bits, 4)
    solution = solve(weights, sensitivity, bits, "upscale")
    rng = np.random.default_rng(0)
    plain = dict.fromkeys(bits, 0.0)
    for row in range(len(weights)):
        s = sensitivity_row(sensitivity, row)
        codes = reference.upscale(reference.Points.of(weights[row], s), bits, rng)
        for b in bits:
            table = reference.codebook(weights[row], s, codes, b, 4)
            plain[b] += error(weights[row], s, table[codes >> (4 - b)]) / len(weights)
    native = {b: error(weights, sensitivity, solution.values_at(b)) / len(weights) for b in bits}
    noise = 0.15 if kind == "heavy+" else 0.065
    for b in bits:
        assert abs(native[b] / plain[b] - 1) < noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("threads", [1, 3])
def test_uniform_matches_the_reference(kind: str, columns: int, threads: int) -> None:
    weights, sensitivity = rows_of(kind, columns, 3)
    bits = tuple(range(2, 9))
    solution = solve(weights, sensitivity, bits, "uniform", threads=threads)
    for row in range(len(weights)):
        codes, lines = reference.uniform(weights[row], sensitivity_row(sensitivity, row), bits)
        assert (solution.codes[row] == codes).all()
        for b in bits:
            reach = max(float(np.abs(weights[row]).max()), 1e-6)
            np.testing.assert_allclose(solution.codebook[f"affine{b}"][row], lines[b], rtol=1e-5, atol=1e-6 * reach)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", [(5, 6, 7, 8), (8,), (5, 7), (2, 6)], ids=str)
def test_cells_match_the_reference(kind: str, columns: int, bits: tuple[int, ...]) -> None:
    """The same cells, and the same errors but where a comparison falls either way by rounding.

    Both are double; on these rows such ties move an error by less than 2 % of itself (most are equal to 1e-9).
    """
    weights, sensitivity = rows_of(kind, columns, 3)
    planes, upper = max(bits), [b for b in bits if b > 4]
    given = solve(weights, sensitivity, sorted({*(b for b in bits if b < 4), 4})).codes
    found = [Grid(np.empty((3, 16), np.float32), np.empty((3, 16), np.uint8), np.empty(3, np.float32)) for _ in upper]
    parts = [[getattr(grid, name) for grid in found] for name in ("centres", "ladders", "steps")]
    codes = given.copy()
    _native.solve_cells(weights, sensitivity, upper, codes, *parts, 2)
    assert (codes >> (planes - 4) == given).all()
    for row in range(len(weights)):
        s = sensitivity_row(sensitivity, row)
        plain_codes, books = reference_cells.cells(weights[row], s, given[row], upper)
        assert (plain_codes >> (planes - 4) == given[row]).all()
        reach = float(np.abs(weights[row]).max())
        for b, grid in zip(upper, found, strict=True):
            centres, ladders, step = books[b]
            plain = Grid(centres[None].astype(np.float32), ladders[None].astype(np.uint8), np.array([step], np.float32))
            wanted, got = (
                error(weights[row], s, one.values(b)[i][c >> (planes - b)])
                for one, i, c in ((plain, 0, plain_codes), (grid, row, codes[row]))
            )
            # Centres are float32: a rounding of 2^-24 of the reach per weight is not the solver's error.
            rounding = columns * (2.0**-24 * reach) ** 2 * (1.0 if s is None else float(s.max()))
            assert abs(got - wanted) <= 0.02 * wanted + rounding
