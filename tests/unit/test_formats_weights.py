"""WeightSpec and TensorSpec: names, shapes, sizes by hand, and what they refuse."""

from __future__ import annotations

import pytest

from everybit.errors import FormatError, PrecisionError, ShapeError
from everybit.formats import ALL_BITS, TensorSpec, WeightSpec, check_bits
from everybit.formats.sizes import SizeReport
from everybit.formats.tensors import show
from everybit.formats.weights import require_bits


def test_tensors_of_a_table_weight_by_hand() -> None:
    spec = WeightSpec("m.weight", (6, 20), (2, 4))
    assert spec.tensors() == {
        "m.weight_plane0": TensorSpec("U8", (6, 3)),  # 20 columns: 2.5 bytes, padded to 3
        "m.weight_plane1": TensorSpec("U8", (6, 3)),
        "m.weight_plane2": TensorSpec("U8", (6, 3)),
        "m.weight_plane3": TensorSpec("U8", (6, 3)),
        "m.weight_lut2": TensorSpec("F16", (6, 4)),
        "m.weight_lut4": TensorSpec("F16", (6, 16)),
    }
    assert spec.tensors("F32")["m.weight_lut2"] == TensorSpec("F32", (6, 4))
    assert (spec.planes, spec.rows, spec.columns, spec.parameters, spec.plane_bytes) == (4, 6, 20, 120, 18)


def test_tensors_of_fused_experts_with_an_affine_codebook() -> None:
    spec = WeightSpec("e.gate", (2, 3, 16), (2, 3), "affine", transposed=True)
    assert spec.tensors("F16") == {
        **{f"e.gate_plane{k}": TensorSpec("U8", (2, 3, 2)) for k in range(3)},
        "e.gate_affine2": TensorSpec("F32", (2, 3, 2)),  # affine has one dtype, whatever tables use
        "e.gate_affine3": TensorSpec("F32", (2, 3, 2)),
    }
    assert (spec.rows, spec.columns, spec.parameters) == (6, 16, 96)


@pytest.mark.parametrize(
    ("own", "asked", "served"),
    [((2, 3, 4), 3, 3), ((2, 4), 3, 2), ((8,), 2, 8), ((4, 6), 2, 4), ((2, 3), 8, 3)],
)
def test_served_bits_is_the_highest_not_above_else_the_lowest(own: tuple[int, ...], asked: int, served: int) -> None:
    assert WeightSpec("w", (1, 8), own).served_bits(asked) == served


@pytest.mark.parametrize("bits", [(), (1,), (9,), (3, 2), (2, 2), (2, 2.0), (True, 3), "23", None, 4, (2, "3")])
def test_bits_that_no_overlay_holds_are_refused(bits: object) -> None:
    with pytest.raises(PrecisionError, match="expected a list of different integers from 2 to 8, ascending"):
        check_bits(bits)


def test_bits_may_come_as_a_list() -> None:
    assert check_bits([2, 5, 8]) == (2, 5, 8)
    assert check_bits(ALL_BITS) == (2, 3, 4, 5, 6, 7, 8)


def test_a_missing_precision_is_explained_with_what_is_there() -> None:
    message = r"^bits 5 asked, overlay has 2, 3, 4: pass one of these or quantize again with --bits 2-5$"
    with pytest.raises(PrecisionError, match=message):
        require_bits(5, (2, 3, 4), "overlay")
    with pytest.raises(PrecisionError, match=r"^bits 99 asked, overlay has 2, 3, 4: pass one of these$"):
        require_bits(99, (2, 3, 4), "overlay")
    with pytest.raises(PrecisionError, match=r"^bits True asked"):
        require_bits(True, (2, 3, 4), "overlay")


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (-1, 8), (2, 3, 4, 5), (2.0, 8), (True, 8)])
def test_shapes_that_are_no_weight_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="expected \\[N, K\\] or \\[E, N, K\\] of positive integers"):
        WeightSpec("w", shape)


