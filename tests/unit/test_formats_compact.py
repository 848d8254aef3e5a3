"""Codebook kind compact: bytes and values by hand, the scale that brings a row's largest value back, roundings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everybit.errors import FormatError, ShapeError
from everybit.formats import ALL_BITS, CODEBOOKS, Overlay
from everybit.formats.compact import Compact, round_step, row_scale, to_int8
from everybit.formats.tensors import from_bf16, to_bf16
from tests.unit import formats_tiny as tiny

BOOK = CODEBOOKS["compact"]


def by_hand(step: float = 0.25) -> dict[str, np.ndarray]:
    """One row: scale 0.5, centres -7 to 8, ladders 1 but for 8 in cell 1."""
    ladders = np.ones((1, 16), np.uint8)
    ladders[0, 1] = 8
    luts = {2: np.array([[-127, 0, 3, 127]], np.int8)}
    return Compact.pack(
        np.array([0.5], np.float32), luts, np.arange(-7, 9, dtype=np.int8)[None], ladders, np.array([step], np.float32)
    )


def test_a_record_byte_by_byte() -> None:
    arrays = by_hand()
    assert {suffix: (str(array.dtype), array.shape) for suffix, array in arrays.items()} == {
        "scale": ("float32", (1, 1)),
        "lut2": ("int8", (1, 4)),
        "cells": ("uint8", (1, 26)),
    }
    assert (
        arrays["cells"].tobytes().hex(" ")
        == "f9 fa fb fc fd fe ff 00 01 02 03 04 05 06 07 08 70" + " 00" * 7 + " 80 3e"
    )


def test_values_by_hand() -> None:
    arrays = by_hand()
    np.testing.assert_array_equal(BOOK.expand(arrays, 2), [[-63.5, 0, 1.5, 63.5]])
    five = BOOK.expand(arrays, 5)  # n = 2: brackets -8 and 8 times the ladder
    assert (five.dtype, five.shape) == (np.float32, (1, 32))
    np.testing.assert_array_equal(five[0, :6], [-3.5 - 2, -3.5 + 2, -3 - 16, -3 + 16, -2.5 - 2, -2.5 + 2])
    eight = BOOK.expand(arrays, 8)  # n = 16: -15, -13 ... 15
    np.testing.assert_array_equal(eight[0, :16], -3.5 + 0.25 * np.arange(-15, 16, 2))


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_every_code_is_the_formula(bits: int) -> None:
    arrays = tiny.compact_codebook(3, ALL_BITS, bits)
    values, n = BOOK.expand(arrays, bits), 1 << (bits - 4)
    for row in range(3):
        record = arrays["cells"][row].tobytes()
        step = np.frombuffer(b"\0\0" + record[24:26], "<f4")[0]
        for code, value in enumerate(values[row]):
            c, r = divmod(code, n)
            ladder = (record[16 + c // 2] >> (4 * (c % 2)) & 15) + 1
            centre = np.float32(arrays["scale"][row, 0] * np.float32(np.int8(record[c] - 256 * (record[c] > 127))))
            assert value == np.float32(centre + np.float32(step * np.float32(ladder * (2 * r + 1 - n) * (16 // n))))


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_grids_say_the_same_and_their_ends_are_the_extremes(bits: int) -> None:
    arrays = tiny.compact_codebook(5, ALL_BITS, bits)
    grid = BOOK.grid(arrays, bits)
    assert grid is not None
    values = BOOK.expand(arrays, bits)
    np.testing.assert_array_equal(grid.values(bits), values)
    cells = values.reshape(5, 16, -1)
    np.testing.assert_array_equal(grid.ends(bits), np.stack([cells.min(axis=2), cells.max(axis=2)], axis=2))
    assert BOOK.unit(arrays, bits) is None


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_up_to_four_bits_are_multiples_of_the_unit(bits: int) -> None:
    arrays = tiny.compact_codebook(5, ALL_BITS, bits)
    unit = BOOK.unit(arrays, bits)
    assert unit is not None
    np.testing.assert_array_equal(np.rint(BOOK.expand(arrays, bits) / unit[:, None]), arrays[f"lut{bits}"])
    assert BOOK.grid(arrays, bits) is None
    assert CODEBOOKS["table"].unit({f"lut{bits}": np.zeros((1, 1 << bits), np.float32)}, bits) is None


def test_the_largest_value_comes_back_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        most = np.abs(rng.standard_normal(20_000) * 10.0 ** rng.uniform(-35, 38, 20_000)).astype(np.float32)
    edges = [0, 1.99, 1.9999999, 1, 1.0000001, 127, 2.0**-119, np.finfo(np.float32).max]
    most = np.concatenate([most[np.isfinite(most)], np.array(edges, np.float32)])
    scale = row_scale(most)
    numbers = to_int8(np.stack([most, -most], axis=1), scale)
    np.testing.assert_array_equal(scale[:, None] * numbers.astype(np.float32), np.stack([most, -most], axis=1))
    assert (np.abs(numbers[most > 0]) >= 64).all()
    assert (numbers[most > 0][:, 0] == 127).mean() > 0.98  # nearly every row has all of int8


def test_denormal_rows_do_not_clip() -> None:
    most = np.array([1e-45, 1e-44, 1.8e-43, 1e-40, 1.1e-38, 1e-37], np.float32)
    scale = row_scale(most)
    back = scale * to_int8(most[:, None], scale)[:, 0].astype(np.float32)
    assert (np.abs(back - most) <= np.maximum(scale / 2, np.float32(1e-45))).all()
    assert (scale * np.float32(127) >= most).all()


def test_bfloat16_rounds_to_the_nearest_and_never_to_infinity() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 0x7F7F8000, 10_000, np.uint32).view(np.float32)
    tie = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], np.uint32).view(np.float32)
    values = np.concatenate([values, -values, tie])
    wanted = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), wanted)
    largest = from_bf16(to_bf16(np.array([np.finfo(np.float32).max], np.float32)))[0]
    assert largest == np.array([0x7F7F0000], np.uint32).view(np.float32)[0]


def test_the_step_is_stored_as_round_step_says() -> None:
    arrays, step = by_hand(0.3), np.array([0.3], np.float32)
    grid = BOOK.grid(arrays, 5)
    assert grid is not None
    assert grid.steps == round_step(step) != step


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_scales_and_steps_that_are_no_widths_are_refused(bits: int, value: float) -> None:
    arrays = by_hand()
    arrays["scale"] = np.array([[value]], np.float32)
    with pytest.raises(FormatError, match=rf"row 0 has {value}, expected a finite scale, 0 or more"):
        BOOK.expand(arrays, bits)
    with pytest.raises(FormatError, match=f"row 0 has {value}, expected a finite scale"):
        Compact.pack(np.array([value], np.float32), {})
    with pytest.raises(FormatError, match=f"row 0 has {value}, expected a finite step"):
        by_hand(value)


def test_what_pack_cannot_store_is_refused() -> None:
    one, centres, ladders = np.ones(1, np.float32), np.zeros((1, 16), np.int8), np.ones((1, 16), np.uint8)
    for wrong in (ladders * np.uint8(9), ladders * np.uint8(0)):
        with pytest.raises(ShapeError, match="expected int8 and 1 to 8"):
            Compact.pack(one, {}, centres, wrong, one)
    with pytest.raises(ShapeError, match="float64 centres"):
        Compact.pack(one, {}, centres.astype(np.float64), ladders, one)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", tiny.COMPACT.bits)
def test_an_overlay_reads_only_what_a_precision_needs(tmp_path: Path, bits: int) -> None:
    with Overlay.open(tiny.write_compact(tmp_path / "out")) as overlay:
        overlay.table("d.weight", bits)
        assert overlay.touched == {"d.weight_scale", f"d.weight_{f'lut{bits}' if bits <= 4 else 'cells'}"}
        overlay.verify_all()
        assert overlay.touched == set(overlay.names())
