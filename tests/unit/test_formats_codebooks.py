"""Codebook kinds: hand-computed values, and the plane-linear reading equal to the expanded one."""

from __future__ import annotations

import numpy as np
import pytest

from everybit.errors import FormatError, ShapeError
from everybit.formats import ALL_BITS, CODEBOOKS, DTYPES
from tests.unit.formats_tiny import pack_cells


def test_registry_names_each_kind_once() -> None:
    assert {kind: book.kind for kind, book in CODEBOOKS.items()} == {
        k: k for k in ("table", "affine", "cells", "compact")
    }
    assert {kind: book.since for kind, book in CODEBOOKS.items()} == {
        "table": 1,
        "affine": 1,
        "cells": 2,
        "compact": 3,
    }
    assert {kind: book.suffixes for kind, book in CODEBOOKS.items()} == {
        "table": tuple(f"lut{b}" for b in ALL_BITS),
        "affine": tuple(f"affine{b}" for b in ALL_BITS),
        "cells": ("cells5", "cells6", "cells7", "cells8", "lut2", "lut3", "lut4"),
        "compact": ("cells", "lut2", "lut3", "lut4", "scale"),  # what precisions share has no digits
    }


def test_table_is_the_stored_numbers() -> None:
    lut = np.array([[-1.5, 0.0, 0.25, 7.0]], np.float16)
    values = CODEBOOKS["table"].expand({"lut2": lut}, 2)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-1.5, 0.0, 0.25, 7.0]])


def test_affine_is_offset_plus_scale_times_code() -> None:
    stored = np.array([[0.5, -1.0], [2.0, 10.0]], np.float32)
    np.testing.assert_array_equal(
        CODEBOOKS["affine"].expand({"affine2": stored}, 2), [[-1.0, -0.5, 0.0, 0.5], [10.0, 12.0, 14.0, 16.0]]
    )