def test_a_shape_beyond_any_file_is_refused() -> None:
    with pytest.raises(ShapeError, match="larger than any file can hold"):
        WeightSpec("w", (2**40, 2**40))


@pytest.mark.parametrize("name", ["", "__metadata__", "w\ud800"])
def test_names_that_no_file_can_hold_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="expected the parameter's name in the model"):
        WeightSpec(name, (1, 8))


def test_an_unknown_codebook_is_refused() -> None:
    with pytest.raises(FormatError, match="codebook 'nf4' is unknown, expected one of table, affine"):
        WeightSpec("w", (1, 8), codebook="nf4")


def test_tensor_sizes() -> None:
    assert TensorSpec("BF16", (3, 5)).nbytes == 30
    assert TensorSpec("F64", ()).nbytes == 8
    assert TensorSpec("U8", (0, 2**62, 2**62 // 2**62)).nbytes == 0
    assert str(TensorSpec("U8", (2, 3))) == "U8 [2, 3]"


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("F4", (2,), "dtype 'F4' is unknown"),
        ("U8", (-1,), "negative size"),
        ("U8", (2**32, 2**32), "overflows 2\\^63 bytes"),
        ("U8", (0, 2**62, 2**62), "overflows 2\\^63 bytes"),
        ("U8", (1,) * 33, "33 dimensions, expected at most 32"),
    ],
)
def test_tensors_that_no_file_can_hold(dtype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSpec(dtype, shape)


def test_show_is_short_and_printable() -> None:
    assert show("a\nb\ud800") == r"'a\nb\ud800'"
    assert len(show("x" * 10_000)) < 100
    assert show(10**5000) == "<int too large to print>"


def test_tensors_of_a_cells_weight_by_hand() -> None:
    spec = WeightSpec("e.gate", (2, 3, 16), (3, 4, 5, 8), "cells")
    found = {name: str(tensor) for name, tensor in spec.tensors("F32").items() if "plane" not in name}
    assert found == {
        "e.gate_lut3": "F32 [2, 3, 8]",
        "e.gate_lut4": "F32 [2, 3, 16]",
        "e.gate_cells5": "U8 [2, 3, 44]",
        "e.gate_cells8": "U8 [2, 3, 44]",
    }


def test_tensors_of_a_compact_weight_by_hand() -> None:
    spec = WeightSpec("e.gate", (2, 3, 16), (3, 4, 5, 8), "compact")
    found = {name: str(tensor) for name, tensor in spec.tensors("F32").items() if "plane" not in name}
    assert found == {
        "e.gate_scale": "F32 [2, 3, 1]",
        "e.gate_lut3": "I8 [2, 3, 8]",
        "e.gate_lut4": "I8 [2, 3, 16]",
        "e.gate_cells": "U8 [2, 3, 26]",  # one for 5 and 8 bits
    }
    assert spec.codebook_names(8) == {"scale": "e.gate_scale", "cells": "e.gate_cells"}
    assert "e.gate_cells" not in WeightSpec("e.gate", (2, 3, 16), (2, 3, 4), "compact").tensors()
    assert set(WeightSpec("w", (1, 8), (8,), "compact").tensors()) == {f"w_plane{k}" for k in range(8)} | {
        "w_scale",
        "w_cells",
    }


def test_sizes_count_what_precisions_share_once_on_disk_and_in_each() -> None:
    spec = WeightSpec("w", (5, 64), codebook="compact")
    sizes = SizeReport.of([spec], spec.bits, spec.tensors())
    assert sizes.stored_bytes == 5 * (8 * 8 + 58)
    assert {b: size.bytes for b, size in sizes.rows.items()} == {
        **{b: 5 * (8 * b + 4 + (1 << b)) for b in (2, 3, 4)},
        **{b: 5 * (8 * b + 4 + 26) for b in (5, 6, 7, 8)},
    }
    assert sizes.rows[3].bpw == sizes.rows[3].bytes * 8 / 320
