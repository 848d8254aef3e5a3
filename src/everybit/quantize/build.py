"""Build an overlay from a model folder: discover, measure sensitivity, solve layer by layer, write, rename.

Everything is written into `OUT.partial`; OUT appears by a rename when it is complete. A killed run goes on with
`resume=True` and ends in the same bytes, because the layout is fixed in advance, every parameter is solved
independently with its own seed, and nothing that is written depends on the clock or the number of threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from everybit import __version__
from everybit.errors import SourceError
from everybit.formats import OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec, check_bits
from everybit.formats.sizes import SizeReport
from everybit.quantize import calibrate
from everybit.quantize.card import model_card
from everybit.quantize.discover import Target, discover
from everybit.quantize.encode import encode, matrices, plain
from everybit.quantize.sensitivity import SensitivityFile, accumulate
from everybit.quantize.solvers import KINDS, codebook_kind
from everybit.quantize.source import FLOATS, Source, load_float, load_tokenizer, resolve
from everybit.quantize.workspace import STATISTICS, copy_side_files, free_output, new_folder, promote, writable

TABLE_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class QuantizeReport:
    """What was (or with a dry run would be) written: sizes, what was left alone and why, what calibration missed."""

    out: Path
    sizes: SizeReport
    left: dict[str, str]
    unreached: list[str]
    zeros: list[str]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "dry_run": self.dry_run,
            **self.sizes.to_dict(),
            "left": self.left,
            "unreached": self.unreached,
            "zeros": self.zeros,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    bits: Sequence[int] | int = (2, 3, 4, 5, 6, 7, 8),
    calibration: str | Path = "none",
    solver: str = "tree",
    ignore: Sequence[str] | str = (),
    override: Mapping[str, Sequence[int] | int] | None = None,
    *,
    codebook: str | None = None,
    seed: int = 0,
    calibration_sequences: int = 128,
    calibration_length: int = 512,
    table_dtype: str | None = None,
    shard_bytes: int = 2 << 30,
    threads: int = 0,
    dry_run: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize a float model once into an overlay that serves every precision in `bits`.

    `model` is a folder or a hub id; `calibration` a text file, `self` (text the model writes) or `none`;
    `solver` one of tree, upscale, uniform; `ignore` regular expressions of module names to leave alone;
    `override` maps such expressions to their own bits (a layer with bits (6,) is served at 6 bits always), the last
    match wins. `codebook` is `compact` (the default: 58 bytes a row for 2 to 8 bits) or `table` (2^b numbers a row for
    each b); the solver uniform has its own. `table_dtype` is that of tables, float16
    (the default) or float32.

    Cost: memory of one parameter (with calibration: of the float32 model and its sensitivities as well).
    Mutates: creates `out`; `out.partial` while it runs.
    Raises: SourceError, PrecisionError, OutputError; nothing appears under `out` then.
    """
    bits = (bits,) if isinstance(bits, int) else bits
    ignore = [ignore] if isinstance(ignore, str) else ignore
    if solver not in KINDS:
        raise SourceError(f"unknown solver {solver!r}: expected one of {', '.join(KINDS)}")
    if codebook is not None and KINDS[solver] != "table":
        raise SourceError(
            f"codebook {codebook!r} has no effect with the solver {solver}, whose grid is its own: drop it"
        )
    kind = codebook_kind(solver, codebook or "compact")
    if table_dtype is not None and kind != "table":
        raise SourceError(
            f"table dtype {table_dtype!r} has no effect with the codebook {kind}: ask for codebook table, or drop it"
        )
    table_dtype = table_dtype or "float16"
    if table_dtype not in TABLE_DTYPES:
        raise SourceError(f"unknown table dtype {table_dtype!r}: expected one of {', '.join(TABLE_DTYPES)}")
    for option, number, most in (("--seed", seed, 2**63 - 1), ("--threads", threads, 1024)):
        if not 0 <= number <= most:
            raise SourceError(f"{option} {number}: expected 0 to {most}")
    bits = check_bits(tuple(bits))
    overrides = {
        pattern: check_bits((b,) if isinstance(b, int) else tuple(b), f"override {pattern}")
        for pattern, b in (override or {}).items()
    }
    record, documents = calibrate.describe(calibration, calibration_sequences, calibration_length, seed)
    if not str(out) or not str(model):
        raise SourceError("an empty path arrived as model or output: expected a folder name")
    out = Path(os.path.abspath(Path(out).expanduser()))
    partial = free_output(out, resume, dry_run)

    source = Source(resolve(model))
    title = source.folder.resolve().name if Path(model).expanduser().is_dir() else str(model)
    targets, left = discover(source.model, list(ignore), list(overrides))
    for target in targets:
        if (dtype := source.dtype_of(target.name)) not in FLOATS:
            raise SourceError(f"{source.folder}: {target.name} holds {dtype}, expected one of {', '.join(FLOATS)}")
    lut_dtype = TABLE_DTYPES[table_dtype]
    specs = {}
    for target in targets:
        own_bits = _bits_of(target, bits, overrides)
        specs[target.name] = WeightSpec(target.name, target.shape, own_bits, kind, target.transposed)
    provenance = {
        "everybit_version": __version__,
        "solver": solver,
        "seed": seed,
        "calibration": record.provenance(),
        "source": {"name": title, "sha256": {} if dry_run else source.checksums(progress)},
    }
    config = {**source.config, "quantization_config": QuantizationConfig(bits, kind, specs, provenance).to_dict()}
    layout: dict[str, TensorSpec] = {}
    for name, shape in source.shapes.items():
        layout |= specs[name].tensors(lut_dtype) if name in specs else {name: TensorSpec(source.dtype_of(name), shape)}
    sizes = SizeReport.of(specs.values(), bits, layout)
    if dry_run:
        return QuantizeReport(out, sizes, left, [], [], True)

    zeros: list[str] = []
    unreached: list[str] = []
    with new_folder(partial), OverlayWriter(partial, layout, config, shard_bytes) as writer:
        if not writer.complete:  # else: killed between the last byte and the rename
            sensitivity, unreached = _measure(source, targets, record, documents, partial / STATISTICS, progress)
            with tqdm(
                total=sizes.parameters, unit="w", unit_scale=True, desc="quantizing", disable=not progress
            ) as bar:
                for name, tensor in source.parameters():
                    spec = specs.get(name)
                    if spec is not None and not tensor.any():
                        zeros.append(name)
                    if name not in writer.done:
                        if spec is None:
                            group = {name: plain(name, tensor, source.folder)}
                        else:
                            weights = matrices(tensor, spec, source.folder)
                            importance = sensitivity.read(name) if sensitivity else None
                            group = encode(spec, weights, importance, solver, lut_dtype, seed, threads)
                        writer.write_group(name, group)
                    bar.update(spec.parameters if spec else 0)
        with writable(partial):
            copy_side_files(source.folder, partial)
            (partial / "README.md").write_text(model_card(config, sizes), encoding="utf-8")
        writer.finish()
    promote(partial, out)
    return QuantizeReport(out, sizes, left, unreached, zeros, False)


