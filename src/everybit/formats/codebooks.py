"""What turns a b-bit code into a value: one class per codebook kind, all behind one interface.

    table    value = lut[code]                free centroids, 2^b a row
    affine   value = offset + scale * code    plane-linear: two numbers a row

A plane-linear codebook can also be read plane by plane, value = constant + sum_i alpha_i * (+-1), which is what the
multiply-free lookup kernels need. To add a kind: subclass `Codebook`, list it in `CODEBOOKS`, describe it in
docs/spec.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from everybit.errors import ShapeError

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

    @abstractmethod
    def width(self, bits: int) -> int:
        """Numbers stored per row for precision `bits`."""

    @abstractmethod
    def expand(self, array: NDArray[Any], bits: int) -> F32:
        """The value of every code.

        Shapes: array [rows, width] or [E, N, width] -> f32[rows, 2^bits]
        Raises: ShapeError
        """

    def coefficients(self, array: NDArray[Any], bits: int) -> tuple[F32, F32]:
        """The plane-linear reading: value = constant + sum_i alpha_i * (+1 where the bit of plane i is set, else -1).

        Shapes: array [rows, width] -> alpha f32[rows, bits] (most significant first), constant f32[rows]
        Raises: ShapeError where the kind is not plane-linear
        """
        raise ShapeError(f"a {self.kind} codebook has no plane-linear form: use expand(), or a plane-linear kind")

    def name(self, parameter: str, bits: int) -> str:
        """The tensor that holds the codebook of `parameter` for precision `bits`."""
        return f"{parameter}_{self.suffix}{bits}"

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


CODEBOOKS: dict[str, Codebook] = {book.kind: book for book in (Table(), Affine())}
