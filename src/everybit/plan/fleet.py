"""The cheapest fleet that serves the demand within the limits: how many of which replicas, and who serves what.

After Melange (Griggs et al. 2024, arXiv 2404.14527), whose buckets are cut into slices; here a bucket may be split in
any way, and quotas, spot, power, carbon and quality are limits of the same program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import bdtrc

from everybit.errors import SourceError
from everybit.formats.tensors import show
from everybit.plan.fleet_inputs import Bucket, Limits, ReplicaType, check
from everybit.plan.fleet_milp import Allocation, FleetProblem

_ROUGH = 5e-3  # the solver's gap for what is only compared
_LEAST = 2e-3  # of the bill: savings below are none
_EQUAL = 1.001  # the solver's own gap, and more


@dataclass(frozen=True, slots=True)
class Binding:
    """A limit that costs money: `saves_usd_per_h` if it is gone, `relaxed_saves_usd_per_h` if it is `relaxed` instead
    of `value`. Both are of the objective, the price of CO2 included, and may be more by 0.5 % of the bill."""

    limit: str
    value: float
    saves_usd_per_h: float
    relaxed: float
    relaxed_saves_usd_per_h: float


@dataclass(frozen=True)
class Fleet:
    """`counts`: replicas of the types in use. `split`: for each bucket, the share of its requests by type.

    `usd_per_h` is the rent, `co2_usd_per_h` what its CO2 adds; no plan costs less than `bound_usd_per_h` in all.
    `loads`: the part of the time that a working replica is busy, spares not counted, at most `utilisation`. `power_w`,
    `gco2_per_h`: at these loads; `peak_w`: at worst.
    `spot_risk`: the part of the time in which more than the spared replicas are gone, if they go independently of each
    other; they rarely do, so it is a lower bound. `runner_up`: the cheapest that does without one of the types.
    """

    counts: dict[str, int]
    split: tuple[dict[str, float], ...]
    usd_per_h: float
    co2_usd_per_h: float
    bound_usd_per_h: float
    power_w: float
    peak_w: float
    gco2_per_h: float
    mean_quality: float
    loads: dict[str, float]
    utilisation: float
    spot_risk: dict[str, float]
    binding: tuple[Binding, ...] = ()
    runner_up: Fleet | None = None

    @property
    def cost_usd_per_h(self) -> float:
        return self.usd_per_h + self.co2_usd_per_h


def plan_fleet(
    demand: Sequence[Bucket],
    types: Sequence[ReplicaType],
    limits: Limits | None = None,
    *,
    verify: Callable[[Fleet], bool | float] | None = None,
    tighten: float = 0.9,
    rounds: int = 10,
    slices: int | None = None,
    explain: bool = False,
    limit_s: float = 30.0,
) -> Fleet:
    """The cheapest fleet within `limits`.

    `verify`: as those of `fleet_checks`: true, or at least 1, if the fleet keeps the SLO. Otherwise it is planned anew
    under a utilisation that is `tighten` of the last, or less if a number below that was answered (no less than half),
    up to `rounds` times.
    `slices`: Melange's way: each bucket in so many equal parts that are not split. `limit_s`: for each program.
    `explain`: with `binding` and `runner_up`: two more programs a limit, seconds each where buckets and types are many.

    Raises: SourceError for input that makes no sense, and where no fleet is possible, with the reason.
    """
    limits = limits or Limits()
    check(demand, types, limits)
    kinds = sorted({one.hardware for one in types})
    if unknown := [kind for kind in limits.quotas if kind not in kinds]:
        raise SourceError(f"a quota of {show(unknown[0])}, which no type has: the types have {', '.join(kinds)}")
    if not 0 < tighten < 1 or rounds < 1 or (slices is not None and slices < 1) or limit_s <= 0:
        raise SourceError(
            f"tighten {tighten}, rounds {rounds}, slices {slices}, limit_s {limit_s}: give a part of 1, and more than 0"
        )
    planner = _Planner(demand, types, slices, limit_s)
    for _ in range(rounds):
        fleet = planner.plan(limits)
        if fleet is None:
            raise SourceError(planner.reason(limits))
        answer = verify(fleet) if verify else True
        if answer >= 1:
            if not explain:
                return fleet
            return replace(fleet, binding=planner.binding(fleet, limits), runner_up=planner.runner_up(fleet, limits))
        factor = tighten if isinstance(answer, bool | np.bool_) else min(tighten, max(0.5, answer))
        limits = replace(limits, utilisation=limits.utilisation * factor)
    raise SourceError(
        f"no fleet held in {rounds} rounds down to utilisation {limits.utilisation / factor:.3g}: the SLO may be "
        "out of reach of these replica types even when idle; loosen it or give more rounds"
    )


def finest(demand: Sequence[Bucket], types: Sequence[ReplicaType], limits: Limits, *, limit_s: float = 30.0) -> Limits:
    """The limits with the highest floor of quality that costs no more: the program itself does not prefer quality.

    Raises: SourceError where there is a choice of floors and no fleet is possible
    """
    least = -math.inf if limits.least_quality is None else limits.least_quality
    floors = sorted({one.quality for one in types if one.quality >= least}, reverse=True)[:-1]
    if not floors:
        return limits
    most_cost = plan_fleet(demand, types, limits, limit_s=limit_s).cost_usd_per_h * _EQUAL
    for floor in floors:
        finer = replace(limits, least_quality=floor)
        if FleetProblem(demand, types, finer).solve(limit_s, gap=1.0, most_cost=most_cost):
            return finer
    return limits


@dataclass(frozen=True)
class _Planner:
    demand: Sequence[Bucket]
    types: Sequence[ReplicaType]
    slices: int | None
    limit_s: float

    def problem(self, limits: Limits, missing: Sequence[str] = ()) -> FleetProblem:
        return FleetProblem(self.demand, self.types, limits, self.slices, missing)

    def plan(self, limits: Limits, missing: Sequence[str] = (), gap: float = 1e-4) -> Fleet | None:
        problem = self.problem(limits, missing)
        found = problem.solve(self.limit_s, gap=gap)
        return None if found is None else _fleet(self.types, limits, problem, problem.spread(found))

    # --- why this one
    def binding(self, fleet: Fleet, limits: Limits) -> tuple[Binding, ...]:
        """The limits without which the fleet is cheaper, dearest first."""
        found = []
        bare = functools.reduce(lambda some, name: some.changed(name, None), limits.names, limits)
        costly = bool(limits.names) and self._saves(fleet, bare) > 0  # all together: mostly none does, soon seen
        for name in [*(limits.names if costly else ()), "utilisation"]:
            gone = limits.changed(name, 1.0 if name == "utilisation" else None)
            if saves := self._saves(fleet, gone):
                value = limits.relaxed(name)
                less = self._saves(fleet, limits.changed(name, value))
                found.append(Binding(name, limits.value(name), max(saves, less), value, less))
        return tuple(sorted(found, key=lambda one: -one.saves_usd_per_h))

    def _saves(self, fleet: Fleet, limits: Limits) -> float:
        cost = fleet.cost_usd_per_h
        found = self.problem(limits).solve(self.limit_s, gap=_ROUGH, most_cost=cost * (1 - _LEAST))
        return cost - found.cost if found else 0.0

    def runner_up(self, fleet: Fleet, limits: Limits) -> Fleet | None:
        return self.plan(limits, missing=list(fleet.counts), gap=_ROUGH)

    # --- why none
    def reason(self, limits: Limits) -> str:
        for place, bucket in enumerate(self.demand):
            if not any(one.rates[place] for one in self.types):
                return f"no replica type keeps the SLO for '{bucket.name}': add a faster type or loosen the SLO"
        few = limits
        for name in limits.names:  # deletion filter: what can go while no fleet is possible is no reason
            if self._impossible(trial := few.changed(name, None)):
                few = trial
        reasons = " and ".join(f"{name} = {few.value(name):g}" for name in few.names)
        nearest = sorted(self._nearest(limits, few.names))
        hint = f"; the nearest that works is {nearest[0][1]} = {nearest[0][2]:g}" if nearest else ""
        alone = "" if nearest else "; other limits rule out every fleet as well"
        return f"no fleet at utilisation {limits.utilisation:.3g} keeps {reasons}{hint}{alone}"

    def _impossible(self, limits: Limits) -> bool:
        return self.problem(limits).solve(self.limit_s, gap=1.0) is None

    def _nearest(self, limits: Limits, names: Sequence[str]) -> Iterator[tuple[float, str, float]]:
        """(how far relative to its value, limit, value) for each that need only give way alone."""
        for name in names:
            old = limits.value(name)
            new = self._floor(limits) if name == "least_quality" else self._stretched(limits, name)
            if new is not None:
                yield abs(new - old) / (abs(old) or 1.0), name, new

    def _floor(self, limits: Limits) -> float | None:
        levels = sorted({one.quality for one in self.types}, reverse=True)
        works = (q for q in levels if not self._impossible(limits.changed("least_quality", q)))
        return next((_outwards(q, up=False) for q in works), None)

    def _stretched(self, limits: Limits, name: str) -> float | None:
        found = self.problem(limits).solve(self.limit_s, elastic=name)
        if found is None:
            return None
        more = name in ("power_w", "gco2_per_h") or name.startswith("quota")
        return _outwards(limits.value(name) + (found.cost if more else -found.cost), up=more)


def _outwards(value: float, up: bool) -> float:
    """At five digits, on the side that works, so that what a message shows can be used."""
    if abs(value) < 1e-9:
        return 0.0
    scale = 10.0 ** (4 - math.floor(math.log10(abs(value))))
    return (math.ceil(value * scale - 1e-3) if up else math.floor(value * scale + 1e-3)) / scale


def _fleet(types: Sequence[ReplicaType], limits: Limits, problem: FleetProblem, found: Allocation) -> Fleet:
    busy = (problem.load * found.split).sum(0)  # replicas at their rates

    def whole(what: str) -> float:
        return float(sum(n * getattr(one, what) for n, one in zip(found.counts, types, strict=True)))

    def under_load(what: str) -> float:
        parts = zip(found.counts, busy, types, strict=True)
        return float(sum(getattr(one, what) * (n * one.base_share + b * (1 - one.base_share)) for n, b, one in parts))

    used = [(place, one) for place, one in enumerate(types) if found.counts[place]]
    share = problem.rate @ found.split / problem.rate.sum()
    gco2_per_h = under_load("gco2_per_h")
    return Fleet(
        counts={one.name: int(found.counts[place]) for place, one in used},
        split=tuple({one.name: float(row[place]) for place, one in used if row[place] > 1e-9} for row in found.split),
        usd_per_h=whole("usd_per_h"),
        co2_usd_per_h=gco2_per_h / 1e6 * limits.co2_usd_per_t,
        bound_usd_per_h=found.bound,
        power_w=under_load("power_w"),
        peak_w=whole("peak_w"),
        gco2_per_h=gco2_per_h,
        mean_quality=float(share @ np.array([one.quality for one in types])),
        loads={one.name: float(busy[place] / (found.counts[place] - problem.spare[place])) for place, one in used},
        utilisation=limits.utilisation,
        spot_risk={one.name: _more_gone(one, int(found.counts[place]), limits) for place, one in used if one.spot},
    )


def _more_gone(one: ReplicaType, count: int, limits: Limits) -> float:
    """Binomial: each is gone a part of the time that its interruptions and recoveries make up."""
    lost = one.interruptions_per_h * one.recovery_s / 3600
    return float(bdtrc(min(count, limits.spot_losses), count, lost / (1 + lost)))
