"""The bytes of a matrix in each of ggml's types that we write: K-quants by us, the others by gguf.quants."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.formats.tensors import to_bf16
from everybit.integrations.gguf import kquants
from everybit.integrations.gguf.fit import F32


def pack(kind: str, values: F32) -> NDArray[np.uint8]:
    """Shapes: f32[..., K] -> u8[..., bytes of a row]; the block of the type divides K"""
    import gguf

    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    if kind in kquants.KINDS:
        stored: Any = kquants.quantize(kind, rows)
    elif kind == "BF16":
        stored = to_bf16(rows)
    elif kind in ("F32", "F16"):
        stored = rows.astype("<f4" if kind == "F32" else "<f2")
    else:
        stored = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    return np.asarray(stored.view(np.uint8).reshape(*values.shape[:-1], -1))
