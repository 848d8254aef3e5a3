"""Replica types of a fleet from cards: what each serves within the SLO, costs and draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration
from everybit.plan.cost import Parallel
from everybit.plan.efficiency import Efficiency, prior
from everybit.plan.estimate import Estimate, estimate
from everybit.plan.fleet_inputs import Bucket, ReplicaType
from everybit.plan.hardware import Hardware, Price, weakest
from everybit.plan.operators import Model
from everybit.plan.power import Capped, capped
from everybit.plan.simulate.metrics import Slo
from everybit.plan.widths import check_multiplied

_MOST_CLIENTS = 4096
_DEAR = 20  # times the list price: cents, or the price of a rack

_Load = Callable[[int], Estimate]  # by clients


@dataclass(frozen=True)
class Candidate:
    """What a type is made of, and how its figures are known.

    `clients`: for each bucket, how many at once keep the SLO. `card`: as its cap leaves it. `price`: None if given.
    """

    type: ReplicaType
    bits: str
    clients: tuple[int, ...]
    model: Model
    card: Hardware
    split: Parallel
    efficiency: Efficiency
    known: str
    price: Price | None
    cap: Capped | None


@dataclass(frozen=True)
class Terms:
    """How a card is had. `price`: a kind, or $/h of one device. `cap_w`: of one device, at all times; it slows.

    `interruptions_per_h`: None takes the card's. `g_per_kwh`: where it stands. `pue`: power of the building over its
    machines'.
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


def type_name(card: Hardware, tp: int, bits: str, terms: Terms) -> str:
    cap = "" if terms.cap_w is None else f", {terms.cap_w:g} W"
    return f"{tp} x {card.name}, {bits}{cap}" + (", spot" if terms.spot else "")


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

    Raises: SourceError where it keeps the SLO for no bucket, its price or power is unknown, or its cap too low
    """
    check_multiplied(bits, model, card)
    terms = terms or Terms()
    name = type_name(card, tp, bits, terms)
    usd_per_h, price = _price(card, terms.price)
    gone = card.spot_interruptions_per_h if terms.interruptions_per_h is None else terms.interruptions_per_h
    if terms.spot and gone is None:
        raise SourceError(f"card {card.name}: how often spot is taken is unknown: give interruptions_per_h")
    if card.tdp_w is None and (needs_power or terms.g_per_kwh):
        raise SourceError(f"card {card.name}: its power is unknown, and power or CO2 counts: give tdp_w in the card")
    efficiency = (calibration.efficiency if calibration else prior(card, engine)).of(model)
    cap = None if terms.cap_w is None else capped(card, terms.cap_w, efficiency)
    held = cap.card if cap else card

    def load(bucket: Bucket) -> _Load:
        return lambda clients: estimate(
            model,
            held,
            parallel=Parallel(tp),
            concurrency=clients,
            prompt=bucket.input_tokens,
            output=bucket.output_tokens,
            engine=engine,
            calibration=calibration,
            power=cap.power if cap else None,
        )

    loads = [load(bucket) for bucket in demand]
    best = [_most(at, slo, cautious) for at in loads]
    if not any(best):
        alone = loads[0](1)
        said = f"TTFT {alone.ttft_s.value * 1e3:.3g} ms, TPOT {alone.tpot_s.value * 1e3:.3g} ms for {demand[0].name}"
        raise SourceError(f"keeps the SLO {_said(slo)} for no bucket, even for a single user: {said}")
    peak_w = tp * (held.peak_w or held.tdp_w or 0.0)
    drawn = [(_watts(one), _base(at(1), one)) for at, one in zip(loads, best, strict=True) if one]
    power_w, base_w = (min(peak_w, watts) for watts in max(drawn))
    return Candidate(
        ReplicaType(
            name,
            card.name,
            usd_per_h * tp,
            tuple(_rate(one) if one else 0.0 for one in best),
            devices=tp,
            power_w=power_w,
            base_w=base_w,
            peak_w=peak_w,
            gco2_per_h=power_w * terms.pue / 1e3 * terms.g_per_kwh,
            quality=quality,
            spot=terms.spot,
            interruptions_per_h=(gone or 0.0) if terms.spot else 0.0,
            recovery_s=terms.recovery_s if terms.spot else 0.0,
        ),
        bits,
        tuple(one.concurrency if one else 0 for one in best),
        model,
        held,
        Parallel(tp),
        efficiency,
        weakest(card),
        price,
        cap,
    )


# --- money
def _price(card: Hardware, price: str | float) -> tuple[float, Price | None]:
    """$/h of one device, and where it is listed. Raises: SourceError"""
    if isinstance(price, str):
        kinds = dict.fromkeys(one.kind for one in card.prices)
        if price not in kinds:
            has = f"it lists {' and '.join(kinds)}" if kinds else "the card lists none"
            agreed = "; reserved ones are agreed with a provider, seldom published" if price == "reserved" else ""
            raise SourceError(
                f"card {card.name}: no {price} price is known, {has}{agreed}: give yours in $/h of one device"
            )
        listed = card.price(price)
        return listed.usd_per_h, listed
    dearest = max((one.usd_per_h for one in card.prices), default=None)
    if dearest and price > _DEAR * dearest:
        raise SourceError(
            f"card {card.name}: a price of {price:g} $/h, more than {_DEAR} times the {dearest:g} that are listed: "
            "give $/h of one device"
        )
    return price, None


# --- the most that keeps the SLO
def _most(at: _Load, slo: Slo, cautious: bool) -> Estimate | None:
    """The estimate of the most clients that fit in memory and keep the means of the SLO. None if one client does not.

    Raises: SourceError where the model does not fit
    """

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


def _said(slo: Slo) -> str:
    times = (("ttft", slo.first_s), ("tpot", slo.gap_s), ("e2e", slo.end_s))
    told = [f"{name}={s:g}s" if s >= 1 else f"{name}={s * 1e3:g}ms" for name, s in times if s is not None]
    return ",".join([*told, f"share={slo.share:g}"])


def _rate(one: Estimate) -> float:
    return one.concurrency / one.e2e_s.value


def _watts(one: Estimate) -> float:
    """Of all devices; 0 where it is unknown."""
    return one.joules_per_token.value * one.tokens_per_s.value if one.joules_per_token else 0.0


def _base(alone: Estimate, full: Estimate) -> float:
    """Watts where the line through a single client's and the most clients' power meets no load.

    It lies above the idle power: with fewer clients batches shrink, but a step, which reads all weights, hardly does.
    Against simulations (benchmarks/plan_power.py: 8B on A10G and H100) the line is high by 0 to 14 % at loads of 0.3 to
    0.9, once by 27 %, where one from the idle power is off by -38 to +11 %. At 0.1 it is high by 0 to 73 %: most where
    a single client is a large part of the load.
    """
    high, low, more = _watts(full), _watts(alone), _rate(full) - _rate(alone)
    return min(high, low - _rate(alone) * (high - low) / more if more > 0 else low)
