"""Step times from a profile of a model's kernels on a GPU: a csv of each kind, in microseconds.

    dense.csv         layer,tokens,time_us                                       what every token passes
    per_sequence.csv  layer,sequences,time_us                                    the head and the sampler
    attention.csv     prefill_chunk,kv_prefill,n_decode,kv_decode,time_us        one layer's attention
    moe.csv           tokens,activated_experts,time_us                           one layer's experts, if it has them

The files are those of LLMServingSim's profiler (casys-kaist, MIT); the composition is ours. A batch that mixes prompts
and decodes takes longer than its halves apart, so that the difference is interpolated on its own.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from everybit.errors import SourceError, reason
from everybit.plan.step import Step

_ONCE = ("embedding", "final_layernorm")  # dense layers that a model has once
_TWICE = ("layernorm",)  # in each block
_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a profile does not say of its model: blocks, and experts in all and chosen, split over `ranks`."""

    layers: int
    experts: int = 0
    chosen: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Factors:
    """What the profile's kernels are off by, and what it does not hold: seconds of each step and of each token."""

    dense: float = 1.0
    attention: float = 1.0
    experts: float = 1.0
    step_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Tables in seconds: `dense` and `head` of the model by tokens and sequences (from 0), the others of all layers.

    `attention`: values at each crossing of `axes`. `experts`: by (activated, tokens).
    """

    shape: Shape
    dense: Sequence[float]
    head: Sequence[float]
    axes: tuple[tuple[int, ...], ...]
    attention: Mapping[tuple[int, ...], float]
    experts: tuple[tuple[float, tuple[float, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class ProfileTime:
    """A StepTime, and a JointTime where experts are shared by ranks in lockstep."""

    profile: Profile
    factors: Factors = field(default_factory=Factors)

    def seconds(self, step: Step, bits: int | None = None) -> float:
        return self.seconds_together([step])

    def seconds_together(self, steps: Sequence[Step], bits: int | None = None) -> float:
        """The slowest rank's own layers, and the experts, which see the tokens of all."""
        by, tokens = self.factors, sum(step.tokens for step in steps)
        own = max(by.dense * self._dense(step) + by.attention * self._attention(step) for step in steps)
        return own + by.experts * self._experts(tokens) + by.step_s + by.token_s * tokens

    def _dense(self, step: Step) -> float:
        rows = len(step.decodes) + len(step.chunks)
        return _at(self.profile.dense, step.tokens) + _at(self.profile.head, rows)

    def _attention(self, step: Step) -> float:
        total = sum(self._crossing(new, past, 0, 0) for new, past in step.chunks)
        if not step.decodes:
            return total
        n, mean = len(step.decodes), sum(step.decodes) / len(step.decodes)
        if not step.chunks:
            return self._crossing(0, 0, n, mean)
        new = sum(new for new, _ in step.chunks)
        past = sum(new * past for new, past in step.chunks) / new
        return total + self._crossing(new, past, n, mean) - self._crossing(new, past, 0, 0)

    def _crossing(self, *point: float) -> float:
        """Linear between the table's values along each axis, and beyond its ends."""
        sides = []
        for axis, value in zip(self.profile.axes, point, strict=True):
            if not value:
                sides.append(((0, 1.0),))
                continue
            above = min(max(bisect_right(axis, value), 2), len(axis) - 1)  # between 0 and the first lies another kernel
            low, high = axis[above - 1], axis[above]
            share = max(0.0, (value - low) / (high - low))
            sides.append(((low, 1 - share), (high, share)))  # type: ignore[arg-type]
        table, total = self.profile.attention, 0.0
        for corner in product(*sides):
            weight = 1.0
            for _, part in corner:
                weight *= part
            if weight:
                total += weight * table[tuple(place for place, _ in corner)]
        return total

    def _experts(self, tokens: int) -> float:
        """Distinct experts of a rank: E (1 - (1 - k/E)^n); each works for its share of the tokens."""
        shape = self.profile.shape
        if not self.profile.experts or not tokens:
            return 0.0
        active = shape.experts / shape.ranks * (1 - (1 - shape.chosen / shape.experts) ** tokens)
        rows = [(a, float(np.interp(tokens / shape.ranks, at, took))) for a, at, took in self.profile.experts]
        return float(np.interp(active, [a for a, _ in rows], [took for _, took in rows]))


