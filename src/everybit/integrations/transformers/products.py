"""Which weights are multiplied as bit-planes by `everybit.gpu`, and which as dense copies."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from everybit.errors import ModelError
from everybit.formats import Overlay

KERNELS = ("auto", "gpu", "reference", "dense")
DTYPES = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # cuda/decode.cuh: mma.m16n8k16, cp.async
_FILLED = 0.9  # of the GPU's memory, by weights; the rest is for activations and the KV cache


class Products:
    """How a model multiplies by its overlay's weights, decided where they are used: a model may change its device.

    `kernels` is auto (planes by the GPU kernels where these run, else dense copies), gpu (the kernels, or an error),
    reference (as gpu, on a processor in plain torch: slow, for tests) or dense.
    """

    def __init__(self, kernels: str = "auto") -> None:
        self.kernels = kernels
        self._told = False

    def by_planes(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Raises: ModelError where `kernels` asks for what is not possible"""
        if self.kernels == "dense" or (self.kernels == "auto" and device.type != "cuda"):
            return False
        obstacle = obstacle_to_kernels(device, dtype, self.kernels == "reference")
        if obstacle is None:
            return True
        if self.kernels != "auto":
            raise ModelError(f"kernels={self.kernels!r}: {obstacle}, or leave kernels out")
        if not self._told:
            warnings.warn(f"everybit: dense copies instead of the GPU kernels: {obstacle}", stacklevel=2)
            self._told = True
        return False


def check_kernels(kernels: str) -> None:
    """Raises: ModelError for an unknown choice, or for gpu where there is none"""
    if kernels not in KERNELS:
        raise ModelError(f"kernels={kernels!r} arrived, expected one of {', '.join(KERNELS)}")
    if kernels == "gpu" and not torch.cuda.is_available():
        raise ModelError("kernels='gpu': torch sees no CUDA device: leave kernels out, or install a torch for CUDA")


@cache
def obstacle_to_kernels(device: torch.device, dtype: torch.dtype, on_processor: bool) -> str | None:
    """Why a product by planes cannot run there, and what to do; None where it can."""
    if device.type != ("cpu" if on_processor else "cuda"):
        return f"the model is on {device}: move it to {'cpu' if on_processor else 'cuda'}"
    if dtype not in DTYPES:
        return f"the model is {str(dtype).removeprefix('torch.')}: load it with dtype=torch.float16 or bfloat16"
    if on_processor:
        return None
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        return f"the GPU has compute capability {found}: use one of {least} or more"
    if not (importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")):
        return 'cuda-bindings is not installed: pip install "everybit[gpu]"'
    return None


@contextmanager
def naming_what_fits(overlay: Overlay, device: torch.device) -> Iterator[None]:
    """Turns a full GPU into a ModelError that says which precisions fit."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        fits = [b for b, size in overlay.sizes().rows.items() if size.bytes < _FILLED * total_bytes]
        advice = f"at most {fits[-1]} bits fit beside nothing else" if fits else "no precision fits"
        raise ModelError(
            f"{overlay.folder}: the {total_bytes / 1e9:.1f} GB of {device} are full: {advice}; lower bits or batch"
        ) from None
