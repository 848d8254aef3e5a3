"""Table tuning of a whole overlay: every precision whose codebook is a table, one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from everybit.errors import OutputError
from everybit.formats import WeightSpec
from everybit.formats.compact import to_int8
from everybit.quantize.solutions import SolutionFiles, write_arrays
from everybit.quantize.solvers import Solution
from everybit.quantize.statistics import Calibrated
from everybit.quantize.tuner import HELD_OUT_TOKENS, STEP_TOKENS, Quantized, Table, Tuned, Tuner

STEPS = 120


@dataclass(frozen=True)
class TunedBits:
    """What tuning one precision did: KL on held-out calibration text, nats per token."""

    before: float
    after: float
    steps: int


def tunable(spec: WeightSpec, bits: int) -> bool:
    """Whether `spec`, served at `bits`, reads a table of that very precision."""
    return bits in spec.bits and any(part.suffix == f"lut{bits}" for part in spec.book.parts(bits))


def memory_bytes(parameters: int, specs: Mapping[str, WeightSpec], vocabulary: int) -> int:
    """What tuning holds: the model, and of the quantized weights codes (twice), values, gradients and, for the largest,
    64-bit indices; logits of the held-out text and, some six times, of a step. Activations come on top."""
    logits = 4 * vocabulary * (HELD_OUT_TOKENS + 6 * STEP_TOKENS)
    quantized = sum(s.parameters for s in specs.values())
    return logits + 4 * parameters + (2 + 4 + 4) * quantized + 16 * max(s.parameters for s in specs.values())


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
        weights, fixed = {}, {}
        for name, spec in specs.items():
            weight = _quantized(spec, solutions.must_read(spec), spec.served_bits(b))
            if tunable(spec, b):
                weights[name] = weight
            else:
                table, codes = torch.from_numpy(weight.table), torch.from_numpy(weight.codes)
                fixed[name] = weight.in_model(table.gather(1, codes.long()))
        if not weights:
            continue
        result: Tuned = tuner.tune(weights, fixed, b, steps, progress)
        report[b] = TunedBits(result.before, result.after, result.steps)
        try:
            write_arrays(path, dict(result.tables), {"report": json.dumps(report[b].__dict__)})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path} ({error}): free space, then continue with --resume") from error
    return report


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
