"""Bit-planes: the layout, the round trip, the precision prefix, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.errors import PrecisionError, ShapeError
from everybit.kernels import dequantize, pack_planes, unpack_codes


def test_layout_is_most_significant_plane_first_and_least_significant_bit_first_in_a_byte() -> None:
    codes = np.array([[4, 0, 0, 0, 0, 0, 0, 0, 0, 3]], np.uint8)  # 100b at weight 0, 011b at weight 9
    planes = pack_planes(codes, 3)
    assert planes.tolist() == [[[0b00000001, 0]], [[0, 0b10]], [[0, 0b10]]]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_round_trip_and_prefix(planes: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**planes, (rows, columns), np.uint8)
    packed = pack_planes(codes, planes)
    assert (unpack_codes(packed, columns) == codes).all()
    for bits in range(1, planes + 1):
        assert (unpack_codes(packed[:bits], columns) == codes >> (planes - bits)).all()


def test_padding_bits_are_zero() -> None:
    packed = pack_planes(np.full((2, 9), 255, np.uint8), 8)
    assert (packed[:, :, 1] == 1).all()


def test_dequantize_looks_up_each_rows_own_table() -> None:
    planes = pack_planes(np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8), 2)
    table = np.array([[0, 1, 2, 3], [10, 11, 12, 13]], np.float32)
    assert dequantize(planes, table, 4).tolist() == [[0, 1, 2, 3], [13, 12, 11, 10]]


def test_a_sliced_plane_is_accepted() -> None:
    codes = np.random.default_rng(0).integers(0, 4, (6, 20), np.uint8)
    planes = pack_planes(codes, 2)
    assert (unpack_codes([plane[::2] for plane in planes], 20) == codes[::2]).all()


PLANES = pack_planes(np.zeros((3, 20), np.uint8), 2)
TABLE = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize("planes", [0, 9, -1])
def test_plane_counts_outside_a_byte_are_refused(planes: int) -> None:
    with pytest.raises(PrecisionError, match=f"got {planes} planes, expected 1 to 8"):
        pack_planes(np.zeros((1, 8), np.uint8), planes)


def test_a_code_too_large_for_its_planes_is_refused() -> None:
    with pytest.raises(PrecisionError, match="a code is 9, but 3 planes hold codes up to 7"):
        pack_planes(np.array([[1, 9]], np.uint8), 3)


def test_no_planes_are_refused() -> None:
    with pytest.raises(PrecisionError, match="got 0 planes"):
        unpack_codes([], 8)


@pytest.mark.parametrize("codes", [np.zeros((2, 8), np.int64), np.zeros(8, np.uint8)])
def test_codes_of_another_type_or_rank_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected codes u8\[N, K\], got"):
        pack_planes(codes, 2)


@pytest.mark.parametrize("columns", [16, 25, -1])
def test_columns_that_do_not_fit_the_planes_are_refused(columns: int) -> None:
    with pytest.raises(ShapeError, match="columns"):
        unpack_codes(PLANES, columns)


def test_planes_of_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"plane 1 has shape \[2, 3\], expected \[3, 3\]"):
        unpack_codes([PLANES[0], PLANES[1][:2]], 20)


@pytest.mark.parametrize("table", [np.zeros((3, 8), np.float32), np.zeros((2, 4), np.float32)])
def test_a_table_of_another_precision_or_height_is_refused(table: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"table has shape .* need \[3, 4\]"):
        dequantize(PLANES, table, 20)


def test_a_table_of_another_type_is_refused() -> None:
    with pytest.raises(ShapeError, match="float16"):
        dequantize(PLANES, TABLE.astype(np.float16), 20)
