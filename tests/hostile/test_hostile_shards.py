"""Safetensors files that lie: each is refused with a sentence that names the file, the tensor and what is wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everybit.errors import ChecksumError
from everybit.formats import Overlay
from tests.hostile.craft import Folder, Shard, refuse

NAME = "model.safetensors"


def test_the_honest_overlay_opens(tmp_path: Path) -> None:
    Overlay.open(Folder().save(tmp_path / "one")).verify_all()
    Overlay.open(Folder(split=True).save(tmp_path / "two")).verify_all()


def test_every_message_about_a_shard_names_its_file(tmp_path: Path) -> None:
    crafted = Folder(split=True)
    crafted.shards["model-00002-of-00002.safetensors"].data += b"x"
    assert refuse(crafted.save(tmp_path / "o"), "bytes belong to no").startswith(
        str(tmp_path / "o" / "model-00002-of-00002.safetensors")
    )


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_the_length(tmp_path: Path, size: int) -> None:
    folder = Folder().save(tmp_path / "o")
    os.truncate(folder / NAME, size)
    refuse(folder, rf"model\.safetensors has {size} bytes, expected at least 8 for a safetensors file")


def test_truncated_in_the_header(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    os.truncate(folder / NAME, 100)
    refuse(folder, r"the header length says \d+ bytes, the file has 92 after it: it is truncated, download it again")


def test_truncated_in_the_data(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    size = (folder / NAME).stat().st_size
    os.truncate(folder / NAME, size - 1)
    refuse(folder, rf"the tensors end at byte {size}, the file has {size - 1} \(it is truncated\): download it again")


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    crafted = Folder()
    crafted.shard.data += b"hidden"
    refuse(crafted.save(tmp_path / "o"), r"the tensors end at byte \d+, the file has \d+ \(bytes belong to no tensor\)")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_huge_header_length(tmp_path: Path, length: int) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / NAME).write_bytes(struct.pack("<Q", length) + (folder / NAME).read_bytes()[8:])
    refuse(folder, f"the header length says {length} bytes, expected at most 100000000")


def test_a_header_length_of_zero(tmp_path: Path) -> None:
    folder = Folder().save(tmp_path / "o")
    (folder / NAME).write_bytes(bytes(8) + (folder / NAME).read_bytes()[8:])
    refuse(folder, "the header length is 0, the file was never finished: run everybit quantize with --resume")


def _edit(name: str, **fields: Any) -> Callable[[Shard], None]:
    return lambda shard: shard.header[name].update(fields)


def _hole(shard: Shard) -> None:
    shard.data += bytes(4)
    begin, end = shard.header["e.weight_plane2"]["data_offsets"]
    shard.header["e.weight_plane2"]["data_offsets"] = [begin + 4, end + 4]


def _overlap(shard: Shard) -> None:
    shard.header["a.weight_plane1"]["data_offsets"] = shard.header["a.weight_plane0"]["data_offsets"]


def _leading_hole(shard: Shard) -> None:
    shard.data = bytes(8) + shard.data
    for name, entry in shard.header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [place + 8 for place in entry["data_offsets"]]


def _misaligned(shard: Shard) -> None:
    raw = json.dumps(shard.header).encode()
    shard.raw_header = raw.ljust(-(-(len(raw) + 8) // 64) * 64 - 7)


HEADERS: dict[str, tuple[Callable[[Shard], Any], str]] = {
    "overlapping": (_overlap, r"tensor 'a\.weight_plane1' overlaps 'a\.weight_plane0': it begins at byte \d+ of"),
    "hole": (_hole, r"tensor 'e\.weight_plane2' leaves a hole after 'e\.weight_plane1': it begins at byte \d+"),
    "hole at the start": (
        _leading_hole,
        r"leaves a hole after the header: it begins at byte 8 of the data, expected 0",
    ),
    "out of range": (
        _edit("e.weight_plane2", data_offsets=[10**9, 10**9 + 4]),
        r"tensor 'e\.weight_plane2' leaves a hole after",
    ),
    "offsets beyond 64 bits": (
        _edit("e.weight_plane2", data_offsets=[10**4000, 10**4000 + 4]),
        r"tensor 'e\.weight_plane2' leaves a hole .*\(4001 characters\)",
    ),
    "more bytes than the shape": (
        _edit("a.weight_plane0", shape=[3, 1]),
        r"tensor 'a\.weight_plane0': data_offsets hold 6 bytes, expected 3 for U8 \[3, 1\]",
    ),
    "shape overflows": (_edit("a.weight_plane0", shape=[2**40, 2**40]), r"overflows 2\^63 bytes"),
    "shape wraps to the right size": (_edit("a.weight_plane0", shape=[2**64 + 3, 2]), r"overflows 2\^63 bytes"),
    "empty but endless shape": (_edit("a.weight_plane0", shape=[0, 2**62, 2**62]), r"overflows 2\^63 bytes"),
    "many dimensions": (_edit("a.weight_plane0", shape=[1] * 65), "65 dimensions, expected at most 32"),
    "negative shape": (_edit("a.weight_plane0", shape=[-3, -2]), r"shape \[-3, -2\] arrived, expected non-negative"),
    "boolean shape": (_edit("a.weight_plane0", shape=[True, 6]), r"shape \[True, 6\] arrived, expected non-negative"),
    "fractional shape": (_edit("a.weight_plane0", shape=[3.0, 2]), r"shape \[3\.0, 2\] arrived, expected non-neg"),
    "shape is no list": (_edit("a.weight_plane0", shape="32"), "shape '32' arrived"),
    "negative offset": (
        _edit("a.weight_plane0", data_offsets=[-6, 0]),
        r"data_offsets \[-6, 0\] arrived, expected \[b",
    ),
    "backward offsets": (_edit("a.weight_plane0", data_offsets=[6, 0]), r"data_offsets \[6, 0\] arrived, expected \[b"),
    "three offsets": (_edit("a.weight_plane0", data_offsets=[0, 6, 6]), r"data_offsets \[0, 6, 6\] arrived"),
    "boolean offset": (_edit("a.weight_plane0", data_offsets=[False, 6]), r"data_offsets \[False, 6\] arrived"),
    "unknown dtype": (_edit("a.weight_plane0", dtype="F4"), r"'a\.weight_plane0': dtype 'F4' is unknown, expected one"),
    "dtype is no text": (_edit("a.weight_plane0", dtype=8), "dtype 8 arrived, expected a name such as U8"),
    "unknown field": (_edit("a.weight_plane0", stride=1), "expected dtype, shape and data_offsets"),
    "entry is no object": (lambda s: s.header.update(norm=3), "tensor 'norm': 3 arrived, expected dtype, shape and"),
    "missing field": (lambda s: s.header["norm.weight"].pop("dtype"), "expected dtype, shape and data_offsets"),
    "surrogate in a name": (
        lambda s: s.header.update({"x\ud800": s.header.pop("norm.weight")}),
        r"tensor 'x\\ud800': the name arrived, expected Unicode text",
    ),
    "metadata is no object": (lambda s: s.header.update(__metadata__=[]), r"__metadata__ \[\] arrived, expected names"),
    "metadata of numbers": (
        lambda s: s.header["__metadata__"].update(a=1),
        "__metadata__ .* expected names with texts",
    ),
    "surrogate in the metadata": (
        lambda s: s.header["__metadata__"].update(note="\ud800"),
        "__metadata__ 'note' is not valid Unicode",
    ),
    "misaligned": (_misaligned, r"it begins at byte \d+ of the file, expected a multiple of its item size 4"),
    "missing checksum": (
        lambda s: s.header["__metadata__"].pop("sha256:norm.weight"),
        r"tensor 'norm\.weight' has no sha256 in __metadata__, expected one for each tensor",
    ),
    "checksum is no hex": (
        lambda s: s.header["__metadata__"].update({"sha256:norm.weight": "Z" * 64}),
        r"tensor 'norm\.weight': sha256 'ZZZ.*' arrived, expected 64 lower-case hex digits",
    ),
    "checksum of nothing": (
        lambda s: s.header["__metadata__"].update({"sha256:ghost": "0" * 64}),
        "a sha256 for 'ghost', which it does not hold",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    change, message = HEADERS[case]
    crafted = Folder()
    change(crafted.shard)
    assert refuse(crafted.save(tmp_path / "o"), message).startswith(str(tmp_path / "o" / NAME))


TEXTS: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"\xff": 1}', r"the header is not UTF-8 text \(byte 2\)"),
    "not JSON": (b"{'a': 1}", r"the header is not valid JSON \(Expecting property name"),
    "two objects": (b"{}{}", r"the header is not valid JSON \(Extra data"),
    "a list": (b"[]", "the header holds a JSON list, expected an object"),
    "duplicate key": (b'{"a": 1, "b": {}, "a": 2}', "the header has the key 'a' twice, expected each key once"),
    "duplicate key inside": (b'{"a": {"dtype": "U8", "dtype": "F32"}}', "the header has the key 'dtype' twice"),
    "nested deeply": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "the header is nested too deeply"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", r"the header is not valid JSON \(Exceeds the limit"),
    "only spaces": (b" " * 64, "the header is not valid JSON"),
    "no tensors": (b"{}", r"\(bytes belong to no tensor\)"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_headers_that_are_no_header(tmp_path: Path, case: str) -> None:
    crafted = Folder()
    crafted.shard.raw_header, message = TEXTS[case]
    refuse(crafted.save(tmp_path / "o"), rf"model\.safetensors.*{message}")


def test_broken_checksum(tmp_path: Path) -> None:
    crafted = Folder()
    begin = crafted.shard.header["norm.weight"]["data_offsets"][0]
    data = bytearray(crafted.shard.data)
    data[begin] ^= 1
    crafted.shard.data = bytes(data)
    overlay = Overlay.open(crafted.save(tmp_path / "o"))
    overlay.planes("a.weight", 3)
    with pytest.raises(
        ChecksumError,
        match=r"model\.safetensors: tensor 'norm\.weight': its sha256 is .*, expected .*: the file is damaged",
    ):
        overlay.tensor("norm.weight")
