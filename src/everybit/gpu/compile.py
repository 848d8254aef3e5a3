"""The CUDA kernels as one source text for each variant, compiled at first use by NVRTC, which torch brings along."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import torch


def source(name: str, **constants: int | str) -> str:
    """The text of cuda/<name>.cu with what it needs before it. Constants become KERNEL_<NAME>."""
    parts = [f"#define KERNEL_{key.upper()} {value}" for key, value in constants.items()]
    parts.append(_text("machine.cuh"))
    if name != "arrange":
        parts.append(_text("decode.cuh"))
    if name == "gemm":
        parts += [_text("hopper.cuh"), _products(int(constants["tokens"]))]
    parts.append(_text(f"{name}.cu"))
    return "\n".join(part.replace("#pragma once", "") for part in parts)


@cache
def kernel(name: str, device: int, **constants: int | str) -> Any:
    """The kernel of cuda/<name>.cu, compiled for the device."""
    major, minor = torch.cuda.get_device_capability(device)
    target = f"{major}{minor}" + ("a" if name == "gemm" else "")
    return torch.cuda._compile_kernel(source(name, **constants), name, target, nvcc_options=["-std=c++17"])


@cache
def _text(file: str) -> str:
    return files("everybit.gpu").joinpath("cuda", file).read_text()


def _products(tokens: int) -> str:
    """Products<T>::times<tokens>: D[64, tokens] += A[64, 16] B[16, tokens], A in registers, B in shared memory."""
    count = tokens // 2  # of accumulators in a thread
    outs = ", ".join(f"%{i}" for i in range(count))
    ins = ", ".join(f"%{count + i}" for i in range(4))
    found = []
    for struct, dtype in (("F16", "f16"), ("BF16", "bf16")):
        accumulators = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        found.append(
            f"template <> struct Products<{struct}> {{\n"
            "  template <int TOKENS>\n"
            f"  static __device__ __forceinline__ void times(float (&d)[{count}], const u32 (&a)[4], u64 b) {{\n"
            f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{dtype}.{dtype} '
            f'{{{outs}}}, {{{ins}}}, %{count + 4}, 1, 1, 1, 0;"\n'
            f'      : {accumulators} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));\n'
            "  }\n};"
        )
    return "\n".join(found)
