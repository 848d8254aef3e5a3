"""Planes and codebook as torch tensors to a dense weight, by the code that every other reader uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.errors import FormatError
from everybit.formats import WeightSpec
from everybit.kernels import dequantize


def codebook(spec: WeightSpec, bits: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays that `bits` reads, from tensors by suffix, of any rows of the weight.

    Raises: FormatError where a value is not finite
    """
    arrays = {part.suffix: tensors[part.suffix].cpu().numpy() for part in spec.book.parts(bits)}
    if not np.isfinite(spec.book.expand(arrays, bits)).all():
        raise FormatError(f"{spec.name}: its {bits}-bit codebook has values that are not finite: download it again")
    return arrays


def decode(
    spec: WeightSpec, bits: int, planes: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor], columns: int
) -> torch.Tensor:
    """Shapes: `bits` planes u8[N, ceil(K/8)], `tensors` of the codebook by suffix -> f32[N, K]"""
    table = spec.book.expand(codebook(spec, bits, tensors), bits)
    return torch.from_numpy(dequantize([plane.cpu().numpy() for plane in planes], table, columns))
