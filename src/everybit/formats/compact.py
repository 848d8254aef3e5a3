"""Codebook kind `compact`: one scale for each row, int8 numbers for everything else, 58 bytes a row for 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import ShapeError
from everybit.formats.codebook import F32, Arrays, Codebook, Part, require_widths
from everybit.formats.grid import CELL_BITS, LADDERS, Grid, pack_nibbles, unpack_nibbles
from everybit.formats.tensors import from_bf16, to_bf16

I8 = NDArray[np.int8]
MOST = 127  # of the numbers, either sign: -128 would have no opposite
_CENTRES, _LADDERS, _STEP = slice(0, 16), slice(16, 24), slice(24, 26)  # bytes of a record


class Compact(Codebook):
    """Up to 4 bits value = scale * lut[code]; above, a `Grid` whose centres are scale * centre, rounded to f32.

    The grid is one record of 26 bytes a row for all precisions above 4 bits: 16 int8 centres, 16 nibbles `ladder - 1`
    (low first), a BF16 step, little-endian.
    """

    kind = "compact"
    since = 3

    def parts(self, bits: int) -> tuple[Part, ...]:
        scale = Part("scale", 1, ("F32",))
        if bits > CELL_BITS:
            return (scale, Part("cells", _STEP.stop, ("U8",)))
        return (scale, Part(f"lut{bits}", 1 << bits, ("I8",)))

    def expand(self, arrays: Arrays, bits: int) -> F32:
        grid = self.grid(arrays, bits)
        if grid is not None:
            return grid.values(bits)
        scale, lut = self.rows(arrays, bits)
        require_widths(scale[:, 0], "scale")
        return _times(scale, lut)

    def grid(self, arrays: Arrays, bits: int) -> Grid | None:
        if bits <= CELL_BITS:
            return None
        scale, records = self.rows(arrays, bits)
        require_widths(scale[:, 0], "scale")
        centres = np.ascontiguousarray(records[:, _CENTRES]).view(np.int8)
        ladders = unpack_nibbles(records[:, _LADDERS])
        steps = from_bf16(np.ascontiguousarray(records[:, _STEP]).view("<u2")[:, 0])
        require_widths(steps, "step")
        return Grid(_times(scale, centres), ladders, steps)

    def unit(self, arrays: Arrays, bits: int) -> F32 | None:
        return None if bits > CELL_BITS else np.ascontiguousarray(self.rows(arrays, bits)[0][:, 0])

    @staticmethod
    def pack(
        scale: F32,
        luts: Mapping[int, I8],
        centres: I8 | None = None,
        ladders: NDArray[np.uint8] | None = None,
        step: F32 | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The arrays to store, by suffix. The grid is left out where no precision is above 4 bits.

        The step is rounded to BF16, as `round_step` does it; everything else is stored as it comes.
        Shapes: scale f32[N], luts bits -> i8[N, 2^bits], centres i8[N, 16], ladders u8[N, 16], step f32[N]
        Needs:  scale and step finite, 0 or more; ladders within 1..8
        Raises: ShapeError, FormatError
        """
        rows = len(scale)
        require_widths(scale, "scale")
        found: dict[str, NDArray[Any]] = {"scale": np.ascontiguousarray(scale, np.float32)[:, None]}
        for bits, lut in luts.items():
            found[f"lut{bits}"] = np.ascontiguousarray(lut)
        if centres is not None and ladders is not None and step is not None:
            require_widths(step, "step")
            if centres.dtype != np.int8 or not ((ladders >= 1) & (ladders <= LADDERS)).all():
                raise ShapeError(
                    f"{centres.dtype} centres and ladders of {ladders.min(initial=1)} to {ladders.max(initial=1)} "
                    f"arrived, expected int8 and 1 to {LADDERS}: round them first"
                )
            records = np.empty((rows, _STEP.stop), np.uint8)
            records[:, _CENTRES] = np.ascontiguousarray(centres).view(np.uint8)
            records[:, _LADDERS] = pack_nibbles(ladders)
            records[:, _STEP] = to_bf16(step)[:, None].view(np.uint8)
            found["cells"] = records
        return found


def row_scale(most: F32) -> F32:
    """The scale of rows from the largest magnitude among the numbers that it must reach.

    So that this number, either sign, comes back bit for bit and none clips: scale * q == most in float32 for the
    largest integer q up to 127 for which there is such a scale (64 always works but for denormal scales).
    Shapes: f32[N] -> f32[N]
    """
    scale = np.zeros_like(most)
    left = np.flatnonzero(most)
    for q in np.arange(MOST, MOST // 2, -1, dtype=np.float32):
        near = most[left] / q
        for candidate in (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0))):
            with np.errstate(over="ignore"):
                hit = candidate * q == most[left]
            scale[left[hit]] = candidate[hit]
        left = left[scale[left] == 0]
    up = most[left] / np.float32(MOST)  # denormal: not exact, at least large enough
    scale[left] = np.where(up * np.float32(MOST) < most[left], np.nextafter(up, np.float32(np.inf)), up)
    return scale


def to_int8(values: F32, scale: F32) -> I8:
    """The nearest multiples of `scale`. Shapes: f32[N, M], f32[N] -> i8[N, M]"""
    safe = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)[:, None]
    return np.clip(np.rint(values / safe), -MOST, MOST).astype(np.int8)


def round_step(step: F32) -> F32:
    """The step as it is stored. Shapes: f32[N] -> f32[N]"""
    return from_bf16(to_bf16(step))


def _times(scale: F32, numbers: I8) -> F32:
    with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses what is not finite
        return np.asarray(scale * numbers.astype(np.float32), dtype=np.float32)
