"""Tiny overlays for the tests of formats: two weights of the kinds of version 1 and two tensors left plain; one of
version 2, with a weight of kind cells; and one of version 3, with a weight of kind compact.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.formats import OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from everybit.formats.compact import Compact
from everybit.formats.grid import pack_nibbles

BITS = (2, 3, 4)
TABLE = WeightSpec("a.weight", (6, 20), BITS)
AFFINE = WeightSpec("b.experts", (2, 3, 16), BITS, "affine", transposed=True)
PLAIN = {"norm.weight": TensorSpec("BF16", (7,)), "scale": TensorSpec("F32", ())}
TENSORS = {**TABLE.tensors(), **AFFINE.tensors(), **PLAIN}
GROUPS = {
    "a.weight": list(TABLE.tensors()),
    "b.experts": list(AFFINE.tensors()),
    "norm": ["norm.weight"],
    "s": ["scale"],
}
QUANTIZATION = QuantizationConfig(BITS, "table", {"a.weight": TABLE, "b.experts": AFFINE}, {"seed": 0})
CONFIG = {"model_type": "llama", "quantization_config": QUANTIZATION.to_dict()}


def arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Every tensor of the overlay, padding bits zero."""
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for name, spec in TENSORS.items():
        if spec.dtype == "U8":
            found[name] = rng.integers(0, 256, spec.shape, np.uint8)
        elif spec.dtype == "BF16":
            found[name] = rng.integers(0, 0x7F80, spec.shape, np.uint16)
        else:
            found[name] = np.asarray(rng.normal(size=spec.shape)).astype(spec.numpy)
        if name.startswith("a.weight_plane"):
            found[name][:, -1] &= 0x0F  # 20 columns: the last byte holds four
    return found


def write(folder: Path, shard_bytes: int = 1 << 30, tensors: dict[str, NDArray[Any]] | None = None) -> Path:
    """Writes the whole overlay."""
    tensors = tensors or arrays()
    with OverlayWriter(folder, TENSORS, CONFIG, shard_bytes) as writer:
        for key, names in GROUPS.items():
            writer.write_group(key, {name: tensors[name] for name in names})
        writer.finish()
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


CELLS = WeightSpec("c.weight", (2, 2, 24), (3, 5, 8), "cells")
CELLS_CONFIG = {
    "model_type": "llama",
    "quantization_config": QuantizationConfig(CELLS.bits, "cells", {"c.weight": CELLS}).to_dict(),
}


def pack_cells(centres: NDArray[Any], ladders: NDArray[Any], steps: NDArray[Any]) -> NDArray[np.uint8]:
    """Records of kind cells, which everybit reads and no longer writes: [N, 16], [N, 16] within 1..8, [N] -> [N, 44]"""
    parts = [centres.astype("<f2"), pack_nibbles(ladders.astype(np.uint8)), steps.astype("<f4")[:, None]]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)


def cells_arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Every tensor of the overlay of version 2."""
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for name, spec in CELLS.tensors().items():
        if "_plane" in name:
            found[name] = rng.integers(0, 256, spec.shape, np.uint8)
        elif "_lut" in name:
            found[name] = rng.normal(size=spec.shape).astype(spec.numpy)
        else:
            parts = (rng.normal(size=(4, 16)).astype(np.float32), rng.integers(1, 9, (4, 16), np.uint8))
            found[name] = pack_cells(*parts, rng.random(4, np.float32)).reshape(spec.shape)
    return found


def write_cells(folder: Path, tensors: dict[str, NDArray[Any]] | None = None) -> Path:
    """Writes the whole overlay of version 2."""
    with OverlayWriter(folder, CELLS.tensors(), CELLS_CONFIG) as writer:
        writer.write_group("c.weight", tensors or cells_arrays())
        writer.finish()
    return folder


COMPACT = WeightSpec("d.weight", (2, 3, 12), (2, 4, 5, 7), "compact")
COMPACT_CONFIG = {
    "model_type": "llama",
    "quantization_config": QuantizationConfig(COMPACT.bits, "compact", {"d.weight": COMPACT}).to_dict(),
}


def compact_codebook(rows: int, bits: tuple[int, ...], seed: int = 0) -> dict[str, NDArray[Any]]:
    """A random codebook of kind compact, by suffix."""
    rng = np.random.default_rng(seed)
    luts = {b: rng.integers(-127, 128, (rows, 1 << b), np.int8) for b in bits if b <= 4}
    scale = rng.random(rows, np.float32) / 100
    if bits[-1] <= 4:
        return Compact.pack(scale, luts)
    centres, ladders = rng.integers(-127, 128, (rows, 16), np.int8), rng.integers(1, 9, (rows, 16), np.uint8)
    return Compact.pack(scale, luts, centres, ladders, rng.random(rows, np.float32) / 1000)


def compact_arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Every tensor of the overlay of version 3."""
    rng = np.random.default_rng(seed)
    codebook = compact_codebook(COMPACT.rows, COMPACT.bits, seed)
    found: dict[str, NDArray[Any]] = {}
    for name, spec in COMPACT.tensors().items():
        if "_plane" in name:
            found[name] = rng.integers(0, 256, spec.shape, np.uint8)
            found[name][..., -1] &= 0x0F  # 12 columns: the last byte holds four
        else:
            found[name] = codebook[name.removeprefix("d.weight_")].reshape(spec.shape)
    return found


def write_compact(folder: Path, tensors: dict[str, NDArray[Any]] | None = None) -> Path:
    """Writes the whole overlay of version 3."""
    with OverlayWriter(folder, COMPACT.tensors(), COMPACT_CONFIG) as writer:
        writer.write_group("d.weight", tensors or compact_arrays())
        writer.finish()
    return folder
