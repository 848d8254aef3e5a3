"""Where every byte of an overlay goes, fixed before the first is written: sizes are known in advance.

A fixed place for each tensor lets a run write in any order, die at any moment and resume, and still give the same
files. The header can be reserved too, because a sha256 in hex always has 64 letters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from everybit.errors import OutputError
from everybit.formats.inventory import CHECKSUM_PREFIX, SINGLE_NAME
from everybit.formats.shard import HEADER_BYTES_LIMIT
from everybit.formats.tensors import TensorSpec, is_tensor_name, show

ALIGNMENT = 64  # a cache line, and the widest vector register (AVX-512)
_NO_CHECKSUM = "0" * 64


@dataclass(frozen=True)
class Slot:
    """A tensor's place: `begin` counts bytes from the start of the file."""

    name: str
    spec: TensorSpec
    begin: int


@dataclass(frozen=True)
class ShardLayout:
    """One shard: its file name, where data starts, its tensors in file order, its size."""

    file: str
    start: int
    slots: tuple[Slot, ...]
    size_bytes: int

    def header(self, checksums: Mapping[str, str]) -> bytes:
        """The bytes before the data, the length prefix included."""
        text = _header_text(self.slots, self.start, checksums)
        return (self.start - 8).to_bytes(8, "little") + text.ljust(self.start - 8)


def plan_layout(tensors: Mapping[str, TensorSpec], shard_bytes: int) -> list[ShardLayout]:
    """Fills shards in the order of `tensors`, a new one where `shard_bytes` of data would be passed.

    Raises: OutputError
    """
    if shard_bytes < 1:
        raise OutputError(f"shard_bytes {shard_bytes} arrived, expected at least 1: use 2147483648 for 2 GiB shards")
    for name in tensors:
        if not is_tensor_name(name):
            raise OutputError(f"tensor name {show(name)} cannot be stored in safetensors: rename the parameter")
    groups: list[list[tuple[str, TensorSpec]]] = [[]]
    used = 0
    for name, spec in tensors.items():
        if groups[-1] and used + spec.nbytes > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((name, spec))
        used += spec.nbytes
    one = len(groups) == 1
    names = (
        [SINGLE_NAME] if one else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return [_place(file, group) for file, group in zip(names, groups, strict=True)]


def _place(file: str, group: list[tuple[str, TensorSpec]]) -> ShardLayout:
    # The format allows no holes, so no padding between tensors: sorted by the power of two in its size, each tensor
    # begins at a multiple of that power (at most 64), hence of its item size. Planes nearly always get all 64.
    ordered = sorted(group, key=lambda item: -_power_of_two(item[1].nbytes))
    slots, place = [], 0
    for name, spec in ordered:
        slots.append(Slot(name, spec, place))
        place += spec.nbytes
    length = 8 + len(_header_text(slots, 0, {}))
    start = -(-length // ALIGNMENT) * ALIGNMENT
    if start - 8 > HEADER_BYTES_LIMIT:
        raise OutputError(
            f"{file} needs a header of {start - 8} bytes for {len(slots)} tensors, at most {HEADER_BYTES_LIMIT} are "
            "allowed: use smaller shards (shard_bytes)"
        )
    moved = tuple(Slot(slot.name, slot.spec, start + slot.begin) for slot in slots)
    return ShardLayout(file, start, moved, start + place)


def _power_of_two(nbytes: int) -> int:
    return min(nbytes & -nbytes, ALIGNMENT) or ALIGNMENT  # an empty tensor fits anywhere


def _header_text(slots: list[Slot] | tuple[Slot, ...], start: int, checksums: Mapping[str, str]) -> bytes:
    metadata = {"format": "pt"}
    for slot in slots:
        metadata[CHECKSUM_PREFIX + slot.name] = checksums.get(slot.name, _NO_CHECKSUM)
    header: dict[str, object] = {"__metadata__": metadata}
    for slot in slots:
        begin = slot.begin - start
        header[slot.name] = {
            "dtype": slot.spec.dtype,
            "shape": list(slot.spec.shape),
            "data_offsets": [begin, begin + slot.spec.nbytes],
        }
    return json.dumps(header, separators=(",", ":")).encode()
