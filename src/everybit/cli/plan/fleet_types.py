"""The replica types of a spec: each offer of a card at each tp and width."""

from __future__ import annotations

from everybit.cli.plan.fleet_spec import Offer, Spec
from everybit.cli.plan.options import slo_of, widths
from everybit.errors import SourceError
from everybit.plan.calibrate import read_calibration
from everybit.plan.candidates import Candidate, Terms, candidate, type_name
from everybit.plan.hardware import Hardware, read_hardware
from everybit.plan.operators import Model
from everybit.plan.widths import read_at


def candidates(spec: Spec) -> tuple[list[Candidate], dict[str, str]]:
    """Of each offer, tp and width that keeps the SLO for a bucket; and why the others do not. Raises: SourceError"""
    calibrations = {one.hardware: one for one in (read_calibration(spec.folder / path) for path in spec.calibration)}
    if bad := [one for one in calibrations.values() if one.engine != spec.engine]:
        raise SourceError(f"a calibration of {bad[0].hardware} x {bad[0].engine}, but engine is {spec.engine}")
    found: list[Candidate] = []
    without: dict[str, str] = {}
    models = {bits: _model(spec, bits) for offer in spec.offers for bits in offer.bits}
    cards = [(offer, _card(spec, offer)) for offer in spec.offers]
    for offer, card in cards:
        terms = Terms(offer.price, offer.cap_w, offer.interruptions_per_h, offer.recovery_s, offer.g_per_kwh, spec.pue)
        for tp in offer.tp:
            for bits in offer.bits:
                try:
                    one = candidate(
                        models[bits],
                        card,
                        spec.demand,
                        slo_of(spec.slo),
                        bits=bits,
                        tp=tp,
                        terms=terms,
                        engine=spec.engine,
                        calibration=calibrations.get(card.name),
                        quality=spec.quality.get(bits, 1.0),
                        cautious=spec.cautious,
                        needs_power=spec.limits.power_w is not None,
                    )
                except SourceError as error:
                    without[type_name(card, tp, bits, terms)] = str(error)
                else:
                    found.append(one)
    if unused := sorted(set(calibrations) - {card.name for _, card in cards}):
        raise SourceError(f"a calibration of {unused[0]}, which is no card of the types: leave it out")
    return found, without


def _card(spec: Spec, offer: Offer) -> Hardware:
    return read_hardware(str(spec.folder / offer.card) if offer.card.endswith(".toml") else offer.card)


def _model(spec: Spec, bits: str) -> Model:
    width, *more = widths(None if bits == "own" else bits)
    if more:
        raise SourceError(f"bits {bits}: {len(more) + 1} widths in one text, expected a list of texts, one for each")
    source = spec.folder / spec.model
    return read_at(str(source) if source.exists() else spec.model, width, spec.kv_bits, spec.activation_bits)
