"""An overlay at one precision in compressed-tensors' `pack-quantized` format, which vLLM and transformers load.

`everybit export OVERLAY OUT --to compressed-tensors`. A weight whose codebook at that precision is a uniform grid with
a whole zero point (ternary ones; `affine` ones whose offset is such a multiple of the scale) keeps its codes: one scale
a row, nothing lost but the rounding of the scale. Any other is fitted anew to the values of its highest precision, one
scale and zero point for each group of columns: coding the b-bit values a second time would lose more.
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
from everybit.integrations.uniform_groups import Grouped, fit_groups, pack_int32, stored, whole_grid
from everybit.kernels import unpack_codes

GROUP_SIZE = 128
WHOLE_ROW = -1


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
    Raises: FormatError (fused experts, Conv1D), PrecisionError, SourceError (rows that no group divides), OutputError
    """
    with Overlay.open(overlay) as opened:
        precision = resolve(opened, bits)
        require_matrices(opened, "compressed-tensors")
        target = float_dtype(opened, dtype)
        served = {w.name: own_bits(w, precision) for w in opened.weights.values()}
        grids = {name: whole_grid(opened.table(name, own)) for name, own in served.items()}
        sizes = {w.name: _group_size(w, group_size, grids[w.name] is not None) for w in opened.weights.values()}
        plain = plain_specs(opened, target if dtype else None)
        layout = dict(plain)
        for w in opened.weights.values():
            layout |= _layout(w, served[w.name], sizes[w.name], target)
        losses: list[Loss] = []

        def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
            yield from plain_arrays(opened, plain)
            for w in opened.weights.values():
                own, size = served[w.name], sizes[w.name]
                wanted, now = dense(opened, w, w.bits[-1]), dense(opened, w, own)
                if (grid := grids[w.name]) is not None:
                    codes = unpack_codes(opened.planes(w.name, own), w.columns)
                    coded = Grouped(codes, stored(grid[0], target), grid[1])
                else:
                    coded = fit_groups(wanted, own, w.columns if size == WHOLE_ROW else size, target)
                errors = relative_error(now, wanted), relative_error(coded.values(), wanted)
                losses.append(Loss(w.name, own, "refit" if grid is None else "exact", *errors))
                yield f"{w.name}_packed", pack_int32(coded.codes, own)
                yield f"{w.name}_scale", cast(coded.scale, target, w.name)
                yield f"{w.name}_zero_point", np.ascontiguousarray(pack_int32(coded.zero.T.copy(), own).T)
                yield f"{w.name}_shape", np.array(w.shape, np.int64)

        config = float_config(opened, target) | {"quantization_config": _config(opened, served, sizes)}
        nbytes = write_model(out, layout, arrays(), config, opened.folder, shard_bytes)
    return ExportReport(out, in_words(precision), target, nbytes, tuple(losses))


def _group_size(spec: WeightSpec, asked: int, exact: bool) -> int:
    """Raises: SourceError"""
    if exact or asked == WHOLE_ROW:
        return WHOLE_ROW
    if asked < 1 or spec.columns % asked:
        fits = math.gcd(spec.columns, GROUP_SIZE)
        raise SourceError(
            f"--group-size {asked}: {show(spec.name)} has rows of {spec.columns} weights, expected a size that divides "
            f"them, such as {fits}, or -1 for one scale a row"
        )
    return asked


def _layout(spec: WeightSpec, own: int, size: int, dtype: str) -> dict[str, TensorSpec]:
    groups = 1 if size == WHOLE_ROW else spec.columns // size
    return {
        f"{spec.name}_packed": TensorSpec("I32", (spec.rows, -(-spec.columns * own // 32))),
        f"{spec.name}_scale": TensorSpec(dtype, (spec.rows, groups)),
        f"{spec.name}_zero_point": TensorSpec("I32", (-(-spec.rows * own // 32), groups)),
        f"{spec.name}_shape": TensorSpec("I64", (2,)),
    }


def _config(overlay: Overlay, served: dict[str, int], sizes: dict[str, int]) -> dict[str, Any]:
    """The quantization_config: a config group for each pair of bits and group size, with its modules if not all."""
    schemes: dict[tuple[int, int], list[str]] = {}
    for name, own in served.items():
        schemes.setdefault((own, sizes[name]), []).append(name.removesuffix(".weight"))
    groups = {}
    for i, ((own, size), modules) in enumerate(sorted(schemes.items())):
        weights: dict[str, Any] = {"num_bits": own, "type": "int", "symmetric": False, "dynamic": False}
        weights |= {"strategy": "channel"} if size == WHOLE_ROW else {"strategy": "group", "group_size": size}
        groups[f"group_{i}"] = {
            "targets": modules if len(schemes) > 1 else ["Linear"],
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
        "dequantize": True,  # for transformers alone, whose other way cannot load packed zero points (5.24)
        "config_groups": groups,
        "ignore": sorted(left),
        "kv_cache_scheme": None,
    }