def read_profile(folder: Path, shape: Shape) -> Profile:
    """Raises: SourceError for a file that cannot be read, a table with holes, and experts without their shape"""
    if min(shape.layers, shape.ranks) < 1 or (shape.experts and not 1 <= shape.chosen <= shape.experts):
        raise SourceError(f"{shape}: expected layers and ranks of 1 or more, and chosen experts among all")
    dense, head = _curves(folder / "dense.csv", "tokens"), _curves(folder / "per_sequence.csv", "sequences")
    counts = {name: 1 if name in _ONCE else shape.layers * (2 if name in _TWICE else 1) for name in dense}
    rows = _read(folder / "attention.csv", (*_AXES, "time_us"))
    values = {tuple(int(one) for one in row[:4]): row[4] / 1e6 * shape.layers for row in rows}
    if (folder / "moe.csv").exists() != bool(shape.experts):
        raise SourceError(f"{folder}: expected moe.csv and a shape with experts, or neither")
    return Profile(
        shape,
        _sum(dense, counts),
        _sum(head, dict.fromkeys(head, 1)),
        *_grid(folder / "attention.csv", values),
        _expert_rows(folder / "moe.csv", shape) if shape.experts else (),
    )


def _grid(
    path: Path, values: dict[tuple[int, ...], float]
) -> tuple[tuple[tuple[int, ...], ...], dict[tuple[int, ...], float]]:
    """The powers of two, which have a value at each crossing, and 0: nothing of that kind."""
    axes: tuple[tuple[int, ...], ...]
    axes = tuple((0, *sorted({one[i] for one in values if one[i] and not one[i] & (one[i] - 1)})) for i in range(4))
    mixed = tuple(n for n in axes[2] if not n or (axes[0][1], 0, n, axes[3][1]) in values)
    axes = (axes[0], axes[1], mixed, axes[3])
    table: dict[tuple[int, ...], float] = {(0, 0, 0, 0): 0.0}
    for point in product(*axes):
        chunk, past, n, kv = point
        if bool(n) != bool(kv) or (past and not chunk) or not (chunk or n):
            continue
        if point not in values:
            raise SourceError(
                f"{path}: no row for {', '.join(map(str, point))}; expected each crossing of powers of two"
            )
        table[point] = values[point]
    return axes, table


def _expert_rows(path: Path, shape: Shape) -> tuple[tuple[float, tuple[float, ...], tuple[float, ...]], ...]:
    by_active: dict[float, list[tuple[float, float]]] = {}
    for tokens, active, took in _read(path, ("tokens", "activated_experts", "time_us")):
        by_active.setdefault(active, []).append((tokens, took / 1e6 * shape.layers))
    found = [(active, sorted(rows)) for active, rows in sorted(by_active.items())]
    return tuple((active, tuple(t for t, _ in rows), tuple(s for _, s in rows)) for active, rows in found)


def _sum(curves: dict[str, list[tuple[float, float]]], counts: dict[str, int]) -> list[float]:
    """Seconds of all layers, at each whole number up to the last."""
    last = int(max(curve[-1][0] for curve in curves.values()))
    places = np.arange(last + 1)
    total = np.zeros(last + 1)
    for name, curve in curves.items():
        total += counts[name] * np.interp(places, [at for at, _ in curve], [took / 1e6 for _, took in curve])
    total[0] = 0.0
    found: list[float] = total.tolist()
    return found


def _at(table: Sequence[float], place: int) -> float:
    """Beyond the end in proportion."""
    last = len(table) - 1
    return table[place] if place <= last else table[last] * place / last


def _curves(path: Path, by: str) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for layer, at, took in _rows(path, ("layer", by, "time_us")):
        curves.setdefault(layer, []).append(_floats(path, (at, took)))  # type: ignore[arg-type]
    return {name: sorted(curve) for name, curve in curves.items()}


def _read(path: Path, columns: tuple[str, ...]) -> list[tuple[float, ...]]:
    return [_floats(path, row) for row in _rows(path, columns)]


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: {reason(error)}; expected a csv of {', '.join(columns)}") from None
    if len(rows) < 2 or tuple(rows[0]) != columns or any(len(row) != len(columns) for row in rows):
        raise SourceError(f"{path}: expected a csv of {', '.join(columns)} and rows of as many values")
    return [tuple(row) for row in rows[1:]]


def _floats(path: Path, row: tuple[str, ...]) -> tuple[float, ...]:
    try:
        found = tuple(map(float, row))
    except ValueError:
        found = ()
    if not found or not all(0 <= one < math.inf for one in found):
        raise SourceError(f"{path}: a row {', '.join(row)[:80]}; expected numbers of 0 or more")
    return found
