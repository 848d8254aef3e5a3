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
        rates = np.array([one.rates for one in types]).T
        floor = -math.inf if limits.least_quality is None else limits.least_quality
        used = np.array([one.quality >= floor for one in types])
        self.can = (rates > 0) & used
        self.load = np.divide(self.rate[:, None], rates, out=np.zeros_like(rates), where=self.can)  # in replicas
        self.missing = np.array([one.name in missing for one in types])
        self.spare = np.array([limits.spot_losses if one.spot else 0 for one in types])
        self.cost = np.array([one.usd_per_h + one.gco2_per_h / 1e6 * limits.co2_usd_per_t for one in types])
        self.rows = dict(_rows(self, types))

    def solve(
        self, limit_s: float, elastic: str | None = None, gap: float = 1e-4, relaxed: bool = False
    ) -> Allocation | None:
        """The cheapest allocation to within a part `gap`, or None if there is none. `relaxed`: counts need not be whole
        in the program, so that `cost` is no more than that of any plan; the counts that come back mean nothing.

        `elastic`: a limit of `rows` that may be broken; then `cost` is by how much it must be, and money is no matter.

        Raises: SourceError if the time is over before any allocation was found.
        """
        buckets, kinds = self.can.shape
        if not self.can.any(1).all():
            return None
        cells = buckets * kinds
        most = np.ceil(self.load.sum(0) / self.limits.utilisation - 1e-9)  # a type that serves all that it can
        upper = np.concatenate([self.can.ravel() * float(self.slices or 1), most, np.ones(kinds), [np.inf]])
        whole = np.concatenate([np.full(cells, self.slices is not None), np.ones(2 * kinds), [False]]).astype(int)
        objective = np.concatenate([np.zeros(cells), self.cost, self.cost * self.spare, [0.0]])
        if elastic:
            objective = np.eye(1, len(objective), len(objective) - 1)[0]
        else:
            upper[-1] = 0.0
        with _silence():
            found = milp(
                objective,
                integrality=whole * (not relaxed),
                bounds=Bounds(0, upper),
                constraints=self._constraints(most, elastic),
                options={"time_limit": limit_s, "mip_rel_gap": gap},
            )
        if found.x is None:
            if found.status == _INFEASIBLE:
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
        loads some types to the limit and leaves others empty."""
        if self.slices is not None:
            return found
        buckets, kinds = self.can.shape
        working = np.maximum(found.counts - self.spare, 0).astype(float)
        blocks, most = [sparse.hstack([self._loads(), -working[:, None]])], [np.zeros(kinds)]
        for row in self.rows.values():
            if row.share is not None:
                blocks.append(sparse.csr_array(np.append(row.cells(self), 0.0)[None]))
                most.append(np.array([row.most]))
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
        return sparse.csr_array((self.load.ravel() / scale, (places % kinds, places)), (kinds, buckets * kinds))

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
        tied = self.missing | (self.spare > 0)
        if tied.any():
            some = sparse.diags_array(tied.astype(float))
            link = sparse.hstack([sparse.csr_array((kinds, cells)), some, -some @ sparse.diags_array(most), end])
            found.append(LinearConstraint(link, -np.inf, 0))
        if self.missing.any():
            line = np.concatenate([np.zeros(cells + kinds), self.missing, [0.0]])
            found.append(LinearConstraint(line, -np.inf, self.missing.sum() - 1))
        for name, row in self.rows.items():
            line = np.concatenate([row.cells(self) / scale, row.each, row.each * self.spare, [-float(name == elastic)]])
            found.append(LinearConstraint(line, -np.inf, row.most))
        return found


@dataclass(frozen=True)
class Row:
    """A limit as a line: the sum of `each` [types] over replicas, or of `share` [types] over requests, is at most
    `most`."""

    each: np.ndarray[Any, np.dtype[np.float64]]
    share: np.ndarray[Any, np.dtype[np.float64]] | None
    most: float

    def cells(self, problem: FleetProblem) -> np.ndarray[Any, np.dtype[np.float64]]:
        if self.share is None:
            return np.zeros(problem.can.size)
        return np.outer(problem.rate / problem.rate.sum(), self.share).ravel()


def _rows(problem: FleetProblem, types: Sequence[ReplicaType]) -> list[tuple[str, Row]]:
    """Each limit by its name, but the quality floor, which bars types."""
    limits, none = problem.limits, np.zeros(len(types))
    rows = []
    for kind, most in limits.quotas.items():
        devices = np.array([float(one.devices) if one.hardware == kind else 0.0 for one in types])
        rows.append((f"quota {kind}", Row(devices, None, most)))
    if limits.power_w is not None:
        rows.append(("power_w", Row(np.array([_drawn(one, limits) for one in types]), None, limits.power_w)))
    if limits.gco2_per_h is not None:
        rows.append(("gco2_per_h", Row(np.array([one.gco2_per_h for one in types]), None, limits.gco2_per_h)))
    if limits.on_demand_share is not None:
        spot = np.array([float(one.spot) for one in types])
        rows.append(("on_demand_share", Row(none, spot, 1 - limits.on_demand_share)))
    if limits.mean_quality is not None:
        short = np.array([limits.mean_quality - one.quality for one in types])
        rows.append(("mean_quality", Row(none, short, 0.0)))
    return rows


def _drawn(one: ReplicaType, limits: Limits) -> float:
    """Watts of a replica that the budget must hold. Oversubscribed, neither the expected sum nor the capped one may
    pass it; the larger of the two for each replica is on the safe side of both."""
    if not limits.oversubscribed or one.capped_w is None:
        return one.peak_w
    return max(one.power_w, one.capped_w)
