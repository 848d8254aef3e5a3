"""One safetensors file: its header checked in full, its tensors as read-only views on a memory map.

Layout: u64 little-endian header length, JSON header, data. Nothing is trusted: lengths, names, dtypes, shapes and
offsets are checked against each other and against the file before a byte of data is mapped.
Source: the format text in the README of huggingface/safetensors; we also refuse what it leaves open (duplicate keys,
views that would be misaligned).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from everybit.errors import FormatError
from everybit.formats.files import open_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import TensorSpec, is_tensor_name, is_text, show

HEADER_BYTES_LIMIT = 100_000_000  # the limit of the safetensors library
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `begin` and `end` count bytes from the start of the file."""

    spec: TensorSpec
    begin: int
    end: int


class Shard:
    """A safetensors file whose header has been checked.

    Raises: FormatError
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self._file: BinaryIO | None = open_inside(folder, name)
        self._map: mmap.mmap | None = None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header, start = _read_header(self._file, self.size, self.path)
            self.metadata = _parse_metadata(header.pop("__metadata__", {}), self.path)
            self.entries = _parse_entries(header, start, self.size, self.path)
        except BaseException:
            self.close()
            raise

    def view(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view on the file; BF16 comes as uint16.

        Raises: FormatError when the file was cut short since it was opened (best effort: reading a page that
        vanishes later still kills the process, as with any memory map)
        """
        entry = self.entries[name]
        if self._file is None:
            raise FormatError(f"{self.path} is closed: keep the overlay open while reading {show(name)}")
        size = os.fstat(self._file.fileno()).st_size
        if size != self.size:
            raise FormatError(
                f"{self.path}: tensor {show(name)}: the file has {size} bytes, had {self.size} when it was opened: "
                "open it again, or download it again"
            )
        if entry.spec.nbytes == 0:
            empty = np.empty(entry.spec.shape, entry.spec.numpy)
            empty.flags.writeable = False
            return empty
        if self._map is None:
            try:
                self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise FormatError(
                    f"{self.path} cannot be mapped ({error}): open it again, or move it to a disk"
                ) from None
        count = entry.spec.nbytes // entry.spec.itemsize
        return np.frombuffer(self._map, entry.spec.numpy, count, entry.begin).reshape(entry.spec.shape)

    def close(self) -> None:
        """Closes the file; views already handed out stay valid."""
        if self._file is not None:
            self._file.close()
        self._file = self._map = None


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise FormatError(f"{path} has {size} bytes, expected at least 8 for a safetensors file: download it again")
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES_LIMIT:
        raise FormatError(
            f"{path}: the header length says {length} bytes, expected at most {HEADER_BYTES_LIMIT}: download it again"
        )
    if length == 0:
        raise FormatError(
            f"{path}: the header length is 0, the file was never finished: run everybit quantize with --resume, "
            "or download it again"
        )
    if 8 + length > size:
        raise FormatError(
            f"{path}: the header length says {length} bytes, the file has {size - 8} after it: "
            "it is truncated, download it again"
        )
    return parse_object(file.read(length), f"{path}: the header"), 8 + length


def _parse_metadata(found: Any, path: Path) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{path}: __metadata__ {show(found)} arrived, expected names with texts: download it again")
    for key, value in found.items():
        if not is_text(key) or not is_text(value):
            raise FormatError(f"{path}: __metadata__ {show(key)} is not valid Unicode: download it again")
    return found


def _parse_entries(header: dict[str, Any], start: int, size: int, path: Path) -> dict[str, Entry]:
    entries = {name: _parse_entry(name, found, start, path) for name, found in header.items()}
    reached, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            kind = "overlaps" if entry.begin < reached else "leaves a hole after"
            raise FormatError(
                f"{path}: tensor {show(name)} {kind} {before}: "
                f"it begins at byte {show(entry.begin - start)} of the data, expected {reached - start}: "
                "download it again"
            )
        reached, before = entry.end, show(name)
    if reached != size:
        what = "it is truncated" if reached > size else "bytes belong to no tensor"
        raise FormatError(f"{path}: the tensors end at byte {reached}, the file has {size} ({what}): download it again")
    return entries


def _parse_entry(name: str, found: Any, start: int, path: Path) -> Entry:
    here = f"{path}: tensor {show(name)}"
    if not is_tensor_name(name):
        raise FormatError(f"{here}: the name arrived, expected Unicode text that is not empty: download it again")
    if not isinstance(found, dict) or set(found) != ENTRY_KEYS:
        raise FormatError(f"{here}: {show(found)} arrived, expected dtype, shape and data_offsets: download it again")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError(f"{here}: dtype {show(dtype)} arrived, expected a name such as U8: download it again")
    if not isinstance(shape, list) or not all(type(one) is int and one >= 0 for one in shape):
        raise FormatError(f"{here}: shape {show(shape)} arrived, expected non-negative integers: download it again")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(one) is int for one in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise FormatError(
            f"{here}: data_offsets {show(offsets)} arrived, expected [begin, end] with 0 <= begin <= end: "
            "download it again"
        )
    try:
        spec = TensorSpec(dtype, tuple(shape))
    except ValueError as error:
        raise FormatError(f"{here}: {error}: download it again, or upgrade everybit") from None
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise FormatError(
            f"{here}: data_offsets hold {show(end - begin)} bytes, expected {spec.nbytes} for {spec}: download it again"
        )
    if (start + begin) % spec.itemsize:
        raise FormatError(
            f"{here}: it begins at byte {show(start + begin)} of the file, expected a multiple of its item size "
            f"{spec.itemsize}: write it again with a safetensors library from 0.3 up"
        )
    return Entry(spec, start + begin, start + end)
