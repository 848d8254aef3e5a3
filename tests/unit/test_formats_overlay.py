"""Reading: round trips, laziness, sizes by hand, checksums, and files that change or link."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from everybit.errors import ChecksumError, FormatError, PrecisionError
from everybit.formats import CODEBOOKS, Overlay, OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from tests.unit import formats_tiny as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("overlay") / "out")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 200, 1])
def test_every_tensor_comes_back(tmp_path: Path, shard_bytes: int) -> None:
    with Overlay.open(tiny.write(tmp_path / "out", shard_bytes)) as overlay:
        expected = tiny.arrays()
        assert overlay.names() == sorted(expected)
        assert overlay.plain_names() == ["norm.weight", "scale"]
        for name, array in expected.items():
            found = overlay.tensor(name)
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype
            assert not found.flags.writeable
            assert overlay.spec_of(name) == tiny.TENSORS[name]
        overlay.verify_all()


def test_members(folder: Path) -> None:
    overlay = Overlay.open(str(folder))
    assert overlay.folder == folder
    assert overlay.config["model_type"] == "llama"
    assert overlay.quantization.provenance == {"seed": 0}
    assert overlay.weights == {"a.weight": tiny.TABLE, "b.experts": tiny.AFFINE}
    assert overlay.bits == (2, 3, 4)
    assert overlay.metadata == {"format": "pt"}
    assert overlay.dtype_of("norm.weight") == "BF16"
    assert overlay.sizes().parameters == 120 + 96


def test_open_reads_no_data_and_a_precision_reads_only_its_own(folder: Path) -> None:
    overlay = Overlay.open(folder)
    overlay.sizes(), overlay.names(), overlay.dtype_of("scale")
    assert overlay.touched == set()
    planes = overlay.planes("a.weight", 2)
    assert overlay.touched == {"a.weight_plane0", "a.weight_plane1"}
    assert [(plane.shape, plane.dtype) for plane in planes] == [((6, 3), np.uint8)] * 2
    overlay.table("a.weight", 3)
    assert overlay.touched == {"a.weight_plane0", "a.weight_plane1", "a.weight_lut3"}


def test_experts_come_as_rows(folder: Path) -> None:
    overlay, stored = Overlay.open(folder), tiny.arrays()
    planes = overlay.planes("b.experts", 3)
    assert [plane.shape for plane in planes] == [(6, 2)] * 3
    np.testing.assert_array_equal(planes[1], stored["b.experts_plane1"].reshape(6, 2))
    expected = CODEBOOKS["affine"].expand({"affine3": stored["b.experts_affine3"]}, 3)
    np.testing.assert_array_equal(overlay.table("b.experts", 3), expected)
    np.testing.assert_array_equal(overlay.table("a.weight", 2), stored["a.weight_lut2"].astype(np.float32))


def test_sizes_by_hand(folder: Path) -> None:
    overlay = Overlay.open(folder)
    # a: a plane is 6 x 3 = 18 bytes, a b-bit table 6 x 2^b x 2; b: a plane is 6 x 2 = 12 bytes, a codebook 6 x 2 x 4
    # stored: 4 planes each, tables for 2, 3, 4 bits (48 + 96 + 192), three affine codebooks
    sizes = overlay.sizes()
    assert (sizes.parameters, sizes.plain_bytes) == (216, 7 * 2 + 4)
    assert sizes.rows[2].bytes - 18 == (2 * 18 + 48) + (2 * 12 + 48) == 156
    assert sizes.rows[4].bytes - 18 == (4 * 18 + 192) + (4 * 12 + 48) == 360
    assert sizes.rows[4].bpw == pytest.approx(360 * 8 / 216)
    assert sizes.stored_bytes == 4 * 18 + 336 + 4 * 12 + 3 * 48 + 18
    assert overlay.touched == set()
    assert sizes.stored_bpw == pytest.approx((4 * 18 + 336 + 4 * 12 + 3 * 48) * 8 / 216)


def test_a_weight_with_its_own_precisions(tmp_path: Path) -> None:
    head = WeightSpec("head", (4, 8), (8,))
    body = WeightSpec("body", (4, 8), (2, 3))
    config = {"quantization_config": QuantizationConfig((2, 3), "table", {"body": body, "head": head}).to_dict()}
    specs = {**body.tensors(), **head.tensors("F32")}
    with OverlayWriter(tmp_path / "out", specs, config) as writer:
        for name, spec in specs.items():
            writer.write(name, np.zeros(spec.shape, spec.numpy))
        writer.finish()
    overlay = Overlay.open(tmp_path / "out")
    assert overlay.bits == (2, 3)
    # body: 2 planes of 4 bytes and 4 x 4 halves; head, always at 8 bits: 8 planes of 4 bytes and 4 x 256 floats
    assert overlay.sizes().rows[2].bytes == (2 * 4 + 32) + (8 * 4 + 4096)
    assert overlay.table("head", 8).shape == (4, 256)
    with pytest.raises(PrecisionError, match="bits 2 asked, weight 'head' has 8: pass one of these"):
        overlay.planes("head", 2)
    with pytest.raises(PrecisionError, match="bits 8 asked, the overlay has 2, 3: pass one of these"):
        overlay.table("body", 8)


@pytest.mark.parametrize("call", ["planes", "table"])
def test_a_precision_that_is_not_there(folder: Path, call: str) -> None:
    overlay = Overlay.open(folder)
    message = "bits 5 asked, the overlay has 2, 3, 4: pass one of these or quantize again with --bits 2-5"
    with pytest.raises(PrecisionError, match=message):
        getattr(overlay, call)("a.weight", 5)
    assert overlay.touched == set()


def test_unknown_names(folder: Path) -> None:
    overlay = Overlay.open(folder)
    for call in (overlay.tensor, overlay.dtype_of, overlay.spec_of):
        with pytest.raises(FormatError, match=r"has no tensor 'nope': names\(\) lists what it has"):
            call("nope")
    with pytest.raises(FormatError, match=r"has no quantized weight 'norm\.weight': weights lists its 2"):
        overlay.planes("norm.weight", 2)


def _damage(folder: Path, name: str) -> None:
    """Flips one bit of a tensor's data."""
    with Overlay.open(folder) as overlay:
        shard = overlay._shard_of[name]
    with shard.path.open("r+b") as file:
        file.seek(shard.entries[name].begin)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_tensor_is_found_at_its_first_touch(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "out", 200)
    _damage(folder, "a.weight_plane1")
    overlay = Overlay.open(folder)
    overlay.planes("b.experts", 4)
    with pytest.raises(
        ChecksumError, match=r"model-0000.-of-0000.\.safetensors: tensor 'a.weight_plane1': its sha256 is .*expected"
    ):
        overlay.planes("a.weight", 2)
    with pytest.raises(ChecksumError):
        overlay.tensor("a.weight_plane1")
    with pytest.raises(ChecksumError):
        overlay.verify_all()
    Overlay.open(folder, verify=False).planes("a.weight", 2)


