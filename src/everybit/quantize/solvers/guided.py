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
IMPORTANCE = {2: 1.25, 3: 1.1, 4: 1.0, 5: 0.15, 6: 0.1, 7: 0.05, 8: 0.1}
ROUNDS, SWEEPS = 4, 2
DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK_ROWS = 512  # judged together


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
    tree represents without error keep its result; so do rows where that sum is no lower than tree's (few weights or few
    values), and all rows where the Hessian is zero (no token reached them).

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
    mean = diagonal.mean(axis=1, dtype=np.float64)
    # A symmetric positive matrix is bounded by its diagonal, but only the sum tells of a NaN elsewhere.
    if not np.isfinite(hessian.sum(axis=(1, 2), dtype=np.float64)).all() or (diagonal < 0).any():
        raise SourceError("the Hessian has values that are not finite or a negative diagonal: calibrate again")
    if rows == 0 or not (mean > 0).any():
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
    solution = Solution(codes, start.bits, found, "compact")
    group_of = np.arange(rows) * len(hessian) // rows
    kept = (start.values_at(start.bits[0]) == weights).all(axis=1) | ~(mean > 0)[group_of]
    for group, matrix in enumerate(damped):
        (left,) = np.nonzero(~kept & (group_of == group))
        for begin in range(0, len(left), BLOCK_ROWS):
            part = left[begin : begin + BLOCK_ROWS]
            before, after = (_objective(weights, matrix, one, importance, part) for one in (start, solution))
            kept[part] = ~(after < before)
    codes[kept] = start.codes[kept]
    for suffix, array in found.items():
        array[kept] = start.codebook[suffix][kept]
    return solution


def _objective(
    weights: Values, hessian: Values, solution: Solution, importance: Sequence[float], rows: NDArray[np.intp]
) -> NDArray[np.float64]:
    """What is minimized, for some rows that share a Hessian."""
    part = {suffix: array[rows] for suffix, array in solution.codebook.items()}
    one = Solution(solution.codes[rows], solution.bits, part, solution.kind)
    total = np.zeros(len(rows))
    for b, weight in zip(solution.bits, importance, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # then it is not lower
            error = weights[rows] - one.values_at(b)
            total += weight * np.einsum("rk,rk->r", error @ hessian, error, dtype=np.float64)
    return total
