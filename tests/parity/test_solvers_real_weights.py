"""On GPT-2's attention matrices: upscale is the original, tree is near the best a nested code can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from everybit.quantize.solvers import reference, solve

NAMES = [f"layers.{layer}.{kind}_proj.weight" for layer in (0, 5, 11) for kind in "qkvo"]
ALL = tuple(range(2, 9))


@pytest.fixture(scope="module")
def matrices(shared_data: Path) -> dict[str, np.ndarray]:
    data = (shared_data / "weights" / "gpt2-124m-attention" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name in NAMES:
        begin, end = header[name]["data_offsets"]
        flat = np.frombuffer(data[8 + size + begin : 8 + size + end], np.float16)
        found[name] = flat.reshape(header[name]["shape"]).astype(np.float32)
    return found


def sensitivities(weights: np.ndarray, weighted: bool, seed: int) -> np.ndarray:
    if not weighted:
        return np.ones_like(weights)
    return np.random.default_rng(1000 + seed).exponential(size=weights.shape).astype(np.float32)


def error(weights: np.ndarray, sensitivity: np.ndarray, values: np.ndarray) -> float:
    return float((sensitivity * (weights.astype(np.float64) - values) ** 2).sum())


@pytest.mark.slow  # numba compiles the peer for some 20 s
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed_bits", [2, 3])
def test_upscale_is_the_original_in_distribution(
    matrices: dict[str, np.ndarray], weighted: bool, seed_bits: int
) -> None:
    """Mean errors within 0.5 % of the library's at every precision, plus three standard errors of the difference.

    k-means++ scatters by up to 10 % on rows with outliers; 3 rows of each matrix are run 64 times by both.
    """
    pytest.importorskip("flash1dkmeans", reason="flash1dkmeans is the peer; pip install everybit[dev]")
    from library_pipeline import library_pipeline

    bits = tuple(range(seed_bits, 9))
    for i, (name, matrix) in enumerate(matrices.items()):
        rows = [3, 300, 700]
        w = np.repeat(matrix[rows], 64, axis=0)
        s = np.repeat(sensitivities(matrix, weighted, i)[rows], 64, axis=0)
        codes, codebooks = library_pipeline(w, s, seed_bits, 8, 1000)
        ours = solve(w, s, bits, "upscale", seed=1)
        for b, table in zip(bits, codebooks, strict=True):
            library_values = np.take_along_axis(table, (codes >> (8 - b)).astype(np.intp), axis=1)
            per_row = [
                (s * (w.astype(np.float64) - v) ** 2).sum(axis=1).reshape(3, 64)
                for v in (library_values, ours.values_at(b))
            ]
            library, native = (x.mean() for x in per_row)
            noise = np.sqrt(sum(x.var(axis=1).sum() for x in per_row) / (9 * 64))
            assert native < 1.005 * library + 3 * noise, f"{name} at {b} bits: {native / library - 1:+.2%}"
            assert native > 0.97 * library - 3 * noise, f"{name} at {b} bits: {native / library - 1:+.2%}"


@pytest.mark.parametrize("weighted", [False, True])
def test_tree_is_near_the_optimum_at_two_three_and_four_bits(matrices: dict[str, np.ndarray], weighted: bool) -> None:
    """Excess over independent optimal k-means per precision, on 16 rows of each matrix.

    2 % at all three is out of reach of any nested code on most of these matrices: the exact joint program with
    this importance leaves a mean excess of 1.6 to 2.6 % (unit) and 2.2 to 3.3 % (weighted); docs/log.md.
    """
    excess = []
    for i, matrix in enumerate(matrices.values()):
        w, s = matrix[::48], sensitivities(matrix, weighted, i)[::48]
        solution = solve(w, s, ALL)
        best = dict.fromkeys((2, 3, 4), 0.0)
        for row in range(len(w)):
            for b, e in reference.optimal_errors(reference.Points.of(w[row], s[row]), (2, 3, 4)).items():
                best[b] += e
        excess.append([error(w, s, solution.values_at(b)) / best[b] - 1 for b in (2, 3, 4)])
    mean, worst = np.mean(excess, axis=0), np.max(excess, axis=0)
    assert (np.min(excess, axis=0) > -1e-6).all()
    assert (mean < (0.036 if weighted else 0.026)).all(), mean
    # One row with outliers can carry most of 16 rows' error; there the exact joint program leaves 9.8 % too.
    assert (worst < 0.11).all(), worst


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_tree_reaches_the_exact_joint_optimum(matrices: dict[str, np.ndarray], weighted: bool) -> None:
    importance = {2: 4.0**2, 3: 4.0**3, 4: 1.1 * 4.0**4}
    found = best = 0.0
    for i, matrix in enumerate(matrices.values()):
        w, s = matrix[5::400], sensitivities(matrix, weighted, i)[5::400]
        solution = solve(w, s, ALL)
        found += sum(scale * error(w, s, solution.values_at(b)) for b, scale in importance.items())
        for row in range(len(w)):
            best += reference.joint_objective(reference.Points.of(w[row], s[row]), importance)
    assert best * (1 - 1e-6) <= found <= best * 1.001


@pytest.mark.parametrize("weighted", [False, True])
def test_tree_beats_upscale_from_four_bits_up(matrices: dict[str, np.ndarray], weighted: bool) -> None:
    for i, (name, w) in enumerate(matrices.items()):
        s = sensitivities(w, weighted, i)
        tree, upscale = solve(w, s, ALL), solve(w, s, ALL[1:], "upscale")
        for b in range(3, 9):
            assert error(w, s, tree.values_at(b)) < error(w, s, upscale.values_at(b)), f"{name} at {b} bits"
