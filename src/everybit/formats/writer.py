"""Writing an overlay: any order, killable at any moment, always the same bytes in the end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from everybit.errors import OutputError, ShapeError
from everybit.formats.config import QuantizationConfig
from everybit.formats.inventory import INDEX_NAME, check_tensors
from everybit.formats.journal import JOURNAL_NAME, Journal
from everybit.formats.layout import ShardLayout, plan_layout
from everybit.formats.tensors import TensorSpec, show

CHUNK_BYTES = 16 << 20  # what is held beside the caller's arrays; large enough that system calls do not show
CONFIG_NAME = "config.json"


class OverlayWriter:
    """Writes the tensors of an overlay into `folder`, and resumes there after a kill.

    `tensors` fixes the layout (file order is its order, see layout.py); `config` is the content of config.json and
    must not change between a run and its resumption. `done` holds the keys of the groups already on disk; where
    `complete` is true an earlier run finished everything and only `finish()` may be called.

    Needs: a folder that is new or without a model, or one that the same arguments left unfinished;
           `close()` or a `with` block at the end
    Raises: OutputError, FormatError (config and tensors disagree)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Mapping[str, TensorSpec],
        config: Mapping[str, Any],
        shard_bytes: int = 2 << 30,
    ) -> None:
        self.folder = Path(folder)
        quantization = QuantizationConfig.from_dict(config.get("quantization_config", {}), "quantization_config")
        check_tensors(quantization, tensors, str(self.folder))
        self._config = json.dumps(config, indent=2).encode() + b"\n"
        self._layout = plan_layout(tensors, shard_bytes)
        self._slots = {slot.name: (shard, slot) for shard in self._layout for slot in shard.slots}
        self._checksums: dict[str, str] = {}
        self._files: dict[str, BinaryIO] = {}
        self._journal: Journal | None = None
        self.done: set[str] = set()
        self.complete = False
        with self._explain_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.complete = self._is_complete()
            if not self.complete:
                self._begin()

    def _begin(self) -> None:
        ours = {CONFIG_NAME, INDEX_NAME}
        names = sorted(name for name in os.listdir(self.folder) if name in ours or name.endswith(".safetensors"))
        if names and not (self.folder / JOURNAL_NAME).exists():
            raise OutputError(
                f"{self.folder} already holds a model ({show(names[0])}): choose a new folder, or delete it"
            )
        self._check_space()
        try:
            self._journal = Journal(self.folder, self._signature())
            for shard in self._layout:
                self._open_shard(shard)
            _sync_folder(self.folder)
            for key, checksums in self._journal.groups.items():
                if all(self._matches(name, recorded) for name, recorded in checksums.items()):
                    self.done.add(key)
                    self._checksums |= checksums
        except BaseException:
            self.close()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Writes one tensor. It counts for `finish()`; to survive a kill it must be part of a group.

        Raises: ShapeError, OutputError
        """
        with self._explain_errors():
            self._checksums[name] = self._write(name, array)

    def write_group(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes tensors, syncs them to disk, then notes `key` in the journal: from then on it is in `done`.

        Raises: ShapeError, OutputError
        """
        journal = self._require_open()
        if key in self.done:
            raise OutputError(f"group {show(key)} is already on disk in {self.folder}: skip the keys in done")
        with self._explain_errors():
            checksums = {name: self._write(name, array) for name, array in arrays.items()}
            for file in {self._slots[name][0].file for name in arrays}:
                os.fsync(self._files[file].fileno())
            journal.append(key, checksums)
        self._checksums |= checksums
        self.done.add(key)

    def finish(self) -> None:
        """Writes headers, index and, last, config.json; then removes the journal.

        Raises: OutputError when a tensor was never written
        """
        if self.complete:
            return
        self._require_open()
        missing = [name for name in self._slots if name not in self._checksums]
        if missing:
            raise OutputError(
                f"{self.folder}: {len(missing)} of {len(self._slots)} tensors were never written, {show(missing[0])} "
                "among them: write every tensor before finish()"
            )
        with self._explain_errors():
            for shard in self._layout:
                file = self._files[shard.file]
                os.fsync(file.fileno())  # data before the header that declares it valid
                _write_at(file, 0, shard.header(self._checksums))
                os.fsync(file.fileno())
            if len(self._layout) > 1:
                self._replace(INDEX_NAME, self._index())
            self._replace(CONFIG_NAME, self._config)
            (self.folder / JOURNAL_NAME).unlink()
            _sync_folder(self.folder)
        self.complete = True
        self.close()

    def close(self) -> None:
        """Closes the files; what `write_group` wrote stays and can be resumed."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._journal is not None:
            self._journal.close()
        self._journal = None

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> Journal:
        if self._journal is None:
            state = (
                "complete: call finish() and use it" if self.complete else "closed: make a new OverlayWriter to resume"
            )
            raise OutputError(f"{self.folder} is {state}")
        return self._journal

    def _write(self, name: str, array: NDArray[Any]) -> str:
        self._require_open()
        if name not in self._slots:
            raise ShapeError(f"tensor {show(name)} is not in the layout: name it in `tensors` when making the writer")
        if name in self._checksums:
            raise OutputError(f"tensor {show(name)} was already written to {self.folder}: write each tensor once")
        shard, slot = self._slots[name]
        if array.dtype != slot.spec.numpy or array.shape != slot.spec.shape:
            raise ShapeError(
                f"tensor {show(name)}: {array.dtype} {list(array.shape)} arrived, expected {slot.spec.numpy} "
                f"{list(slot.spec.shape)} ({slot.spec.dtype}): convert it first"
            )
        digest, place = hashlib.sha256(), slot.begin
        for chunk in _chunks(array):
            digest.update(chunk)
            _write_at(self._files[shard.file], place, chunk)
            place += len(chunk)
        return digest.hexdigest()

    def _open_shard(self, shard: ShardLayout) -> None:
        path = self.folder / shard.file
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b", buffering=0)
        self._files[shard.file] = file
        file.truncate(shard.size_bytes)

    def _matches(self, name: str, recorded: str) -> bool:
        if name not in self._slots:
            return False
        shard, slot = self._slots[name]
        digest, file = hashlib.sha256(), self._files[shard.file]
        file.seek(slot.begin)
        left = slot.spec.nbytes
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                return False
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest() == recorded

    def _is_complete(self) -> bool:
        """Whether an earlier run with the same arguments finished here (it was killed before its caller went on)."""
        if (self.folder / JOURNAL_NAME).exists() or not (self.folder / CONFIG_NAME).is_file():
            return False
        if (self.folder / CONFIG_NAME).read_bytes() != self._config:
            return False
        for shard in self._layout:
            path = self.folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.size_bytes:
                return False
            with path.open("rb") as file:
                found = file.read(shard.start)
            if not _same_but_checksums(found, shard.header({})):
                return False
        return True

    def _signature(self) -> str:
        digest = hashlib.sha256(self._config)
        for shard in self._layout:
            digest.update(shard.file.encode() + shard.header({}))
        return digest.hexdigest()

    def _index(self) -> bytes:
        total = sum(slot.spec.nbytes for _, slot in self._slots.values())
        weight_map = {name: shard.file for name, (shard, _) in sorted(self._slots.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, indent=2).encode() + b"\n"

    def _replace(self, name: str, content: bytes) -> None:
        """Writes a small file whole or not at all."""
        part = self.folder / (name + ".tmp")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / name)
        _sync_folder(self.folder)

    def _check_space(self) -> None:
        needed = 0
        for shard in self._layout:
            path = self.folder / shard.file
            blocks = getattr(path.stat(), "st_blocks", 0) if path.exists() else 0
            needed += max(shard.size_bytes - blocks * 512, 0)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.folder} needs {needed} more bytes, the disk has {free} free: free some, or use another"
            )

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                size = sum(shard.size_bytes for shard in self._layout)
                raise OutputError(
                    f"{self.folder}: the disk is full, the overlay needs {size} bytes in all: "
                    "free some and continue with --resume"
                ) from error
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}): choose another folder") from error


def _chunks(array: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of `array` in C order; copies only what is not contiguous, a piece at a time."""
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous:
        data = array.reshape(-1).view(np.uint8).data
        for begin in range(0, len(data), CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]
        return
    step = max(CHUNK_BYTES * array.shape[0] // array.nbytes, 1)
    for begin in range(0, array.shape[0], step):
        piece = np.ascontiguousarray(array[begin : begin + step])
        yield piece.reshape(-1).view(np.uint8).data


def _write_at(file: BinaryIO, place: int, data: bytes | memoryview) -> None:
    file.seek(place)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _same_but_checksums(found: bytes, expected: bytes) -> bool:
    """Whether two headers differ at most where `expected` holds the 64 zeros of a checksum to come."""
    if len(found) != len(expected):
        return False
    begin = 0
    while True:
        zeros = expected.find(b'"' + b"0" * 64 + b'"', begin)
        if zeros < 0:
            return found[begin:] == expected[begin:]
        if found[begin : zeros + 1] != expected[begin : zeros + 1]:
            return False
        begin = zeros + 65


def _sync_folder(folder: Path) -> None:
    """Makes created and renamed names durable, where the system can (not Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
