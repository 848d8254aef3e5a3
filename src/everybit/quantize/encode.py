"""One parameter of the model to the tensors an overlay stores for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.errors import EverybitError, SourceError
from everybit.formats import WeightSpec
from everybit.kernels import pack_planes
from everybit.quantize.solvers import Solution, solve
from everybit.quantize.solvers.guided import solve_guided

if TYPE_CHECKING:  # it needs transformers, whose import may be what imports this file
    from everybit.quantize.statistics import Statistics

Array = NDArray[np.generic]


def matrices(tensor: torch.Tensor, spec: WeightSpec, folder: Path) -> list[NDArray[np.float32]]:
    """The parameter as float32 [N, K] in stored orientation, one per expert. Raises: SourceError if not finite."""
    _check_finite(spec.name, tensor, folder)
    found = tensor.reshape(-1, *tensor.shape[-2:])
    return [np.ascontiguousarray((m.T if spec.transposed else m).float().numpy()) for m in found]


def outlying(weights: NDArray[np.float32]) -> float:
    """The largest weight of any row in units of that row's root mean square. Shapes: f32[N, K]"""
    with np.errstate(over="ignore", invalid="ignore"):
        mean_square = np.einsum("nk,nk->n", weights, weights) / weights.shape[1]
        ratio = np.abs(weights).max(axis=1) / np.sqrt(np.where(mean_square > 0, mean_square, 1))
    return float(np.nan_to_num(ratio).max(initial=0))


def solve_parameter(
    spec: WeightSpec,
    weights: list[NDArray[np.float32]],
    statistics: Statistics | None,
    solver: str,
    seed: int,
    threads: int,
) -> list[Solution]:
    """One solution for each matrix of a parameter. Shapes: weights one f32[N, K] per expert

    Raises: whatever the solver raises, with the name
    """
    sensitivities: list[NDArray[np.float32]] | list[None] = [None] * len(weights)
    hessians: list[NDArray[np.float32]] | list[None] = [None] * len(weights)
    if statistics is not None:
        shape = (len(weights), *weights[0].shape)
        sensitivities = list(np.ascontiguousarray(statistics.sensitivity(spec.name)).reshape(shape))
        if solver == "guided" and (found := statistics.hessian(spec.name)) is not None:
            hessians = list(found.reshape(len(weights), *found.shape[-3:]))
    own_seed = seed ^ int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "little")
    solutions = []
    for e, (matrix, sensitivity, hessian) in enumerate(zip(weights, sensitivities, hessians, strict=True)):
        try:
            if hessian is not None:
                solutions.append(solve_guided(matrix, hessian, sensitivity, spec.bits, threads))
            else:
                kind = spec.codebook if spec.codebook == "compact" else "table"
                solutions.append(solve(matrix, sensitivity, spec.bits, solver, own_seed + e, threads, kind))
        except EverybitError as error:
            raise type(error)(f"{spec.name}: {error}") from error
    return solutions


def encode(spec: WeightSpec, solutions: list[Solution], lut_dtype: str) -> dict[str, Array]:
    """Pack, and collect planes and codebooks by tensor name.

    Raises: SourceError when a value overflows the tables' dtype
    """
    layout = spec.tensors(lut_dtype)
    experts = len(solutions)
    arrays = {name: np.empty((experts, spec.rows // experts, t.shape[-1]), t.numpy) for name, t in layout.items()}
    for e, solution in enumerate(solutions):
        for k, plane in enumerate(pack_planes(solution.codes, spec.planes)):
            arrays[spec.plane_name(k)][e] = plane
        for name, part in spec.codebook_parts().items():
            with np.errstate(over="ignore"):
                arrays[name][e] = solution.codebook[part.suffix]
        for b in spec.bits:
            stored = {suffix: arrays[name][e] for suffix, name in spec.codebook_names(b).items()}
            if not np.isfinite(spec.book.expand(stored, b)).all():
                dtype = "compact" if spec.codebook == "compact" else str(next(iter(stored.values())).dtype)
                most = np.nanmax(np.abs(solution.table_at(b)))
                raise SourceError(
                    f"{spec.name}: values up to {most:.3g} overflow a {dtype} codebook: use "
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
