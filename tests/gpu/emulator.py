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
    loaded.emulated_gemv.restype = loaded.emulated_gemm.restype = ctypes.c_bool
    shutil.rmtree(folder)
    return loaded


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def times(
    name: str, x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, columns: int
) -> torch.Tensor:
    """`name` is gemv (columns of x padded to whole tiles) or gemm. Shapes: x [M, K] -> [M, rows]"""
    y = torch.full((len(x), rows), float("nan"), dtype=x.dtype)
    weight = (
        bits, int(x.dtype == torch.bfloat16), int(tables.int8), pointer(planes), pointer(tables.tables),
        pointer(tables.steps), pointer(tables.scales), rows, planes.shape[1], planes.shape[2], pointer(x), x.stride(0),
    )  # fmt: skip
    extra = (columns,) if name == "gemm" else ()
    found = getattr(library(), f"emulated_{name}")(*weight, *extra, pointer(y), len(x))
    assert found, f"no kernel for {bits} bits, {x.dtype}, int8 {tables.int8}"
    return y
