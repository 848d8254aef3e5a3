"""HQQ: half-quadratic quantization, which moves the zero points of a min-max grid and needs no data.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023,
mobiusml.github.io/hqq_blog), "Half-Quadratic solver": minimize ||W - Q(W)||_p with p < 1 by splitting, for the zero
points alone. Errors are measured in steps of the grid here, so that the threshold means the same for every layer.
"""

from __future__ import annotations

import numpy as np

from everybit.quantize.peers.method import F32, Statistics, groups_of, half
from everybit.quantize.peers.rtn import bits_per_weight

GROUP = 64
P, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20  # the authors' defaults


def hqq(weights: F32, bits: int, statistics: Statistics, *, group: int = GROUP) -> tuple[F32, float]:
    """value = scale * (code - zero), scale and zero float16 per `group` columns of a row.

    Shapes: f32[N, K] -> f32[N, K]. Bits per weight: bits + 32 * ceil(K / group) / K
    Raises: UnfitError when a scale overflows float16
    """
    out = np.empty_like(weights)
    for columns in groups_of(weights.shape[1], group):
        out[:, columns] = _group(weights[:, columns], bits)
    return out, bits_per_weight(weights.shape[1], bits, group)


def _group(part: F32, bits: int) -> F32:
    low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
    scale = half((high - low) / ((1 << bits) - 1), "scales")
    scale = np.where(scale > 0, scale, 1).astype(np.float32)  # all weights equal, or too near to tell: one value
    steps = part / scale
    zero = -low / scale
    best, least = zero, np.full_like(zero, np.inf)
    beta = BETA
    for _ in range(ROUNDS):
        codes = _codes(steps, zero, bits)
        error = steps - (codes - zero)
        cost = (np.abs(error) ** P).mean(axis=1, keepdims=True)
        best, least = np.where(cost < least, zero, best), np.minimum(cost, least)
        with np.errstate(divide="ignore"):
            sparse = np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** (P - 1) / beta, 0)
        zero = (codes - (steps - sparse)).mean(axis=1, keepdims=True)
        beta *= GROWTH
    stored = half(best, "zero points")
    return np.asarray((_codes(steps, stored, bits) - stored) * scale, np.float32)


def _codes(steps: F32, zero: F32, bits: int) -> F32:
    return np.asarray(np.clip(np.rint(steps + zero), 0, (1 << bits) - 1), np.float32)