def test_affine_coefficients_by_hand() -> None:
    # scale 0.5, offset -1, 3 bits: planes weigh 4, 2, 1 codes; a sign moves half of each; the middle is -1 + 0.5 * 3.5
    alpha, constant = CODEBOOKS["affine"].coefficients({"affine3": np.array([[0.5, -1.0]], np.float32)}, 3)
    np.testing.assert_array_equal(alpha, [[1.0, 0.5, 0.25]])
    np.testing.assert_array_equal(constant, [0.75])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_plane_linear_reading_equals_the_expanded_table(bits: int) -> None:
    rng = np.random.default_rng(bits)
    stored = rng.normal(size=(5, 2)).astype(np.float32)
    arrays = {f"affine{bits}": stored}
    book = CODEBOOKS["affine"]
    alpha, constant = book.coefficients(arrays, bits)
    assert (alpha.dtype, alpha.shape, constant.dtype, constant.shape) == (np.float32, (5, bits), np.float32, (5,))
    codes = np.arange(1 << bits)
    signs = np.stack([np.where(codes >> (bits - 1 - plane) & 1, 1.0, -1.0) for plane in range(bits)])
    linear = constant[:, None].astype(np.float64) + alpha.astype(np.float64) @ signs
    # expand() rounds twice, constant once: at most 3 half-ulps of the largest magnitude in the row.
    largest = np.abs(stored[:, :1]) * (1 << bits) + np.abs(stored[:, 1:])
    assert np.all(np.abs(linear - book.expand(arrays, bits)) <= 1.5 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("bits", [2, 7])
def test_experts_become_rows(kind: str, bits: int) -> None:
    book, rng = CODEBOOKS[kind], np.random.default_rng(0)
    stored = {p.suffix: rng.integers(0, 8, (2, 3, p.width)).astype(DTYPES[p.dtypes[0]]) for p in book.parts(bits)}
    assert book.expand(stored, bits).shape == (6, 1 << bits)
    alone = book.expand({suffix: array[1] for suffix, array in stored.items()}, bits)
    np.testing.assert_array_equal(book.expand(stored, bits)[3:], alone)


def test_table_has_no_plane_linear_form() -> None:
    assert not CODEBOOKS["table"].plane_linear
    with pytest.raises(ShapeError, match="a table codebook has no plane-linear form"):
        CODEBOOKS["table"].coefficients({"lut2": np.zeros((1, 4), np.float32)}, 2)


def test_wrong_arrays_are_refused() -> None:
    table, compact = CODEBOOKS["table"], CODEBOOKS["compact"]
    with pytest.raises(
        ShapeError, match=r"lut3 of a table codebook arrived as float32 \[1, 4\], expected F16 or F32 \[N"
    ):
        table.expand({"lut3": np.zeros((1, 4), np.float32)}, 3)
    with pytest.raises(ShapeError, match=r"arrived as float32 \[4\], expected F32 \[N, 2\] or \[E, N, 2\]"):
        CODEBOOKS["affine"].expand({"affine3": np.zeros(4, np.float32)}, 3)
    with pytest.raises(ShapeError, match="a table codebook without lut3 arrived, expected lut3 for 3 bits"):
        table.expand({"lut2": np.zeros((1, 4), np.float32)}, 3)
    with pytest.raises(ShapeError, match="a compact codebook without cells arrived, expected scale, cells for 5 bits"):
        compact.expand({"scale": np.zeros((1, 1), np.float32)}, 5)
    with pytest.raises(ShapeError, match=r"whose tensors have \[2, 1\] rows arrived"):
        compact.expand({"scale": np.zeros((2, 1), np.float32), "lut2": np.zeros((1, 4), np.int8)}, 2)
    with pytest.raises(ShapeError, match=r"lut2 of a compact codebook arrived as uint8 \[1, 4\], expected I8"):
        compact.expand({"scale": np.zeros((1, 1), np.float32), "lut2": np.zeros((1, 4), np.uint8)}, 2)


CENTRES = np.array([np.arange(16) - 7.5], np.float32)


def record(ladders: list[int], step: float) -> np.ndarray:
    return pack_cells(CENTRES, np.array([ladders]), np.array([step]))


def test_a_record_byte_by_byte() -> None:
    stored = record([1, 8, 2, *[1] * 12, 5], 0.25)
    assert stored.shape == (1, 44)
    assert stored[0, :4].tobytes().hex() == "80c780c6"  # F16 -7.5, -6.5, little-endian
    assert stored[0, 32:40].tobytes().hex() == "7001000000000040"  # ladder - 1: low nibble first
    assert stored[0, 40:].tobytes().hex() == "0000803e"


def test_cells_by_hand() -> None:
    stored = record([1, 8, 2, *[1] * 13], 0.25)
    five = CODEBOOKS["cells"].expand({"cells5": stored}, 5)  # n = 2: brackets -8 and 8 times the ladder
    assert (five.dtype, five.shape) == (np.float32, (1, 32))
    np.testing.assert_array_equal(five[0, :6], [-7.5 - 2, -7.5 + 2, -6.5 - 16, -6.5 + 16, -5.5 - 4, -5.5 + 4])
    eight = CODEBOOKS["cells"].expand({"cells8": stored}, 8)  # n = 16: -15, -13 ... 15
    np.testing.assert_array_equal(eight[0, :16], -7.5 + 0.25 * np.arange(-15, 16, 2))
    np.testing.assert_array_equal(eight[0, 16:32], -6.5 + 2.0 * np.arange(-15, 16, 2))


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_every_code_of_cells_is_the_formula(bits: int) -> None:
    rng = np.random.default_rng(bits)
    ladders, step = rng.integers(1, 9, 16), np.float32(rng.random())
    values = CODEBOOKS["cells"].expand({f"cells{bits}": record(list(ladders), step)}, bits)[0]
    n = 1 << (bits - 4)
    for code, value in enumerate(values):
        c, r = divmod(code, n)
        bracket = int(ladders[c]) * (2 * r + 1 - n) * (16 // n)
        assert abs(bracket) <= 120
        assert value == np.float32(CENTRES[0, c] + np.float32(step * np.float32(bracket)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cells_up_to_four_bits_are_the_table(bits: int) -> None:
    cells, table = CODEBOOKS["cells"], CODEBOOKS["table"]
    lut = np.random.default_rng(bits).normal(size=(3, 1 << bits)).astype(np.float16)
    arrays = {f"lut{bits}": lut}
    np.testing.assert_array_equal(cells.expand(arrays, bits), table.expand(arrays, bits))
    assert cells.parts(bits) == table.parts(bits)
    assert cells.grid(arrays, bits) is None


@pytest.mark.parametrize("nibble", [8, 15])
def test_ladders_beyond_eight_are_refused(nibble: int) -> None:
    stored = record([1] * 16, 1.0)
    stored[0, 33] = nibble << 4
    with pytest.raises(FormatError, match=rf"row 0 has {nibble}, expected a nibble of 0 to 7"):
        CODEBOOKS["cells"].expand({"cells6": stored}, 6)


@pytest.mark.parametrize("step", [-1.0, np.nan, np.inf])
def test_steps_that_are_no_widths_are_refused(step: float) -> None:
    with pytest.raises(FormatError, match=rf"row 0 has {step}, expected a finite step, 0 or more"):
        CODEBOOKS["cells"].expand({"cells6": record([1] * 16, step)}, 6)


def test_records_are_bytes() -> None:
    with pytest.raises(
        ShapeError, match=r"cells5 of a cells codebook arrived as float32 \[1, 44\], expected U8 \[N, 44\]"
    ):
        CODEBOOKS["cells"].expand({"cells5": np.zeros((1, 44), np.float32)}, 5)
    with pytest.raises(ShapeError, match=r"cells8 of a cells codebook arrived as uint8 \[1, 256\]"):
        CODEBOOKS["cells"].expand({"cells8": np.zeros((1, 256), np.uint8)}, 8)
