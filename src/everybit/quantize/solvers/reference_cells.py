"""Plain numpy version of native/src/cells.cc: residual bits of one row for codebook kind `cells`. Clear and slow.

The constants are explained there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

CELLS, LADDERS = 16, 8
IMPORTANCE, WIDTH_RATIO, PAST_MINIMUM, MOST_SAMPLES, ROUNDS, MOVES = 3.0, 1.15, 1.5, 27, 4, 2


@dataclass
class Line:
    """A cell at one precision: its error for a width is least + spread * (width - best)^2."""

    spread: float
    best: float
    mean_value: float
    mean_grid: float
    width: float = 0.0


@dataclass
class Cell:
    """The weights of a cell (minus `origin`), what they count, and their residuals of the highest precision."""

    value: Doubles
    weight: Doubles
    origin: float
    residual: NDArray[np.intp]

    def square(self) -> float:
        """Weighted squared error around the mean."""
        mean = np.average(self.value, weights=self.weight)
        return float((self.weight * (self.value - mean) ** 2).sum())

    def line(self, bits: int, top: int) -> Line:
        """Least squares of value on grid."""
        g, w = grid(bits)[self.residual >> (top - bits)], self.weight
        mean_value, mean_grid = np.average(self.value, weights=w), np.average(g, weights=w)
        spread = float((w * (g - mean_grid) ** 2).sum())
        joint = float((w * (g - mean_grid) * (self.value - mean_value)).sum())
        known = joint > 0 and spread > 0
        return Line(spread if known else 0.0, joint / spread if known else 0.0, float(mean_value), float(mean_grid))


def grid(bits: int) -> Doubles:
    """The bracket of the format for ladder 1, of every residual."""
    n = 1 << (bits - 4)
    return ((2 * np.arange(n) + 1 - n) * (16 // n)).astype(np.float64)


def cells(
    row: NDArray[np.float32], sensitivity: NDArray[np.float32] | None, codes: NDArray[np.uint8], bits: Sequence[int]
) -> tuple[NDArray[np.uint8], dict[int, tuple[Doubles, NDArray[np.intp], float]]]:
    """Codes of the highest of `bits` (all above 4) and, for each, centres [16], ladders [16] and the step."""
    x, top = row.astype(np.float64), max(bits)
    given = np.ones(len(x)) if sensitivity is None or not sensitivity.any() else sensitivity.astype(np.float64)
    weight = given + (1e-9 * given.mean() if sensitivity is not None and sensitivity.any() else 0.0)
    found: dict[int, Cell] = {}
    for c in np.unique(codes):
        inside = codes == c
        origin = (x[inside].min() + x[inside].max()) / 2
        found[int(c)] = Cell(x[inside] - origin, weight[inside], origin, np.zeros(inside.sum(), np.intp))
    choose_widths(found, bits)
    chosen = {b: fit(found, b, top) for b in bits}
    for round_ in range(ROUNDS):
        if round_:
            chosen = {b: fit_step(found, b, top, chosen[b][1]) for b in bits}
        before = [cell.residual.copy() for cell in found.values()]
        for c, cell in found.items():
            assign(cell, {b: chosen[b][0][c] for b in bits}, top)
        if all((old == cell.residual).all() for old, cell in zip(before, found.values(), strict=True)):
            break
    books = {}
    for b in bits:
        lines, ladders, step = fit(found, b, top)
        centres = np.zeros(CELLS)
        for c, line in lines.items():
            centres[c] = found[c].origin + line.mean_value - line.width * line.mean_grid
        books[b] = centres, ladders, step
    out = np.zeros(len(x), np.uint8)
    for c, cell in found.items():
        out[codes == c] = (c << (top - 4)) + cell.residual
    return out, books


def choose_widths(found: dict[int, Cell], bits: Sequence[int]) -> None:
    """Residuals of even grids whose widths share a step. Mutates: the cells."""
    top, ratio = max(bits), np.log(WIDTH_RATIO)
    samples: dict[int, tuple[float, Doubles, list[float]]] = {}
    for c, cell in found.items():
        low, high = cell.value.min(), cell.value.max()
        if low == high:
            cell.residual[:] = len(grid(top)) // 2
            continue
        width, centre = (high - low) / 32, (low + high) / 2
        errors: list[float] = []
        centres: list[float] = []
        while len(errors) < MOST_SAMPLES and (not errors or errors[-1] <= PAST_MINIMUM * min(errors)):
            error, centre = place(cell, width / WIDTH_RATIO ** len(errors), centre, bits)
            errors.append(error)
            centres.append(centre)
        samples[c] = (np.log(width) / ratio, np.array(errors), centres)
    if not samples:
        return
    log_ladders = np.log(np.arange(1, LADDERS + 1)) / ratio

    def error_at(c: int, log_width: float) -> float:
        reach, errors, _ = samples[c]
        at, last = reach - log_width, len(errors) - 1
        if at <= 0:
            return float(errors[0] * np.exp(2 * min(-at * ratio, 100)))
        if at >= last:
            return float(errors[-1] * np.exp(4 * min((at - last) * ratio, 100)))
        return float(np.interp(at, np.arange(last + 1), errors))

    def log_width(c: int, log_step: float) -> float:
        """Of the two ladders beside the best width."""
        best = samples[c][0] - np.argmin(samples[c][1])
        narrow = max(int((log_ladders <= best - log_step).sum()), 1) - 1
        near = [log_step + log for log in log_ladders[narrow : narrow + 2]]
        return float(min(near, key=lambda log: error_at(c, log)))

    steps = [reach - np.argmin(sampled) - log for reach, sampled, _ in samples.values() for log in log_ladders]
    log_step = min(steps, key=lambda step: sum(error_at(c, log_width(c, step)) for c in samples))
    for c, (reach, _, follow) in samples.items():
        log = log_width(c, log_step)
        nearest = int(np.clip(reach - log, 0, len(follow) - 1))
        place(found[c], WIDTH_RATIO**log, follow[nearest], bits)


def place(cell: Cell, width: float, centre: float, bits: Sequence[int]) -> tuple[float, float]:
    """Error at all precisions, and the centre, after an even cut whose centre follows. Mutates: the residuals."""
    top = max(bits)
    full = grid(top)
    for move in range(MOVES + 1):
        edges = centre + width * (full[:-1] + full[1:]) / 2
        cell.residual = np.searchsorted(edges, cell.value, side="right")
        if move < MOVES:
            centre = float(np.average(cell.value - width * full[cell.residual], weights=cell.weight))
    error = 0.0
    for b in bits:
        own = cell.line(b, top)
        error += IMPORTANCE ** (b - 4) * (cell.square() + own.spread * ((width - own.best) ** 2 - own.best**2))
    return max(error, 0.0), centre


Fit = tuple[dict[int, Line], NDArray[np.intp], float]


def fit(found: dict[int, Cell], bits: int, top: int) -> Fit:
    """The step and ladders of least sum of spread * (best - step * ladder)^2, over all that rounding can give."""
    lines = {c: cell.line(bits, top) for c, cell in found.items()}
    used = {c: line for c, line in lines.items() if line.spread > 0}
    changes = sorted(line.best / (ladder + 0.5) for line in used.values() for ladder in range(1, LADDERS))
    places = [0.0, *changes, changes[-1] * 2] if changes else []
    best: Fit | None = None
    most = -1.0
    for low, high in pairwise(places):
        if low == high:
            continue
        ladders = np.ones(CELLS, np.intp)
        for c, line in used.items():
            ladders[c] = np.clip(np.floor(line.best / ((low + high) / 2) + 0.5), 1, LADDERS)
        product = sum(line.spread * line.best * ladders[c] for c, line in used.items())
        square = sum(line.spread * ladders[c] ** 2 for c, line in used.items())
        if product**2 / square > most:
            most, best = product**2 / square, (lines, ladders, float(product / square))
    return with_widths(*(best or (lines, np.ones(CELLS, np.intp), 0.0)))


def fit_step(found: dict[int, Cell], bits: int, top: int, ladders: NDArray[np.intp]) -> Fit:
    """The best step for given ladders."""
    lines = {c: cell.line(bits, top) for c, cell in found.items()}
    product = sum(line.spread * line.best * ladders[c] for c, line in lines.items())
    square = sum(line.spread * ladders[c] ** 2 for c, line in lines.items())
    return with_widths(lines, ladders, float(product / square) if square > 0 else 0.0)


def with_widths(lines: dict[int, Line], ladders: NDArray[np.intp], step: float) -> Fit:
    for c, line in lines.items():
        line.width = step * float(ladders[c])
    return lines, ladders, step


def assign(cell: Cell, lines: dict[int, Line], top: int) -> None:
    """The residual of least cost for every weight. Mutates: the residuals."""
    cost = np.zeros((len(cell.value), len(grid(top))))
    for b, line in lines.items():
        centre = line.mean_value - line.width * line.mean_grid
        values = np.repeat(centre + line.width * grid(b), 1 << (top - b))
        cost += IMPORTANCE ** (b - 4) * (cell.value[:, None] - values) ** 2
    cell.residual = np.argmin(cost, axis=1)
