"""Plain numpy version of native/src/guided.cc: one row of the solver `guided`, in float64. Clear and slow.

What the format holds (int8 numbers, a float32 scale, a bfloat16 step) is rounded as there; everything else is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everybit.formats.compact import MOST, round_step
from everybit.formats.grid import CELL_BITS, CELLS, LADDERS
from everybit.quantize.solvers.reference_cells import grid

Doubles = NDArray[np.float64]
Codes = NDArray[np.uint8]

SWEEP_BITS, RIDGE, STAY = 6, 1e-6, 1 - 1e-5


@dataclass(frozen=True)
class Row:
    """A solved row as the native solver writes it; tables and centres are int8 numbers, to be times the scale."""

    codes: Codes
    scale: np.float32
    tables: dict[int, NDArray[np.int8]]
    centres: NDArray[np.int8]
    ladders: NDArray[np.uint8]
    step: np.float32


class Guided:
    """One row between its rounds. `importance[b]` is what a squared error of b bits counts."""

    def __init__(
        self, row: NDArray[np.float32], hessian: NDArray[np.float32], importance: Mapping[int, float], codes: Codes
    ) -> None:
        self.w, self.h = row.astype(np.float64), hessian.astype(np.float64)
        self.bits = tuple(importance)
        self.top = self.bits[-1]
        self.depth = min(self.top, SWEEP_BITS)
        self.leaves = 1 << self.depth
        self.leaf = (codes >> (self.top - self.depth)).astype(np.intp)
        self.importance = {b: i for b, i in importance.items() if b <= self.depth}
        self.free_importance = sum(i for b, i in importance.items() if b > self.depth)
        if self.top > self.depth and self.depth not in self.importance:
            self.importance[self.depth] = self.free_importance
        self.values: dict[int, Doubles] = {}
        self._start()

    def node(self, bits: int) -> NDArray[np.intp]:
        """The ancestor of each leaf among the codes of `bits`."""
        return np.arange(self.leaves) >> (self.depth - bits)

    def _start(self) -> None:
        """Means of the weights under each node, an empty one has its parent's; cells reach over their weights."""
        parent = np.zeros(1)
        for b in range(1, min(self.depth, CELL_BITS) + 1):
            code = self.leaf >> (self.depth - b)
            count, total = np.bincount(code, minlength=1 << b), np.bincount(code, self.w, 1 << b)
            parent = np.where(count > 0, total / np.maximum(count, 1), np.repeat(parent, 2) if b > 1 else 0.0)
            self.values[b] = parent
        self.centres, self.widths = np.zeros(CELLS), np.zeros(CELLS)
        self.ladders, self.step = np.zeros(CELLS, np.uint8), np.float32(0)
        if self.top <= CELL_BITS:
            return
        self.centres = self.values[CELL_BITS].copy()
        cell = self.leaf >> (self.depth - CELL_BITS)
        for c in np.unique(cell):
            self.widths[c] = np.ptp(self.w[cell == c]) / 32
        wide = self.widths > 0
        self.widths[~wide] = self.widths[wide].mean() if wide.any() else 0.0

    def fit(self) -> None:
        """Least squares of all codebooks with the codes fixed, then rounding and the errors that are left."""
        s = np.zeros((len(self.w), self.leaves))
        s[np.arange(len(self.w)), self.leaf] = 1
        products, moments = s.T @ self.h @ s, s.T @ self.h @ self.w
        for b in self.bits:
            if b <= CELL_BITS:
                member = np.equal.outer(self.node(b), np.arange(1 << b)).astype(np.float64)
                a = member.T @ products @ member
                self.values[b] = self.values[b] + solve(a, member.T @ moments - a @ self.values[b])
        if self.top > CELL_BITS:
            self._fit_cells(products, moments)
        self._round()
        self.errors = {b: self.w - self.values[b][self.leaf >> (self.depth - b)] for b in self.importance}
        self.free = np.array([self._within(np.array([i]), w)[0] for i, w in zip(self.leaf, self.w, strict=True)])

    def _normal_equations(self, products: Doubles, moments: Doubles) -> tuple[Doubles, Doubles]:
        """Of the change in centres (first 16) and widths that lowers the weighted loss most."""
        cell = np.equal.outer(self.node(CELL_BITS), np.arange(CELLS)).astype(np.float64)
        a, x = np.zeros((2 * CELLS, 2 * CELLS)), np.zeros(2 * CELLS)
        for b, importance in self.importance.items():
            if b <= CELL_BITS:
                continue
            n = 1 << (b - CELL_BITS)
            g = grid(b)[self.node(b) % n]
            design = np.hstack([cell, cell * g[:, None]])
            value = cell @ self.centres + cell @ self.widths * g
            a += importance * design.T @ products @ design
            x += importance * design.T @ (moments - products @ value)
        return a, x

    def _fit_cells(self, products: Doubles, moments: Doubles) -> None:
        """Centres and widths together; a step and ladders for these widths; the centres again for those."""
        a, x = self._normal_equations(products, moments)
        change = solve(a, x)
        self.centres = self.centres + change[:CELLS]
        self.widths = np.maximum(self.widths + change[CELLS:], 0.1 * self.widths)
        weight, best = np.diag(a)[CELLS:], np.inf
        for i in range(33):  # the widest cell gets ladder 8 down to 2
            step = round_step(np.array([self.widths.max() / 8 * 2 ** (i / 16)], np.float32))[0]
            ladders = np.clip(np.floor(self.widths / step + 0.5), 1, LADDERS) if step > 0 else np.ones(CELLS)
            cost = float((weight * (self.widths - ladders * float(step)) ** 2).sum())
            if cost < best:
                best, self.step, self.ladders = cost, step, ladders.astype(np.uint8)
        self.widths = float(self.step) * self.ladders.astype(np.float64)
        a, x = self._normal_equations(products, moments)
        self.centres = self.centres + solve(a[:CELLS, :CELLS], x[:CELLS])

    def _round(self) -> None:
        """To what the format holds: multiples of one scale, and the grid of each cell."""
        tables = [self.values[b] for b in self.bits if b <= CELL_BITS]
        most = max(float(np.abs(t).max()) for t in (*tables, self.centres))
        self.scale = np.float32(np.float32(most) / np.float32(MOST))
        for b in self.bits:
            if b <= CELL_BITS:
                self.values[b] = self._numbers(self.values[b]) * float(self.scale)
        if self.top <= CELL_BITS:
            return
        self.centres = self._numbers(self.centres) * float(self.scale)
        for b in range(CELL_BITS + 1, self.top + 1):
            reach = float(self.step) * self.ladders.astype(np.float64)
            self.values[b] = (self.centres[:, None] + reach[:, None] * grid(b)).reshape(-1)

    def _numbers(self, values: Doubles) -> Doubles:
        found: Doubles = np.rint(values / float(self.scale)) if self.scale > 0 else np.zeros_like(values)
        return found.clip(-MOST, MOST)

    def _within(self, leaves: NDArray[np.intp], wanted: float) -> Doubles:
        """The value nearest to `wanted` that bits beyond the sixth can give a weight in each of `leaves`."""
        if self.top == self.depth:
            return np.full(len(leaves), wanted)
        reach = 4 * float(self.step) * self.ladders[leaves >> (self.depth - CELL_BITS)]
        middle = self.values[self.depth][leaves]
        found: Doubles = np.clip(wanted, middle - reach, middle + reach)
        return found

    def sweep(self) -> bool:
        """Each weight to the leaf of least summed cost, given all others. Whether one moved."""
        moved, every = False, np.arange(self.leaves)
        for k, diagonal in enumerate(np.diag(self.h)):
            if not diagonal > 0:
                continue
            costs = np.zeros(self.leaves)
            for b, importance in self.importance.items():
                own = self.values[b][self.leaf[k] >> (self.depth - b)]
                target = own + self.h[k] @ self.errors[b] / diagonal
                costs += importance * (self.values[b][self.node(b)] - target) ** 2
            wanted = self.free[k] + self.h[k] @ (self.w - self.free) / diagonal
            costs += self.free_importance * (wanted - self._within(every, wanted)) ** 2
            now, best = self.leaf[k], int(np.argmin(costs))
            if not costs[best] < costs[now] * STAY:
                best = int(now)
            self.free[k] = self._within(every[best : best + 1], wanted)[0]
            moved |= best != now
            self.leaf[k] = best
            for b in self.importance:
                self.errors[b][k] = self.w[k] - self.values[b][best >> (self.depth - b)]
        return moved

    def finish(self, sweeps: int) -> Codes:
        """The bits that sweeps do not know: nearest first, then descent at the top precision within each cell."""
        rest = self.top - self.depth
        cells = self.values[self.top].reshape(self.leaves, 1 << rest)
        residual = np.abs(cells[self.leaf] - self.w[:, None]).argmin(axis=1)
        for _ in range(sweeps if rest else 0):
            for k, diagonal in enumerate(np.diag(self.h)):
                if diagonal > 0:
                    values = cells[self.leaf, residual]
                    target = values[k] + self.h[k] @ (self.w - values) / diagonal
                    residual[k] = np.abs(cells[self.leaf[k]] - target).argmin()
        codes: Codes = (self.leaf << rest | residual).astype(np.uint8)
        return codes

    def numbers(self, values: Doubles) -> NDArray[np.int8]:
        return self._numbers(values).astype(np.int8)


def solve(a: Doubles, x: Doubles) -> Doubles:
    """(a + ridge)^-1 x: empty leaves, whose row and moment are zero, stay."""
    mean = float(np.trace(a)) / len(a)
    ridge = RIDGE * mean if mean > 0 else 1.0
    return np.asarray(np.linalg.solve(a + ridge * np.eye(len(a)), x), dtype=np.float64)


def guided(
    row: NDArray[np.float32],
    hessian: NDArray[np.float32],
    bits: Sequence[int],
    importance: Sequence[float],
    rounds: int,
    sweeps: int,
    codes: Codes,
) -> Row:
    """Rounds of fit and sweeps from `codes`, a last fit, and the bits beyond the sixth."""
    state = Guided(row, hessian, dict(zip(bits, importance, strict=True)), codes)
    for _ in range(rounds):
        state.fit()
        moved = False
        for _ in range(sweeps):
            if not state.sweep():
                break
            moved = True
        if not moved:
            break
    state.fit()
    found = state.finish(sweeps)
    tables = {b: state.numbers(state.values[b]) for b in bits if b <= CELL_BITS}
    return Row(found, state.scale, tables, state.numbers(state.centres), state.ladders, state.step)
