"""What turns a b-bit code into a value: one class per codebook kind, all behind one interface.

    table    value = lut[code]                free centroids, 2^b a row
    affine   value = offset + scale * code    plane-linear: two numbers a row
    cells    a table up to 4 bits; above, 16 cells a row with an even grid in each: 44 bytes, whatever the precision

A plane-linear codebook can also be read plane by plane, value = constant + sum_i alpha_i * (+-1), which is what the
multiply-free lookup kernels need. To add a kind: subclass `Codebook`, list it in `CODEBOOKS`, describe it in
docs/spec.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from everybit.errors import FormatError, ShapeError

F32 = NDArray[np.float32]


class Shaped(Protocol):
    """Anything with the stored shape of a weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] or [E, N, K]."""


class Codebook(ABC):
    """A codebook kind: how its tensors are named, shaped and expanded."""

    kind: ClassVar[str]
    suffix: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]  # the first is the default
    plane_linear: ClassVar[bool]
    since: ClassVar[int] = 1  # the first format_version that has it

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of all its tensors' names."""
        return (self.suffix,)

    def suffix_at(self, bits: int) -> str:
        """Of the tensor for precision `bits`."""
        return self.suffix

    def dtypes_at(self, bits: int) -> tuple[str, ...]:
        """What the tensor for precision `bits` may be, the default first."""
        return self.dtypes

    @abstractmethod
    def width(self, bits: int) -> int:
        """Numbers stored per row for precision `bits`."""

    @abstractmethod
    def expand(self, array: NDArray[Any], bits: int) -> F32:
        """The value of every code.

        Shapes: array [rows, width] or [E, N, width] -> f32[rows, 2^bits]
        Raises: ShapeError, FormatError (a record that means no numbers)
        """

    def coefficients(self, array: NDArray[Any], bits: int) -> tuple[F32, F32]:
        """The plane-linear reading: value = constant + sum_i alpha_i * (+1 where the bit of plane i is set, else -1).

        Shapes: array [rows, width] -> alpha f32[rows, bits] (most significant first), constant f32[rows]
        Raises: ShapeError where the kind is not plane-linear
        """
        raise ShapeError(f"a {self.kind} codebook has no plane-linear form: use expand(), or a plane-linear kind")

    def name(self, parameter: str, bits: int) -> str:
        """The tensor that holds the codebook of `parameter` for precision `bits`."""
        return f"{parameter}_{self.suffix_at(bits)}{bits}"

    def tensor_shape(self, spec: Shaped, bits: int) -> tuple[int, ...]:
        """Shape of that tensor: the weight's leading dimensions, then `width`."""
        return (*spec.shape[:-1], self.width(bits))

    def as_rows(self, array: NDArray[Any], bits: int) -> NDArray[Any]:
        """`array` with its leading dimensions joined into rows."""
        if array.ndim not in (2, 3) or array.shape[-1] != self.width(bits):
            raise ShapeError(
                f"a {bits}-bit {self.kind} codebook of shape {list(array.shape)} arrived, "
                f"expected [N, {self.width(bits)}] or [E, N, {self.width(bits)}]: read it at its own precision"
            )
        return array.reshape(-1, array.shape[-1])


class Table(Codebook):
    """Free centroids: value = lut[code]."""

    kind = "table"
    suffix = "lut"
    dtypes = ("F16", "F32")
    plane_linear = False

    def width(self, bits: int) -> int:
        return 1 << bits

    def expand(self, array: NDArray[Any], bits: int) -> F32:
        return np.asarray(self.as_rows(array, bits), dtype=np.float32)


