"""Random weights for the kernels' tests, without the native extension: a GPU machine may not have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.formats.compact import Compact

KINDS = ("compact", "affine", "cells", "table")


def planes_of(codes: NDArray[np.uint8]) -> torch.Tensor:
    """Eight planes as stored. Shapes: u8[N, K] -> u8[8, N, ceil(K/8)]"""
    bits = codes[None] >> np.arange(7, -1, -1, dtype=np.uint8)[:, None, None] & 1
    return torch.from_numpy(np.packbits(bits, axis=2, bitorder="little"))


def arrays_of(kind: str, rows: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """A random codebook of 2 to 8 bits, or of 2 to 4 where the kind has free tables above."""
    scale = rng.uniform(0.001, 0.02, rows).astype(np.float32)
    if kind == "affine":
        steps = {b: rng.uniform(0.01, 0.02, rows) * 2 ** (8 - b) for b in range(2, 9)}
        offset = rng.normal(0, 0.1, rows)
        return {f"affine{b}": np.stack([steps[b], offset], 1).astype(np.float32) for b in steps}
    if kind == "compact":
        scale[0] = 0  # a row of zeros
        luts = {b: rng.integers(-127, 128, (rows, 1 << b)).astype(np.int8) for b in (2, 3, 4)}
        centres = rng.integers(-127, 128, (rows, 16)).astype(np.int8)
        ladders = rng.integers(1, 9, (rows, 16)).astype(np.uint8)
        return Compact.pack(scale, luts, centres, ladders, (scale * rng.uniform(0.01, 0.5, rows)).astype(np.float32))
    arrays: dict[str, NDArray[Any]] = {
        f"lut{b}": rng.normal(0, 0.02, (rows, 1 << b)).astype(np.float16) for b in range(2, 5)
    }
    if kind == "cells":
        for b in range(5, 9):
            record = np.zeros((rows, 44), np.uint8)
            record[:, :32] = rng.normal(0, 0.02, (rows, 16)).astype("<f2").view(np.uint8)
            record[:, 32:40] = rng.integers(0, 8, (rows, 8)) | rng.integers(0, 8, (rows, 8)) << 4
            record[:, 40:] = rng.uniform(1e-5, 3e-4, (rows, 1)).astype("<f4").view(np.uint8)
            arrays[f"cells{b}"] = record
    return arrays
