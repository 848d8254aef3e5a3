"""Plain numpy versions of the kernels: the definition that the native code must match, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack_planes(codes: NDArray[np.uint8], planes: int) -> NDArray[np.uint8]:
    """Split codes into bit-planes. Shapes: codes u8[N, K] -> u8[B, N, ceil(K/8)]."""
    bits = [(codes >> (planes - 1 - k)) & 1 for k in range(planes)]
    return np.stack([np.packbits(bit, axis=1, bitorder="little") for bit in bits])


def unpack_codes(planes: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Join bit-planes. Shapes: B arrays u8[N, ceil(K/8)] -> codes u8[N, K]."""
    codes: NDArray[np.uint8] = np.zeros((len(planes[0]), columns), np.uint8)
    for plane in planes:
        codes = ((codes << 1) | np.unpackbits(plane, axis=1, count=columns, bitorder="little")).astype(np.uint8)
    return codes


def dequantize(
    planes: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], table: NDArray[np.float32], columns: int
) -> NDArray[np.float32]:
    """Look codes up. Shapes: B arrays u8[N, ceil(K/8)], table f32[N, 2^B] -> f32[N, K]."""
    return np.take_along_axis(table, unpack_codes(planes, columns).astype(np.intp), axis=1)
