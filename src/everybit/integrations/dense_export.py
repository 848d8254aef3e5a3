"""An overlay at one precision as a plain float model: `everybit export OVERLAY OUT --to safetensors`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.plan import Plan, Precision, own_bits
from everybit.errors import FormatError, SourceError
from everybit.formats import Overlay, TensorSpec, WeightSpec
from everybit.formats.tensors import from_bf16, show, to_bf16
from everybit.formats.weights import require_bits
from everybit.integrations.model_folder import SHARD_BYTES, write_model
from everybit.kernels import dequantize

F32 = NDArray[np.float32]
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Loss:
    """What a weight lost, as the norm of the error over the norm of the weight at the highest precision it has:
    `before` of the overlay at `bits`, `after` of what was written. `how`: exact, or refit."""

    name: str
    bits: int
    how: str
    before: float
    after: float


@dataclass(frozen=True)
class ExportReport:
    """What was written: `precision` in words, the float `dtype`, `bytes` of all tensors, and where a weight was put
    on another grid, its loss."""

    out: Path
    precision: str
    dtype: str
    bytes: int
    losses: tuple[Loss, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def export_safetensors(
    overlay: Path,
    out: Path,
    *,
    bits: int | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Writes a Hugging Face folder with every weight as a float matrix, in the model's own names and orientation.

    `bits` is a precision of the overlay (None: its highest) or a plan file; `dtype` bf16, f16 or f32 (None: that of
    the model before it was quantized). With f32 the values are those of the overlay bit for bit.
    Cost: memory of one weight in float32.
    Raises: FormatError, PrecisionError, SourceError (values that the dtype cannot hold), OutputError
    """
    with Overlay.open(overlay) as opened:
        precision = resolve(opened, bits)
        target = float_dtype(opened, dtype)
        plain = plain_specs(opened, target if dtype else None)
        weights = {w.name: TensorSpec(target, model_shape(w)) for w in opened.weights.values()}

        def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
            yield from plain_arrays(opened, plain)
            for spec in opened.weights.values():
                values = dense(opened, spec, own_bits(spec, precision)).reshape(spec.shape)
                yield spec.name, cast(np.swapaxes(values, -1, -2) if spec.transposed else values, target, spec.name)

        config = float_config(opened, target)
        nbytes = write_model(out, {**plain, **weights}, arrays(), config, opened.folder, shard_bytes)
    return ExportReport(out, in_words(precision), target, nbytes)


def resolve(overlay: Overlay, bits: int | Path | None) -> Precision:
    """The precision asked for: the overlay's highest, one of its own, or a plan file. Raises: PrecisionError, ..."""
    if isinstance(bits, Path):
        return Plan.open(bits, overlay)
    if bits is not None:
        require_bits(bits, overlay.bits, "the overlay")
    return bits or overlay.bits[-1]


def in_words(precision: Precision) -> str:
    """For reports."""
    return str(precision) if isinstance(precision, Plan) else f"{precision} bits"


def dense(overlay: Overlay, spec: WeightSpec, own: int) -> F32:
    """A weight at one of its own precisions. Shapes: -> f32[rows, K]"""
    return dequantize(overlay.planes(spec.name, own), overlay.table(spec.name, own), spec.columns)


def model_shape(spec: WeightSpec) -> tuple[int, ...]:
    """The shape of the parameter in the model."""
    *lead, rows, columns = spec.shape
    return (*lead, columns, rows) if spec.transposed else spec.shape


def float_dtype(overlay: Overlay, asked: str | None) -> str:
    """The safetensors dtype for floats: what was asked for, else that of the largest parameter left as it was."""
    if asked is not None:
        if asked not in DTYPES:
            raise SourceError(f"dtype {show(asked)}: expected one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    floats = [spec for name in overlay.plain_names() if (spec := overlay.spec_of(name)).dtype in _CONFIG_NAMES]
    return max(floats, key=lambda spec: spec.nbytes).dtype if floats else "F32"


def plain_specs(overlay: Overlay, target: str | None) -> dict[str, TensorSpec]:
    """The tensors that are not quantized; their floats as `target`, if any."""
    found = {name: overlay.spec_of(name) for name in overlay.plain_names()}
    if target is None:
        return found
    return {
        name: TensorSpec(target if spec.dtype in (*_CONFIG_NAMES, "F64") else spec.dtype, spec.shape)
        for name, spec in found.items()
    }


def plain_arrays(overlay: Overlay, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of `specs`, in the dtypes it names."""
    for name, spec in specs.items():
        array, stored = overlay.tensor(name), overlay.dtype_of(name)
        if spec.dtype != stored:
            array = cast(from_bf16(array) if stored == "BF16" else array, spec.dtype, name)
        yield name, array


def cast(values: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    """Floats as a safetensors dtype, rounded to nearest. Raises: SourceError where f16 cannot hold them"""
    if dtype == "BF16":
        return to_bf16(np.asarray(values, np.float32))
    with np.errstate(over="ignore"):
        found = np.asarray(values).astype(TensorSpec(dtype, ()).numpy)
    if dtype == "F16" and not np.isfinite(found).all():
        raise SourceError(f"{name} has values up to {np.abs(values).max():.3g}, too large for f16: use --dtype bf16")
    return found


def float_config(overlay: Overlay, dtype: str) -> dict[str, Any]:
    """config.json without the quantization, naming the dtype under the key that it has, or both."""
    config = {key: value for key, value in overlay.config.items() if key != "quantization_config"}
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype", "torch_dtype"]
    return {**config, **dict.fromkeys(keys, _CONFIG_NAMES[dtype])}


def relative_error(found: F32, wanted: F32) -> float:
    """The norm of the difference over the norm of what was wanted; 0 where both are all zeros."""
    norm = math.sqrt(float(np.square(wanted, dtype=np.float64).sum()))
    error = math.sqrt(float(np.square(found.astype(np.float64) - wanted).sum()))
    return error / norm if norm else error


def require_matrices(overlay: Overlay, to: str) -> None:
    """Refuses weights that a format of plain linear layers cannot hold. Raises: FormatError"""
    for spec in overlay.weights.values():
        what = "fused experts" if len(spec.shape) == 3 else "a Conv1D" if spec.transposed else ""
        if what or not spec.name.endswith(".weight"):
            raise FormatError(
                f"{overlay.folder}: {show(spec.name)} is {what or 'not the weight of a layer'}, which {to} cannot "
                "hold: export --to safetensors"
            )
