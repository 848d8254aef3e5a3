"""What turns a b-bit code into a value: one class per codebook kind, all behind the interface of codebook.py.

    table    value = lut[code]                free centroids, 2^b a row
    affine   value = offset + scale * code    plane-linear: two numbers a row
    cells    a table up to 4 bits; above, 16 cells a row with an even grid in each: 44 bytes for each precision
    compact  the same two in int8 beside a scale for each row; one grid for all precisions above 4 bits (compact.py)

A plane-linear codebook can also be read plane by plane, value = constant + sum_i alpha_i * (+-1), which is what the
multiply-free lookup kernels need. To add a kind: subclass `Codebook`, list it in `CODEBOOKS`, describe it in
docs/spec.md.
"""

from __future__ import annotations

import numpy as np

from everybit.formats.codebook import F32, Arrays, Codebook, Part, require_widths
from everybit.formats.compact import Compact
from everybit.formats.grid import CELL_BITS, Grid, unpack_nibbles


class Table(Codebook):
    """Free centroids: value = lut[code]."""

    kind = "table"

    def parts(self, bits: int) -> tuple[Part, ...]:
        return (Part(f"lut{bits}", 1 << bits, ("F16", "F32")),)

    def expand(self, arrays: Arrays, bits: int) -> F32:
        return np.asarray(self.rows(arrays, bits)[0], dtype=np.float32)


class Affine(Codebook):
    """A scale and an offset per row: value = offset + scale * code, rounded to f32 after each of the two operations."""

    kind = "affine"
    plane_linear = True

    def parts(self, bits: int) -> tuple[Part, ...]:
        return (Part(f"affine{bits}", 2, ("F32",)),)

    def expand(self, arrays: Arrays, bits: int) -> F32:
        (rows,) = self.rows(arrays, bits)
        codes = np.arange(1 << bits, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses what is not finite
            return np.asarray(rows[:, 1:] + rows[:, :1] * codes, dtype=np.float32)

    def coefficients(self, arrays: Arrays, bits: int) -> tuple[F32, F32]:
        # code = sum_i bit_i * 2^(b-1-i) and bit_i = (sign_i + 1) / 2, so alpha_i = scale * 2^(b-2-i)
        # and the halves that remain move into the constant: offset + scale * (2^b - 1) / 2.
        (rows,) = self.rows(arrays, bits)
        powers = np.exp2(bits - 2 - np.arange(bits)).astype(np.float32)
        constant = rows[:, 1].astype(np.float64) + rows[:, 0].astype(np.float64) * ((1 << bits) - 1) / 2
        with np.errstate(over="ignore", invalid="ignore"):
            return rows[:, :1] * powers, constant.astype(np.float32)


_CENTRES, _LADDERS, _STEP = slice(0, 32), slice(32, 40), slice(40, 44)  # bytes of a record


class Cells(Table):
    """A table up to 4 bits; above, a record of 44 bytes a row and precision that means a `Grid`: 16 F16 centres,
    16 nibbles `ladder - 1` (low first), an F32 step, little-endian. Read, and no longer written: `compact` is smaller.
    """

    kind = "cells"
    since = 2

    def parts(self, bits: int) -> tuple[Part, ...]:
        return super().parts(bits) if bits <= CELL_BITS else (Part(f"cells{bits}", _STEP.stop, ("U8",)),)

    def expand(self, arrays: Arrays, bits: int) -> F32:
        grid = self.grid(arrays, bits)
        return super().expand(arrays, bits) if grid is None else grid.values(bits)

    def grid(self, arrays: Arrays, bits: int) -> Grid | None:
        if bits <= CELL_BITS:
            return None
        records = np.ascontiguousarray(self.rows(arrays, bits)[0])
        centres = np.ascontiguousarray(records[:, _CENTRES]).view("<f2").astype(np.float32)
        ladders = unpack_nibbles(records[:, _LADDERS])
        steps = np.ascontiguousarray(records[:, _STEP]).view("<f4")[:, 0].astype(np.float32)
        require_widths(steps, "step")
        return Grid(centres, ladders, steps)


CODEBOOKS: dict[str, Codebook] = {book.kind: book for book in (Table(), Affine(), Cells(), Compact())}
