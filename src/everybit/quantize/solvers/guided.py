"""Solver `guided`: nested codes for all precisions at once, under a Hessian shared by groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.errors import ShapeError, SourceError
from everybit.formats import Compact
from everybit.formats.grid import CELL_BITS, CELLS
from everybit.quantize.solvers.solve import Solution, Values, solve

# What a relative error counts at each precision. Errors fall fourfold with each bit, so squared ones are weighed by
# 4^bits on top. Measured in docs/log.md, 2026-11-26: equal weights cost 2 bits a third of their gain, none above 4
# bits make 6 to 8 bits worse than the original's.
IMPORTANCE = {2: 1.0, 3: 1.0, 4: 1.0, 5: 0.1, 6: 0.1, 7: 0.02, 8: 0.05}
ROUNDS, SWEEPS = 6, 3
DAMPING = 0.01  # of the mean diagonal, added to it


def solve_guided(
    weights: Values,
    hessian: Values,
    sensitivity: Values | None,
    bits: Sequence[int],
    threads: int = 0,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
) -> Solution:
    """Quantize one matrix to all the precisions in `bits`, in codebook kind `compact`.

    Minimizes, per row, the sum over precisions of importance * 4^bits * e' H e, e = weights - values: coordinate
    descent over codes and least squares over codebooks, from the solver tree's result (native/src/guided.cc). Rows that
    tree represents without error keep its result; so do all rows where the Hessian is zero (no token reached them).

    Shapes:  weights f32[N, K], hessian f32[groups, K, K] (row r has group r * groups // N), sensitivity f32[N, K] or
             None, which the start minimizes -> as Solution
    Needs:   finite weights; symmetric, positive semi-definite Hessians; 1 <= groups <= N
    Cost:    per row and round about K^2 additions, and 5K more per weight that moves. Threads: any count, same result
    Raises:  as solve; ShapeError, SourceError for a Hessian of another shape or with values that are not finite
    Source:  GuidedQuant and LNQ (Kim et al., 2505.07004), sections 3 and 4; one nested code for all precisions is ours
    """
    start = solve(weights, sensitivity, bits, "tree", threads=threads, codebook="compact")
    weights = np.ascontiguousarray(weights)
    rows, columns = weights.shape
    if hessian.ndim != 3 or hessian.shape[1:] != (columns, columns) or not 1 <= len(hessian) <= max(rows, 1):
        raise ShapeError(
            f"a Hessian of shape {list(hessian.shape)} arrived for weights {list(weights.shape)}, expected "
            f"[groups, {columns}, {columns}] with 1 to {rows} groups: measure it for this weight"
        )
    diagonal = np.einsum("gkk->gk", hessian)
    mean = diagonal.mean(axis=1)
    # A symmetric positive matrix is bounded by its diagonal, but only the sum tells of a NaN elsewhere.
    if not np.isfinite(hessian.sum(axis=(1, 2), dtype=np.float64)).all() or (diagonal < 0).any():
        raise SourceError("the Hessian has values that are not finite or a negative diagonal: calibrate again")
    if not (mean > 0).any():
        return start
    damped: Values = (hessian / np.where(mean > 0, mean, 1)[:, None, None]).astype(np.float32)
    damped[:, np.arange(columns), np.arange(columns)] += np.float32(DAMPING)

    codes = start.codes.copy()
    low = [b for b in start.bits if b <= CELL_BITS]
    upper = start.bits[-1] > CELL_BITS
    tables = {b: np.empty((rows, 1 << b), np.int8) for b in low}
    scale = np.empty(rows, np.float32)
    centres = np.empty((rows, CELLS), np.int8) if upper else None
    ladders = np.empty((rows, CELLS), np.uint8) if upper else None
    steps = np.empty(rows, np.float32) if upper else None
    importance = [IMPORTANCE[b] * 4.0 ** (b - 2) for b in start.bits]
    _native.solve_guided(
        weights, damped, list(start.bits), importance, rounds, sweeps, codes, list(tables.values()), scale, centres,
        ladders, steps, threads,
    )  # fmt: skip
    found: dict[str, NDArray[Any]] = Compact.pack(scale, tables, centres, ladders, steps)
    group_of = np.arange(rows) * len(hessian) // rows
    exact = (start.values_at(start.bits[0]) == weights).all(axis=1)
    kept = exact | ~(mean > 0)[group_of]
    codes[kept] = start.codes[kept]
    for suffix, array in found.items():
        array[kept] = start.codebook[suffix][kept]
    return Solution(codes, start.bits, found, "compact")
