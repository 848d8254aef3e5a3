"""An overlay at one precision in compressed-tensors' `pack-quantized` format, which vLLM and transformers load.

`everybit export OVERLAY OUT --to compressed-tensors`. A weight whose codebook at that precision is a uniform grid with
a whole zero point (ternary ones; `affine` ones whose offset is such a multiple of the scale) keeps its codes: nothing
is lost but the rounding of the scale. Any other is fitted anew to the values of its highest precision, one scale and
zero point for each group of columns: coding the b-bit values a second time would lose more.

Weights of several precisions are symmetric, without zero points. transformers (5.24) has two ways to load: the one that
reads packed zero points (`dequantize`) takes the first config group for all modules, the other keeps the groups apart.
Source: compressed-tensors 0.20 (config_groups, weight_packed, weight_scale, weight_zero_point, weight_shape)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.plan import own_bits
from everybit.errors import SourceError
from everybit.formats import Overlay, TensorSpec, WeightSpec
from everybit.formats.tensors import show
from everybit.integrations.dense_export import (
    ExportReport,
    Loss,
    cast,
    dense,
    float_config,
    float_dtype,
    in_words,
    plain_arrays,
    plain_specs,
    relative_error,
    require_matrices,
    resolve,
)
from everybit.integrations.model_folder import SHARD_BYTES, write_model
from everybit.integrations.uniform_groups import F32, U8, fit_groups, pack_int32, spread, whole_grid
from everybit.kernels import unpack_codes

GROUP_SIZE = 128
WHOLE_ROW = -1
FLOAT_BITS = 16  # what takes more is better a float16 model


def export_compressed_tensors(
    overlay: Path,
    out: Path,
    *,
    bits: int | Path | None = None,
    group_size: int = GROUP_SIZE,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Writes the folder; `report.losses` says of every weight whether it is exact, and what it lost.

    `bits` and `dtype` (of scales and of what is not quantized) as in `export_safetensors`; `group_size` columns share
    a scale where a weight is fitted anew, -1: a whole row.
    Raises: FormatError (fused experts, Conv1D), PrecisionError, SourceError (groups that do not divide rows, or are so
    small that float16 takes less), OutputError
    """
    with Overlay.open(overlay) as opened:
        precision = resolve(opened, bits)
        require_matrices(opened, "compressed-tensors")
        target = float_dtype(opened, dtype)
        served = {w.name: own_bits(w, precision) for w in opened.weights.values()}
        symmetric = len(set(served.values())) > 1
        grids = {name: _grid(opened, name, own, symmetric) for name, own in served.items()}
        size = group_size if None in grids.values() else WHOLE_ROW
        for w in opened.weights.values():
            _check_group_size(w, served[w.name], size, target)
        plain = plain_specs(opened, target if dtype else None)
        layout = dict(plain)
        for w in opened.weights.values():
            layout |= _layout(w, served[w.name], size, target, symmetric)
        losses: list[Loss] = []

        def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
            yield from plain_arrays(opened, plain)
            for w in opened.weights.values():
                own, columns = served[w.name], w.columns if size == WHOLE_ROW else size
                wanted, now = dense(opened, w, w.bits[-1]), dense(opened, w, own)
                if (grid := grids[w.name]) is not None:
                    coded = spread(grid, unpack_codes(opened.planes(w.name, own), w.columns), columns, target)
                else:
                    coded = fit_groups(wanted, own, columns, target, symmetric)
                errors = relative_error(now, wanted), relative_error(coded.values(), wanted)
                losses.append(Loss(w.name, own, "refit" if grid is None else "exact", *errors))
                yield f"{w.name}_packed", pack_int32(coded.codes, own)
                yield f"{w.name}_scale", cast(coded.scale, target, w.name)
                if not symmetric:
                    yield f"{w.name}_zero_point", np.ascontiguousarray(pack_int32(coded.zero.T.copy(), own).T)
                yield f"{w.name}_shape", np.array(w.shape, np.int64)

        config = float_config(opened, target) | {"quantization_config": _config(opened, served, size)}
        nbytes = write_model(out, layout, arrays(), config, opened.folder, shard_bytes)
    return ExportReport(out, in_words(precision), target, nbytes, tuple(losses))


def _grid(overlay: Overlay, name: str, own: int, symmetric: bool) -> tuple[F32, U8] | None:
    """The grid of a weight's codebook, where it is one that can be written."""
    grid = whole_grid(overlay.table(name, own))
    if grid is None or not symmetric:
        return grid
    scale, zero = grid
    half = np.full_like(zero, 1 << (own - 1))
    return (scale, half) if np.array_equal(zero[scale > 0], half[scale > 0]) else None


def _check_group_size(spec: WeightSpec, own: int, size: int, dtype: str) -> None:
    """Raises: SourceError"""
    if size == WHOLE_ROW:
        return
    fits = math.gcd(spec.columns, GROUP_SIZE)
    if size < 1 or spec.columns % size:
        raise SourceError(
            f"--group-size {size}: {show(spec.name)} has rows of {spec.columns} weights, expected a size that divides "
            f"them, such as {fits}, or -1 for one scale a row"
        )
    bits = own + (TensorSpec(dtype, ()).itemsize * 8 + own) / size
    if bits > FLOAT_BITS:
        raise SourceError(
            f"--group-size {size}: {show(spec.name)} would have {bits:g} bits a weight with its scales, more than "
            f"float16: choose a larger size, such as {fits}, or export --to safetensors"
        )


def _layout(spec: WeightSpec, own: int, size: int, dtype: str, symmetric: bool) -> dict[str, TensorSpec]:
    groups = 1 if size == WHOLE_ROW else spec.columns // size
    found = {
        f"{spec.name}_packed": TensorSpec("I32", (spec.rows, -(-spec.columns * own // 32))),
        f"{spec.name}_scale": TensorSpec(dtype, (spec.rows, groups)),
        f"{spec.name}_shape": TensorSpec("I64", (2,)),
    }
    if not symmetric:
        found[f"{spec.name}_zero_point"] = TensorSpec("I32", (-(-spec.rows * own // 32), groups))
    return found


def _config(overlay: Overlay, served: dict[str, int], size: int) -> dict[str, Any]:
    """The quantization_config: a config group for each precision, with its modules if there are several."""
    modules: dict[int, list[str]] = {}
    for name, own in served.items():
        modules.setdefault(own, []).append(name.removesuffix(".weight"))
    mixed = len(modules) > 1
    groups = {}
    for i, (own, targets) in enumerate(sorted(modules.items())):
        weights: dict[str, Any] = {"num_bits": own, "type": "int", "symmetric": mixed, "dynamic": False}
        weights |= {"strategy": "channel"} if size == WHOLE_ROW else {"strategy": "group", "group_size": size}
        groups[f"group_{i}"] = {
            "targets": targets if mixed else ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    left = {n.removesuffix(".weight") for n in overlay.plain_names() if len(overlay.spec_of(n).shape) == 2}
    if "lm_head.weight" not in served:
        left.add("lm_head")  # not among the tensors where it is tied to the embedding
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": not mixed,  # for transformers alone; see above
        "config_groups": groups,
        "ignore": sorted(left),
        "kv_cache_scheme": None,
    }