def test_each_tensor_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = hashlib.sha256
    monkeypatch.setattr("hashlib.sha256", lambda data: hashed.append(1) or real(data))
    overlay = Overlay.open(folder)
    assert not hashed
    for _ in range(3):
        overlay.planes("a.weight", 3), overlay.table("a.weight", 3)
    assert len(hashed) == 4


def test_padding_bits_must_be_zero(tmp_path: Path) -> None:
    tensors = tiny.arrays()
    tensors["a.weight_plane1"][5, 2] |= 0x10
    overlay = Overlay.open(tiny.write(tmp_path / "out", tensors=tensors))
    overlay.tensor("a.weight_plane1")
    with pytest.raises(FormatError, match=r"'a\.weight_plane1': bits after column 20 are set, expected zero padding"):
        overlay.planes("a.weight", 2)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["a.weight_lut3", "b.experts_affine3"])
def test_codebooks_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    tensors = tiny.arrays()
    tensors[name][1, -1] = value
    overlay = Overlay.open(tiny.write(tmp_path / "out", tensors=tensors))
    parameter = name.rpartition("_")[0]
    with pytest.raises(FormatError, match=f"'{name}': row [15] has a value that is not finite"):
        overlay.table(parameter, 3)
    overlay.table(parameter, 2)


def test_an_affine_codebook_that_overflows(tmp_path: Path) -> None:
    tensors = tiny.arrays()
    tensors["b.experts_affine3"][:] = np.finfo(np.float32).max
    overlay = Overlay.open(tiny.write(tmp_path / "out", tensors=tensors))
    with pytest.raises(FormatError, match="row 0 has a value that is not finite"):
        overlay.table("b.experts", 3)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_after_opening(tmp_path: Path, mapped: bool) -> None:
    folder = tiny.write(tmp_path / "out")
    overlay = Overlay.open(folder)
    if mapped:
        overlay.tensor("scale")
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(FormatError, match=f"the file has {size - 10} bytes, had {size} when it was opened"):
        overlay.tensor("norm.weight")


def test_arrays_outlive_the_overlay(folder: Path) -> None:
    with Overlay.open(folder) as overlay:
        plane = overlay.planes("a.weight", 2)[0]
    np.testing.assert_array_equal(plane, tiny.arrays()["a.weight_plane0"])
    with pytest.raises(FormatError, match="is closed: keep the overlay open while reading 'scale'"):
        overlay.tensor("scale")


def test_a_hub_cache_snapshot(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--me--m" / "blobs", tmp_path / "models--me--m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny.write(tmp_path / "out", 200).iterdir())):
        path.rename(blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"hash{number}")
    overlay = Overlay.open(snapshot)
    overlay.verify_all()
    (tmp_path / "link").symlink_to(snapshot)
    Overlay.open(tmp_path / "link").verify_all()


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "data")
    (folder / "model.safetensors").symlink_to("data")
    Overlay.open(folder).verify_all()


def test_empty_and_scalar_plain_tensors(tmp_path: Path) -> None:
    specs = {**tiny.TENSORS, "empty": TensorSpec("F32", (0, 3)), "flag": TensorSpec("BOOL", (2,))}
    values = {**tiny.arrays(), "empty": np.zeros((0, 3), np.float32), "flag": np.array([True, False])}
    with OverlayWriter(tmp_path / "out", specs, tiny.CONFIG) as writer:
        for name, array in values.items():
            writer.write(name, array)
        writer.finish()
    overlay = Overlay.open(tmp_path / "out")
    overlay.verify_all()
    assert overlay.tensor("empty").shape == (0, 3)
    assert not overlay.tensor("empty").flags.writeable
    assert overlay.tensor("scale").shape == ()
    np.testing.assert_array_equal(overlay.tensor("flag"), [True, False])
