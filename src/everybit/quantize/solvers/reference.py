"""Plain numpy versions of the solvers, and exact optima to measure them against. Clear and slow.

Everything works on one row. `Points` are its distinct values in ascending order; a clustering is its `cuts`,
with cell c = points [cuts[c], cuts[c+1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Cuts = NDArray[np.intp]


@dataclass(frozen=True)
class Points:
    """Distinct values of a row, their summed sensitivities, and the index of each weight's value."""

    value: Doubles
    weight: Doubles
    index: NDArray[np.intp]

    @classmethod
    def of(cls, row: NDArray[np.float32], sensitivity: NDArray[np.float32] | None) -> Points:
        given = np.ones(len(row)) if sensitivity is None or not sensitivity.any() else sensitivity.astype(np.float64)
        weight = given + 1e-9 * given.mean()  # as the native solvers: no cell is quite without weight
        value, index = np.unique(row.astype(np.float64), return_inverse=True)
        return cls(value, np.bincount(index, weight, len(value)).astype(np.float64), index)

    def errors(self) -> Doubles:
        """[n+1, n+1]: weighted squared error of points [i, j) around their mean; inf where j < i."""
        v = self.value - self.value[len(self.value) // 2]
        w, s, q = (np.concatenate([[0.0], np.cumsum(self.weight * v**p)]) for p in (0, 1, 2))
        dw, ds, dq = (x[None, :] - x[:, None] for x in (w, s, q))
        error = np.maximum(dq - ds**2 / np.where(dw > 0, dw, 1.0), 0.0)
        return np.where(np.tri(len(w), k=-1, dtype=bool), np.inf, error)


def min_plus(left: Doubles, right: Doubles) -> Doubles:
    """out[i, j] = min over k of left[i, k] + right[k, j]. Cost: O(n^3)."""
    out = np.full((len(left), right.shape[1]), np.inf)
    for k in range(len(right)):
        np.minimum(out, left[:, k, None] + right[k], out=out)
    return out


def optimal_errors(points: Points, bits: Sequence[int]) -> dict[int, float]:
    """The least possible weighted error of 2^b free cells, for each b: exact dynamic programming.

    Cost:    O(2^max(bits) n^2)
    Source:  Wang and Song, "Ckmeans.1d.dp", R Journal 3(2) 2011, section 2 (without their index bounds)
    """
    error = points.errors()
    best, found = error[0], {}
    for cells in range(2, 2 ** max(bits) + 1):
        best = (best[:, None] + error).min(axis=0)
        if cells.bit_count() == 1:
            found[cells.bit_length() - 1] = float(best[-1])
    return {b: found[b] for b in bits}


def joint_objective(points: Points, importance: dict[int, float]) -> float:
    """The least sum over levels of importance * weighted error, over all nested contiguous cells: exact.

    Needs:   importance of every level from the lowest to the base; cost O(levels n^3 + 2^lowest n^2)
    """
    low, base = min(importance), max(importance)
    error = points.errors()
    table = importance[base] * error
    for level in range(base - 1, low - 1, -1):
        table = min_plus(table, table) + importance[level] * error
    chain = table[0]
    for _ in range(2**low - 1):
        chain = (chain[:, None] + table).min(axis=0)
    return float(chain[-1])


def best_split(points: Points, i: int, j: int) -> int:
    """The cut of points [i, j) into two with the least weighted error; j when there is nothing to cut."""
    if j - i < 2:
        return j
    v, w = points.value[i:j] - points.value[i], points.weight[i:j]
    wl, sl = np.cumsum(w)[:-1], np.cumsum(w * v)[:-1]
    wr, sr = w.sum() - wl, (w * v).sum() - sl
    return i + 1 + int(np.argmax(sl**2 / wl + sr**2 / wr))


def stationary_split(points: Points, i: int, j: int) -> int:
    """The original's cut of points [i, j): bisection for a place halfway between the means of its two sides."""
    if j - i < 2:
        return j
    v, w = points.value, points.weight
    low, high = i + 1, j - 1
    while low < high:
        m = (low + high) // 2
        middle = (np.average(v[i:m], weights=w[i:m]) + np.average(v[m:j], weights=w[m:j])) / 2
        if middle < v[m - 1]:
            high = max(low, m - 1)
        elif middle > v[m]:
            low = m + 1
        else:
            return m
    return low


def kmeans(points: Points, cells: int, rng: np.random.Generator) -> Cuts:
    """Weighted k-means with greedy k-means++ seeding and at most 50 rounds of Lloyd.

    Source:  Arthur and Vassilvitskii 2007, with 2 + ln(cells) trials per centre
    """
    x, w = points.value, points.weight
    centres = rng.choice(x, 1, p=w / w.sum())
    while len(centres) < cells:
        mass = w * ((x[:, None] - centres) ** 2).min(axis=1)
        trials = rng.choice(x, 2 + int(np.log(cells)), p=mass / mass.sum())
        errors = [(w * ((x[:, None] - np.append(centres, t)) ** 2).min(axis=1)).sum() for t in trials]
        centres = np.append(centres, trials[int(np.argmin(errors))])
    centres = np.sort(centres)
    cuts = np.zeros(cells + 1, np.intp)
    for _ in range(50):
        inner = np.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        new = np.concatenate([[0], inner, [len(x)]])
        if (new == cuts).all():
            break
        cuts = new
        for c in range(cells):
            if cuts[c] < cuts[c + 1]:
                centres[c] = np.average(x[cuts[c] : cuts[c + 1]], weights=w[cuts[c] : cuts[c + 1]])
    return cuts


def codes_of(points: Points, cuts: Cuts) -> NDArray[np.uint8]:
    """The cell of every weight of the row."""
    return (np.searchsorted(cuts, np.arange(len(points.value)), side="right") - 1).astype(np.uint8)[points.index]


def upscale(points: Points, bits: Sequence[int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """k-means at min(bits), then bisected splits: the codes of the original's pipeline."""
    cuts = kmeans(points, 2 ** min(bits), rng)
    for _ in range(min(bits), max(bits)):
        middles = [stationary_split(points, int(i), int(j)) for i, j in pairwise(cuts)]
        cuts = np.append(np.stack([cuts[:-1], middles], axis=1).ravel(), cuts[-1])
    return codes_of(points, cuts)


def codebook(
    row: NDArray[np.float32], sensitivity: NDArray[np.float32] | None, codes: NDArray[np.uint8], bits: int, planes: int
) -> NDArray[np.float32]:
    """Sensitivity-weighted means of the cells; unweighted where a cell has no weight; empty: the parent's value."""
    x = row.astype(np.float64)
    w = np.ones_like(x) if sensitivity is None else sensitivity.astype(np.float64)
    parent = np.full(1, np.average(x, weights=w if w.any() else None))
    for level in range(1, bits + 1):
        cell = codes >> (planes - level)
        count, plain, weight, moment = (np.bincount(cell, s, 2**level) for s in (None, x, w, w * x))
        parent = np.repeat(parent, 2)
        used, weighted = count > 0, weight > 0
        parent[used] = plain[used] / count[used]
        parent[weighted] = moment[weighted] / weight[weighted]
    return parent.astype(np.float32)


def uniform(
    row: NDArray[np.float32], sensitivity: NDArray[np.float32] | None, bits: Sequence[int]
) -> tuple[NDArray[np.uint8], dict[int, tuple[float, float]]]:
    """An even grid over the row's range; per precision the weighted least-squares (scale, offset) of its codes."""
    x = row.astype(np.float64)
    w = np.ones_like(x) if sensitivity is None or not sensitivity.any() else sensitivity.astype(np.float64)
    span, planes = x.max() - x.min(), max(bits)
    per_unit = 2.0**planes / span if span > 0 else 0.0
    codes = np.minimum((x - x.min()) * per_unit, 2**planes - 1).astype(np.uint8)
    lines = {}
    for b in bits:
        code = (codes >> (planes - b)).astype(np.float64)
        mean_code, mean = np.average(code, weights=w), np.average(x, weights=w)
        spread = (w * (code - mean_code) ** 2).sum()
        scale = (w * (code - mean_code) * (x - mean)).sum() / spread if spread > 0 else 0.0
        lines[b] = (float(scale), float(mean - scale * mean_code))
    return codes, lines
