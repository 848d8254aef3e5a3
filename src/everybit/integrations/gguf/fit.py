"""The scale (and offset) of each small block of weights that leaves the least weighted squared error.

Codes are fixed, then scale and offset by least squares, for a row of starting scales; the best goes on to be refined
in the same way. A weight counts by its size, as llama.cpp counts it without an importance matrix: an overlay keeps no
statistics of its calibration.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
REFINEMENTS = 2  # rounds of codes and least squares after the search
_TINY = np.float32(1e-30)  # a sum of squares below this is zero


def fit_scale(blocks: F32, bits: int) -> F32:
    """Scales for `scale * code`, with code in -2^(bits-1) ... 2^(bits-1) - 1; the largest weight takes about the first.

    Shapes: f32[M, S] -> f32[M]
    """
    half = 1 << (bits - 1)
    importance = blocks * blocks
    heavy = importance * blocks
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    best = np.zeros(len(blocks), np.float32)
    least = np.zeros(len(blocks), np.float32)  # the error, less what it is at scale 0

    def attempt(scale: F32) -> None:
        codes = np.clip(np.rint(blocks * _inverse(scale)), -half, half - 1)
        products = np.einsum("ms,ms->m", heavy, codes)
        squares = np.maximum(np.einsum("ms,ms,ms->m", importance, codes, codes), _TINY)
        gain = -products * (products / squares)
        better = gain < least
        least[better], best[better] = gain[better], (products / squares)[better]

    for end in np.linspace(-half - 0.9, -half + 0.9, 19, dtype=np.float32):
        attempt(largest / end)
    for _ in range(REFINEMENTS):
        attempt(best[:, None])
    return best


def fit_offset(blocks: F32, bits: int, weights: F32) -> tuple[F32, F32]:
    """Scales and offsets, neither negative, for `scale * code - offset`, with code in 0 ... 2^bits - 1.

    Shapes: f32[M, S] -> two f32[M]
    """
    top = (1 << bits) - 1
    heavy = weights * blocks
    total, first = weights.sum(1), heavy.sum(1)
    second = np.einsum("ms,ms->m", heavy, blocks)
    low = np.minimum(blocks.min(1), 0)
    reach = np.maximum(blocks.max(1), 0) - low
    best, best_offset = reach / top, -low
    least = np.full(len(blocks), np.inf, np.float32)

    def attempt(scale: F32, offset: F32) -> None:
        codes = np.clip(np.rint((blocks + offset[:, None]) * _inverse(scale[:, None])), 0, top)
        weighted = weights * codes
        c = weighted.sum(1)
        cc = np.einsum("ms,ms->m", weighted, codes)
        cx = np.einsum("ms,ms->m", heavy, codes)
        spread = total * cc - c * c
        plain = cx / np.maximum(cc, _TINY)  # the best scale without an offset
        solvable = spread > total * cc * 1e-6
        spread = np.where(solvable, spread, 1)
        scale, offset = (total * cx - c * first) / spread, (c * cx - cc * first) / spread
        usable = solvable & (offset > 0) & (scale > 0)
        flat = ~solvable & (first < 0)  # one code for all
        scale = np.where(usable, scale, np.where(flat, 0, np.maximum(plain, 0)))
        offset = np.where(usable, offset, np.where(flat, -first / total, 0))
        error = second + scale * (scale * cc - 2 * cx - 2 * offset * c) + offset * (offset * total + 2 * first)
        better = error < least
        least[better], best[better], best_offset[better] = error[better], scale[better], offset[better]

    for nudge in np.linspace(-1, 1, 21, dtype=np.float32):
        attempt(reach / (top + nudge), -low)
    for _ in range(REFINEMENTS):
        attempt(best.copy(), best_offset.copy())
    return best, best_offset


def _inverse(scale: F32) -> F32:
    """1 / scale, and 0 for 0."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > _TINY)
