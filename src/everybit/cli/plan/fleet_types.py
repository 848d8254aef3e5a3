"""Replica types of a spec: what each serves within the SLO, costs and draws; and their simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from everybit.batching.fluidity import Target
from everybit.cli.plan.fleet_spec import Offer, Spec
from everybit.cli.plan.options import slo_of, widths
from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration, read_calibration
from everybit.plan.cost import Parallel
from everybit.plan.deployment import Deployment
from everybit.plan.efficiency import Efficiency, prior
from everybit.plan.estimate import Estimate, estimate
from everybit.plan.fleet import Fleet
from everybit.plan.fleet_inputs import Bucket, ReplicaType
from everybit.plan.hardware import Hardware, read_hardware, weakest
from everybit.plan.model import read_model
from everybit.plan.operators import Model
from everybit.plan.simulate.metrics import Slo, measure
from everybit.plan.simulate.requests import draw
from everybit.plan.simulate.run import simulate

_MOST_CLIENTS = 4096
_REQUESTS = 400  # simulated of each type
_WARMUP = 0.2  # of them, while the deployment fills


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


def candidates(spec: Spec) -> tuple[list[Candidate], dict[str, str]]:
    """Of each offer, tp and width that keeps the SLO for a bucket; and why the others do not. Raises: SourceError"""
    calibrations = {one.hardware: one for one in (read_calibration(spec.folder / path) for path in spec.calibration)}
    if bad := [one for one in calibrations.values() if one.engine != spec.engine]:
        raise SourceError(f"a calibration of {bad[0].hardware} x {bad[0].engine}, but engine is {spec.engine}")
    found: list[Candidate] = []
    without: dict[str, str] = {}
    slo = slo_of(spec.slo) if spec.offers else None
    models = {bits: _model(spec, bits) for offer in spec.offers for bits in offer.bits}
    for offer in spec.offers:
        card = read_hardware(_beside(spec, offer.card))
        for tp in offer.tp:
            for bits in offer.bits:
                assert slo is not None
                name = f"{tp} x {card.name}, {bits}" + (", spot" if offer.price == "spot" else "")
                try:
                    found.append(_candidate(spec, offer, name, card, tp, bits, models[bits], slo, calibrations))
                except SourceError as error:
                    without[name] = str(error)
    if unused := sorted(set(calibrations) - {read_hardware(_beside(spec, one.card)).name for one in spec.offers}):
        raise SourceError(f"a calibration of {unused[0]}, which is no card of the types: leave it out")
    return found, without


def _beside(spec: Spec, card: str) -> str:
    return str(spec.folder / card) if card.endswith(".toml") else card


def _model(spec: Spec, bits: str) -> Model:
    (width,) = widths(None if bits == "own" else bits)
    source = spec.folder / spec.model
    return read_model(
        source if source.exists() else spec.model,
        weight_bits=width,
        kv_bits=spec.kv_bits,
        activation_bits=spec.activation_bits,
    )


def _candidate(
    spec: Spec,
    offer: Offer,
    name: str,
    card: Hardware,
    tp: int,
    bits: str,
    model: Model,
    slo: Slo,
    calibrations: dict[str, Calibration],
) -> Candidate:
    """Raises: SourceError where it keeps the SLO for no bucket, or its price is unknown"""
    options: dict[str, Any] = {
        "parallel": Parallel(tp),
        "engine": spec.engine,
        "calibration": calibrations.get(card.name),
    }
    best = [_most(model, card, bucket, slo, spec.cautious, options) for bucket in spec.demand]
    kept = [one for one in best if one is not None]
    if not kept:
        first = spec.demand[0]
        alone = estimate(model, card, concurrency=1, prompt=first.input_tokens, output=first.output_tokens, **options)
        said = f"TTFT {alone.ttft_s.value * 1e3:.3g} ms, TPOT {alone.tpot_s.value * 1e3:.3g} ms for {first.name}"
        raise SourceError(f"keeps the SLO {spec.slo} for no bucket, even for a single user: {said}")
    usd = offer.price if isinstance(offer.price, float) else card.price(offer.price).usd_per_h
    spot = offer.price == "spot"
    gone = card.spot_interruptions_per_h if offer.interruptions_per_h is None else offer.interruptions_per_h
    if spot and gone is None:
        raise SourceError(f"card {card.name}: how often spot is taken is unknown: give interruptions_per_h")
    peak_w = tp * (card.peak_w or card.tdp_w or 0.0)
    drawn = [one.joules_per_token.value * one.tokens_per_s.value for one in kept if one.joules_per_token]
    power_w = min(peak_w, max(drawn, default=0.0))
    if not peak_w and (spec.limits.power_w is not None or offer.carbon):
        raise SourceError(f"card {card.name}: its power is unknown, and power or CO2 counts: give tdp_w in the card")
    calibration = calibrations.get(card.name)
    efficiency = calibration.efficiency if calibration else prior(card, spec.engine)
    return Candidate(
        ReplicaType(
            name,
            card.name,
            usd * tp,
            tuple(_rate(one) for one in best),
            devices=tp,
            power_w=power_w,
            peak_w=peak_w,
            capped_w=None if offer.cap_w is None else min(peak_w, tp * offer.cap_w),
            gco2_per_h=power_w * spec.pue / 1e3 * (offer.carbon or 0.0),
            quality=spec.quality.get(bits, 1.0),
            spot=spot,
            interruptions_per_h=(gone or 0.0) if spot else 0.0,
            recovery_s=offer.recovery_s if spot else 0.0,
        ),
        bits,
        model,
        card,
        Parallel(tp),
        efficiency,
        weakest(card),
    )


def _rate(one: Estimate | None) -> float:
    return 0.0 if one is None else one.concurrency / one.e2e_s.value


def _most(
    model: Model, card: Hardware, bucket: Bucket, slo: Slo, cautious: bool, options: dict[str, Any]
) -> Estimate | None:
    """The estimate of the most clients that fit in memory and keep the means of the SLO; `cautious`: the slow ends of
    the intervals keep it. None if one client does not. Raises: SourceError where the model does not fit"""

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


def verifier(spec: Spec, found: list[Candidate]) -> Callable[[Fleet], float]:
    """A function of a fleet: the least share of requests within the SLO, over what is asked for; at least 1 is kept."""
    slo, by_name = slo_of(spec.slo), {one.type.name: one for one in found}
    target = Target(round(1e9 * (slo.first_s or 1.0)), round(1e9 * (slo.gap_s or 0.1)))

    def verify(fleet: Fleet) -> float:
        return min(_share(spec, fleet, by_name[name], slo, target) for name in fleet.counts) / slo.share

    return verify


def _share(spec: Spec, fleet: Fleet, one: Candidate, slo: Slo, target: Target) -> float:
    rows = zip(fleet.split, spec.demand, strict=True)
    rates = [row.get(one.type.name, 0.0) * bucket.requests_per_s for row, bucket in rows]
    lengths = list(_lengths(spec, rates))
    if not lengths:  # it is there for others' spares
        return slo.share
    working = fleet.counts[one.type.name] - (spec.limits.spot_losses if one.type.spot else 0)
    engine = "everybit" if spec.engine == "everybit" else "vllm"
    deployment = Deployment({0: one.model}, one.card, one.split, one.efficiency, engine)
    requests = draw(sum(rates), _REQUESTS, lengths)
    context = max(prompt + output for prompt, output in lengths)
    done = simulate(requests, deployment.pool(working, context, target, "shortest-queue"))
    begin_s = requests[round(_WARMUP * _REQUESTS)].at_s
    return float(measure(done, target, slo, begin_s=begin_s)["goodput"]["share"])


def _lengths(spec: Spec, rates: list[float]) -> Iterator[tuple[int, int]]:
    """A hundred pairs or a few more, each bucket as often as its requests are."""
    for rate, bucket in zip(rates, spec.demand, strict=True):
        if rate > 0:
            yield from [(bucket.input_tokens, bucket.output_tokens)] * max(1, round(100 * rate / sum(rates)))
