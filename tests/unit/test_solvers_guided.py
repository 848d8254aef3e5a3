"""What solver `guided` promises: never above the tree, far below under correlated inputs, exact rows kept, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everybit.errors import EverybitError, ShapeError, SourceError
from everybit.quantize.solvers import Solution, reference, solve
from everybit.quantize.solvers.guided import DAMPING, IMPORTANCE, solve_guided

ALL = (2, 3, 4, 5, 6, 7, 8)
BITS = [ALL, (2, 3, 4), (4,), (3, 6), (5, 7), (8,), (2, 8)]


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """x'x of inputs that share a few directions, as activations do. f32[1, K, K]"""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((4 * columns, columns))
    inputs += 3 * rng.standard_normal((4 * columns, 4)) @ rng.standard_normal((4, columns))
    hessian: np.ndarray = (inputs.T @ inputs / len(inputs)).astype(np.float32)[None]
    return hessian


def rows(kind: str, count: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(columns)
    weights = {
        "normal": rng.standard_normal((count, columns)),
        "heavy": rng.standard_t(3, (count, columns)),
        "levels": np.round(rng.standard_normal((count, columns)) * 3) / 3,
        "sparse": rng.standard_normal((count, columns)) * (rng.random((count, columns)) < 0.3),
    }[kind]
    return weights.astype(np.float32)


def losses(weights: np.ndarray, hessian: np.ndarray, solution: Solution, bits: int) -> np.ndarray:
    """e'He of every row under one Hessian, damped as the solver damps it."""
    h = hessian.astype(np.float64) / hessian.diagonal().mean() + DAMPING * np.eye(len(hessian))
    error = weights.astype(np.float64) - solution.values_at(bits)
    return np.einsum("rk,kl,rl->r", error, h, error)


def objective(weights: np.ndarray, hessian: np.ndarray, solution: Solution) -> np.ndarray:
    return sum(IMPORTANCE[b] * 4.0**b * losses(weights, hessian, solution, b) for b in solution.bits)


def start(weights: np.ndarray, bits: tuple[int, ...], sensitivity: np.ndarray | None = None) -> Solution:
    return solve(weights, sensitivity, bits, codebook="compact")


@pytest.mark.parametrize("kind", ["normal", "heavy", "levels", "sparse"])
@pytest.mark.parametrize("columns", [1, 2, 5, 20, 70, 200])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_no_row_is_worse_than_the_tree(kind: str, columns: int, bits: tuple[int, ...]) -> None:
    weights, hessian = rows(kind, 12, columns), correlated(columns)
    found = solve_guided(weights, hessian, None, bits)
    assert (found.kind, found.bits) == ("compact", bits)
    ours, tree = (objective(weights, hessian[0], s) for s in (found, start(weights, bits)))
    # Both sums of K^2 products are compared in float32 (2^-24 each): the looser bound of a random walk, K * 2^-24.
    assert (ours <= tree * (1 + columns * 2.0**-24)).all()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_a_diagonal_hessian_gives_the_weighted_optimum(kind: str) -> None:
    """Then rows are weighted k-means at three precisions, whose exact joint optimum is known.

    Above it lie the int8 tables, whose unit an outlier sets: 1.4 % measured.
    """
    weights, diagonal = rows(kind, 6, 150), np.random.default_rng(2).exponential(size=150).astype(np.float32)
    sensitivity = (diagonal / diagonal.mean() + np.float32(DAMPING)).astype(np.float32)
    everywhere = np.tile(sensitivity, (6, 1))
    found = solve_guided(weights, np.diag(diagonal)[None], everywhere, (2, 3, 4))
    ours = objective(weights, np.diag(diagonal), found)
    tree = objective(weights, np.diag(diagonal), start(weights, (2, 3, 4), everywhere))
    weigh = {b: IMPORTANCE[b] * 4.0**b for b in (2, 3, 4)}
    for r in range(6):
        best = reference.joint_objective(reference.Points.of(weights[r], sensitivity), weigh)
        assert best * (1 - 1e-6) <= ours[r] <= tree[r] * (1 + 1e-6)
        assert ours[r] <= best * 1.03


def test_correlated_inputs_are_made_use_of() -> None:
    weights, hessian = rows("normal", 16, 256), correlated(256)
    tree, ours = start(weights, ALL), solve_guided(weights, hessian, None, ALL)
    gain = {b: losses(weights, hessian[0], tree, b).sum() / losses(weights, hessian[0], ours, b).sum() for b in ALL}
    assert min(gain[2], gain[3], gain[4]) > 1.5, gain
    alone = solve_guided(weights, hessian, None, (3,))
    assert losses(weights, hessian[0], tree, 3).sum() > 2 * losses(weights, hessian[0], alone, 3).sum()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_seven_and_eight_bits_are_below_plain_rounding(kind: str) -> None:
    """Rounding to nearest on an even grid over the row's range, the least that anyone would do."""
    weights, hessian = rows(kind, 16, 256), correlated(256)
    found = solve_guided(weights, hessian, None, ALL)
    h = hessian[0].astype(np.float64) / hessian[0].diagonal().mean() + DAMPING * np.eye(256)
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    for b in (7, 8):
        step = (high - low) / (2**b - 1)
        error = weights - (low + np.rint((weights - low) / step) * step).astype(np.float64)
        assert losses(weights, hessian[0], found, b).sum() < np.einsum("rk,kl,rl->", error, h, error)


@pytest.mark.parametrize("bits", [ALL, (2,), (2, 8), (5, 8)], ids=str)
@pytest.mark.parametrize("value", [0.0421, 1.9999, 3.1e-5])
def test_three_symmetric_values_are_exact(bits: tuple[int, ...], value: float) -> None:
    rng = np.random.default_rng(1)
    weights = rows("normal", 6, 90)
    weights[::2] = rng.choice(np.array([-value, 0, value], np.float32), (3, 90))
    found, tree = solve_guided(weights, correlated(90), None, bits), start(weights, bits)
    for b in bits:
        np.testing.assert_array_equal(found.values_at(b)[::2], weights[::2])
    assert (found.codes[::2] == tree.codes[::2]).all()
    assert (found.codes[1::2] != tree.codes[1::2]).any()


def test_rows_whose_group_no_token_reached_keep_the_trees_result() -> None:
    weights = rows("normal", 8, 60)
    hessians = np.concatenate([correlated(60), np.zeros((1, 60, 60), np.float32)])
    sensitivity = np.random.default_rng(3).exponential(size=weights.shape).astype(np.float32)
    found, tree = solve_guided(weights, hessians, sensitivity, ALL), start(weights, ALL, sensitivity)
    assert (found.codes[4:] == tree.codes[4:]).all()
    for suffix, array in tree.codebook.items():
        np.testing.assert_array_equal(found.codebook[suffix][4:], array[4:])
    assert (found.codes[:4] != tree.codes[:4]).any(axis=1).all()
    nothing = solve_guided(weights, hessians[1:], sensitivity, ALL)
    assert (nothing.codes == tree.codes).all()


def test_the_hessians_unit_does_not_matter() -> None:
    weights, hessian = rows("normal", 4, 60), correlated(60)
    one, other = (solve_guided(weights, hessian * np.float32(2.0**e), None, (2, 3, 4)) for e in (0, -60))
    assert (one.codes == other.codes).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: h[0], ShapeError, r"a Hessian of shape \[60, 60\] arrived for weights \[4, 60\], expected \[groups"),
        (lambda h: h[:, :59], ShapeError, r"shape \[1, 59, 60\] arrived"),
        (lambda h: h[:0], ShapeError, r"shape \[0, 60, 60\] arrived .* with 1 to 4 groups"),
        (lambda h: np.repeat(h, 5, axis=0), ShapeError, r"shape \[5, 60, 60\] arrived .* with 1 to 4 groups"),
        (lambda h: with_value(h, 3, 7, np.nan), SourceError, "not finite or a negative diagonal: calibrate again"),
        (lambda h: with_value(h, 5, 5, np.inf), SourceError, "not finite or a negative diagonal: calibrate again"),
        (lambda h: with_value(h, 5, 6, -np.inf), SourceError, "not finite or a negative diagonal: calibrate again"),
        (lambda h: with_value(h, 9, 9, -1.0), SourceError, "not finite or a negative diagonal: calibrate again"),
    ],
)
def test_a_bad_hessian_is_refused_in_one_line(change: object, error: type[EverybitError], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        solve_guided(rows("normal", 4, 60), change(correlated(60)), None, (2, 3))  # type: ignore[operator]
    assert "\n" not in str(refused.value)


def with_value(hessian: np.ndarray, i: int, j: int, value: float) -> np.ndarray:
    changed = hessian.copy()
    changed[0, i, j] = changed[0, j, i] = value
    return changed


def test_a_matrix_without_rows_is_fine() -> None:
    for bits in ((2, 3), (2, 8), (5, 8)):
        assert solve_guided(np.zeros((0, 8), np.float32), correlated(8), None, bits).codes.shape == (0, 8)


@settings(max_examples=60)
@given(st.integers(1, 40), st.sampled_from(BITS), st.floats(-44, 37), st.floats(-30, 30), st.integers(0, 99))
def test_any_size_of_weights_is_solved(
    columns: int, bits: tuple[int, ...], size: float, unit: float, seed: int
) -> None:
    weights = (rows("heavy", 2, columns).clip(-9, 9) * 10.0**size).astype(np.float32)
    found = solve_guided(weights, correlated(columns, seed) * np.float32(10.0**unit), None, bits)
    assert int(found.codes.max()) < 2 ** bits[-1]
    reach = np.abs(weights).max(axis=1, keepdims=True).astype(np.float64)
    for b in bits:
        # A value may lie beyond the row's range (it makes up for errors elsewhere), not far beyond.
        assert (np.abs(found.values_at(b)) <= 3 * reach + 1e-43).all()


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_any_thread_count_gives_the_same_bytes(bits: tuple[int, ...]) -> None:
    weights, hessians = rows("heavy", 21, 48), np.concatenate([correlated(48, seed) for seed in range(4)])
    first = solve_guided(weights, hessians, None, bits, threads=1)
    for threads in (2, 3, 0):
        other = solve_guided(weights, hessians, None, bits, threads=threads)
        assert other.codes.tobytes() == first.codes.tobytes()
        assert all(other.codebook[k].tobytes() == a.tobytes() for k, a in first.codebook.items())
