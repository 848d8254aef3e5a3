"""Relative errors on Gaussian rows lie where theory puts them: bounded from below and from above.

Lloyd-Max errors of the unit Gaussian (Max 1960, table 1; 5 bits from Gersho and Gray 1992): the optimum of
endlessly many weights. With 4096 a row the optimum is a little lower, because cells fit the sample: 0.1, 0.6,
3.5 and 9 % lower at 2..5 bits. A solver below the band would not be computing what it claims.
"""

from __future__ import annotations

import numpy as np
import pytest

from everybit.quantize.solvers import solve

LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
ROWS, COLUMNS = 32, 4096


def relative_errors(solver: str, bits: tuple[int, ...]) -> dict[int, float]:
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    solution = solve(weights, None, bits, solver)
    power = (weights.astype(np.float64) ** 2).sum()
    return {b: float(((weights.astype(np.float64) - solution.values_at(b)) ** 2).sum() / power) for b in bits}


# Bands around what was measured, at least 5 standard errors wide (32 rows: 0.2 % of the error).
@pytest.mark.parametrize(
    ("solver", "bits", "bands"),
    [
        ("tree", (2, 3, 4, 5), {2: (1.000, 1.020), 3: (0.985, 1.010), 4: (0.962, 0.985), 5: (0.94, 0.98)}),
        ("tree", (2,), {2: (0.99, 1.005)}),
        ("tree", (3,), {3: (0.985, 1.000)}),
        ("tree", (4,), {4: (0.955, 0.975)}),
        ("tree", (5,), {5: (0.89, 0.92)}),
        ("upscale", (2, 3, 4, 5), {2: (0.99, 1.005), 3: (0.995, 1.02), 4: (0.995, 1.03), 5: (0.98, 1.02)}),
        ("upscale", (3, 4, 5), {3: (0.985, 1.01), 4: (0.98, 1.015), 5: (0.96, 1.0)}),
        # An even grid over the range of 4096 Gaussians (about +-3.5): cell^2 / 12 = (7 / 2^b)^2 / 12 = 1.68 times
        # the optimum at 4 bits; more at 2 and 3 bits, where the cells' edges are far from the nearest level.
        ("uniform", (2, 3, 4, 5), {2: (1.6, 2.0), 3: (1.6, 2.0), 4: (1.6, 1.9), 5: (1.5, 1.8)}),
    ],
)
def test_error_lies_in_its_band(solver: str, bits: tuple[int, ...], bands: dict[int, tuple[float, float]]) -> None:
    for b, error in relative_errors(solver, bits).items():
        low, high = bands[b]
        assert low <= error / LLOYD_MAX[b] <= high, f"{b} bits: {error / LLOYD_MAX[b]:.4f} of Lloyd-Max"


def test_tree_beats_upscale_from_four_bits_up() -> None:
    bits = tuple(range(2, 9))
    tree, upscale = relative_errors("tree", bits), relative_errors("upscale", bits)
    assert all(tree[b] < upscale[b] for b in range(3, 9))
