"""Bit-planes to codes to values, and back: checks here, work in everybit._native.

Shape letters: B planes, N out-features (rows), K in-features (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.errors import PrecisionError, ShapeError

Codes = NDArray[np.uint8]
Values = NDArray[np.float32]


def pack_planes(codes: Codes, planes: int, threads: int = 0) -> Codes:
    """Split codes into bit-planes, most significant first.

    Shapes:  codes u8[N, K] -> u8[B, N, ceil(K/8)]; bit t of byte l = weight 8l + t; padding bits zero
    Needs:   1 <= planes <= 8 and every code < 2^planes
    Cost:    reads N*K bytes, writes N*K*B/8
    Mutates: nothing. Threads: deterministic for any count; 0 = one per processor
    Raises:  ShapeError, PrecisionError
    Source:  Any-Precision LLM (Park et al., ICML 2024) section 4.2, without its permutation within 1024 weights
    """
    codes = _array(codes, np.uint8, 2, "codes u8[N, K]")
    check_planes(planes)
    if codes.size and int(codes.max()) >> planes:
        raise PrecisionError(
            f"a code is {int(codes.max())}, but {planes} planes hold codes up to {2**planes - 1}; "
            f"pass planes={int(codes.max()).bit_length()} or shift the codes down"
        )
    rows, columns = codes.shape
    packed = np.empty((planes, rows, -(-columns // 8)), np.uint8)
    _native.pack_planes(codes, packed, threads)
    return packed


def unpack_codes(planes: Codes | Sequence[Codes], columns: int, threads: int = 0) -> Codes:
    """Join bit-planes into codes; the first b planes of more give the b-bit codes.

    Shapes:  planes u8[B, N, ceil(K/8)] or B arrays u8[N, ceil(K/8)] -> codes u8[N, K]
    Needs:   1 <= B <= 8; columns = K
    Mutates: nothing. Threads: deterministic for any count; 0 = one per processor
    Raises:  ShapeError, PrecisionError
    """
    arrays = _plane_list(planes, columns)
    codes = np.empty((arrays[0].shape[0], columns), np.uint8)
    _native.unpack_codes(arrays, codes, threads)
    return codes


def dequantize(planes: Codes | Sequence[Codes], table: Values, columns: int, threads: int = 0) -> Values:
    """Look every weight's code up in its row's table.

    Shapes:  planes B arrays u8[N, ceil(K/8)], table f32[N, 2^B] -> f32[N, K]
    Needs:   1 <= B <= 8; columns = K
    Cost:    reads N*K*B/8 plane bytes and N*2^B table entries, writes 4*N*K bytes
    Mutates: nothing. Threads: deterministic for any count; 0 = one per processor
    Raises:  ShapeError, PrecisionError
    """
    arrays = _plane_list(planes, columns)
    table = _array(table, np.float32, 2, "table f32[N, 2^B]")
    rows = arrays[0].shape[0]
    if table.shape != (rows, 2 ** len(arrays)):
        raise ShapeError(
            f"table has shape {list(table.shape)}, but {len(arrays)} planes of {rows} rows need "
            f"[{rows}, {2 ** len(arrays)}]; pass the table of exactly as many bits as planes"
        )
    values = np.empty((rows, columns), np.float32)
    _native.dequantize(arrays, table, values, threads)
    return values


def check_planes(planes: int) -> None:
    """Refuse a plane count outside 1..8."""
    if not 1 <= planes <= 8:
        raise PrecisionError(f"got {planes} planes, expected 1 to 8; a code is at most one byte")


def _array(array: object, dtype: type[np.generic], dims: int, what: str) -> NDArray[Any]:
    """A C-contiguous array of exactly this dtype and rank; copies only to make it contiguous."""
    result = np.asarray(array)
    if result.dtype != dtype or result.ndim != dims:
        raise ShapeError(
            f"expected {what}, got {result.dtype}{list(result.shape)}; convert it with astype and reshape first"
        )
    return np.ascontiguousarray(result)


def _plane_list(planes: Codes | Sequence[Codes], columns: int) -> list[Codes]:
    arrays = [_array(plane, np.uint8, 2, "each plane u8[N, ceil(K/8)]") for plane in planes]
    check_planes(len(arrays))
    if columns < 0:
        raise ShapeError(f"columns is {columns}, expected the number of weights in a row, 0 or more")
    wanted = (arrays[0].shape[0], -(-columns // 8))
    for k, array in enumerate(arrays):
        if array.shape != wanted:
            raise ShapeError(
                f"plane {k} has shape {list(array.shape)}, expected {list(wanted)} for {columns} columns; "
                "pass planes of one weight and its true column count"
            )
    return arrays
