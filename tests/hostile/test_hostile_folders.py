"""Folders and configs that lie, and folders that are something else: each gets its own sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from everybit.errors import FormatError
from everybit.formats import Overlay
from tests.hostile.craft import Folder, Shard, honest_tensors, refuse

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# What is not an overlay at all


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere does not exist, expected an overlay folder: check the path, or download")
    refuse(Path("zero\0byte"), "does not exist, expected an overlay folder")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse(tmp_path / "model.safetensors", "is a file, expected an overlay folder: pass the folder that holds it")


def test_an_empty_folder(tmp_path: Path) -> None:
    refuse(tmp_path, r"has no config\.json, expected an overlay folder: run everybit quantize to make one")


def test_a_plain_model(tmp_path: Path) -> None:
    crafted = Folder()
    del crafted.config["quantization_config"]
    refuse(crafted.save(tmp_path / "o"), "is a model but not an overlay: run everybit quantize .*o to make one")


def test_a_model_of_another_quantizer(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    refuse(crafted.save(tmp_path / "o"), "is quantized with 'gptq', not with everybit: run everybit quantize on the")


def test_an_original_any_precision_checkpoint(tmp_path: Path) -> None:
    config = {"model_type": "llama", "anyprec": {"seed_precision": 3, "parent_precision": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 qweight")
    refuse(
        tmp_path,
        "is an original Any-Precision checkpoint, not an everybit overlay: run everybit import ",
    )


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, Folder().config])
def test_a_folder_of_pickles(tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    refuse(tmp_path, r"holds its tensors as pickle \('pytorch_model\.bin'\), which everybit never loads: convert")


# config.json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", r"config\.json holds a JSON list, expected an object"),
        (b"\xff\xfe", r"config\.json is not UTF-8 text \(byte 0\)"),
        (b'{"a": 1, "a": 2}', r"config\.json has the key 'a' twice"),
        (b'{"a": ' + b"[" * 100_000, r"config\.json is nested too deeply"),
        (b"", r"config\.json is not valid JSON"),
    ],
)
def test_a_config_that_is_no_config(tmp_path: Path, text: bytes, message: str) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / "config.json").write_bytes(text)
    refuse(folder, message)


def test_a_config_of_a_hundred_megabytes(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    os.truncate(folder / "config.json", 100_000_001)  # sparse: takes no room
    refuse(folder, r"config\.json has 100000001 bytes, expected at most 100000000")


def test_a_newer_format(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.quantization.update(format_version=4, bits="a new syntax", new_key=1)
    refuse(
        crafted.save(tmp_path / "o"),
        r"config\.json: quantization_config: format_version 4 arrived, this everybit reads up to 3: "
        "this file needs a newer everybit, upgrade it",
    )


LIES: list[tuple[str, Any, str]] = [
    ("more bits", {"bits": [2, 3, 4]}, r"tensor 'a\.weight_plane3' is missing, the config says weight 'a\.weight' has"),
    ("fewer bits", {"bits": [2]}, r"tensor 'e\.weight_affine3' belongs to no weight and precision in the config"),
    ("a hole in bits", {"bits": [3]}, r"tensor 'e\.weight_affine2' belongs to no weight and precision in the config"),
    ("other kind", {"codebook": "affine"}, r"tensor 'a\.weight_affine2' is missing, .* codebook affine"),
    (
        "other rows",
        {"weights": {"a.weight": {"shape": [4, 16]}}},
        r"tensor 'a\.weight_plane0' is U8 \[3, 2\], expected U8 \[4, 2\] from the config's shape \[4, 16\]",
    ),
    ("other columns", {"weights": {"a.weight": {"shape": [3, 17]}}}, r"expected U8 \[3, 3\] from the config's shape"),
    ("other dimensions", {"weights": {"a.weight": {"shape": [1, 3, 16]}}}, r"expected U8 \[1, 3, 2\]"),
    (
        "a weight not listed",
        {"weights": {"a.weight": {"shape": [3, 16]}}},
        r"tensor 'e\.weight_\w+' belongs to no weight and precision in the config",
    ),
    ("a weight of another name", {"weights": {"z": {"shape": [3, 16]}}}, "tensor 'z_plane0' is missing"),
    (
        "quantized and plain",
        {"weights": {"norm.weight": {"shape": [1, 5]}}},
        r"'norm\.weight' is stored plain and also",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in LIES], ids=[case[0] for case in LIES])
def test_configs_that_lie(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    crafted = Folder()
    crafted.quantization.update(change)
    refuse(crafted.save(tmp_path / "o"), message)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("a.weight_plane0", "I8", r"'a\.weight_plane0' is I8 \[3, 2\], expected U8 \[3, 2\]"),
        ("a.weight_lut2", "BF16", r"'a\.weight_lut2' is BF16 \[3, 4\], expected F16 or F32 \[3, 4\]"),
        ("e.weight_affine3", "I32", r"'e\.weight_affine3' is I32 \[2, 2, 2\], expected F32 \[2, 2, 2\]"),
    ],
)
def test_wrong_dtypes(tmp_path: Path, name: str, dtype: str, message: str) -> None:
    crafted = Folder()
    crafted.shard.header[name]["dtype"] = dtype
    refuse(crafted.save(tmp_path / "o"), message)


def test_wrong_shape_of_the_same_size(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.shard.header["a.weight_plane0"]["shape"] = [2, 3]
    refuse(crafted.save(tmp_path / "o"), r"'a\.weight_plane0' is U8 \[2, 3\], expected U8 \[3, 2\]")


def test_mislabelled_planes_are_caught_by_their_checksums(tmp_path: Path) -> None:
    crafted = Folder()
    header = crafted.shard.header
    header["a.weight_plane0"], header["a.weight_plane1"] = header["a.weight_plane1"], header["a.weight_plane0"]
    refuse(crafted.save(tmp_path / "o"), r"tensor 'a\.weight_plane0': its sha256 is")


def test_reserved_names_of_unlisted_weights(tmp_path: Path) -> None:
    for name in ("x_plane0", "x_lut2", "x_affine8", "a.weight_plane3"):
        crafted = Folder()
        crafted.shards["model.safetensors"] = Shard({**honest_tensors(), name: ("U8", [1], b"\0")})
        refuse(crafted.save(tmp_path / name), f"tensor '{name}' belongs to no weight and precision in the config")


def test_names_of_a_later_version_are_reserved_from_then_on(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.shards["model.safetensors"] = Shard({**honest_tensors(), "x_cells5": ("U8", [1], b"\0")})
    Overlay.open(crafted.save(tmp_path / "one")).verify_all()
    crafted.quantization["format_version"] = 2
    refuse(crafted.save(tmp_path / "two"), "tensor 'x_cells5' belongs to no weight and precision in the config")


# Codebooks of kind cells

RECORDS: list[tuple[str, int, bytes, str]] = [
    ("a ladder of 9", 39, b"\x80", "row 0 has 8, expected a nibble of 0 to 7"),
    ("a ladder of 16", 32, b"\x0f", "row 0 has 15, expected a nibble of 0 to 7"),
    ("a negative step", 40, b"\0\0\x80\xbf", "row 0 has -1.0, expected a finite step, 0 or more"),
    ("a step that is no number", 40, b"\0\0\xc0\x7f", "row 0 has nan, expected a finite step"),
    ("an infinite step", 40, b"\0\0\x80\x7f", "row 0 has inf, expected a finite step"),
    ("an infinite centre", 0, b"\0\x7c", "row 0 has a value that is not finite"),
    ("a centre that is no number", 30, b"\0\x7e", "row 0 has a value that is not finite"),
    ("values that overflow", 40, b"\xff\xff\x7f\x7f", "row 0 has a value that is not finite"),
]


@pytest.mark.parametrize(
    ("place", "data", "message"), [case[1:] for case in RECORDS], ids=[case[0] for case in RECORDS]
)
def test_records_that_lie(tmp_path: Path, place: int, data: bytes, message: str) -> None:
    tensors = honest_tensors(kind="cells")
    dtype, shape, honest = tensors["c.weight_cells6"]
    tensors["c.weight_cells6"] = (dtype, shape, honest[:place] + data + honest[place + len(data) :])
    crafted = Folder(kind="cells")
    Overlay.open(crafted.save(tmp_path / "honest")).verify_all()
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), rf"tensor 'c\.weight_cells6': {message}")


@pytest.mark.parametrize(("dtype", "shape"), [("F16", [2, 22]), ("U8", [1, 88]), ("U8", [2, 4, 11])])
def test_records_of_another_shape_or_dtype(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    tensors = honest_tensors(kind="cells")
    tensors["c.weight_cells6"] = (dtype, shape, tensors["c.weight_cells6"][2])
    crafted = Folder(kind="cells")
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), r"'c\.weight_cells6' is .*, expected U8 \[2, 44\]")


# Codebooks of kind compact

COMPACT: list[tuple[str, str, int, bytes, str]] = [
    ("a ladder of 9", "cells", 23, b"\x80", "row 0 has 8, expected a nibble of 0 to 7"),
    ("a ladder of 16", "cells", 26 + 16, b"\x0f", "row 1 has 15, expected a nibble of 0 to 7"),
    ("a negative step", "cells", 24, b"\x80\xbf", "row 0 has -1.0, expected a finite step, 0 or more"),
    ("a step that is no number", "cells", 24, b"\xc0\x7f", "row 0 has nan, expected a finite step"),
    ("an infinite step", "cells", 26 + 24, b"\x80\x7f", "row 1 has inf, expected a finite step"),
    ("a step that overflows", "cells", 24, b"\x7f\x7f", "row 0 has a value that is not finite"),
    ("a negative scale", "scale", 4, b"\0\0\x80\xbf", "row 1 has -1.0, expected a finite scale, 0 or more"),
    ("a scale that is no number", "scale", 0, b"\0\0\xc0\x7f", "row 0 has nan, expected a finite scale"),
    ("an infinite scale", "scale", 0, b"\0\0\x80\x7f", "row 0 has inf, expected a finite scale"),
    ("a scale that overflows", "scale", 0, b"\xff\xff\x7f\x7f", "row 0 has a value that is not finite"),
]


@pytest.mark.parametrize(
    ("suffix", "place", "data", "message"), [case[1:] for case in COMPACT], ids=[case[0] for case in COMPACT]
)
def test_compact_numbers_that_lie(tmp_path: Path, suffix: str, place: int, data: bytes, message: str) -> None:
    tensors = honest_tensors("compact")
    dtype, shape, honest = tensors[f"c.weight_{suffix}"]
    tensors[f"c.weight_{suffix}"] = (dtype, shape, honest[:place] + data + honest[place + len(data) :])
    crafted = Folder(kind="compact")
    Overlay.open(crafted.save(tmp_path / "honest")).verify_all()
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), rf"tensors 'c\.weight_scale' and 'c\.weight_(lut4|cells)': {message}")
    with Overlay.open(tmp_path / "o") as overlay:
        for read in (overlay.table, overlay.grid):  # the engine asks for the one or the other
            with pytest.raises(FormatError, match=message):
                read("c.weight", 6)


@pytest.mark.parametrize("kind", ["cells", "compact"])
def test_kinds_in_an_earlier_version(tmp_path: Path, kind: str) -> None:
    crafted = Folder(kind=kind)
    crafted.quantization["format_version"] -= 1
    refuse(crafted.save(tmp_path / "o"), "arrived beside a codebook kind that came with")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("scale", "U8", [2, 4], r"'c\.weight_scale' is U8 \[2, 4\], expected F32 \[2, 1\]"),
        ("scale", "F16", [2, 2], r"'c\.weight_scale' is F16 \[2, 2\], expected F32 \[2, 1\]"),
        ("scale", "F32", [2], r"'c\.weight_scale' is F32 \[2\], expected F32 \[2, 1\]"),
        ("lut4", "U8", [2, 16], r"'c\.weight_lut4' is U8 \[2, 16\], expected I8 \[2, 16\]"),
        ("lut4", "F16", [2, 8], r"'c\.weight_lut4' is F16 \[2, 8\], expected I8 \[2, 16\]"),
        ("cells", "I8", [2, 26], r"'c\.weight_cells' is I8 \[2, 26\], expected U8 \[2, 26\]"),
        ("cells", "U8", [1, 52], r"'c\.weight_cells' is U8 \[1, 52\], expected U8 \[2, 26\]"),
    ],
)
def test_compact_of_another_shape_or_dtype(
    tmp_path: Path, name: str, dtype: str, shape: list[int], message: str
) -> None:
    tensors = honest_tensors("compact")
    tensors[f"c.weight_{name}"] = (dtype, shape, tensors[f"c.weight_{name}"][2])
    crafted = Folder(kind="compact")
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), message)


@pytest.mark.parametrize("name", ["scale", "lut4", "cells"])
def test_compact_without_a_part(tmp_path: Path, name: str) -> None:
    tensors = honest_tensors("compact")
    del tensors[f"c.weight_{name}"]
    crafted = Folder(kind="compact")
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), rf"tensor 'c\.weight_{name}' is missing, the config says weight 'c\.weight'")


@pytest.mark.parametrize("name", ["a.weight_scale", "e.weight_cells", "c.weight_lut3", "c.weight_cells6"])
def test_compact_parts_that_no_weight_has(tmp_path: Path, name: str) -> None:
    crafted = Folder(kind="compact")
    crafted.shards["model.safetensors"] = Shard({**honest_tensors("compact"), name: ("U8", [1], b"\0")})
    refuse(crafted.save(tmp_path / "o"), f"tensor '{name}' belongs to no weight and precision in the config")


def test_cells_where_all_bits_are_low(tmp_path: Path) -> None:
    tensors = {name: t for name, t in honest_tensors("compact").items() if name[-1] not in "45" or "plane" not in name}
    crafted = Folder(kind="compact")
    crafted.quantization["weights"]["c.weight"]["bits"] = [4]
    crafted.shards["model.safetensors"] = Shard(tensors)
    refuse(crafted.save(tmp_path / "o"), r"tensor 'c\.weight_cells' belongs to no weight and precision in the config")


def test_a_plain_tensor_may_be_called_scale(tmp_path: Path) -> None:
    for kind in ("cells", "compact"):
        crafted = Folder(kind=kind)
        extra = {"x.weight_scale": ("U8", [1], b"\0"), "x_cells": ("U8", [1], b"\0")}
        crafted.shards["model.safetensors"] = Shard({**honest_tensors(kind), **extra})
        overlay = Overlay.open(crafted.save(tmp_path / kind))
        overlay.verify_all()
        assert set(extra) <= set(overlay.plain_names())


# The index and its shards


def test_no_shard_at_all(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.shards = {}
    refuse(crafted.save(tmp_path / "o"), r"has no model\.safetensors and no model\.safetensors\.index\.json")


def test_a_missing_shard(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    del crafted.shards[SECOND]
    refuse(crafted.save(tmp_path / "o"), rf"{SECOND} is missing, {INDEX} lists it: download the folder again")


def test_a_missing_index(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    crafted.index = None
    refuse(crafted.save(tmp_path / "o"), f"has the shards {FIRST}, {SECOND} and no {INDEX}")


def test_an_extra_shard(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    crafted.shards["model.safetensors"] = Shard({})
    refuse(crafted.save(tmp_path / "o"), rf"model\.safetensors is not listed in {INDEX}: delete it")


def test_an_index_that_leaves_out_a_tensor(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    assert crafted.index
    del crafted.index["weight_map"]["norm.weight"]
    refuse(crafted.save(tmp_path / "o"), rf"{FIRST}: tensor 'norm\.weight' is not listed in {INDEX}")


def test_an_index_that_invents_a_tensor(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    assert crafted.index
    crafted.index["weight_map"]["ghost"] = FIRST
    refuse(crafted.save(tmp_path / "o"), f"{FIRST}: tensor 'ghost' is missing, {INDEX} lists it")


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    assert crafted.index
    crafted.index["weight_map"]["norm.weight"] = SECOND
    refuse(crafted.save(tmp_path / "o"), rf"{FIRST}: tensor 'norm\.weight' is listed in {INDEX} for {SECOND}")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    both = {k: v for k, v in honest_tensors().items() if k.startswith("e.") or k == "norm.weight"}
    crafted.shards[SECOND] = Shard(both)
    refuse(crafted.save(tmp_path / "o"), rf"{SECOND}: tensor 'norm\.weight' is listed in {INDEX} for {FIRST}")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors"]
)
def test_shard_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    Shard({k: v for k, v in honest_tensors().items() if k.startswith("e.")}).save(tmp_path / "outside.safetensors")
    crafted = Folder(split=True)
    assert crafted.index
    crafted.index["weight_map"] = {
        tensor: name if shard == SECOND else shard for tensor, shard in crafted.index["weight_map"].items()
    }
    refuse(
        crafted.save(tmp_path / "o"), r"index\.json: the shard name '.*' arrived, expected a plain \.safetensors name"
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    crafted = Folder(split=True)
    crafted.index = {"weight_map": weight_map}
    refuse(crafted.save(tmp_path / "o"), "weight_map .* arrived, expected tensor names with shard names")


# Links and special files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("relative", [False, True])
def test_links_out_of_the_folder(tmp_path: Path, name: str, relative: bool) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(Path("..") / "secret" if relative else tmp_path / "secret")
    refuse(folder, rf"{name} links to .*secret, outside the folder: replace the link by the file itself")


def test_a_hub_cache_allows_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot, other = tmp_path / "m" / "snapshots" / "abc", tmp_path / "other" / "blobs"
    snapshot.mkdir(parents=True)
    other.mkdir(parents=True)
    Folder().save(snapshot)
    (snapshot / "model.safetensors").rename(other / "hash")
    (snapshot / "model.safetensors").symlink_to(other / "hash")
    refuse(snapshot, r"model\.safetensors links to .*hash, outside the folder")


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refuse(folder, r"model\.safetensors cannot be opened \(.*\): make it readable")


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refuse(folder, r"model\.safetensors is not a regular file")


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refuse(folder, r"model\.safetensors is not a regular file")


def test_a_refused_folder_leaves_no_file_open(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    crafted.shards[SECOND].data += b"x"
    folder = crafted.save(tmp_path / "o")
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(FormatError):
            Overlay.open(folder)
    assert len(list(descriptors.iterdir())) == before
