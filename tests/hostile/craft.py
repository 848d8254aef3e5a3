"""Overlays made by hand, without everybit's writer, so that every byte can be made to lie."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everybit.errors import FormatError
from everybit.formats import Overlay

SIZES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


def honest_config(kind: str = "") -> dict[str, Any]:
    """The config.json of the overlay that `Shard` holds by default; with a third weight c.weight of codebook
    `kind`, cells (version 2) or compact (version 3)."""
    if kind:
        found = honest_config()
        found["quantization_config"]["format_version"] = {"cells": 2, "compact": 3}[kind]
        found["quantization_config"]["weights"]["c.weight"] = {"shape": [2, 8], "bits": [4, 6], "codebook": kind}
        return found
    return {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "everybit",
            "format_version": 1,
            "bits": [2, 3],
            "codebook": "table",
            "weights": {
                "a.weight": {"shape": [3, 16]},
                "e.weight": {"shape": [2, 2, 8], "transposed": True, "codebook": "affine"},
            },
            "provenance": {},
        },
    }


def honest_tensors(kind: str = "") -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, widest items first so that each is aligned."""
    if kind == "compact":
        compact = np.zeros((2, 26), np.uint8)
        compact[:, :16] = np.arange(-8, 8, dtype=np.int8).view(np.uint8)
        compact[:, 16:24] = 0x70  # ladders 1 and 8
        compact[:, 24:] = (0x00, 0x3F)  # BF16 0.5
        return {
            "c.weight_lut4": ("I8", [2, 16], np.arange(-16, 16, dtype="i1").tobytes()),
            "c.weight_cells": ("U8", [2, 26], compact.tobytes()),
            "c.weight_scale": ("F32", [2, 1], np.array([0.5, 2], "<f4").tobytes()),
            **honest_tensors(),
            **{f"c.weight_plane{k}": ("U8", [2, 1], bytes([37 * k, 91])) for k in range(6)},
        }
    if kind == "cells":
        record = np.zeros((2, 44), np.uint8)
        record[:, 32:40] = 0x70  # ladders 1 and 8
        record[:, 40:] = np.frombuffer(np.array([0.5], "<f4").tobytes(), np.uint8)
        return {
            "c.weight_lut4": ("F16", [2, 16], np.linspace(-1, 1, 32).astype("<f2").tobytes()),
            "c.weight_cells6": ("U8", [2, 44], record.tobytes()),
            **honest_tensors(),
            **{f"c.weight_plane{k}": ("U8", [2, 1], bytes([37 * k, 91])) for k in range(6)},
        }
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[str, list[int]]] = {
        "e.weight_affine2": ("F32", [2, 2, 2]),
        "e.weight_affine3": ("F32", [2, 2, 2]),
        "a.weight_lut2": ("F16", [3, 4]),
        "a.weight_lut3": ("F16", [3, 8]),
        "norm.weight": ("BF16", [5]),
        **{f"a.weight_plane{k}": ("U8", [3, 2]) for k in range(3)},
        **{f"e.weight_plane{k}": ("U8", [2, 2, 1]) for k in range(3)},
    }
    found = {}
    for name, (dtype, shape) in shapes.items():
        count = int(np.prod(shape))
        if dtype in ("F16", "F32"):
            data = rng.normal(size=count).astype(f"<f{SIZES[dtype]}").tobytes()
        else:
            data = rng.integers(0, 256, count * SIZES[dtype], np.uint8).tobytes()
        found[name] = (dtype, shape, data)
    return found


class Shard:
    """A safetensors file in parts; tests change `header`, `data` or `raw_header` before `save`."""

    def __init__(self, tensors: dict[str, tuple[str, list[int], bytes]] | None = None) -> None:
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.data = b""
        self.raw_header: bytes | None = None
        for name, (dtype, shape, data) in (honest_tensors() if tensors is None else tensors).items():
            place = len(self.data)
            self.data += data
            self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
            self.header["__metadata__"][f"sha256:{name}"] = hashlib.sha256(data).hexdigest()

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode() if self.raw_header is None else self.raw_header
        if self.raw_header is None:
            text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
        return struct.pack("<Q", len(text)) + text + self.data

    def save(self, path: Path) -> None:
        path.write_bytes(self.bytes())


class Folder:
    """An overlay folder in parts: one shard by default, or several with an index; with a weight of `kind` beside."""

    def __init__(self, split: bool = False, kind: str = "") -> None:
        self.config = honest_config(kind)
        self.index: dict[str, Any] | None = None
        tensors = honest_tensors(kind)
        if not split:
            self.shards = {"model.safetensors": Shard(tensors)}
            return
        halves = [{k: v for k, v in tensors.items() if k.startswith("e.") == first} for first in (False, True)]
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        self.shards = {name: Shard(half) for name, half in zip(names, halves, strict=True)}
        weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
        self.index = {"metadata": {"total_size": 1}, "weight_map": weight_map}

    @property
    def shard(self) -> Shard:
        return self.shards["model.safetensors"]

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]  # type: ignore[no-any-return]

    def copy(self) -> Folder:
        return copy.deepcopy(self)

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps(self.index))
        for name, shard in self.shards.items():
            shard.save(folder / name)
        return folder


def refuse(folder: Path, message: str) -> str:
    """Opens and reads everything; it must fail with one line that matches."""
    with pytest.raises(FormatError, match=message) as caught:
        Overlay.open(folder).verify_all()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)