def _bits_of(target: Target, default: tuple[int, ...], overrides: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    module = target.name.rpartition(".")[0]
    found = [bits for pattern, bits in overrides.items() if re.search(pattern, module)]
    return found[-1] if found else default


def _measure(
    source: Source,
    targets: list[Target],
    record: calibrate.Calibration,
    documents: list[str] | None,
    path: Path,
    progress: bool,
) -> tuple[SensitivityFile | None, list[str]]:
    if record.kind == "none":
        return None, []
    if (finished := SensitivityFile.finished(path)) is not None:  # before a kill; the journal vouches for the options
        return finished, finished.unreached()
    tokenizer, model = load_tokenizer(source.folder), load_float(source.folder)
    model.requires_grad_(False)
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", record.length))
    if documents is None:
        sequences = calibrate.self_sequences(model, tokenizer, record, context, progress)
    else:
        sequences = calibrate.text_sequences(tokenizer, documents, record, context)
    vocabulary = model.get_input_embeddings().num_embeddings
    if (highest := max(int(s.max()) for s in sequences)) >= vocabulary:
        raise SourceError(
            f"{source.folder}: the tokenizer gives token {highest}, the model knows {vocabulary}: "
            "they do not belong together; fix the folder or use --calibration none"
        )
    statistics = accumulate(model, targets, sequences, path, progress)
    return statistics, statistics.unreached()
