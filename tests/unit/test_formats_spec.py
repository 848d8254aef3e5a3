"""docs/spec.md is run: its worked example is written and compared byte by byte, its reader reads real overlays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everybit.formats import Overlay, OverlayWriter, QuantizationConfig, WeightSpec
from everybit.formats.compact import Compact
from everybit.formats.config import KEYS, WEIGHT_KEYS
from everybit.kernels import dequantize
from tests.unit import formats_tiny as tiny

SPEC = (Path(__file__).parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")


def block(language: str, heading: str) -> str:
    """The first fenced block of a language after a heading."""
    found = re.search(rf"^#+ {re.escape(heading)}$.*?^```{language}\n(.*?)^```$", SPEC, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block under {heading!r}"
    return found[1]


def texts(language: str, heading: str) -> list[str]:
    """Every fenced block of a language in a section."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## )", SPEC, re.DOTALL | re.MULTILINE)
    assert section, heading
    return re.findall(rf"^```{language}\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)


def write_example(folder: Path) -> Path:
    """The overlay of the worked example, from the codes and tables that the text states."""
    stated = json.loads(block("json", "A worked example"))
    codes = np.array(stated["codes"], np.uint8)
    weight = WeightSpec("w", tuple(stated["shape"]), tuple(stated["bits"]))
    config = {"quantization_config": QuantizationConfig(weight.bits, "table", {"w": weight}).to_dict()}
    with OverlayWriter(folder, weight.tensors(), config) as writer:
        for plane in range(3):
            bits = codes >> (2 - plane) & 1
            writer.write(f"w_plane{plane}", np.packbits(bits, axis=1, bitorder="little"))
        for b in weight.bits:
            writer.write(f"w_lut{b}", np.array(stated[f"lut{b}"], np.float16))
        writer.finish()
    return folder


def test_the_worked_example_byte_by_byte(tmp_path: Path) -> None:
    overlay = Overlay.open(write_example(tmp_path / "out"))
    stated = block("text", "A worked example")
    lines = []
    for name in [f"w_plane{k}" for k in range(3)] + ["w_lut2", "w_lut3"]:
        lines.append(f"{name:<9}{overlay.spec_of(name)!s:<11}{overlay.tensor(name).tobytes().hex(' ')}")
    assert stated.splitlines() == lines
    values = json.loads(block("json", "A worked example"))
    for b in (2, 3):
        expected = np.take_along_axis(
            np.array(values[f"lut{b}"], np.float32), (np.array(values["codes"]) >> (3 - b)).astype(np.int64), axis=1
        )
        np.testing.assert_array_equal(reader()(tmp_path / "out", "w", b), expected)


def test_the_cells_of_the_worked_example(tmp_path: Path) -> None:
    stated = json.loads(texts("json", "A worked example")[1])
    codes = np.array(stated["codes"], np.uint8)
    weight = WeightSpec("v", tuple(stated["shape"]), tuple(stated["bits"]), "cells")
    config = {"quantization_config": QuantizationConfig(weight.bits, "cells", {"v": weight}).to_dict()}
    parts = [np.array(stated[key], dtype) for key, dtype in (("centres", "f4"), ("ladders", "u1"), ("steps", "f4"))]
    with OverlayWriter(tmp_path / "out", weight.tensors(), config) as writer:
        for plane in range(6):
            writer.write(f"v_plane{plane}", np.packbits(codes >> (5 - plane) & 1, axis=1, bitorder="little"))
        writer.write("v_lut4", np.array(stated["lut4"], np.float16))
        writer.write("v_cells6", tiny.pack_cells(*parts))
        writer.finish()
    overlay = Overlay.open(tmp_path / "out")
    record = overlay.tensor("v_cells6").tobytes().hex(" ")
    assert texts("text", "A worked example")[1] == f"v_cells6 {overlay.spec_of('v_cells6')} {record}\n"
    assert reader()(tmp_path / "out", "v", 6).tolist() == [[-8.75, -6.625, 0.875, 9.5]]
    assert reader()(tmp_path / "out", "v", 4).tolist() == [[-8, -7, 1, 8]]


def test_the_compact_row_of_the_worked_example(tmp_path: Path) -> None:
    stated = json.loads(texts("json", "A worked example")[2])
    codes = np.array(stated["codes"], np.uint8)
    weight = WeightSpec("u", tuple(stated["shape"]), tuple(stated["bits"]), "compact")
    config = {"quantization_config": QuantizationConfig(weight.bits, "compact", {"u": weight}).to_dict()}
    types = {"scale": "f4", "lut2": "i1", "centres": "i1", "ladders": "u1", "steps": "f4"}
    parts = {key: np.array(stated[key], dtype) for key, dtype in types.items()}
    packed = Compact.pack(parts["scale"], {2: parts["lut2"]}, parts["centres"], parts["ladders"], parts["steps"])
    with OverlayWriter(tmp_path / "out", weight.tensors(), config) as writer:
        for plane in range(6):
            writer.write(f"u_plane{plane}", np.packbits(codes >> (5 - plane) & 1, axis=1, bitorder="little"))
        for suffix, array in packed.items():
            writer.write(f"u_{suffix}", array)
        writer.finish()
    overlay = Overlay.open(tmp_path / "out")
    names = ("u_scale", "u_lut2", "u_cells")
    lines = [f"{name} {overlay.spec_of(name)} {overlay.tensor(name).tobytes().hex(' ')}" for name in names]
    assert texts("text", "A worked example")[2].splitlines() == lines
    for bits, values in {6: [-62, -45, -0.5, 71.5], 5: [-60, -46, -1.5, 79.5], 2: [-63.5, -63.5, 20, 63.5]}.items():
        assert reader()(tmp_path / "out", "u", bits).tolist() == [values]
        planes = overlay.planes("u", bits)
        assert dequantize(planes, overlay.table("u", bits), 4).tolist() == [values]


def reader() -> Callable[[Path, str, int], np.ndarray]:
    """The example reader of the specification."""
    source = block("python", "A reader in 40 lines")
    assert len(source.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(compile(source, "docs/spec.md", "exec"), names)
    return names["read"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("shard_bytes", [1 << 30, 200])
@pytest.mark.parametrize("parameter", ["a.weight", "b.experts"])
@pytest.mark.parametrize("bits", tiny.BITS)
def test_the_reader_of_the_specification(tmp_path: Path, shard_bytes: int, parameter: str, bits: int) -> None:
    check_the_reader(tiny.write(tmp_path / "out", shard_bytes), parameter, bits)


@pytest.mark.parametrize("bits", tiny.CELLS.bits)
def test_the_reader_of_the_specification_reads_cells(tmp_path: Path, bits: int) -> None:
    check_the_reader(tiny.write_cells(tmp_path / "out"), "c.weight", bits)


@pytest.mark.parametrize("bits", tiny.COMPACT.bits)
def test_the_reader_of_the_specification_reads_compact(tmp_path: Path, bits: int) -> None:
    check_the_reader(tiny.write_compact(tmp_path / "out"), "d.weight", bits)


def check_the_reader(folder: Path, parameter: str, bits: int) -> None:
    """The same values, to the last bit, as ours."""
    overlay = Overlay.open(folder)
    spec = overlay.weights[parameter]
    planes = [
        np.unpackbits(plane, axis=1, bitorder="little")[:, : spec.columns].astype(np.int64)
        for plane in overlay.planes(parameter, bits)
    ]
    codes = sum(plane << (bits - 1 - k) for k, plane in enumerate(planes))
    expected = np.take_along_axis(overlay.table(parameter, bits), codes, axis=1).reshape(spec.shape)
    np.testing.assert_array_equal(reader()(folder, parameter, bits), expected)


def test_every_config_key_is_described() -> None:
    described = set(re.findall(r"^\| `(\w+)`", SPEC, re.MULTILINE))
    assert set(KEYS) | set(WEIGHT_KEYS) <= described
