"""Typed signatures of the C++ module (native/src/bindings.cc); outputs are the arrays passed last."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def pack_planes(codes: NDArray[np.uint8], packed: NDArray[np.uint8], threads: int) -> None: ...
def unpack_codes(planes: Sequence[NDArray[np.uint8]], codes: NDArray[np.uint8], threads: int) -> None: ...
def dequantize(
    planes: Sequence[NDArray[np.uint8]], table: NDArray[np.float32], values: NDArray[np.float32], threads: int
) -> None: ...
def solve_upscale(
    weights: NDArray[np.float32],
    sensitivity: NDArray[np.float32] | None,
    bits: Sequence[int],
    seed: int,
    codes: NDArray[np.uint8],
    codebooks: Sequence[NDArray[np.float32]],
    threads: int,
) -> None: ...

solve_tree = solve_upscale
solve_uniform = solve_upscale

def find_bad_row(values: NDArray[np.float32], refuse_negative: bool, threads: int) -> int: ...
