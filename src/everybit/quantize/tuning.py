"""Table tuning of a whole overlay: every precision whose codebook is a table, one after the other.

`tune_tables` where the model fits into memory with its gradients, `tune_blocks` where only its blocks do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from everybit.errors import OutputError
from everybit.formats import WeightSpec
from everybit.formats.compact import to_int8
from everybit.quantize.block_tuner import BlockTuner
from everybit.quantize.blocks import Blocks
from everybit.quantize.solutions import SolutionFiles, read_arrays, write_arrays
from everybit.quantize.solvers import Solution
from everybit.quantize.statistics import Calibrated
from everybit.quantize.tuner import HELD_OUT_TOKENS, STEP_TOKENS, Level, Quantized, Table, Tuned, Tuner

STEPS = 120


@dataclass(frozen=True)
class TunedBits:
    """What tuning one precision did: KL on held-out calibration text, nats per token.

    Where blocks were tuned one by one, `blocks` says how many gained by it, and `steps` is the most that one took.
    """

    before: float
    after: float
    steps: int
    blocks: int | None = None


def tunable(spec: WeightSpec, bits: int) -> bool:
    """Whether `spec`, served at `bits`, reads a table of that very precision."""
    return bits in spec.bits and any(part.suffix == f"lut{bits}" for part in spec.book.parts(bits))


def memory_bytes(parameters: int, specs: Mapping[str, WeightSpec], vocabulary: int) -> int:
    """What tuning holds: the model, and of the quantized weights codes (twice), values, gradients and, for the largest,
    64-bit indices; logits of the held-out text and, some six times, of a step. Activations come on top."""
    logits = 4 * vocabulary * (HELD_OUT_TOKENS + 6 * STEP_TOKENS)
    return logits + 4 * parameters + _level_bytes(list(specs.values()))


def block_memory_bytes(
    shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], specs: Mapping[str, WeightSpec], vocabulary: int
) -> int:
    """What tuning block by block holds: what is outside of blocks, the largest block as `memory_bytes` counts the
    model, logits of a step. `shapes` are of all parameters, `names` those of the blocks with a dot behind them."""
    blocks = [0] * len(names)
    outside = 0
    for name, shape in shapes.items():
        index = _block_of(name, names)
        if index is None:
            outside += 4 * math.prod(shape) * (2 if name in specs else 1)
        else:
            blocks[index] += 4 * math.prod(shape)
    for index, own in enumerate(_by_block(specs, names)):
        blocks[index] += _level_bytes(own)
    return 4 * vocabulary * 6 * STEP_TOKENS + outside + max(blocks)


def _level_bytes(specs: Sequence[WeightSpec]) -> int:
    """Codes (twice), values and gradients of quantized weights and, of the largest, 64-bit indices."""
    return sum((2 + 4 + 4) * s.parameters for s in specs) + 16 * max((s.parameters for s in specs), default=0)


def _block_of(name: str, names: Sequence[str]) -> int | None:
    return next((i for i, block in enumerate(names) if name.startswith(block)), None)


def _by_block(specs: Mapping[str, WeightSpec], names: Sequence[str]) -> list[list[WeightSpec]]:
    return [[s for s in specs.values() if s.name.startswith(block)] for block in names]


def tune_tables(
    calibrated: Calibrated,
    specs: Mapping[str, WeightSpec],
    solutions: SolutionFiles,
    bits: Sequence[int],
    steps: int,
    folder: Path,
    seed: int,
    progress: bool,
) -> dict[int, TunedBits]:
    """Tune each of `bits`; the tables end in `folder`, where `tuned` finds them and a killed run its finished ones.

    Raises: OutputError
    """
    report: dict[int, TunedBits] = {}
    tuner: Tuner | None = None
    for b in bits:
        path = folder / f"tuned{b}.part"
        if (found := _read_report(path)) is not None:
            report[b] = found
            continue
        tuner = tuner or Tuner(calibrated.model, calibrated.sequences, seed)
        weights, fixed = _weights(list(specs.values()), solutions, b)
        if not weights:
            continue
        result: Tuned = tuner.tune(weights, fixed, b, steps, progress)
        report[b] = TunedBits(result.before, result.after, result.steps)
        _write(path, dict(result.tables), report[b])
    return report


def tune_blocks(
    blocks: Blocks,
    sequences: Callable[[], Sequence[torch.Tensor]],
    specs: Mapping[str, WeightSpec],
    solutions: SolutionFiles,
    bits: Sequence[int],
    steps: int,
    folder: Path,
    seed: int,
    progress: bool,
) -> dict[int, TunedBits]:
    """As `tune_tables`, one decoder block after the other; of a killed run finished blocks are found again, too.

    Of each precision the outcome is kept where the whole model's KL on held-out text fell. Weights of no block stay
    as they are. Raises: OutputError
    """
    report: dict[int, TunedBits] = {}
    tuner: BlockTuner | None = None
    within = _by_block(specs, blocks.names)
    inside = {spec.name for own in within for spec in own}
    for b in bits:
        path = folder / f"tuned{b}.part"
        if (found := _read_report(path)) is not None:
            report[b] = found
            continue
        if not any(tunable(specs[name], b) for name in inside):
            continue
        tuner = tuner or BlockTuner(blocks, sequences(), folder, seed)
        outside = [spec for spec in specs.values() if spec.name not in inside]
        tuner.enter(b, Level(*_weights(outside, solutions, b)).untuned())
        tables, done = _walk(tuner, within, solutions, b, steps, folder, progress)
        before, after = tuner.divergences()
        if not after < before:  # each block gained by its own measure, and the model lost
            tables, after = {}, before
        gained = sum(r.after < r.before for r in done) if tables else 0
        report[b] = TunedBits(before, after, max(r.steps for r in done), gained)
        _write(path, tables, report[b])
        for index in range(len(within)):
            _block_path(folder, b, index).unlink(missing_ok=True)
    return report


def _walk(
    tuner: BlockTuner,
    within: Sequence[Sequence[WeightSpec]],
    solutions: SolutionFiles,
    bits: int,
    steps: int,
    folder: Path,
    progress: bool,
) -> tuple[dict[str, Table], list[TunedBits]]:
    """All blocks at one precision; the tables, and what tuning did to each block's own measure."""
    paths = [_block_path(folder, bits, index) for index in range(len(within))]
    known = [_read_report(path) for path in paths]
    tables: dict[str, Table] = {}
    report: list[TunedBits] = []
    found_steps = steps * sum(r is not None for r in known)
    with tqdm(total=steps * len(paths), initial=found_steps, unit="step", disable=not progress) as bar:
        for index, (path, own, found) in enumerate(zip(paths, within, known, strict=True)):
            bar.set_description(f"tuning {bits} bits, block {index + 1}/{len(paths)}")
            level = Level(*_weights(own, solutions, bits))
            tuner.read()
            if found is not None and (arrays := read_arrays(path)) is not None:
                block, did = arrays, found
            else:
                begun = bar.n
                result = tuner.tune(level, steps, bar)
                bar.update(steps - (bar.n - begun))  # those that it did not need
                block = {n: t.numpy() for n, t in result.tables.items()}
                did = TunedBits(result.before, result.after, result.steps)
                _write(path, block, did)
            tuner.move_on(level, {n: torch.from_numpy(t) for n, t in block.items()})
            tables |= block
            report.append(did)
    return tables, report


