"""What every method of the comparison is: one small function from a matrix to its dequantized self and its price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from everybit.errors import SourceError

F32 = NDArray[np.float32]
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
SCALE_BITS = 16  # of a stored float16


class UnfitError(SourceError):
    """A method that cannot quantize a weight of this model, or is not installed: its rows are left out, with this."""


class Statistics(Protocol):
    """What calibration says about one matrix f32[N, K]."""

    @property
    def seed(self) -> int:
        """Of this matrix and run."""

    def sensitivity(self) -> F32:
        """Diagonal Fisher information, floored. Shapes: -> f32[N, K]"""

    def hessian(self) -> F32:
        """X'X / tokens of the layer's inputs, K of them a token. Shapes: -> f32[K, K]. Raises: UnfitError"""

    def guided(self) -> F32:
        """Guided Hessians (quantize/statistics.py). Shapes: -> f32[groups, K, K]. Raises: UnfitError"""


# (weights f32[N, K], bits, statistics) -> (dequantized f32[N, K], bits per weight with everything stored counted)
Quantize = Callable[[F32, int, Statistics], tuple[F32, float]]


@dataclass(frozen=True)
class Method:
    """An entry of the table: at which bits it exists, how to get its function, what it needs.

    `load` imports what the method needs and raises UnfitError where that is missing. `needs`: some of sensitivity,
    hessian and guided. `seeded`: results depend on a seed and are averaged over several.
    """

    name: str
    load: Callable[[], Quantize]
    bits: tuple[int, ...] = ALL_BITS
    needs: tuple[str, ...] = ()
    seeded: bool = False


def half(values: NDArray[np.floating], what: str) -> F32:
    """Values as float16 stores them, in float32. Raises: UnfitError when one overflows"""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not np.isfinite(stored).all():
        raise UnfitError(f"{what} up to {np.abs(values).max():.3g} overflow float16")
    return stored.astype(np.float32)


def groups_of(columns: int, group: int) -> list[slice]:
    """Runs of `group` columns, the last one perhaps shorter; 0 is the whole row."""
    step = group or columns
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
