"""A model's parameters on a device, each in the form that its products read, placed at first use."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from everybit.engine.checkpoint import Checkpoint
from everybit.errors import ModelError, PrecisionError
from everybit.formats import WeightSpec
from everybit.gpu.weight import TiledWeight
from everybit.kernels import dequantize

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Parameters:
    """`dtype` F16 or BF16: products by the kernels, planes once for all precisions; plain numbers as they are stored.
    F32: dense numbers, a copy for each precision used, as where a codebook has no kernel.

    `most_bits`: planes beyond are not loaded, and precisions above it are refused.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, most_bits: int | None = None
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.most_bits = checkpoint, device, dtype, most_bits
        self._tiled: dict[tuple[str, int | None], TiledWeight | None] = {}
        self._dense: dict[tuple[str, int], torch.Tensor] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._constants: dict[tuple[float, ...], torch.Tensor] = {}

    def plain(self, name: str) -> torch.Tensor:
        """As it is stored, or in F32. Raises: ModelError (another dtype), FormatError, ChecksumError"""
        if (name, 0) not in self._dense:
            view, stored = self.checkpoint.raw(name)
            if stored not in _STORED:
                raise ModelError(
                    f"{self.checkpoint.folder}: {name} is stored as {stored}, expected {', '.join(_STORED)}: "
                    "convert the model first"
                )
            host = np.array(view).view(np.float32 if stored == "F32" else np.int16)  # a copy: torch wants to write
            values = torch.from_numpy(host).view(_STORED[stored])
            self._dense[name, 0] = values.to(self.device, torch.float32 if self.dtype == torch.float32 else None)
        return self._dense[name, 0]

    def constant(self, numbers: tuple[float, ...]) -> torch.Tensor:
        """Numbers of an op, F32 as the engine has them, in F64."""
        if numbers not in self._constants:
            self._constants[numbers] = torch.tensor(numbers, dtype=torch.float32).double().to(self.device)
        return self._constants[numbers]

    def vector(self, name: str) -> torch.Tensor:
        """In F32: norms, biases, sinks."""
        if name not in self._vectors:
            self._vectors[name] = self.plain(name).float()
        return self._vectors[name]

    def times(
        self, x: torch.Tensor, name: str, own: int, *, expert: int | None = None, transposed: bool = False
    ) -> torch.Tensor:
        """x W', W at `own` of its own bits (0: a plain one, stored [K, N] where `transposed`).

        Shapes: f32[T, K] -> f32[T, N]
        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec = self.checkpoint.quantized(name)
        if spec is not None and (tiled := self.tiled(spec, expert)) is not None:
            return tiled.times(x.to(self.dtype), own).float()
        weight = self.plain(name) if spec is None else self._dense_at(spec, own)
        if expert is not None:
            weight = weight[expert]
        if transposed and spec is None:
            weight = weight.T
        return torch.nn.functional.linear(x.to(weight.dtype), weight).float()

    def prepare(self, name: str, own: int) -> None:
        """Place a parameter, so that `times` finds it."""
        spec = self.checkpoint.quantized(name)
        if spec is None:
            self.plain(name)
        elif not all(self.tiled(spec, e) for e in (range(spec.shape[0]) if len(spec.shape) == 3 else [None])):
            self._dense_at(spec, own)

    def tiled(self, spec: WeightSpec, expert: int | None) -> TiledWeight | None:
        """For the kernels; None where they do not know the codebook, or the dtype is theirs no more."""
        key = spec.name, expert
        if key not in self._tiled:
            found = None
            if self.dtype != torch.float32 and self.checkpoint.overlay is not None:
                with contextlib.suppress(PrecisionError):  # a free table above 4 bits
                    found = TiledWeight.of(
                        self.checkpoint.overlay, spec.name, self.dtype, self.device, expert, self.most_bits
                    )
            self._tiled[key] = found
        return self._tiled[key]

    def _dense_at(self, spec: WeightSpec, own: int) -> torch.Tensor:
        if (spec.name, own) not in self._dense:
            overlay = self.checkpoint.overlay
            assert overlay is not None
            values = dequantize(overlay.planes(spec.name, own), overlay.table(spec.name, own), spec.columns)
            self._dense[spec.name, own] = torch.from_numpy(values).reshape(spec.shape).to(self.device, self.dtype)
        return self._dense[spec.name, own]
