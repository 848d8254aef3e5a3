"""A fleet as a mixed-integer linear program, solved by HiGHS through scipy.

Variables: x, the share of each bucket that each type serves; m, working replicas of each type; y, whether a type is
used (the spare replicas of spot are paid only then). Replicas of a type: n = m + spare * y.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from everybit.errors import SourceError
from everybit.plan.fleet_inputs import Bucket, Limits, ReplicaType

_INFEASIBLE = 2  # scipy's status
_GAP = 1e-4  # of the bill, between the plan and the bound
_TINY = 1e-3  # replicas: of less the solver's tolerances may make none
_NONE = 1e-5  # replicas: less only disturbs the solver


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS 1.12 prints lines of its debugging, which would stand among --json. Python cannot catch them."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Allocation:
    """`counts` [types], `split` [buckets, types] with rows that sum to 1; `cost` is the objective, no plan is below
    `bound`."""

    counts: np.ndarray[Any, np.dtype[np.int64]]
    split: np.ndarray[Any, np.dtype[np.float64]]
    cost: float
    bound: float


class FleetProblem:
    """`slices`: each bucket is cut into so many equal parts that are not split further (Melange); None: any split.

    `missing`: names of types of which at least one may not be used.
    """

    def __init__(
        self,
        demand: Sequence[Bucket],
        types: Sequence[ReplicaType],
        limits: Limits,
        slices: int | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.limits, self.slices = limits, slices
        self.rate = np.array([bucket.requests_per_s for bucket in demand])
        rates = np.array([one.rates for one in types], dtype=float).T
        floor = -math.inf if limits.least_quality is None else limits.least_quality
        used = np.array([one.quality >= floor for one in types])
        self.can = (rates > 0) & used
        self.load = np.divide(self.rate[:, None], rates, out=np.zeros_like(rates), where=self.can)  # in replicas
        self.missing = np.array([one.name in missing for one in types])
        self.spare = np.array([limits.spot_losses if one.spot else 0 for one in types])
        base = np.array([one.base_share for one in types])
        co2_usd = np.array([one.gco2_per_h for one in types]) / 1e6 * limits.co2_usd_per_t
        self.cost = np.array([one.usd_per_h for one in types]) + co2_usd * base
        self.load_cost = self.load * co2_usd * (1 - base)
        self.rows = _rows(self, types)

    def solve(
        self, limit_s: float, elastic: str | None = None, gap: float = _GAP, most_cost: float | None = None
    ) -> Allocation | None:
        """The cheapest allocation to within a part `gap`, or None if there is none.

        `elastic`: a limit of `rows` that may be broken; then `cost` is by how much it must be, and money is no matter.
        `most_cost`: dearer ones do not count, nor do such that are not found in time; far faster where there is none.

        Raises: SourceError if the time is over before any allocation was found.
        """
        buckets, kinds = self.can.shape
        if not self.can.any(1).all():
            return None
        cells = buckets * kinds
        most = np.ceil(self.load.sum(0) / self.limits.utilisation - 1e-9)  # a type that serves all that it can
        most = np.maximum(most, self.can.any(0))
        upper = np.concatenate([self.can.ravel() * float(self.slices or 1), most, np.ones(kinds), [np.inf]])
        whole = np.concatenate([np.full(cells, self.slices is not None), np.ones(2 * kinds), [False]]).astype(int)
        cost = np.concatenate([self.load_cost.ravel() / (self.slices or 1), self.cost, self.cost * self.spare, [0.0]])
        constraints, objective = self._constraints(most, elastic), cost
        if most_cost is not None:
            constraints.append(LinearConstraint(cost, -np.inf, most_cost))
        if elastic:
            objective = np.eye(1, len(objective), len(objective) - 1)[0]
        else:
            upper[-1] = 0.0
        with _silence():
            found = milp(
                objective,
                integrality=whole,
                bounds=Bounds(0, upper),
                constraints=constraints,
                options={"time_limit": limit_s, "mip_rel_gap": gap},
            )
        if found.x is None:
            if found.status == _INFEASIBLE or most_cost is not None:
                return None
            raise SourceError(f"no fleet was found within {limit_s:g} s: give more time, fewer buckets or fewer types")
        split = found.x[:cells].reshape(buckets, kinds) / (self.slices or 1)
        needed = np.ceil((self.load * split).sum(0) / self.limits.utilisation - 1e-6)  # free replicas may be too many
        counts = np.minimum(np.rint(found.x[cells : cells + kinds]), needed).astype(np.int64)
        counts = np.maximum(counts, split.max(0) > 1e-6)  # the solver takes a millionth of a replica for none
        counts += self.spare * (counts > 0)
        bound = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
        return Allocation(counts, split / split.sum(1, keepdims=True), float(found.fun), float(bound))

    def spread(self, found: Allocation) -> Allocation:
        """The same replicas with traffic spread so that the busiest type is as idle as can be. A vertex of the program
        loads some types to the limit and leaves others empty. CO2 that is paid for may grow by the gap of the bill."""
        if self.slices is not None:
            return found
        buckets, kinds = self.can.shape
        working = np.maximum(found.counts - self.spare, 0).astype(float)
        blocks, most = [sparse.hstack([self._loads(), -working[:, None]])], [np.zeros(kinds)]
        rows = [(row.cells, row.most - row.each @ found.counts) for _, row in self.rows]
        rows.append((self.load_cost, (self.load_cost * found.split).sum() + _GAP * found.cost))
        for cells, left in rows:
            if cells.any():
                blocks.append(sparse.csr_array(np.append(cells.ravel(), 0.0)[None]))
                most.append(np.array([left]))
        result = linprog(
            np.eye(1, buckets * kinds + 1, buckets * kinds)[0],
            A_ub=sparse.vstack(blocks),
            b_ub=np.concatenate(most),
            A_eq=sparse.hstack([self._sums(), sparse.csr_array((buckets, 1))]),
            b_eq=np.ones(buckets),
            bounds=[(0.0, float(open_)) for open_ in self.can.ravel()] + [(0.0, None)],
            method="highs",
        )
        if result.x is None:  # a limit met only within the solver's tolerance
            return found
        split = result.x[:-1].reshape(buckets, kinds)
        return Allocation(found.counts, split / split.sum(1, keepdims=True), found.cost, found.bound)

    def _loads(self, scale: float = 1.0) -> Any:
        """[types, cells]: what a bucket's share takes of a type."""
        buckets, kinds = self.can.shape
        places = np.arange(buckets * kinds)
        load = np.where(self.load < _NONE, 0.0, self.load).ravel() / scale
        return sparse.csr_array((load, (places % kinds, places)), (kinds, buckets * kinds))

    def _sums(self) -> Any:
        """[buckets, cells]: the shares of a bucket."""
        buckets, kinds = self.can.shape
        return sparse.csr_array(sparse.kron(sparse.eye_array(buckets), np.ones((1, kinds))))

    def _constraints(self, most: np.ndarray[Any, Any], elastic: str | None) -> list[LinearConstraint]:
        buckets, kinds = self.can.shape
        cells, scale = buckets * kinds, float(self.slices or 1)
        eye, none = sparse.eye_array(kinds), sparse.csr_array((kinds, kinds))
        end = sparse.csr_array((kinds, 1))
        whole = sparse.hstack([self._sums(), sparse.csr_array((buckets, 2 * kinds + 1))])
        busy = sparse.hstack([self._loads(scale), -self.limits.utilisation * eye, none, end])
        found = [LinearConstraint(whole, scale, scale), LinearConstraint(busy, -np.inf, 0)]
        tiny = np.flatnonzero(self.can & (self.load < _TINY))
        if tiny.size:  # whoever serves a part of such a bucket has a replica
            parts = sparse.eye_array(cells, format="csr")[tiny]
            theirs = sparse.kron(np.ones((buckets, 1)), eye, format="csr")[tiny]
            rest = sparse.csr_array((tiny.size, kinds + 1))
            found.append(LinearConstraint(sparse.hstack([parts, -scale * theirs, rest]), -np.inf, 0))
        tied = self.missing | (self.spare > 0)
        if tied.any():
            some = sparse.diags_array(tied.astype(float))
            link = sparse.hstack([sparse.csr_array((kinds, cells)), some, -some @ sparse.diags_array(most), end])
            found.append(LinearConstraint(link, -np.inf, 0))
        if self.missing.any():
            line = np.concatenate([np.zeros(cells + kinds), self.missing, [0.0]])
            found.append(LinearConstraint(line, -np.inf, self.missing.sum() - 1))
        for name, row in self.rows:
            over = [-float(name == elastic)]
            line = np.concatenate([row.cells.ravel() / scale, row.each, row.each * self.spare, over])
            found.append(LinearConstraint(line, -np.inf, row.most))
        return found