def _block_path(folder: Path, bits: int, index: int) -> Path:
    return folder / f"tuned{bits}.block{index}.part"


def _weights(
    specs: Sequence[WeightSpec], solutions: SolutionFiles, bits: int
) -> tuple[dict[str, Quantized], dict[str, torch.Tensor]]:
    """As they are served at `bits`: those whose tables can be tuned, and the values of the others."""
    weights, fixed = {}, {}
    for spec in specs:
        weight = _quantized(spec, solutions.must_read(spec), spec.served_bits(bits))
        if tunable(spec, bits):
            weights[spec.name] = weight
        else:
            table, codes = torch.from_numpy(weight.table), torch.from_numpy(weight.codes)
            fixed[spec.name] = weight.in_model(table.gather(1, codes.long()))
    return weights, fixed


def _write(path: Path, tables: dict[str, Table], report: TunedBits) -> None:
    try:
        write_arrays(path, dict(tables), {"report": json.dumps(report.__dict__)})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path} ({error}): free space, then continue with --resume") from error


def tuned(spec: WeightSpec, solutions: list[Solution], folder: Path) -> list[Solution]:
    """The solutions of one parameter with the tables that tuning made."""
    for b in spec.bits:
        table = _read_table(folder / f"tuned{b}.part", spec.name) if tunable(spec, b) else None
        if table is None:
            continue
        parts = table.reshape(len(solutions), -1, 1 << b)
        solutions = [
            replace(solution, codebook={**solution.codebook, f"lut{b}": _as_stored(solution, part)})
            for solution, part in zip(solutions, parts, strict=True)
        ]
    return solutions


def _as_stored(solution: Solution, table: Table) -> np.ndarray[Any, Any]:
    return to_int8(table, solution.codebook["scale"][:, 0]) if "scale" in solution.codebook else table


def _quantized(spec: WeightSpec, solutions: list[Solution], bits: int) -> Quantized:
    scales = [s.codebook["scale"] for s in solutions if "scale" in s.codebook]
    shape = spec.shape
    return Quantized(
        np.concatenate([s.codes_at(bits) for s in solutions]),
        np.concatenate([s.table_at(bits) for s in solutions]),
        np.concatenate(scales) if scales else None,
        (*shape[:-2], shape[-1], shape[-2]) if spec.transposed else shape,
        spec.transposed,
    )


def _read_table(path: Path, name: str) -> Table | None:
    """One weight's, of a file that holds all. None where that precision, or that weight at it, was not tuned."""
    if not path.is_file():
        return None
    with safe_open(path, framework="np") as file:
        table: Table | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (not a dict)
        return table


def _read_report(path: Path) -> TunedBits | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return TunedBits(**json.loads(file.metadata()["report"]))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None  # torn: tuned again
