"""Build an overlay from a model folder: discover, measure, solve layer by layer, tune, write, rename.

Everything is written into `OUT.partial`; OUT appears by a rename when it is complete. A killed run goes on with
`resume=True` and ends in the same bytes, because the layout is fixed in advance, every parameter is solved
independently with its own seed, and nothing that is written depends on the clock or the number of threads.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from everybit import __version__
from everybit.errors import SourceError
from everybit.formats import OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec, check_bits
from everybit.formats.sizes import SizeReport
from everybit.quantize import calibrate
from everybit.quantize.blocks import Blocks
from everybit.quantize.calibrate import Calibrated
from everybit.quantize.card import model_card
from everybit.quantize.discover import Target, discover
from everybit.quantize.encode import encode, matrices, outlying, plain, solve_parameter
from everybit.quantize.solutions import SolutionFiles
from everybit.quantize.solvers import KINDS, Solution, codebook_kind
from everybit.quantize.source import FLOATS, Source, resolve
from everybit.quantize.statistics import Statistics, measure
from everybit.quantize.tuning import (
    STEPS,
    TunedBits,
    block_memory_bytes,
    memory_bytes,
    tunable,
    tune_blocks,
    tune_tables,
    tuned,
)
from everybit.quantize.workspace import (
    WORK,
    copy_side_files,
    free_output,
    new_folder,
    promote,
    statistics_folder,
    writable,
)

OUTLIER = 20.0  # times a row's root mean square: beyond, int8 tables cost more than the bits they save
GROUPS = 4  # of output rows that share a Hessian: those of single rows are 3 to 10 % better and do not scale
TABLE_DTYPES = {"float16": "F16", "float32": "F32"}
TUNE = ("whole", "blocks")
MEMORY_SHARE = 0.8  # of this machine's, that tuning may take


@dataclass(frozen=True)
class QuantizeReport:
    """What was (or with a dry run would be) written: sizes, what was left alone and why, what calibration missed, and
    what tuning did at each precision (or, in `untuned`, why there was none)."""

    out: Path
    sizes: SizeReport
    left: dict[str, str]
    unreached: list[str]
    zeros: list[str]
    dry_run: bool
    unguided: list[str] = field(default_factory=list)
    outliers: list[str] = field(default_factory=list)
    tuned: dict[int, TunedBits] = field(default_factory=dict)
    untuned: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "dry_run": self.dry_run,
            **self.sizes.to_dict(),
            "left": self.left,
            "unreached": self.unreached,
            "zeros": self.zeros,
            "unguided": self.unguided,
            "outliers": self.outliers,
            "tuned": {str(b): asdict(t) for b, t in self.tuned.items()},
            "untuned": self.untuned,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    bits: Sequence[int] | int = (2, 3, 4, 5, 6, 7, 8),
    calibration: str | Path = "none",
    solver: str | None = None,
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
    tune: bool | Literal["whole", "blocks"] | None = None,
    tune_steps: int = STEPS,
    statistics: str | Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize a float model once into an overlay that serves every precision in `bits`.

    `model` is a folder or a hub id; `calibration` a text file, `self` (text the model writes), `random`
    (tokens) or `none`; `solver` one of guided (the default with calibration and compact codebooks), tree (the default
    otherwise), upscale, uniform; `ignore` regular expressions of module names to leave alone;
    `override` maps such expressions to their own bits (a layer with bits (6,) is served at 6 bits always), the last
    match wins. `codebook` is `compact` (the default: 58 bytes a row for 2 to 8 bits) or `table` (2^b numbers a row for
    each b); the solver uniform has its own. `table_dtype` is that of tables, float16 (the default) or float32.
    `tune` trains the tables of each precision against the float model, `tune_steps` at most; by default where there is
    calibration, and memory for it: the `whole` model's at once, or else that of one of its `blocks` after the other,
    which gains less at 2 bits. `statistics` is a folder that keeps what calibration measured, for the next run
    with the same model, text and options.

    Cost: memory of one parameter; with calibration, of the float32 model, its sensitivities and up to 4 GiB of Hessians
    as well; with tuning, about 14 bytes a parameter and activations, or those of a decoder block and, on disk, three
    float32 hidden states of the calibration text.
    Mutates: creates `out`; `out.partial` while it runs.
    Raises: SourceError, PrecisionError, OutputError; nothing appears under `out` then.
    """
    bits = (bits,) if isinstance(bits, int) else bits
    ignore = [ignore] if isinstance(ignore, str) else ignore
    if solver is None:
        solver = "tree" if str(calibration) == "none" or codebook == "table" else "guided"
    if solver not in KINDS:
        raise SourceError(f"unknown solver {solver!r}: expected one of {', '.join(KINDS)}")
    if str(calibration) == "none" and (solver == "guided" or tune or statistics is not None):
        what = "the solver guided" if solver == "guided" else "tuning" if tune else "a statistics folder"
        raise SourceError(f"{what} needs calibration: give a text file, self or random")
    if not isinstance(tune, bool | None) and tune not in TUNE:
        raise SourceError(f"tune {tune!r}: expected True, False, None or one of {', '.join(TUNE)}")
    if codebook is not None and KINDS[solver] == "affine":
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
    limits = (("--seed", seed, 0, 2**63 - 1), ("--threads", threads, 0, 1024), ("--tune-steps", tune_steps, 1, 10**6))
    for option, number, least, most in limits:
        if not least <= number <= most:
            raise SourceError(f"{option} {number}: expected {least} to {most}")
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
    tuned_bits = [b for b in bits if any(tunable(spec, b) for spec in specs.values())]
    way, untuned = _way_to_tune(tune, record, source, specs, tuned_bits)
    provenance = {
        "everybit_version": __version__,
        "solver": solver,
        "seed": seed,
        "calibration": record.provenance(),
        "tuning": {"steps": 0 if untuned else tune_steps} | ({"by": way} if way == "blocks" else {}),
        "source": {"name": title, "sha256": {} if dry_run else source.checksums(progress)},
    }
    config = {**source.config, "quantization_config": QuantizationConfig(bits, kind, specs, provenance).to_dict()}
    layout: dict[str, TensorSpec] = {}
    for name, shape in source.shapes.items():
        layout |= specs[name].tensors(lut_dtype) if name in specs else {name: TensorSpec(source.dtype_of(name), shape)}
    sizes = SizeReport.of(specs.values(), bits, layout)
    if dry_run:
        return QuantizeReport(out, sizes, left, [], [], True, untuned=untuned)

    origin = {key: provenance[key] for key in ("everybit_version", "source", "calibration")}
    origin |= {"weights": [t.name for t in targets]}
    groups = GROUPS if solver == "guided" else 0
    kept = None if statistics is None else statistics_folder(Path(statistics), {**origin, "groups": groups})
    outliers: list[str] = []
    zeros: list[str] = []
    unreached: list[str] = []
    unguided: list[str] = []
    tuning: dict[int, TunedBits] = {}
    with new_folder(partial), OverlayWriter(partial, layout, config, shard_bytes) as writer:
        if not writer.complete:  # else: killed between the last byte and the rename
            work = partial / WORK
            work.mkdir(exist_ok=True)
            measured: Statistics | None = None
            calibrated = Calibrated(source.folder, record, documents, progress)
            if record.kind != "none":
                path = (kept or work) / "statistics"
                measured = measure(calibrated, targets, path, groups, progress=progress)
                unreached, unguided = measured.unreached(), measured.unguided()

            def solved(name: str, tensor: Any) -> list[Solution]:
                weights = matrices(tensor, specs[name], source.folder)
                if specs[name].codebook == "compact" and max(outlying(w) for w in weights) > OUTLIER:
                    outliers.append(name)
                return solve_parameter(specs[name], weights, measured, solver, seed, threads)

            solutions: SolutionFiles | None = None
            if not untuned:
                solutions = SolutionFiles(work / "solutions")
                with writable(partial), _bar(sizes, "solving", progress) as bar:
                    for name, tensor in source.parameters():
                        if name in specs:
                            if solutions.read(specs[name]) is None:
                                solutions.save(name, solved(name, tensor))
                            bar.update(specs[name].parameters)
                how = (specs, solutions, tuned_bits, tune_steps, work, seed, progress)
                if way == "blocks":
                    tuning = tune_blocks(Blocks(source), calibrated.without_model, *how)
                else:
                    tuning = tune_tables(calibrated, *how)
            with _bar(sizes, "quantizing" if untuned else "writing", progress) as bar:
                for name, tensor in source.parameters():
                    spec = specs.get(name)
                    if spec is not None and not tensor.any():
                        zeros.append(name)
                    if name not in writer.done:
                        if spec is None:
                            group = {name: plain(name, tensor, source.folder)}
                        elif solutions is None:
                            group = encode(spec, solved(name, tensor), lut_dtype)
                        else:
                            group = encode(spec, tuned(spec, solutions.must_read(spec), work), lut_dtype)
                        writer.write_group(name, group)
                    bar.update(spec.parameters if spec else 0)
        with writable(partial):
            copy_side_files(source.folder, partial)
            (partial / "README.md").write_text(model_card(config, sizes, source.folder), encoding="utf-8")
        writer.finish()
    promote(partial, out)
    return QuantizeReport(out, sizes, left, unreached, zeros, False, unguided, outliers, tuning, untuned)


