"""One parameter of the model to the tensors an overlay stores for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.errors import EverybitError, SourceError
from everybit.formats import WeightSpec
from everybit.kernels import pack_planes
from everybit.quantize.solvers import solve

Array = NDArray[np.generic]


def matrices(tensor: torch.Tensor, spec: WeightSpec, folder: Path) -> list[NDArray[np.float32]]:
    """The parameter as float32 [N, K] in stored orientation, one per expert. Raises: SourceError if not finite."""
    _check_finite(spec.name, tensor, folder)
    found = tensor.reshape(-1, *tensor.shape[-2:])
    return [np.ascontiguousarray((m.T if spec.transposed else m).float().numpy()) for m in found]


def encode(
    spec: WeightSpec,
    weights: list[NDArray[np.float32]],
    importance: NDArray[np.float32] | None,
    solver: str,
    lut_dtype: str,
    seed: int,
    threads: int,
) -> dict[str, Array]:
    """Solve, pack and collect planes and codebooks by tensor name.

    Shapes: weights one f32[N, K] per expert; importance f32 of the stored shape or None
    Raises: SourceError when a value overflows the tables' dtype; whatever the solver raises, with the name
    """
    layout = spec.tensors(lut_dtype)
    experts = len(weights)
    arrays = {name: np.empty((experts, spec.rows // experts, t.shape[-1]), t.numpy) for name, t in layout.items()}
    shares = [None] * experts if importance is None else list(importance.reshape(experts, *weights[0].shape))
    own_seed = seed ^ int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "little")
    for e in range(experts):
        try:
            kind = spec.codebook if spec.codebook == "compact" else "table"
            solution = solve(weights[e], shares[e], spec.bits, solver, own_seed + e, threads, kind)
        except EverybitError as error:
            raise type(error)(f"{spec.name}: {error}") from error
        for k, plane in enumerate(pack_planes(solution.codes, spec.planes)):
            arrays[spec.plane_name(k)][e] = plane
        for name, part in spec.codebook_parts().items():
            with np.errstate(over="ignore"):
                arrays[name][e] = solution.codebook[part.suffix]
        for b in spec.bits:
            stored = {suffix: arrays[name][e] for suffix, name in spec.codebook_names(b).items()}
            if not np.isfinite(spec.book.expand(stored, b)).all():
                dtype = "compact" if spec.codebook == "compact" else str(next(iter(stored.values())).dtype)
                raise SourceError(
                    f"{spec.name}: weights up to {np.abs(weights[e]).max():.3g} overflow a {dtype} codebook: use "
                    f"{'--codebook table ' if dtype == 'compact' else ''}--table-dtype float32, or rescale the layer"
                )
    return {name: array.reshape(layout[name].shape) for name, array in arrays.items()}


def plain(name: str, tensor: torch.Tensor, folder: Path) -> Array:
    """A parameter that is not quantized, bit for bit (bfloat16 as uint16). Raises: SourceError if not finite."""
    if tensor.is_floating_point():
        _check_finite(name, tensor, folder)
    return to_numpy(tensor)


def to_numpy(tensor: torch.Tensor) -> Array:
    """The tensor's bytes as numpy holds them: bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _check_finite(name: str, tensor: torch.Tensor, folder: Path) -> None:
    if not torch.isfinite(tensor).all():
        at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise SourceError(
            f"{folder}: {name} holds {tensor[tuple(at)].item()} at {at}, expected finite weights: repair the model"
        )