class Affine(Codebook):
    """A scale and an offset per row: value = offset + scale * code, rounded to f32 after each of the two operations."""

    kind = "affine"
    suffix = "affine"
    dtypes = ("F32",)
    plane_linear = True

    def width(self, bits: int) -> int:
        return 2

    def expand(self, array: NDArray[Any], bits: int) -> F32:
        rows = np.asarray(self.as_rows(array, bits), dtype=np.float32)
        codes = np.arange(1 << bits, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses what is not finite
            return np.asarray(rows[:, 1:] + rows[:, :1] * codes, dtype=np.float32)

    def coefficients(self, array: NDArray[Any], bits: int) -> tuple[F32, F32]:
        # code = sum_i bit_i * 2^(b-1-i) and bit_i = (sign_i + 1) / 2, so alpha_i = scale * 2^(b-2-i)
        # and the halves that remain move into the constant: offset + scale * (2^b - 1) / 2.
        rows = np.asarray(self.as_rows(array, bits), dtype=np.float32)
        powers = np.exp2(bits - 2 - np.arange(bits)).astype(np.float32)
        constant = rows[:, 1].astype(np.float64) + rows[:, 0].astype(np.float64) * ((1 << bits) - 1) / 2
        with np.errstate(over="ignore", invalid="ignore"):
            return rows[:, :1] * powers, constant.astype(np.float32)


CELL_BITS = 4  # the top bits of a code, which choose the cell
LADDERS = 8  # widths a cell can have, in steps of its row
_CENTRES, _LADDERS, _STEP = slice(0, 32), slice(32, 40), slice(40, 44)  # bytes of a record


class Cells(Table):
    """A table up to 4 bits. Above, with c the top 4 bits of the code, r the other b - 4 and n = 2^(b-4),
    value = centre[c] + step * (ladder[c] * (2r + 1 - n) * (16 / n)), rounded to f32 after product and sum.

    A record of 44 bytes a row: 16 F16 centres, 16 nibbles `ladder - 1` (low first), an F32 step, little-endian.
    """

    kind = "cells"
    since = 2

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("lut", "cells")

    def suffix_at(self, bits: int) -> str:
        return self.suffixes[bits > CELL_BITS]

    def dtypes_at(self, bits: int) -> tuple[str, ...]:
        return ("U8",) if bits > CELL_BITS else self.dtypes

    def width(self, bits: int) -> int:
        return _STEP.stop if bits > CELL_BITS else super().width(bits)

    def expand(self, array: NDArray[Any], bits: int) -> F32:
        if bits <= CELL_BITS:
            return super().expand(array, bits)
        records = np.ascontiguousarray(self.as_rows(array, bits))
        if records.dtype != np.uint8:
            raise ShapeError(f"a {bits}-bit cells codebook of {records.dtype} arrived, expected U8: pass it as stored")
        centres = np.ascontiguousarray(records[:, _CENTRES]).view("<f2").astype(np.float32)
        pairs = records[:, _LADDERS]
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 1 << CELL_BITS)
        step = np.ascontiguousarray(records[:, _STEP]).view("<f4")
        for what, bad, found in (
            (f"a nibble of 0 to {LADDERS - 1}", nibbles >= LADDERS, nibbles),
            ("a finite step, 0 or more", ~((step >= 0) & np.isfinite(step)), step),
        ):
            if bad.any():
                row, place = (int(i) for i in np.argwhere(bad)[0])
                raise FormatError(
                    f"row {row} has {found[row, place]}, expected {what}: quantize again, or download again"
                )
        n = 1 << (bits - CELL_BITS)
        grid = (2 * np.arange(n) + 1 - n) * (16 // n)
        brackets = ((nibbles[:, :, None].astype(np.int32) + 1) * grid).reshape(len(records), -1)
        with np.errstate(over="ignore", invalid="ignore"):  # the reader refuses what is not finite
            return np.asarray(np.repeat(centres, n, axis=1) + step * brackets.astype(np.float32), dtype=np.float32)

    @staticmethod
    def pack(centres: F32, ladders: NDArray[np.uint8], steps: F32) -> NDArray[np.uint8]:
        """The records of rows; a centre beyond F16 becomes infinite.

        Shapes: centres f32[N, 16], ladders u8[N, 16] within 1..8, steps f32[N] -> u8[N, 44]
        """
        records = np.empty((len(centres), _STEP.stop), np.uint8)
        with np.errstate(over="ignore"):
            records[:, _CENTRES] = np.ascontiguousarray(centres.astype("<f2")).view(np.uint8)
        nibbles = ladders - np.uint8(1)
        records[:, _LADDERS] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        records[:, _STEP] = np.ascontiguousarray(steps.astype("<f4")[:, None]).view(np.uint8)
        return records


CODEBOOKS: dict[str, Codebook] = {book.kind: book for book in (Table(), Affine(), Cells())}
