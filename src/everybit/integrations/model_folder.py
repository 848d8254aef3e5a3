"""A plain Hugging Face model folder, written tensor by tensor into `OUT.partial` and renamed when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import OutputError
from everybit.formats import TensorSpec
from everybit.formats.inventory import INDEX_NAME
from everybit.formats.layout import ShardLayout, plan_layout
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
    out = Path(os.path.abspath(out.expanduser()))
    partial = free_output(out, resume=False, remedy="")
    shards = plan_layout(tensors, shard_bytes)
    size = sum(shard.size_bytes for shard in shards)
    try:
        partial.mkdir(parents=True)
        if size > (free := shutil.disk_usage(partial).free):
            raise OutputError(f"{out} needs {size} bytes, the disk has {free} free: free some, or use another")
        _write_shards(partial, shards, arrays)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in tensors.values())},
                "weight_map": {slot.name: shard.file for shard in shards for slot in shard.slots},
            }
            _write_json(partial / INDEX_NAME, index)
        copy_side_files(side_files_of, partial)
        _write_json(partial / "config.json", config)
        promote(partial, out)
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror or error}): choose another output folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where it became `out`
    return sum(spec.nbytes for spec in tensors.values())


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
