"""Solved parameters on disk, between solving and tuning: what a killed run does not do again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from everybit.errors import OutputError
from everybit.formats import WeightSpec
from everybit.quantize.solvers import Solution

CODES = "codes"


class SolutionFiles:
    """One file a parameter in `folder`: the solutions of its matrices (experts), codes and codebook arrays stacked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def save(self, name: str, solutions: list[Solution]) -> None:
        """Raises: OSError, SafetensorError (a full disk)"""
        arrays = {CODES: np.stack([s.codes for s in solutions])}
        for suffix in solutions[0].codebook:
            arrays[suffix] = np.stack([s.codebook[suffix] for s in solutions])
        write_arrays(self._path(name), arrays)

    def read(self, spec: WeightSpec) -> list[Solution] | None:
        """None where there is none, or only a torn one."""
        arrays = read_arrays(self._path(spec.name))
        if arrays is None:
            return None
        codes = arrays.pop(CODES)
        return [
            Solution(codes[e], spec.bits, {suffix: a[e] for suffix, a in arrays.items()}, spec.codebook)  # type: ignore[arg-type]
            for e in range(len(codes))
        ]

    def must_read(self, spec: WeightSpec) -> list[Solution]:
        """Raises: OutputError where somebody removed it"""
        if (found := self.read(spec)) is None:
            raise OutputError(f"{self._path(spec.name)} is gone or damaged: continue with --resume")
        return found


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)
    os.replace(temporary, path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of a file, or None where it is missing or damaged."""
    try:
        return dict(load_file(path)) if path.is_file() else None
    except (SafetensorError, OSError, ValueError):
        return None