def _bar(sizes: SizeReport, what: str, progress: bool) -> Any:
    return tqdm(total=sizes.parameters, unit="w", unit_scale=True, desc=what, disable=not progress)


def _bits_of(target: Target, default: tuple[int, ...], overrides: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    module = target.name.rpartition(".")[0]
    found = [bits for pattern, bits in overrides.items() if re.search(pattern, module)]
    return found[-1] if found else default


def _way_to_tune(
    wanted: bool | str | None,
    record: calibrate.Calibration,
    source: Source,
    specs: Mapping[str, WeightSpec],
    tuned_bits: Sequence[int],
) -> tuple[str | None, str | None]:
    """`whole` or `blocks`, or else why tables are not tuned. Raises: SourceError where that was asked for, then"""
    if wanted is False:
        return None, "switched off"
    way: str | None = None
    why: str | None = "no calibration"
    if record.kind != "none" and not tuned_bits:
        why = "no precision has tables (compact codebooks have them up to 4 bits, those of uniform none)"
    elif record.kind != "none":
        vocabulary = source.model.get_input_embeddings().num_embeddings
        way, why = _way_that_fits(wanted, source, specs, vocabulary)
    if wanted and why:
        raise SourceError(f"tables cannot be tuned: {why}; drop the wish for it")
    return way, why


def _way_that_fits(
    wanted: bool | str | None, source: Source, specs: Mapping[str, WeightSpec], vocabulary: int
) -> tuple[str | None, str | None]:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    whys = []
    if wanted != "blocks":
        needed = memory_bytes(sum(math.prod(s) for s in source.shapes.values()), specs, vocabulary)
        if needed <= MEMORY_SHARE * there:
            return "whole", None
        whys.append(f"it needs about {needed / 1e9:.0f} GB of memory, this machine has {there / 1e9:.0f} GB")
    if wanted != "whole":
        blocks = Blocks(source)
        if (obstacle := blocks.why_not()) is not None:
            return None, "; ".join([*whys, obstacle])
        needed = block_memory_bytes(source.shapes, blocks.names, specs, vocabulary)
        if needed <= MEMORY_SHARE * there:
            return "blocks", None
        whys.append(f"block by block about {needed / 1e9:.0f} GB" + ("" if whys else f" of {there / 1e9:.0f} GB"))
    return None, "; ".join(whys)
