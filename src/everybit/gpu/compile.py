"""The CUDA kernels as one source text for each variant, compiled at first use by NVRTC, which torch brings along."""

from __future__ import annotations

import ctypes
import importlib
import os
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from everybit.errors import EverybitError

HOPPER = (9, 0)
OVERLAP = "EVERYBIT_GPU_OVERLAP"  # 0: no kernel begins before the one before it has ended


class Kernel:
    """One compiled kernel. `shared` bytes of memory are its own, for every launch."""

    def __init__(self, name: str, device: int, shared: int, constants: dict[str, int | str]) -> None:
        driver = _bindings("driver")
        self._driver, self._shared, self._device = driver, shared, device
        code = _compile(name, device, constants)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context exists from here on
            module = _checked(driver.cuModuleLoadData(code))
            self._function = _checked(driver.cuModuleGetFunction(module, name.encode()))
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared))
        self._overlap = torch.cuda.get_device_capability(device) >= HOPPER and os.environ.get(OVERLAP) != "0"

    @cache  # noqa: B019  (asked for at every launch; kernels are kept for ever anyway)
    def blocks_at_once(self, threads: int) -> int:
        """How many blocks a multiprocessor holds."""
        return int(
            _checked(self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, self._shared))
        )

    def __call__(self, grid: tuple[int, int], threads: int, *args: torch.Tensor | int) -> None:
        """On the current stream; the kernels themselves say where they need the end of the one before."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY = grid
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = threads
        config.sharedMemBytes = self._shared
        config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        if self._overlap:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [early], 1
        values = tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
        types = tuple(ctypes.c_void_p if isinstance(arg, torch.Tensor) else ctypes.c_int for arg in args)
        with torch.cuda.device(self._device):
            _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


@cache
def kernel(name: str, device: int, shared: int = 0, **constants: int | str) -> Kernel:
    """That of cuda/<name>.cu, compiled for the device."""
    return Kernel(name, device, shared, constants)


def source(name: str, constants: dict[str, int | str]) -> str:
    """The text of cuda/<name>.cu with what it needs before it. Constants become KERNEL_<NAME>."""
    parts = [f"#define KERNEL_{key.upper()} {value}" for key, value in constants.items()]
    parts.append(_text("machine.cuh"))
    if name != "arrange":
        parts.append(_text("decode.cuh"))
    if name == "gemm":
        parts += [_text("hopper.cuh"), _products(int(constants["tokens"]))]
    if name == "mixed":
        parts.append(_text("gemv.cu"))
    parts.append(_text(f"{name}.cu"))
    return "\n".join(part.replace("#pragma once", "") for part in parts)


def _compile(name: str, device: int, constants: dict[str, int | str]) -> bytes:
    nvrtc = _bindings("nvrtc")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise EverybitError(f"a GPU of compute capability {major}.{minor} arrived, the kernels need 8.0 or more")
    target = f"sm_{major}{minor}" + ("a" if name == "gemm" else "")
    options = [f"--gpu-architecture={target}".encode(), b"-std=c++17"]
    program = _checked(nvrtc.nvrtcCreateProgram(source(name, constants).encode(), f"{name}.cu".encode(), 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise EverybitError(
            f"cuda/{name}.cu does not compile for {target}: {bytes(log[:1000]).decode(errors='replace')}"
        )
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def _bindings(part: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{part}")
    except ImportError:
        raise EverybitError('the GPU kernels need cuda-bindings: pip install "everybit[gpu]"') from None


def _checked(result: tuple[Any, ...]) -> Any:
    if result[0]:
        raise EverybitError(f"CUDA says {result[0]!r}")
    return result[1] if len(result) > 1 else None


@cache
def _text(file: str) -> str:
    return files("everybit.gpu").joinpath("cuda", file).read_text()


def _products(tokens: int) -> str:
    """Products<T>::times<tokens>: D[64, tokens] += A[64, 16] B[16, tokens], A in registers, B in shared memory."""
    count = tokens // 2  # of accumulators in a thread
    outs = ", ".join(f"%{i}" for i in range(count))
    ins = ", ".join(f"%{count + i}" for i in range(4))
    accumulators = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return "\n".join(
        f"template <> struct Products<{struct}> {{\n"
        "  template <int TOKENS>\n"
        f"  static __device__ __forceinline__ void times(float (&d)[{count}], const u32 (&a)[4], u64 b) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{dtype}.{dtype} '
        f'{{{outs}}}, {{{ins}}}, %{count + 4}, 1, 1, 1, 0;"\n'
        f'      : {accumulators} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));\n'
        "  }\n};"
        for struct, dtype in (("F16", "f16"), ("BF16", "bf16"))
    )
