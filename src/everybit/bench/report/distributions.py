"""Charts of one run, or of several over each other, that forget time: CDFs, fluidity, latency by prompt length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everybit.bench.fluidity import SMOOTH
from everybit.bench.report.figures import duration
from everybit.bench.report.markup import Child, Html
from everybit.bench.report.plot import Plot
from everybit.bench.report.requests import Document, Request
from everybit.bench.report.scale import Scale, around, from_zero
from everybit.bench.statistics import percentile

SERIES = 6  # tints s0 to s5
Values = Sequence[float]
Limits = Mapping[str, float | None]
_SHARES = (*(i / 2 for i in range(200)), 99.6, 99.7, 99.8, 99.9, 100)
_STYLES = (*[""] * SERIES, *["dashed"] * SERIES)
_COVERED = ("broad", "dashed", "dotted")  # for lines that may lie on each other
_DOTS = 600
_BINS = 20


def cdf(
    title: str,
    series: Sequence[tuple[str, Values]],
    limits: Limits | None = None,
    note: Child = None,
    styles: Sequence[str] = _STYLES,
) -> Html:
    """Each of `series`: a name and values in ms; empty ones are left out. `limits`: vertical lines, in ms."""
    curves = [
        (name, [(percentile(ordered, q), q) for q in _SHARES]) for name, values in series if (ordered := sorted(values))
    ]
    return _cdf(title, curves, limits, note, styles)


def gap_cdf(title: str, runs: Sequence[tuple[str, Document]], limits: Limits | None = None, note: Child = None) -> Html:
    """From the percentiles that a run keeps of all its gaps."""
    curves = []
    for name, run in runs:
        curve = ((latency(run).get("gap_ms")) or {}).get("curve") or []
        curves.append((name, [(value, float(q)) for q, value in enumerate(curve)]))
    return _cdf(title, [one for one in curves if one[1]], limits, note, _STYLES)


def run_cdfs(run: Document, requests: Sequence[Request]) -> list[Html]:
    """First token, gaps and end, each with its limits."""
    counted = [one for one in requests if one.counts]
    clean = [one for one in counted if not one.client_stalled]
    corrected = len(clean) < len(counted)
    slo, targets = (run.get("targets") or {}).get("slo") or {}, run.get("targets") or {}
    firsts = [("from the intended send", firsts_of(counted)), ("from the actual send", _since_sent(counted, "first"))]
    ends = [("from the intended send", ends_of(counted)), ("from the actual send", _since_sent(counted, "end"))]
    if corrected:
        firsts.append(("without this client's own stalls", firsts_of(clean)))
        ends.append(("without this client's own stalls", ends_of(clean)))
    deadline = targets.get("first_ms") if targets.get("slack_ms") is None else None
    return [
        cdf("Time to the first token", firsts, {"SLO": slo.get("ttft_ms"), "deadline": deadline}, styles=_COVERED),
        gap_cdf(
            "Time between tokens",
            [("of all tokens", run)],
            {"SLO (mean)": slo.get("tpot_ms"), "deadline": targets.get("gap_ms")},
            note="tokens that come together have 0 ms between them",
        ),
        cdf("Time to the end", ends, {"SLO": slo.get("e2e_ms")}, styles=_COVERED),
    ]


def fluidity_chart(requests: Sequence[Request]) -> Html | None:
    scored = [one for one in requests if one.fluidity is not None]
    if not scored:
        return None
    answered, failed = [0] * _BINS, [0] * _BINS
    for one in scored:
        (failed if one.failed else answered)[min(_BINS - 1, int((one.fluidity or 0) * _BINS + 1e-9))] += 1
    most = max(a + f for a, f in zip(answered, failed, strict=True))
    plot = Plot("Fluidity", Scale(0, 1), from_zero([most]), "fluidity index", "requests", note="1 is a smooth stream")
    for name, tint, counts, below in (("answered", "s0", answered, [0] * _BINS), ("failed", "bad", failed, answered)):
        boxes = [
            (i / _BINS, (i + 1) / _BINS, low, low + n) for i, (n, low) in enumerate(zip(counts, below, strict=True))
        ]
        shown = [
            (a, b, low, high, f"{high - low} {name}, {a:.2f} to {b:.2f}") for a, b, low, high in boxes if high > low
        ]
        if shown:
            plot.bars(name, tint, shown)
    plot.limit(SMOOTH, f"smooth from {SMOOTH}")
    return plot.figure()


def prompt_chart(run: Document, requests: Sequence[Request]) -> Html | None:
    """First token by prompt length, where lengths differ."""
    found = [(one.prompt, one.first - one.intended, one) for one in requests if one.counts and one.prompt and one.first]
    if len({prompt for prompt, _, _ in found}) < 5:
        return None
    shown = found[:: -(-len(found) // _DOTS)]
    ideal: dict[str, float] | None = (run.get("targets") or {}).get("ideal")
    x = around([prompt for prompt, _, _ in shown])
    alone = [(p, _alone(ideal, p)) for i in range(41) if (p := _between(x, i / 40))] if ideal else []
    y = around([first for _, first, _ in shown] + [value for _, value in alone if value > 0])
    plot = Plot("First token by prompt", x, y, "tokens of the prompt", "ms from the intended send")
    plot.dots("requests", "s0", [(prompt, first, one.tell()) for prompt, first, one in shown])
    if alone:
        plot.line("alone on an idle endpoint", "s1", alone)
    return plot.figure()


def firsts_of(requests: Sequence[Request]) -> list[float]:
    return [one.first - one.intended for one in requests if one.counts and one.first is not None]


def ends_of(requests: Sequence[Request]) -> list[float]:
    return [one.end - one.intended for one in requests if one.counts and one.end is not None]


def latency(run: Document) -> dict[str, Any]:
    return (run.get("metrics") or {}).get("latency") or {}


def tint(number: int) -> str:
    return f"s{number % SERIES}"


def _since_sent(requests: Sequence[Request], name: str) -> list[float]:
    pairs = [(getattr(one, name), one.sent) for one in requests]
    return [when - sent for when, sent in pairs if when is not None and sent is not None]


def _cdf(
    title: str,
    curves: Sequence[tuple[str, list[tuple[float, float]]]],
    limits: Limits | None,
    note: Child,
    styles: Sequence[str],
) -> Html:
    """Limits far right of all values are told, not drawn: they would leave no room for the curve."""
    if not curves:
        return Html()
    every = [value for _, points in curves for value, _ in points]
    asked = {name: value for name, value in (limits or {}).items() if value is not None}
    drawn = {name: value for name, value in asked.items() if value <= 2.5 * max(every)}
    far = [f"{name} {duration(value)}: beyond the right end" for name, value in asked.items() if name not in drawn]
    x = around([*every, *drawn.values()])
    plot = Plot(title, x, Scale(0, 100), "ms", "%", note=_notes(note, far))
    for i, (name, points) in enumerate(curves):
        plot.line(name, tint(i), points, styles[i % len(styles)])
    for name, value in drawn.items():
        plot.limit(value, f"{name} {duration(value)}")
    return plot.figure()


def _notes(note: Child, more: Sequence[str]) -> Child:
    parts = [*([note] if note else []), *more]
    return [[" · " if i else None, part] for i, part in enumerate(parts)] or None


def _alone(ideal: Mapping[str, float], prompt: float) -> float:
    ns = ideal["first_base_ns"] + ideal["first_token_ns"] * prompt + ideal["first_square_ns"] * prompt**2
    return ns / 1e6


def _between(scale: Scale, share: float) -> float:
    if scale.log:
        return float(scale.low * (scale.high / scale.low) ** share)
    return scale.low + (scale.high - scale.low) * share
