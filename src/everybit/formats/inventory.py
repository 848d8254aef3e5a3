"""Whether the parts of an overlay agree: index and shards, tensors and quantization_config, checksums and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from everybit.errors import FormatError
from everybit.formats.codebooks import CODEBOOKS
from everybit.formats.config import QuantizationConfig
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.shard import Shard
from everybit.formats.tensors import TensorSpec, show

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CHECKSUM_PREFIX = "sha256:"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_OWN_SHARD = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors")
_HEX = re.compile(r"[0-9a-f]{64}")


def find_shards(folder: Path, names: list[str], shards: list[Shard]) -> None:
    """Opens every shard into `shards` (the caller closes them) and checks them against the index.

    Raises: FormatError
    """
    present = [name for name in names if _OWN_SHARD.fullmatch(name)]
    if INDEX_NAME not in names:
        if present != [SINGLE_NAME]:
            what = f"the shards {', '.join(present)}" if present else "no model.safetensors"
            raise FormatError(f"{folder} has {what} and no {INDEX_NAME}: download the folder again")
        shards.append(Shard(folder, SINGLE_NAME))
        return
    index = folder / INDEX_NAME
    shard_of = _read_index(folder)
    for name in sorted(set(shard_of.values())):
        if not _SHARD_NAME.fullmatch(name):
            raise FormatError(
                f"{index}: the shard name {show(name)} arrived, expected a plain .safetensors name inside the folder: "
                "download it again"
            )
        if name not in names:
            raise FormatError(f"{folder / name} is missing, {INDEX_NAME} lists it: download the folder again")
        shards.append(Shard(folder, name))
    extra = sorted(set(present) - set(shard_of.values()))
    if extra:
        raise FormatError(f"{folder / extra[0]} is not listed in {INDEX_NAME}: delete it, or download the folder again")
    for shard in shards:
        for name in shard.entries:
            if name not in shard_of:
                raise FormatError(f"{shard.path}: tensor {show(name)} is not listed in {INDEX_NAME}: download it again")
            if shard_of.get(name) != shard.path.name:
                raise FormatError(
                    f"{shard.path}: tensor {show(name)} is listed in {INDEX_NAME} for {shard_of[name]}: "
                    "download it again"
                )
    held = {(name, shard.path.name) for shard in shards for name in shard.entries}
    for name, where in shard_of.items():
        if (name, where) not in held:
            raise FormatError(
                f"{folder / where}: tensor {show(name)} is missing, {INDEX_NAME} lists it: download it again"
            )


def _read_index(folder: Path) -> dict[str, str]:
    where = str(folder / INDEX_NAME)
    found = parse_object(read_inside(folder, INDEX_NAME), where).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise FormatError(
            f"{where}: weight_map {show(found)} arrived, expected tensor names with shard names: download it again"
        )
    return found


def check_tensors(quantization: QuantizationConfig, specs: Mapping[str, TensorSpec], where: str) -> None:
    """Whether the tensors are exactly what `quantization` says, beside tensors that are not quantized.

    Raises: FormatError naming the tensor and what disagrees
    """
    own: set[str] = set()
    for weight in quantization.weights.values():
        if weight.name in specs:
            raise FormatError(
                f"{where}: tensor {show(weight.name)} is stored plain and also listed as quantized: quantize again"
            )
        codebook = weight.codebook_parts()
        for name, expected in weight.tensors().items():
            own.add(name)
            found = specs.get(name)
            if found is None:
                raise FormatError(
                    f"{where}: tensor {show(name)} is missing, the config says weight {show(weight.name)} has bits "
                    f"{list(weight.bits)} and codebook {weight.codebook}: the config or the shards are wrong, "
                    "download both again"
                )
            dtypes = codebook[name].dtypes if name in codebook else (expected.dtype,)
            if found.dtype not in dtypes or found.shape != expected.shape:
                raise FormatError(
                    f"{where}: tensor {show(name)} is {found.dtype} {show(list(found.shape))}, expected "
                    f"{' or '.join(dtypes)} {show(list(expected.shape))} from the config's shape "
                    f"{show(list(weight.shape))}: the config or the shards are wrong, download both again"
                )
    known = {s for book in CODEBOOKS.values() if book.since <= quantization.format_version for s in book.suffixes}
    # Suffixes without digits are words that models use, too: reserved for the listed weights only.
    shared = {f"{weight}_{suffix}" for weight in quantization.weights for suffix in known if not suffix[-1].isdigit()}
    numbered = "|".join(sorted({suffix.rstrip("0123456789") for suffix in known if suffix[-1].isdigit()}))
    reserved = re.compile(rf".+_(plane|{numbered})[0-9]+", re.DOTALL)
    for name in specs:
        if name not in own and (name in shared or reserved.fullmatch(name)):
            raise FormatError(
                f"{where}: tensor {show(name)} belongs to no weight and precision in the config: "
                "the config or the shards are wrong, download both again"
            )


def check_checksums(shards: list[Shard]) -> None:
    """Whether every tensor has a well-formed sha256 in its shard, and none has two or belongs to no tensor.

    Raises: FormatError
    """
    for shard in shards:
        for name in shard.entries:
            recorded = shard.metadata.get(CHECKSUM_PREFIX + name)
            if recorded is None:
                raise FormatError(
                    f"{shard.path}: tensor {show(name)} has no sha256 in __metadata__, expected one for each tensor: "
                    "write the overlay with everybit, or download it again"
                )
            if not _HEX.fullmatch(recorded):
                raise FormatError(
                    f"{shard.path}: tensor {show(name)}: sha256 {show(recorded)} arrived, expected 64 lower-case hex "
                    "digits: download it again"
                )
        for key in shard.metadata:
            name = key.removeprefix(CHECKSUM_PREFIX)
            if key.startswith(CHECKSUM_PREFIX) and name not in shard.entries:
                raise FormatError(f"{shard.path}: a sha256 for {show(name)}, which it does not hold: download it again")
