"""The CUDA kernels run on the CPU (emulate.h), compiled once per test run with the machine's C++ compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from everybit import gpu
from everybit.gpu.layout import Tables

HERE = Path(__file__).parent
SOURCES = Path(gpu.__file__).parent / "cuda"


@cache
def library() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the emulator needs a C++ compiler, as the build of everybit does"
    folder = Path(tempfile.mkdtemp())
    out = folder / "emulated.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{SOURCES}", f"-I{HERE}"]
    subprocess.run([*command, "-o", str(out), str(HERE / "emulate.cc")], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.emulated.restype = ctypes.c_bool
    shutil.rmtree(folder)
    return loaded


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def times(
    x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, tile: int = 0, block: int = 0
) -> torch.Tensor:
    """By gemv, or with `tile` tokens and `block` rows by gemm. Shapes: x [M, K], for gemv whole tiles -> [M, rows]"""
    y = torch.full((len(x), rows), float("nan"), dtype=x.dtype)
    found = library().emulated(
        bits, int(x.dtype == torch.bfloat16), int(tables.as_bytes), tile, block, pointer(planes),
        pointer(tables.entries), pointer(tables.scales), rows, planes.shape[1], planes.shape[2], pointer(x),
        x.stride(0), x.shape[1], pointer(y), len(x),
    )  # fmt: skip
    assert found, f"no kernel for {bits} bits, {x.dtype}, bytes {tables.as_bytes}, {tile} x {block}"
    return y


def mixture(
    x: torch.Tensor, planes: torch.Tensor, tables: dict[int, Tables], chosen: torch.Tensor, rows: int
) -> torch.Tensor:
    """By mixed, up to 8 tokens; without a table a precision is not served. Shapes: x [M, 256C], i32[M] -> [M, rows]"""
    y = torch.full((len(x), rows), float("nan"), dtype=x.dtype)
    pointers = torch.zeros(9, 2, dtype=torch.int64)
    for bits, table in tables.items():
        pointers[bits, 0], pointers[bits, 1] = table.entries.data_ptr(), table.scales.data_ptr()
    as_bytes = next(iter(tables.values())).as_bytes
    library().emulated_mixture(
        int(x.dtype == torch.bfloat16), int(as_bytes), pointer(planes), pointer(pointers), rows, planes.shape[1],
        planes.shape[2], pointer(x), x.stride(0), pointer(y), len(x), pointer(chosen),
    )  # fmt: skip
    return y
