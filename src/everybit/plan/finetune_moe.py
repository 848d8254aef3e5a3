"""Fine-tuning a mixture of experts: the batch and throughput laws of one device, Xia et al. 2024 (arXiv 2408.04693).

batch = floor(c0 * (memory - model) / (sequence * ((1 - c1) + c1 * sparsity))), and queries/s = c2 * ln(batch^(1 /
(sparsity * c3))) + c4. `sparsity` is the share of experts that a token takes, 1 in a dense model. c2 and c3 occur only
as their ratio: a fit sets c3 to 1.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from everybit.errors import ModelError, SourceError, reason
from everybit.plan.operators import Model


@dataclass(frozen=True, slots=True)
class MoeRun:
    """A measured run: the largest `batch` that fits the device's memory, and its `queries_per_s`."""

    memory_bytes: float
    model_bytes: float
    sequence: int
    sparsity: float
    batch: int
    queries_per_s: float


@dataclass(frozen=True, slots=True)
class MoeLaw:
    """The constants: c0 in sequence tokens a byte, c2 and c4 in queries/s."""

    c0: float
    c1: float
    c2: float
    c3: float
    c4: float

    def batch(self, memory_bytes: float, model_bytes: float, sequence: int, sparsity: float) -> int:
        """0 where the model does not fit. Raises: SourceError"""
        room = (memory_bytes - model_bytes) / self.sequence_bytes(sequence, sparsity)
        return max(0, math.floor(room * (1 + 1e-9)))

    def sequence_bytes(self, sequence: int, sparsity: float) -> float:
        """What a sequence takes beside the model; states of the optimizer are in it. Raises: SourceError"""
        _check(sequence=sequence, sparsity=sparsity)
        found = sequence * (1 - self.c1 + self.c1 * sparsity) / self.c0
        if found <= 0:
            raise SourceError(f"the law gives {found:.3g} bytes a sequence at sparsity {sparsity:.3g}: fit other runs")
        return found

    def queries_per_s(self, batch: int, sparsity: float) -> float:
        """Raises: SourceError, also where the law comes to nothing or less"""
        _check(batch=batch, sparsity=sparsity)
        found = self.c2 * math.log(batch) / (sparsity * self.c3) + self.c4
        if found <= 0:
            raise SourceError(f"the law gives {found:.3g} queries/s at batch {batch}: it was fitted for other runs")
        return found


def sparsity_of(model: Model) -> float:
    """Raises: ModelError for a model without experts"""
    routed = [layer.experts for layer in model.layers if layer.experts]
    if not routed:
        raise ModelError(f"'{model.name}' has no experts, and the law of runs is of models that have: leave it out")
    return max(one.chosen / one.count for one in routed)


def read_moe_runs(path: str | os.PathLike[str]) -> list[MoeRun]:
    """Of a table (csv) with the fields of `MoeRun` as its header. Raises: SourceError"""
    names = {one.name: int if one.type == "int" else float for one in fields(MoeRun)}
    runs = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if missing := set(names).difference(table.fieldnames or ()):
                raise SourceError(f"{path}: no column {min(missing)}, expected {', '.join(names)}: add it")
            for row in table:
                values: dict[str, Any] = {name: read(row[name]) for name, read in names.items()}
                runs.append(MoeRun(**values))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise SourceError(f"{path}: not a table of numbers ({reason(error)}): write {', '.join(names)}") from None
    return runs


def fit_moe_law(rows: Sequence[MoeRun]) -> MoeLaw:
    """Least squares of both laws, which are linear: (memory - model) / (batch * sequence) = ((1 - c1) + c1 * sparsity)
    / c0, and queries/s over ln(batch) / sparsity.

    Raises: SourceError where the runs do not tell the constants apart: two sparsities and two batches at least.
    """
    for row in rows:
        _check(batch=row.batch, sequence=row.sequence, sparsity=row.sparsity, queries_per_s=row.queries_per_s)
        if row.memory_bytes <= row.model_bytes:
            raise SourceError(f"a run has {row.memory_bytes:.3g} bytes for a model of {row.model_bytes:.3g}: no room")
    sparsity = np.array([row.sparsity for row in rows])
    each = np.array([(row.memory_bytes - row.model_bytes) / (row.batch * row.sequence) for row in rows])
    alone, slope = _line(sparsity, each, "sparsities")
    c4, c2 = _line(
        np.array([math.log(row.batch) / row.sparsity for row in rows]),
        np.array([row.queries_per_s for row in rows]),
        "batches",
    )
    if alone + slope <= 0:
        raise SourceError("these runs need less memory the more experts are taken: the law does not hold for them")
    return MoeLaw(1 / (alone + slope), slope / (alone + slope), c2, 1.0, c4)


def _line(x: np.ndarray, y: np.ndarray, what: str) -> tuple[float, float]:
    if len(set(x.tolist())) < 2:
        raise SourceError(f"{len(x)} runs with the same {what}: the law needs at least two different ones")
    (start, slope), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), y, rcond=None)
    return float(start), float(slope)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0) or (name == "sparsity" and value > 1):
            raise SourceError(f"{name} is {value}: give more than 0{', at most 1' if name == 'sparsity' else ''}")
