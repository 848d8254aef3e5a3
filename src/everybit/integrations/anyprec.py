"""Checkpoints of the original Any-Precision LLM as overlays, bit for bit.

A module holds `qweight` int32 [B, N, K/32], planes from the most significant, and `lut{b}` float16 [N, 2^b] for every b
from the seed to the parent precision. Of a plane's row each run of 128 bytes (the rest of a row: one shorter run) is
stored for the 32 threads of a warp (a quarter as many as the run has bytes): byte t of each quarter of the run goes to
thread t, whose 32-bit word holds the first quarter in its highest byte. In a byte the first weight is the highest bit.
Source: SNU-ARC/any-precision-llm at a3257d0, any_precision/quantization/pack.py; Park et al., ICML 2024
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import SourceError
from everybit.formats import MAX_BITS, MIN_BITS, WeightSpec
from everybit.formats.tensors import show
from everybit.integrations.imported import ImportReport, write_overlay
from everybit.integrations.torch_pickle import TensorRef, TorchFile

FILE = "pytorch_model.bin"
RUN_BYTES = 128
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little")[:, 0]


def import_anyprec(folder: Path, out: Path, config: Mapping[str, Any]) -> ImportReport:
    """Writes the overlay of a checkpoint whose config.json is `config`.

    Cost: memory of one weight's planes.
    Raises: SourceError (a pickle with more than tensors, tensors missing or of another shape), FormatError, OutputError
    """
    where = f"{folder}/config.json: anyprec"
    bits = _bits(config["anyprec"], where)
    if (other := config.get("quantization_config")) is not None:
        raise SourceError(
            f"{where}: quantization_config {show(other)} arrived beside it, expected one of them: drop the one that "
            "does not describe the tensors"
        )
    with TorchFile(folder, FILE) as file:
        refs = file.tensors
        weights: dict[str, WeightSpec] = {}
        own: set[str] = set()
        for name in refs:
            module, _, last = name.rpartition(".")
            if last == "qweight":
                spec = _weight(module, refs, bits, file.path)
                weights[spec.name] = spec
                own |= {name, f"{module}.weight", *(f"{module}.lut{b}" for b in bits)}
        if not weights:
            raise SourceError(f"{file.path} has no tensor named *.qweight, expected an Any-Precision checkpoint")
        plain = _plain(refs, own, config)

        def groups() -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
            for name in plain:
                yield name, {name: np.ascontiguousarray(file.read(name))}
            for name, spec in weights.items():
                module = name.removesuffix(".weight")
                planes = unpermute(file.read(f"{module}.qweight"))
                arrays: dict[str, NDArray[Any]] = {spec.plane_name(k): plane for k, plane in enumerate(planes)}
                for b in bits:
                    lut = np.ascontiguousarray(file.read(f"{module}.lut{b}"))
                    if not np.isfinite(lut).all():
                        raise SourceError(f"{file.path}: {module}.lut{b} has values that are not finite")
                    arrays[f"{name}_lut{b}"] = lut
                yield name, arrays

        own_config = {key: value for key, value in config.items() if key not in ("anyprec", "quantization_config")}
        layout = {name: refs[name].spec for name in plain}
        details = {"anyprec": config["anyprec"]}
        return write_overlay(out, folder, "Any-Precision", own_config, weights, layout, groups(), details)


def unpermute(qweight: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Planes in our order. Shapes: i32[B, N, K/32] -> u8[B, N, K/8]"""
    stored = np.ascontiguousarray(qweight, "<i4").view(np.uint8)
    planes = np.empty_like(stored)
    whole = stored.shape[-1] // RUN_BYTES * RUN_BYTES
    for begin, end, run in ((0, whole, RUN_BYTES), (whole, stored.shape[-1], stored.shape[-1] - whole)):
        if end > begin:
            words = stored[..., begin:end].reshape(*stored.shape[:-1], -1, run // 4, 4)  # run, thread, byte
            planes[..., begin:end] = words[..., ::-1].swapaxes(-1, -2).reshape(*stored.shape[:-1], -1)
    return np.asarray(_REVERSED[planes])


def _bits(found: Any, where: str) -> tuple[int, ...]:
    if not isinstance(found, Mapping):
        raise SourceError(f"{where} {show(found)} arrived, expected an object with seed_precision and parent_precision")
    seed, parent = found.get("seed_precision"), found.get("parent_precision")
    if type(seed) is not int or type(parent) is not int or not MIN_BITS <= seed <= parent <= MAX_BITS:
        raise SourceError(
            f"{where}: seed_precision {show(seed)} and parent_precision {show(parent)} arrived, expected "
            f"{MIN_BITS} <= seed <= parent <= {MAX_BITS}"
        )
    if found.get("group_count", 1) != 1:
        raise SourceError(
            f"{where}: group_count {show(found['group_count'])} arrived, expected 1: it has no packed form"
        )
    return tuple(range(seed, parent + 1))


def _weight(module: str, refs: Mapping[str, TensorRef], bits: tuple[int, ...], path: Path) -> WeightSpec:
    """The weight of a module, its tensors checked. Raises: SourceError"""
    shape = refs[f"{module}.qweight"].shape
    rows, words = shape[1:] if len(shape) == 3 else (0, 0)
    wanted = {"qweight": ("I32", (bits[-1], rows, words))} | {f"lut{b}": ("F16", (rows, 1 << b)) for b in bits}
    for last, (dtype, size) in wanted.items():
        ref = refs.get(f"{module}.{last}")
        found = None if ref is None else (ref.storage.dtype, ref.shape)
        if found != (dtype, size) or not rows or not words:
            raise SourceError(
                f"{path}: {show(f'{module}.{last}')} is {show(found)}, expected {dtype} {list(size)}: download it again"
            )
    return WeightSpec(f"{module}.weight", (rows, words * 32), bits, "table")


def _plain(refs: Mapping[str, TensorRef], own: set[str], config: Mapping[str, Any]) -> list[str]:
    """The other tensors: tied ones once, and without the rotary tables that old checkpoints carry."""
    kept: dict[TensorRef | str, str] = {}
    for name, ref in refs.items():
        if name not in own and not name.endswith("rotary_emb.inv_freq"):
            kept.setdefault(name if config.get("tie_word_embeddings") is False else ref, name)
    return list(kept.values())
