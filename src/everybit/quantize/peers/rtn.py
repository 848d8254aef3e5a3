"""Round to nearest: an even grid from the least to the greatest weight of a row or group.

Source: the baseline of GPTQ (2210.17323), section 4; scale and offset are two float16 numbers a group here.
"""

from __future__ import annotations

import numpy as np

from everybit.quantize.peers.method import F32, SCALE_BITS, Statistics, groups_of, half


def rtn(weights: F32, bits: int, statistics: Statistics, *, group: int = 0) -> tuple[F32, float]:
    """value = scale * code + offset, code of `bits` bits, per row or per `group` columns of one.

    Shapes: f32[N, K] -> f32[N, K]. Bits per weight: bits + 32 * ceil(K / group) / K
    Raises: UnfitError when a scale overflows float16
    """
    out = np.empty_like(weights)
    for columns in groups_of(weights.shape[1], group):
        part = weights[:, columns]
        out[:, columns] = round_to(part, *grid(part, bits), bits)
    return out, bits_per_weight(weights.shape[1], bits, group)


def grid(part: F32, bits: int) -> tuple[F32, F32]:
    """Scale and offset of the grid from min to max, as float16 stores them. Shapes: f32[N, G] -> f32[N, 1] each"""
    low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
    return half((high - low) / ((1 << bits) - 1), "scales"), half(low, "offsets")


def round_to(part: F32, scale: F32, offset: F32, bits: int) -> F32:
    """The nearest point of the grid; a scale of zero has one point."""
    steps = np.where(scale > 0, (part - offset) / np.where(scale > 0, scale, 1), 0)
    codes = np.clip(np.rint(steps), 0, (1 << bits) - 1)
    return np.asarray(codes * scale + offset, np.float32)


def bits_per_weight(columns: int, bits: int, group: int, numbers: int = 2) -> float:
    """Codes and `numbers` float16 per group."""
    return bits + numbers * SCALE_BITS * len(groups_of(columns, group)) / columns
