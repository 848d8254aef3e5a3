"""Weights on a uniform integer grid, one scale and one whole zero point for each group of columns of a row.

    value = scale * (code - zero), code and zero within 0 .. 2^bits - 1

which is what compressed-tensors' `pack-quantized` stores. In a symmetric one every zero point is half of 2^bits, and
not stored. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everybit.formats.tensors import TensorSpec, from_bf16, to_bf16

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
# Of the range from the least to the greatest weight; below it clips. Few codes gain from clipping outliers.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
WHOLE = 1e-4  # steps by which a grid may miss whole codes: offset, product and sum of 255 steps round by 1.5e-5 each
CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Grouped:
    """Shapes: codes u8[N, K], scale f32[N, G], zero u8[N, G]; G groups of K/G neighbouring columns"""

    codes: U8
    scale: F32
    zero: U8

    def values(self) -> F32:
        """Shapes: -> f32[N, K]"""
        rows, groups = self.scale.shape
        steps = self.codes.reshape(rows, groups, -1).astype(np.float32) - self.zero[..., None]
        return (steps * self.scale[..., None]).reshape(self.codes.shape)


def whole_grid(table: F32) -> tuple[F32, U8] | None:
    """The scale and the zero point of every row, where the table of each is such a grid; else None.

    Shapes: table f32[N, 2^bits] -> f32[N, 1], u8[N, 1]
    """
    top = table.shape[1] - 1
    values = table.astype(np.float64)
    step = (values[:, -1:] - values[:, :1]) / top
    unit = np.where(step > 0, step, 1)
    zero = np.rint(-values[:, :1] / unit)
    grid = np.where(step > 0, np.arange(top + 1) - zero, 0)
    if (step < 0).any() or (zero < 0).any() or (zero > top).any() or (np.abs(values / unit - grid) > WHOLE).any():
        return None
    return step.astype(np.float32), zero.astype(np.uint8)


def spread(grid: tuple[F32, U8], codes: U8, group_size: int, dtype: str) -> Grouped:
    """Codes on a grid of whole rows, with its scales, as `dtype` stores them, once for each group.

    Shapes: codes u8[N, K], K a multiple of group_size
    """
    groups = codes.shape[1] // group_size
    return Grouped(codes, np.repeat(stored(grid[0], dtype), groups, 1), np.repeat(grid[1], groups, 1))


def fit_groups(weights: F32, bits: int, group_size: int, dtype: str, symmetric: bool = False) -> Grouped:
    """The grid of each group with the least squared error among several ranges, each with its least-squares scale.

    `dtype` is that in which scales will be stored: codes are chosen for the rounded scale.
    Shapes: weights f32[N, K], K a multiple of group_size
    Cost:   some 2 million weights a second on one core; memory of one chunk of rows beside the result
    """
    rows, columns = weights.shape
    grouped = weights.reshape(rows, -1, group_size)
    found = Grouped(
        np.empty((rows, columns), np.uint8),
        np.empty(grouped.shape[:2], np.float32),
        np.empty(grouped.shape[:2], np.uint8),
    )
    for part in _chunks(rows, columns):
        codes, found.scale[part], found.zero[part] = _fit(grouped[part], bits, dtype, symmetric)
        found.codes[part] = codes.reshape(-1, columns)
    return found


def _fit(weights: F32, bits: int, dtype: str, symmetric: bool) -> tuple[U8, F32, U8]:
    """Shapes: weights f32[R, G, g] -> u8[R, G, g], f32[R, G], u8[R, G]"""
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(weights.min(axis=2), 0), np.maximum(weights.max(axis=2), 0)
    if symmetric:
        low, high = np.minimum(low, -high), np.maximum(-low, high)
    best = np.full(low.shape, np.inf, np.float32)
    codes, scales, zeros = (np.zeros(s, t) for s, t in ((weights.shape, "u1"), (low.shape, "f4"), (low.shape, "u1")))
    for shrink in SHRINKS:
        scale = (high - low) * np.float32(shrink) / top
        zero = np.clip(np.rint(-low * np.float32(shrink) / _positive(scale)), 0, top)
        if symmetric:
            zero = np.full_like(scale, 1 << (bits - 1))
        steps = _steps(weights, scale, zero, top)
        squares = np.einsum("rgk,rgk->rg", steps, steps)
        scale = stored(np.einsum("rgk,rgk->rg", weights, steps) / _positive(squares), dtype)
        steps = _steps(weights, scale, zero, top)
        rest = weights - steps * scale[..., None]
        error = np.einsum("rgk,rgk->rg", rest, rest)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
        codes[better] = (steps + zero[..., None])[better]
    return codes, scales, zeros


def _steps(weights: F32, scale: F32, zero: F32, top: np.float32) -> F32:
    steps: F32 = np.rint(weights / _positive(scale)[..., None])
    return np.clip(steps, -zero[..., None], (top - zero)[..., None])


def _positive(numbers: F32) -> F32:
    positive: F32 = np.where(numbers > 0, numbers, np.float32(1))
    return positive


def stored(scale: F32, dtype: str) -> F32:
    """Scales as `dtype` (F32, F16 or BF16) holds them."""
    if dtype == "BF16":
        return from_bf16(to_bf16(scale))
    with np.errstate(over="ignore"):
        return scale.astype(TensorSpec(dtype, ()).numpy).astype(np.float32)


def pack_int32(codes: U8, bits: int) -> NDArray[np.int32]:
    """Codes as one stream of bits a row, the low bit first, in 32-bit words. Shapes: [N, K] -> [N, ceil(K * bits / 32)]

    Source: compressed-tensors 0.20, `pack_to_int32`
    """
    rows, columns = codes.shape
    packed = np.zeros((rows, -(-columns * bits // 32) * 4), np.uint8)
    for part in _chunks(rows, columns):
        stream = np.unpackbits(codes[part, :, None], axis=2, count=bits, bitorder="little")
        bytes_ = np.packbits(stream.reshape(len(stream), -1), axis=1, bitorder="little")
        packed[part, : bytes_.shape[1]] = bytes_
    return packed.view("<i4")


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(CHUNK_WEIGHTS // columns, 1)
    return (slice(begin, begin + step) for begin in range(0, rows, step))
