"""Replica types of a fleet from cards: what each serves within the SLO, costs and draws."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration
from everybit.plan.cost import Parallel
from everybit.plan.efficiency import Efficiency, prior
from everybit.plan.estimate import Estimate, estimate
from everybit.plan.fleet import plan_fleet
from everybit.plan.fleet_inputs import Bucket, Limits, ReplicaType
from everybit.plan.hardware import Hardware, weakest
from everybit.plan.operators import Model
from everybit.plan.simulate.metrics import Slo

_MOST_CLIENTS = 4096
_EQUAL = 1.001  # the solver's own gap, and more


@dataclass(frozen=True)
class Candidate:
    """What a type is made of, and how its figures are known."""

    type: ReplicaType
    bits: str
    model: Model
    card: Hardware
    split: Parallel
    efficiency: Efficiency
    known: str


@dataclass(frozen=True)
class Terms:
    """How a card is had. `price`: a kind, or $/h of one device. `cap_w`: of one device. `g_per_kwh`: where it stands.

    `interruptions_per_h`: None takes the card's. `pue`: power of the building over its machines'.
    """

    price: str | float = "on-demand"
    cap_w: float | None = None
    interruptions_per_h: float | None = None
    recovery_s: float = 120.0
    g_per_kwh: float = 0.0
    pue: float = 1.0

    @property
    def spot(self) -> bool:
        return self.price == "spot"


def candidate(
    model: Model,
    card: Hardware,
    demand: Sequence[Bucket],
    slo: Slo,
    *,
    bits: str,
    tp: int = 1,
    terms: Terms | None = None,
    engine: str = "any",
    calibration: Calibration | None = None,
    quality: float = 1.0,
    cautious: bool = False,
    needs_power: bool = False,
) -> Candidate:
    """`bits`: a name of the model's width. `cautious`: the slow ends of the intervals keep the SLO. `needs_power`: a
    card without watts is refused.

    Raises: SourceError where it keeps the SLO for no bucket, or its price or power is unknown
    """
    terms = terms or Terms()
    options: dict[str, Any] = {"parallel": Parallel(tp), "engine": engine, "calibration": calibration}
    best = [_most(model, card, bucket, slo, cautious, options) for bucket in demand]
    kept = [one for one in best if one is not None]
    if not kept:
        first = demand[0]
        alone = estimate(model, card, concurrency=1, prompt=first.input_tokens, output=first.output_tokens, **options)
        said = f"TTFT {alone.ttft_s.value * 1e3:.3g} ms, TPOT {alone.tpot_s.value * 1e3:.3g} ms for {first.name}"
        raise SourceError(f"keeps the SLO for no bucket, even for a single user: {said}")
    usd = card.price(terms.price).usd_per_h if isinstance(terms.price, str) else terms.price
    gone = card.spot_interruptions_per_h if terms.interruptions_per_h is None else terms.interruptions_per_h
    if terms.spot and gone is None:
        raise SourceError(f"card {card.name}: how often spot is taken is unknown: give interruptions_per_h")
    peak_w = tp * (card.peak_w or card.tdp_w or 0.0)
    drawn = [one.joules_per_token.value * one.tokens_per_s.value for one in kept if one.joules_per_token]
    power_w = min(peak_w, max(drawn, default=0.0))
    if not peak_w and (needs_power or terms.g_per_kwh):
        raise SourceError(f"card {card.name}: its power is unknown, and power or CO2 counts: give tdp_w in the card")
    return Candidate(
        ReplicaType(
            f"{tp} x {card.name}, {bits}" + (", spot" if terms.spot else ""),
            card.name,
            usd * tp,
            tuple(0.0 if one is None else one.concurrency / one.e2e_s.value for one in best),
            devices=tp,
            power_w=power_w,
            peak_w=peak_w,
            capped_w=None if terms.cap_w is None else min(peak_w, tp * terms.cap_w),
            gco2_per_h=power_w * terms.pue / 1e3 * terms.g_per_kwh,
            quality=quality,
            spot=terms.spot,
            interruptions_per_h=(gone or 0.0) if terms.spot else 0.0,
            recovery_s=terms.recovery_s if terms.spot else 0.0,
        ),
        bits,
        model,
        card,
        Parallel(tp),
        calibration.efficiency if calibration else prior(card, engine),
        weakest(card),
    )


def finest(demand: Sequence[Bucket], types: Sequence[ReplicaType], limits: Limits, *, limit_s: float = 30.0) -> Limits:
    """The limits with the highest floor of quality that costs no more: the program itself does not prefer quality.

    Raises: SourceError where no fleet is possible
    """
    cheapest = plan_fleet(demand, types, limits, limit_s=limit_s).cost_usd_per_h
    for floor in sorted({one.quality for one in types}, reverse=True)[:-1]:
        finer = replace(limits, least_quality=max(floor, limits.least_quality or floor))
        with contextlib.suppress(SourceError):  # no fleet of these
            if plan_fleet(demand, types, finer, limit_s=limit_s).cost_usd_per_h <= cheapest * _EQUAL:
                return finer
    return limits


def _most(
    model: Model, card: Hardware, bucket: Bucket, slo: Slo, cautious: bool, options: dict[str, Any]
) -> Estimate | None:
    """The estimate of the most clients that fit in memory and keep the means of the SLO. None if one client does not.

    Raises: SourceError where the model does not fit
    """

    def at(clients: int) -> Estimate:
        return estimate(
            model, card, concurrency=clients, prompt=bucket.input_tokens, output=bucket.output_tokens, **options
        )

    def keeps(one: Estimate) -> bool:
        pairs = ((one.ttft_s, slo.first_s), (one.tpot_s, slo.gap_s), (one.e2e_s, slo.end_s))
        times = [(time.high if cautious else time.value, most) for time, most in pairs if most is not None]
        return one.running >= one.concurrency and all(time <= most for time, most in times)

    low, high, best = 1, 2, at(1)
    if not keeps(best):
        return None
    while high <= _MOST_CLIENTS and keeps(found := at(high)):
        low, high, best = high, high * 2, found
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        low, high, best = (middle, high, found) if keeps(found) else (low, middle, best)
    return best
