"""Why a deployment is as fast as it is, whether it keeps its promise, and what else on the same card would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from everybit.errors import SourceError
from everybit.plan.cost import SINGLE, Parallel
from everybit.plan.estimate import Estimate, estimate, with_bits
from everybit.plan.hardware import Hardware
from everybit.plan.operators import Model

_FEWER_BITS = (8.0, 4.5)


def explain(
    model: Model,
    hardware: Hardware,
    *,
    parallel: Parallel = SINGLE,
    concurrency: int = 1,
    most_ttft_s: float | None = None,
    most_tpot_s: float | None = None,
    **options: Any,
) -> list[str]:
    """Lines: what binds each phase, which limit is missed, and the best of the neighbours. `options`: of `estimate`.

    Neighbours have half or twice the devices or clients, or weights of fewer bits. Raises: SourceError
    """
    own = estimate(model, hardware, parallel=parallel, concurrency=concurrency, **options)
    lines = [f"{phase}: {share:.0%} of the time is {name}" for phase, (name, share) in own.binding.items()]
    if own.running < concurrency:
        lines.append(f"memory holds {own.running:.0f} of {concurrency} clients; the others wait for their first token")
    missed = _missed(own, most_ttft_s, most_tpot_s)
    lines += missed
    others: dict[str, Estimate] = {}
    for name, (changed, split, clients) in _neighbours(model, parallel, concurrency):
        try:
            others[name] = estimate(changed, hardware, parallel=split, concurrency=clients, **options)
        except SourceError:  # does not fit, or cannot be split so
            continue
    keeping = {name: one for name, one in others.items() if not _missed(one, most_ttft_s, most_tpot_s)}
    if keeping:
        name = min(keeping, key=lambda name: _cost(keeping[name]))
        better = "better" if missed or _cost(keeping[name]) < _cost(own) else "next best"
        lines.append(f"{better}: {name}: {_words(keeping[name])} instead of {_words(own)}")
    elif others:
        name = min(others, key=lambda name: _excess(others[name], most_ttft_s, most_tpot_s))
        lines.append(f"no neighbour keeps the limits; nearest: {name}: {_words(others[name])}")
    return [*lines, f"efficiencies: {own.source}; figures of the card: {own.card}"]


def _neighbours(
    model: Model, parallel: Parallel, concurrency: int
) -> Iterator[tuple[str, tuple[Model, Parallel, int]]]:
    yield f"tp {parallel.tp * 2}", (model, replace(parallel, tp=parallel.tp * 2), concurrency)
    if parallel.tp % 2 == 0:
        with contextlib.suppress(SourceError):  # experts may not spread so
            yield f"tp {parallel.tp // 2}", (model, replace(parallel, tp=parallel.tp // 2), concurrency)
    yield f"{concurrency * 2} clients", (model, parallel, concurrency * 2)
    if concurrency > 1:
        yield f"{concurrency // 2} clients", (model, parallel, concurrency // 2)
    widest = max((linear.bits for layer in model.layers for linear in layer.linears), default=0.0)
    for bits in _FEWER_BITS:
        if bits < widest:
            yield f"{bits:g} bits a weight", (with_bits(model, bits), parallel, concurrency)


def _missed(one: Estimate, most_ttft_s: float | None, most_tpot_s: float | None) -> list[str]:
    return [
        f"{name} {found.value * 1e3:.1f} ms misses the limit of {most * 1e3:.1f} ms"
        for name, found, most in (("TTFT", one.ttft_s, most_ttft_s), ("TPOT", one.tpot_s, most_tpot_s))
        if most is not None and found.value > most
    ]


def _excess(one: Estimate, most_ttft_s: float | None, most_tpot_s: float | None) -> float:
    pairs = ((one.ttft_s.value, most_ttft_s), (one.tpot_s.value, most_tpot_s))
    return max(value / most for value, most in pairs if most is not None)


def _cost(one: Estimate) -> float:
    """$ for a million tokens; without a price, devices for a token per second."""
    return one.usd_per_mtok.value if one.usd_per_mtok else one.parallel.devices / one.tokens_per_s.value


def _words(one: Estimate) -> str:
    price = f", {one.usd_per_mtok.value:.2f} $/Mtok" if one.usd_per_mtok else ""
    speed = f"TTFT {one.ttft_s.value * 1e3:.0f} ms, TPOT {one.tpot_s.value * 1e3:.1f} ms"
    return f"{speed}, {one.tokens_per_s.value:.0f} tokens/s{price}"
