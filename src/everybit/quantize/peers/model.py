"""A whole model under one method: every weight that everybit quantizes is replaced, in a float folder of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from everybit.errors import EverybitError, OutputError
from everybit.formats import WeightSpec
from everybit.quantize.discover import Target
from everybit.quantize.encode import matrices
from everybit.quantize.peers.collect import Collected, MatrixStatistics
from everybit.quantize.peers.method import F32, Method, Quantize
from everybit.quantize.source import Source

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Written:
    """What `write_model` made: `bpw` over the quantized parameters, `seconds` in the method itself."""

    folder: Path
    bpw: float
    seconds: float


def model_bytes(source: Source) -> int:
    """About what one `write_model` takes on disk: four bytes a quantized weight, at most four of the others."""
    return 4 * sum(int(np.prod(shape)) for shape in source.shapes.values())


def write_model(
    source: Source,
    targets: list[Target],
    method: Method,
    bits: int,
    collected: Collected,
    seed: int,
    folder: Path,
    step: Callable[[int], object] = lambda weights: None,
) -> Written:
    """Write `source` with its targets quantized and dequantized, in float32; the rest bit for bit.

    `step` is told how many weights each matrix had.

    Mutates: creates `folder`. Cost: memory of one parameter and SHARD_BYTES
    Raises: UnfitError, SourceError; OutputError when the disk is full
    """
    quantize = method.load()
    folder.mkdir()
    wanted = {target.name: target for target in targets}
    writer = _Writer(folder)
    seconds = bits_total = 0.0
    weights_total = 0
    for name, tensor in source.parameters():
        if (target := wanted.get(name)) is not None:
            spec = WeightSpec(name, target.shape, (bits,), "table", target.transposed)
            parts = []
            for e, weights in enumerate(matrices(tensor, spec, source.folder)):
                own = MatrixStatistics(collected, name, e if len(target.shape) == 3 else None, _seed(seed, name) + e)
                began = time.perf_counter()
                values, bpw = _one(quantize, weights, bits, own)
                seconds += time.perf_counter() - began
                parts.append(values.T if target.transposed else values)
                bits_total += bpw * weights.size
                weights_total += weights.size
                step(weights.size)
            tensor = torch.from_numpy(np.stack(parts).reshape(tuple(tensor.shape)))
        writer.add(name, tensor)
    writer.finish()
    shutil.copyfile(source.folder / "config.json", folder / "config.json")
    return Written(folder, bits_total / weights_total, seconds)


def _one(quantize: Quantize, weights: F32, bits: int, statistics: MatrixStatistics) -> tuple[F32, float]:
    try:
        return quantize(weights, bits, statistics)
    except EverybitError as error:
        raise type(error)(f"{statistics.name}: {error}") from error


def _seed(seed: int, name: str) -> int:
    """As `encode` seeds a parameter, so that the same seed gives the same codes."""
    return seed ^ int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class _Writer:
    """Float safetensors in shards, with the index that names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, torch.Tensor] = {}
        self.shard_of: dict[str, str] = {}
        self.shards = self.total = self.held = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.waiting[name] = tensor.contiguous()
        self.held += tensor.nbytes
        if self.held >= SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.shard_of}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _flush(self) -> None:
        if not self.waiting:
            return
        self.shards += 1
        file = f"part-{self.shards:05}.safetensors"
        try:
            save_file(self.waiting, self.folder / file)
        except Exception as error:  # safetensors wraps what the system says
            raise OutputError(f"{self.folder}: cannot be written ({error}): free space, or set TMPDIR") from error
        self.shard_of |= dict.fromkeys(self.waiting, file)
        self.total += self.held
        self.waiting, self.held = {}, 0
