"""llama.cpp's formats, quantized by its own code: the `gguf` package, or ggml through ctypes where that lacks one.

Method names are `gguf:TYPE` and, with llama.cpp's importance matrix (the mean square of every input, the Hessian's
diagonal), `gguf-imatrix:TYPE`. Dequantizing is always the gguf package's.

Source: llama.cpp, ggml/src/ggml-quants.c (MIT), called and not copied; block sizes from gguf.constants
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from everybit.quantize.peers.method import F32, Quantize, Statistics, UnfitError

# type -> its bits; Q4_1 and Q5_1 store an offset per block as well
PLAIN = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}  # by the gguf package itself
K_QUANTS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}  # by ggml


def load(kind: str, imatrix: bool = False) -> Quantize:
    """The function of one type. Raises: UnfitError where gguf, or ggml for types that need it, is not installed"""
    if importlib.util.find_spec("gguf") is None:
        raise UnfitError('the gguf package is not installed: pip install "everybit[peers]"')
    if imatrix or kind in K_QUANTS:
        _ggml()
    return functools.partial(_quantize, kind, imatrix)


def _quantize(kind: str, imatrix: bool, weights: F32, bits: int, statistics: Statistics) -> tuple[F32, float]:
    """Shapes: f32[N, K] -> f32[N, K]. Bits per weight: bytes of a block * 8 / its weights. Raises: UnfitError (K)"""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weights.shape
    if columns % block:
        raise UnfitError(f"rows of {columns} weights are no multiple of {block}")
    if imatrix or kind in K_QUANTS:
        importance = np.ascontiguousarray(np.diag(statistics.hessian()), np.float32) if imatrix else None
        stored = _by_ggml(int(number), weights, importance, columns // block * block_bytes)
    else:
        stored = gguf.quants.quantize(np.ascontiguousarray(weights), number)
    values = gguf.quants.dequantize(stored, number).reshape(rows, columns)
    return np.asarray(values, np.float32), block_bytes * 8 / block


def _by_ggml(number: int, weights: F32, importance: F32 | None, row_bytes: int) -> Any:
    weights = np.ascontiguousarray(weights, np.float32)
    stored = np.empty((len(weights), row_bytes), np.uint8)
    written = _ggml().ggml_quantize_chunk(
        number,
        weights.ctypes.data,
        stored.ctypes.data,
        0,
        weights.shape[0],
        weights.shape[1],
        None if importance is None else importance.ctypes.data,
    )
    if written != stored.nbytes:
        raise UnfitError(
            f"ggml wrote {written} bytes where {stored.nbytes} were expected: versions do not fit together"
        )
    return stored


@functools.cache
def _ggml() -> Any:
    """ggml's shared library beside an installed llama-cpp-python, which itself is not imported. Raises: UnfitError"""
    for path in _libraries():
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "ggml_quantize_chunk"):
            continue
        function = library.ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        return library
    raise UnfitError("llama-cpp-python is not installed, and only its ggml quantizes to this type")


def _libraries() -> Iterator[Path]:
    spec = importlib.util.find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml.so", "libllama.so"):
            if (path := Path(place) / "lib" / name).is_file():
                yield path
