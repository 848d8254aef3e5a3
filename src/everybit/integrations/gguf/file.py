"""Writing an overlay as one GGUF file, which llama.cpp, and all that is built on it, loads."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import build
from everybit.engine.models.config import Config
from everybit.engine.program import Program
from everybit.errors import OutputError, PrecisionError, SourceError
from everybit.formats.tensors import show
from everybit.formats.weights import require_bits
from everybit.integrations.gguf.families import find_family
from everybit.integrations.gguf.metadata import add_sizes
from everybit.integrations.gguf.packing import pack
from everybit.integrations.gguf.recipes import FILE_TYPES, Sizes, choose_type, plain_type
from everybit.integrations.gguf.tensors import Tensor, end_names, list_tensors
from everybit.integrations.gguf.vocabulary import add_vocabulary
from everybit.integrations.model_folder import require_outside, require_space, writable

TYPES: tuple[str, ...] = tuple(FILE_TYPES)


@dataclass(frozen=True)
class Report:
    """What was written: `bytes` of the file, `bpw` over all parameters, how many `tensors` have each type, and `notes`
    on what is not as asked."""

    bytes: int
    bpw: float
    tensors: Mapping[str, int]
    notes: tuple[str, ...]


def export_gguf(
    overlay: Path,
    out: Path,
    *,
    type: str = "Q4_K_M",
    bits: int | None = None,
    source: Path | None = None,
    progress: bool = True,
) -> Report:
    """Writes `out`, a GGUF file of `type`, from an overlay (or a folder of float weights).

    Values are the overlay's at `bits`, by default its highest precision, or those of `source`, the float model that it
    was made from.
    Cost: one parameter in float32 at a time; some 3 million weights a second for K-quants
    Raises: SourceError, ModelError, FormatError, ChecksumError, PrecisionError, OutputError
    """
    if type not in FILE_TYPES:
        raise SourceError(f"GGUF type {show(type)} arrived, expected one of {', '.join(TYPES)}: choose one of these")
    if bits is not None and source is not None:
        raise PrecisionError(f"bits {bits} and a float source arrived, expected one of them: leave the other out")
    try:
        import gguf
    except ImportError:
        raise SourceError('the gguf package is not installed: pip install "everybit[export]"') from None
    _require_free(out)
    for folder in (overlay, source or overlay):
        require_outside(out, folder)
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint.open(overlay))
        if bits is not None:
            require_bits(bits, checkpoint.bits, "the overlay")
        program = build(checkpoint)
        config = Config(checkpoint.config, f"{overlay}/config.json")
        family = find_family(checkpoint.config, config.where)
        origin = checkpoint if source is None else opened.enter_context(Checkpoint.open(source))
        if source is not None and (origin.bits or build(origin) != program):
            raise SourceError(f"{source} is not the float model of {overlay}: pass the folder that it was made from")
        writer = gguf.GGUFWriter(None, family.architecture)
        writer.add_type("model")
        writer.add_name(_title(checkpoint))
        writer.add_file_type(int(gguf.LlamaFileType[("ALL_" if type == "F32" else "MOSTLY_") + type]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        extra, notes = add_sizes(writer, program, config, family)
        add_vocabulary(writer, overlay, program.vocabulary)
        served = bits or max(origin.bits, default=0)
        tensors = [*list_tensors(program, origin, served, family), *extra]
        sizes = _sizes(program)
        kinds = [choose_type(type, tensor.name, tensor.shape, sizes) for tensor in tensors]
        notes += _replaced(type, tensors, kinds, sizes)
        stored_bytes = 0
        for tensor, kind in zip(tensors, kinds, strict=True):
            number = gguf.GGMLQuantizationType[kind]
            block, block_bytes = gguf.GGML_QUANT_SIZES[number]
            tensor_bytes = math.prod(tensor.shape) // block * block_bytes
            stored_bytes += tensor_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor_bytes, number)
        file_bytes = _write(writer, out, _pack(tensors, kinds, origin.folder, progress), stored_bytes)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return Report(file_bytes, stored_bytes * 8 / parameters, dict(Counter(kinds)), tuple(notes))


def _sizes(program: Program) -> Sizes:
    attention = next(op for op in program.ops if isinstance(op, ops.Attention))
    experts = next((op.scores.width for op in program.ops if isinstance(op, ops.Experts)), 0)
    embedding, head = end_names(program)
    return Sizes(program.layers, attention.heads, attention.kv_heads, experts, embedding == head)


def _replaced(type: str, tensors: list[Tensor], kinds: list[str], sizes: Sizes) -> list[str]:
    """One line for each type that rows of other lengths could not have."""
    found: Counter[tuple[str, str]] = Counter()
    for tensor, kind in zip(tensors, kinds, strict=True):
        if len(tensor.shape) > 1 and (wanted := plain_type(type, tensor.name, sizes)) != kind:
            found[wanted, kind] += 1
    return [
        f"{count} tensors are {kind} instead of {wanted}, whose blocks do not divide their rows"
        for (wanted, kind), count in found.items()
    ]


def _pack(tensors: list[Tensor], kinds: list[str], folder: Path, progress: bool) -> Iterator[NDArray[Any]]:
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    with tqdm(total=total, unit="w", unit_scale=True, desc="packing", disable=not progress) as bar:
        for tensor, kind in zip(tensors, kinds, strict=True):
            values = tensor.read()
            # Scales of quantized types are float16.
            limit = np.finfo(np.float32 if kind in ("F32", "BF16") else np.float16).max
            if not (np.abs(values) <= limit).all():
                raise SourceError(
                    f"{folder}: {show(tensor.name)} has values beyond {limit:.5g}, which {kind} cannot hold: "
                    "export as BF16, or correct the model"
                )
            yield pack(kind, values)
            bar.update(values.size)


def _write(writer: Any, out: Path, packed: Iterator[NDArray[Any]], least_bytes: int) -> int:
    """The bytes of the file, which is written as `OUT.partial` first."""
    partial = out.with_name(out.name + ".partial")
    with writable(out):
        try:
            partial.touch(exist_ok=False)
        except FileExistsError:
            raise OutputError(f"{partial} is there, of a run that was cut off or still goes on: remove it") from None
        try:
            require_space(partial, least_bytes, out)
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in packed:
                writer.write_tensor_data(stored)
            for file in writer.fout:
                file.flush()
                os.fsync(file.fileno())
            writer.close()
            _require_free(out)  # packing takes long
            os.rename(partial, out)
            return out.stat().st_size
        finally:
            writer.close()
            partial.unlink(missing_ok=True)


def _require_free(out: Path) -> None:
    """Raises: OutputError"""
    if os.path.lexists(out):
        raise OutputError(f"{out} exists: choose another file, or remove it")


def _title(checkpoint: Checkpoint) -> str:
    """The name of the model that the overlay was made from, or the folder's."""
    source = checkpoint.overlay.quantization.provenance.get("source") if checkpoint.overlay else None
    name = source.get("name") if isinstance(source, Mapping) else None
    return name if isinstance(name, str) and name else checkpoint.folder.resolve().name
