"""GPTQ: columns are rounded one after another, and what each loses is made up by those still to come.

Source: Frantar et al., GPTQ (2210.17323), section 3: step 1 (one order for all rows; here, as in the authors' code, by
falling diagonal: "act-order"), step 2 (lazy batches of 128 columns), step 3 (Cholesky of the inverse, 1 % damping).
Written from the paper's algorithm 1. The grid is `rtn`'s, so that with a diagonal Hessian the two are the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everybit.quantize.peers.method import F32, Statistics, UnfitError, groups_of
from everybit.quantize.peers.rtn import bits_per_weight, grid, round_to

BLOCK = 128
DAMPING = 0.01


def gptq(
    weights: F32, bits: int, statistics: Statistics, *, group: int = 0, act_order: bool = True
) -> tuple[F32, float]:
    """Minimizes, column by column, the squared error of the layer's output on the calibration tokens.

    With `act_order` the grids of groups are those of the float weights ("static groups"), and no order need be
    stored. Without it a group's grid is made when the sweep reaches it.

    Shapes: f32[N, K] -> f32[N, K]. Bits per weight as `rtn`
    Raises: UnfitError (no Hessian, or one that damping does not make positive definite)
    """
    columns = weights.shape[1]
    upper, order = _factor(statistics.hessian(), act_order)
    left = np.ascontiguousarray(weights.T[order])  # [K, N]: a column of the paper is a row here. What is to be rounded
    out = np.empty_like(left)
    step = group or columns
    grids = {i: grid(weights[:, part], bits) for i, part in enumerate(groups_of(columns, group))} if act_order else {}
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = np.zeros((end - start, left.shape[1]), np.float32)
        for i in range(start, end):
            own = int(order[i]) // step
            if own not in grids:  # the group's weights, with the errors of this lazy batch made up for beyond it too
                stop = min(i + step, columns)
                beyond = left[end:stop] - upper[start:end, end:stop].T @ errors
                grids[own] = grid(np.concatenate([left[i : min(stop, end)], beyond]).T, bits)
            scale, offset = grids[own]
            out[i] = round_to(left[i], scale[:, 0], offset[:, 0], bits)
            errors[i - start] = (left[i] - out[i]) / upper[i, i]
            left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        left[end:] -= upper[start:end, end:].T @ errors
    back = np.empty_like(out)
    back[order] = out
    return np.ascontiguousarray(back.T), bits_per_weight(columns, bits, group)


def _factor(hessian: F32, act_order: bool) -> tuple[F32, NDArray[np.intp]]:
    """The upper Cholesky factor of the damped inverse, in the order of the sweep, and that order."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    damped = damped[np.ix_(order, order)]
    damped[np.diag_indices_from(damped)] += max(DAMPING * diagonal.mean(), np.finfo(np.float32).tiny)
    try:
        return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32), order
    except np.linalg.LinAlgError as error:
        raise UnfitError(f"its Hessian is not positive definite ({error}): give more calibration text") from None
