"""Why a deployment is as fast as it is, whether it keeps its promise, and what else would under the same load."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration
from everybit.plan.cost import SINGLE, Parallel
from everybit.plan.estimate import Estimate, estimate, with_bits
from everybit.plan.hardware import Hardware
from everybit.plan.operators import Model

_FEWER_BITS = (8.0, 4.5)
_MOST_CLIENTS = 4096


def explain(
    model: Model,
    hardware: Hardware,
    *,
    parallel: Parallel = SINGLE,
    concurrency: int = 1,
    most_ttft_s: float | None = None,
    most_tpot_s: float | None = None,
    others: Sequence[Hardware] = (),
    calibrations: Mapping[str, Calibration] | None = None,
    **options: Any,
) -> list[str]:
    """Lines: what binds each phase, whether the limits are kept and up to how many clients, the best alternative.

    Alternatives serve the same load: twice or half the devices, weights of fewer bits, or the `others` as they are.
    `calibrations`: by the card's name. `options`: of `estimate`. Raises: SourceError
    """
    calibrations = calibrations or {}

    def at(clients: int, model: Model = model, card: Hardware = hardware, split: Parallel = parallel) -> Estimate:
        calibration = calibrations.get(card.name)
        return estimate(model, card, parallel=split, concurrency=clients, calibration=calibration, **options)

    def limits(one: Estimate) -> list[tuple[str, float, float]]:
        pairs = (("TTFT", one.ttft_s.value, most_ttft_s), ("TPOT", one.tpot_s.value, most_tpot_s))
        return [(name, value, most) for name, value, most in pairs if most is not None]

    def keeps(one: Estimate) -> bool:
        return all(value <= most for _, value, most in limits(one))

    own = at(concurrency)
    lines = [f"{phase}: {share:.0%} of the time is {name}" for phase, (name, share) in own.binding.items()]
    if own.running < concurrency:
        lines.append(f"memory holds {own.running:.0f} of {concurrency} clients; the others wait for their first token")
    lines += [_kept(*one) for one in limits(own)]
    if limits(own):
        most = bisect_left(range(1, _MOST_CLIENTS + 1), True, key=lambda clients: not keeps(at(clients)))
        more = " or more" if most == _MOST_CLIENTS else ""
        lines.append(
            f"the limits are kept up to {most}{more} clients" if most else "one client alone misses the limits"
        )
    found: dict[str, Estimate] = {}
    for name, changed, card, split in _alternatives(model, hardware, parallel, others):
        with contextlib.suppress(SourceError):  # does not fit, or cannot be split so
            found[name] = at(concurrency, changed, card, split)
    keeping = {name: one for name, one in found.items() if keeps(one)}
    if keeping:
        name, best = min(keeping.items(), key=lambda item: _cost(item[1], own))
        better = "better" if not keeps(own) or _cost(best, own) < _cost(own, own) else "next best"
        lines.append(f"{better}: {name}: {_words(best)} instead of {_words(own)}{_doubt(best, own)}")
    elif found:
        name, best = min(found.items(), key=lambda item: max(value / most for _, value, most in limits(item[1])))
        lines.append(f"no alternative keeps the limits; nearest: {name}: {_words(best)}{_doubt(best, own)}")
    return [*lines, f"efficiencies ({own.known}): {own.source}; figures of the card: {own.card}"]


def _alternatives(
    model: Model, hardware: Hardware, parallel: Parallel, others: Sequence[Hardware]
) -> Iterator[tuple[str, Model, Hardware, Parallel]]:
    for name, now in (("tp", parallel.tp), ("pp", parallel.pp), ("dp", parallel.dp)):
        for devices in (now * 2, *([now // 2] if now % 2 == 0 else [])):
            yield f"{name} {devices}", model, hardware, replace(parallel, **{name: devices})
    widest = max((linear.bits for layer in model.layers for linear in layer.linears), default=0.0)
    for bits in _FEWER_BITS:
        if bits < widest:
            yield f"{bits:g} bits a weight", with_bits(model, bits), hardware, parallel
    for card in others:
        yield f"on {card.name}", model, card, parallel


def _kept(name: str, value: float, most: float) -> str:
    if value > most:
        return f"{name} {value * 1e3:.1f} ms misses the limit of {most * 1e3:.1f} ms"
    return f"{name} {value * 1e3:.1f} ms keeps the limit of {most * 1e3:.1f} ms, with {1 - value / most:.0%} of it free"


def _cost(one: Estimate, own: Estimate) -> tuple[bool, float]:
    """$ for a million tokens, of what has no price the last; where nothing has one, devices for a token per second."""
    if own.usd_per_mtok:
        return (False, one.usd_per_mtok.value) if one.usd_per_mtok else (True, 0.0)
    return False, one.parallel.devices / one.tokens_per_s.value


def _words(one: Estimate) -> str:
    price = f", {one.usd_per_mtok.value:.2f} $/Mtok" if one.usd_per_mtok else ", no price known"
    speed = f"TTFT {one.ttft_s.value * 1e3:.0f} ms, TPOT {one.tpot_s.value * 1e3:.1f} ms"
    return f"{speed}, {one.tokens_per_s.value:.0f} tokens/s{price}"


def _doubt(one: Estimate, own: Estimate) -> str:
    """Where less is known of the alternative than of the deployment itself."""
    return "" if (one.known, one.card) == (own.known, own.card) else f" (efficiencies {one.known}, figures {one.card})"
