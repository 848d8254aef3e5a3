"""The interface of a codebook kind: which tensors a precision reads and what value each code then has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from everybit.errors import FormatError, ShapeError
from everybit.formats.grid import Grid
from everybit.formats.tensors import DTYPES

F32 = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]  # the tensors of a codebook by suffix
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Part:
    """One tensor of a codebook: P_<suffix>, `width` numbers for each row of the weight P.

    A suffix ends in its precision where no other reads the tensor ("lut3"), and has no digits where some share it.
    """

    suffix: str
    width: int
    dtypes: tuple[str, ...]  # the first is the default


class Codebook(ABC):
    """A codebook kind. Arrays come by suffix, as stored, [N, width] or [E, N, width]; more than needed may be there."""

    kind: ClassVar[str]
    plane_linear: ClassVar[bool] = False
    since: ClassVar[int] = 1  # the first format_version that has it

    @abstractmethod
    def parts(self, bits: int) -> tuple[Part, ...]:
        """The tensors that precision `bits` reads."""

    @abstractmethod
    def expand(self, arrays: Arrays, bits: int) -> F32:
        """The value of every code.

        Shapes: -> f32[rows, 2^bits]
        Raises: ShapeError, FormatError (numbers that the kind forbids)
        """

    def coefficients(self, arrays: Arrays, bits: int) -> tuple[F32, F32]:
        """The plane-linear reading: value = constant + sum_i alpha_i * (+1 where the bit of plane i is set, else -1).

        Shapes: -> alpha f32[rows, bits] (most significant first), constant f32[rows]
        Raises: ShapeError where the kind is not plane-linear
        """
        raise ShapeError(f"a {self.kind} codebook has no plane-linear form: use expand(), or a plane-linear kind")

    def grid(self, arrays: Arrays, bits: int) -> Grid | None:
        """The same values as an even grid inside each of 16 cells, where the kind says them so.

        Raises: ShapeError, FormatError
        """
        return None

    def unit(self, arrays: Arrays, bits: int) -> F32 | None:
        """For each row a number of which all its values are multiples by integers of -127 to 127, if the kind has one.

        Shapes: -> f32[rows]
        Raises: ShapeError, FormatError
        """
        return None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of its tensors at all precisions, sorted."""
        return tuple(sorted({part.suffix for b in range(MIN_BITS, MAX_BITS + 1) for part in self.parts(b)}))

    def rows(self, arrays: Arrays, bits: int) -> list[NDArray[Any]]:
        """The arrays that `bits` reads, leading dimensions joined into rows, in the order of `parts`.

        Raises: ShapeError
        """
        found = []
        for part in self.parts(bits):
            array = arrays.get(part.suffix)
            if array is None:
                raise ShapeError(
                    f"a {self.kind} codebook without {part.suffix} arrived, expected "
                    f"{self._needs(bits)} for {bits} bits: pass all of one weight"
                )
            fits = array.ndim in (2, 3) and array.shape[-1] == part.width
            if not fits or array.dtype not in [DTYPES[dtype] for dtype in part.dtypes]:
                raise ShapeError(
                    f"{part.suffix} of a {self.kind} codebook arrived as {array.dtype} {list(array.shape)}, expected "
                    f"{' or '.join(part.dtypes)} [N, {part.width}] or [E, N, {part.width}]: pass it as stored"
                )
            found.append(array.reshape(-1, part.width))
        if len({len(array) for array in found}) > 1:
            raise ShapeError(
                f"a {self.kind} codebook whose tensors have {[len(array) for array in found]} rows arrived, expected "
                "as many in each: pass those of one weight"
            )
        return found

    def _needs(self, bits: int) -> str:
        return ", ".join(part.suffix for part in self.parts(bits))


def require_widths(values: F32, what: str) -> None:
    """Refuses numbers of rows that are negative or not finite. Shapes: values f32[rows]. Raises: FormatError"""
    bad = ~((values >= 0) & np.isfinite(values))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise FormatError(
            f"row {row} has {values[row]}, expected a finite {what}, 0 or more: quantize again, or download it again"
        )