@dataclass(frozen=True)
class Row:
    """A limit as a line: the sum of `each` [types] over replicas and of `cells` [buckets, types] over shares is at most
    `most`."""

    each: np.ndarray[Any, np.dtype[np.float64]]
    cells: np.ndarray[Any, np.dtype[np.float64]]
    most: float


def _rows(problem: FleetProblem, types: Sequence[ReplicaType]) -> list[tuple[str, Row]]:
    """Each limit by its name, but the quality floor, which bars types; power may have two."""
    limits, kinds = problem.limits, len(types)
    none, idle = np.zeros(kinds), np.zeros_like(problem.load)

    def each(what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([float(getattr(one, what)) for one in types])

    def grows(full: np.ndarray[Any, Any], most: float) -> Row:
        """Of what grows with the load, up to `full` [types]."""
        base = full * each("base_share")
        return Row(base, problem.load * (full - base), most)

    def of_requests(share: np.ndarray[Any, Any], most: float) -> Row:
        return Row(none, np.outer(problem.rate / problem.rate.sum(), share), most)

    rows = []
    for kind, quota in limits.quotas.items():
        rows.append((f"quota {kind}", Row(each("devices") * [one.hardware == kind for one in types], idle, quota)))
    if limits.power_w is not None:
        held = np.array([bool(limits.oversubscribed and one.capped_w is not None) for one in types])
        capped = np.array([one.peak_w if one.capped_w is None else one.capped_w for one in types])
        rows.append(("power_w", Row(np.where(held, capped, each("peak_w")), idle, limits.power_w)))
        if held.any():
            expected = grows(held * each("power_w"), limits.power_w)
            rows.append(("power_w", Row(expected.each + ~held * each("peak_w"), expected.cells, limits.power_w)))
    if limits.gco2_per_h is not None:
        rows.append(("gco2_per_h", grows(each("gco2_per_h"), limits.gco2_per_h)))
    if limits.on_demand_share is not None:
        rows.append(("on_demand_share", of_requests(each("spot"), 1 - limits.on_demand_share)))
    if limits.mean_quality is not None:
        rows.append(("mean_quality", of_requests(limits.mean_quality - each("quality"), 0.0)))
    return rows
