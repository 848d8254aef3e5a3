"""A plain Hugging Face model folder, written tensor by tensor into `OUT.partial` and renamed when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import OutputError
from everybit.formats import TensorSpec
from everybit.formats.inventory import INDEX_NAME
from everybit.formats.layout import ShardLayout, plan_layout
from everybit.formats.tensors import show
from everybit.quantize.workspace import copy_side_files, free_output, promote

SHARD_BYTES = 2 << 30


def write_model(
    out: Path,
    tensors: Mapping[str, TensorSpec],
    arrays: Iterable[tuple[str, NDArray[Any]]],
    config: Mapping[str, Any],
    side_files_of: Path,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes shards, index, config.json and the tokenizer's files; returns the bytes of all tensors.

    `tensors` fixes the layout, `arrays` brings each of them once in any order. Nothing is left behind on an error.
    Raises: OutputError, and whatever `arrays` raises
    """
    shards = plan_layout(tensors, shard_bytes)
    with new_model(out, side_files_of) as partial:
        require_space(partial, sum(shard.size_bytes for shard in shards), out)
        _write_shards(partial, shards, arrays)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in tensors.values())},
                "weight_map": {slot.name: shard.file for shard in shards for slot in shard.slots},
            }
            _write_json(partial / INDEX_NAME, index)
        copy_side_files(side_files_of, partial)
        _write_json(partial / "config.json", config)
    return sum(spec.nbytes for spec in tensors.values())


@contextmanager
def new_model(out: Path, source: Path) -> Iterator[Path]:
    """An empty `OUT.partial`, which becomes `out` at the end and is removed on an error; `source` is what is read.

    Raises: OutputError
    """
    out = Path(os.path.abspath(out.expanduser()))
    partial = free_output(out, resume=False, remedy="")
    require_outside(out, source)
    with writable(out):
        partial.mkdir(parents=True)  # fails where another run made it since: that one's is left alone
    try:
        with writable(out):
            yield partial
        promote(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_outside(out: Path, source: Path) -> None:
    """Refuses a place inside the folder that is read, by whatever way, and a name of several lines.

    Raises: OutputError
    """
    if len(str(out).splitlines()) != 1:
        raise OutputError(f"the output name {show(str(out))} arrived, expected one line: choose another name")
    if Path(os.path.realpath(out.expanduser())).is_relative_to(os.path.realpath(source.expanduser())):
        raise OutputError(f"{out} lies in {source}, which is read: choose a place outside it")


def require_space(place: Path, size_bytes: int, out: Path) -> None:
    """Raises: OutputError where the disk of `place` has less than that"""
    if size_bytes > (free := shutil.disk_usage(place).free):
        raise OutputError(f"{out} needs {size_bytes} bytes, the disk has {free} free: free some, or use another")


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Turns the disk's errors into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror or error}): choose another place") from error


def _write_shards(folder: Path, shards: list[ShardLayout], arrays: Iterable[tuple[str, NDArray[Any]]]) -> None:
    with ExitStack() as stack:
        files = {shard.file: stack.enter_context(open(folder / shard.file, "wb")) for shard in shards}
        places = {slot.name: (files[shard.file], slot) for shard in shards for slot in shard.slots}
        checksums: dict[str, str] = {}
        for name, array in arrays:
            file, slot = places.pop(name)
            assert (array.dtype, array.shape) == (slot.spec.numpy, slot.spec.shape), name
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksums[name] = hashlib.sha256(data).hexdigest()
            file.seek(slot.begin)
            file.write(data)
        assert not places, f"never written: {sorted(places)[:3]}"
        for shard in shards:
            file = files[shard.file]
            file.seek(0)
            file.write(shard.header(checksums))
            file.flush()
            os.fsync(file.fileno())


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
