"""Charts of one run over time, all with the same axis, so that what happens together stands below each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everybit.bench.report.figures import duration, number, percent, plural
from everybit.bench.report.markup import Child, Html, tag
from everybit.bench.report.plot import Plot
from everybit.bench.report.requests import Document, Request
from everybit.bench.report.scale import Scale, around, buckets, from_zero

MOST_BARS = 400  # requests; more are drawn as a density, with the worst as bars
_WORST = 80
_MOMENTS = 300
_MOST_STALLS = 600
_LEFT = 58
_PHASES = (
    ("waiting to be sent", "soft"),
    ("to the first token", "s2"),
    ("streaming", "s0"),
    ("stalled", "stall"),
    ("failed", "bad"),
)
_ROW_MIN, _ROW_MAX, _ROWS_HEIGHT = 2.4, 11.0, 520
Span = tuple[float, float]


def run_timelines(run: Document, requests: Sequence[Request]) -> list[Child]:
    if not requests:
        return []
    metrics, window = run.get("metrics") or {}, run.get("window") or {}
    end = max([one.last for one in requests] + [window.get("end_ms") or 0]) / 1000
    time = Scale(0, end or 1)
    begin = (window.get("begin_ms") or 0) / 1000
    seconds = metrics.get("timeline") or {}
    return [
        *_requests(requests, time, window),
        _in_flight(requests, time),
        _per_second(seconds.get("tokens"), time, begin, "Tokens per second", "tokens/s", "s0"),
        _failures(seconds.get("failed"), time, begin),
        _stalls(requests, time),
        _precision(metrics.get("precision"), time, begin),
    ]


def _requests(requests: Sequence[Request], time: Scale, window: Mapping[str, Any]) -> list[Html]:
    if len(requests) <= MOST_BARS:
        return [_bars("Requests", requests, time, window, "one line each, in the order they were due")]
    answered = [one for one in requests if one.counts]
    worst = sorted(answered, key=lambda one: (one.fluidity or 0, one.intended - one.last))[:_WORST]
    worst.sort(key=lambda one: one.intended)
    return [
        _density(requests, time),
        _bars(f"The {len(worst)} least smooth answers", worst, time, window, f"of {len(answered):,}, by fluidity"),
    ]


def _phases(one: Request) -> list[Sequence[Span]]:
    """The spans that a request spent in each of _PHASES, in ms."""
    end = one.last
    if one.failed:
        return [[], [], [], [], [(one.intended, end)]]
    sent = end if one.sent is None else one.sent
    first = end if one.first is None else one.first
    stalled = [(begin, begin + length) for begin, length in one.stalls]
    edges = [first, *(edge for span in stalled for edge in span), end]
    return [[(one.intended, sent)], [(sent, first)], list(zip(edges[::2], edges[1::2], strict=True)), stalled, []]


def _bars(title: str, requests: Sequence[Request], time: Scale, window: Mapping[str, Any], note: str) -> Html:
    row = min(_ROW_MAX, max(_ROW_MIN, _ROWS_HEIGHT / len(requests)))
    plot = Plot(
        title, time, Scale(0, 1), "s from the start", "", wide=True, left=_LEFT, rows=True, note=note,
        height=math.ceil(64 + row * len(requests)),
    )  # fmt: skip
    begin, end = (window.get("begin_ms") or 0) / 1000, (window.get("end_ms") or 1000 * time.high) / 1000
    floor, top = plot.py(0), plot.py(1)
    for a, b in ((0.0, begin), (end, time.high)):
        if plot.px(b) > plot.px(a):
            size = {"width": round(plot.px(b) - plot.px(a), 1), "height": floor - top}
            plot.mark(
                tag("rect", x=plot.px(a), y=top, class_="outside", data_tip="not counted: warm-up or drain", **size)
            )
    seen = set()
    for place, one in enumerate(requests):
        y = round(top + (place + 0.5) * row, 1)
        marks: list[Child] = []
        for (name, tint), spans in zip(_PHASES, _phases(one), strict=True):
            pieces = [(plot.px(a / 1000), plot.px(b / 1000)) for a, b in spans if b > a]
            drawn = [f"M{a:g} {y:g}H{max(b, a + 0.6):g}" for a, b in pieces if b - a > 0.2 or tint in ("stall", "bad")]
            if drawn:
                seen.add((name, tint))
                marks.append(tag("path", d="".join(drawn), class_=tint))
        if one.failed:
            x, arm = plot.px(one.last / 1000), min(3.0, row / 2)
            cross = f"M{x - arm:g} {y - arm:g}l{2 * arm:g} {2 * arm:g}m0 {-2 * arm:g}l{-2 * arm:g} {2 * arm:g}"
            marks.append(tag("path", d=cross, class_="cross bad"))
        if not marks:
            marks.append(tag("path", d=f"M{plot.px(one.intended / 1000):g} {y:g}h1", class_="soft"))
        plot.mark(tag("g", *marks, class_="row", stroke_width=round(row * 0.78, 2), data_tip=one.tell()))
    for name, tint in _PHASES:
        if (name, tint) in seen:
            plot.key(name, tint)
    return plot.figure()


def _density(requests: Sequence[Request], time: Scale) -> Html:
    """How many requests were in each phase, stacked."""
    moments = _moments(time)
    every = [_phases(one) for one in requests]
    layers = [_counts((span for one in every for span in one[i]), time) for i in range(len(_PHASES))]
    most = max(map(sum, zip(*layers, strict=True)))
    plot = Plot("Requests by what they wait for", time, from_zero([most]), "s from the start", "requests", wide=True,
                left=_LEFT, note=plural(len(requests), "request"))  # fmt: skip
    below = [0.0] * len(moments)
    for (name, tint), layer in zip(_PHASES, layers, strict=True):
        above = [a + b for a, b in zip(below, layer, strict=True)]
        if any(layer):
            plot.area(name, tint, list(zip(moments, below, strict=True)), list(zip(moments, above, strict=True)), name)
        below = above
    return plot.figure()


def _moments(time: Scale) -> list[float]:
    return [(i + 0.5) * time.high / _MOMENTS for i in range(_MOMENTS)]


def _counts(spans: Iterable[Span], time: Scale) -> list[int]:
    """Spans (ms) that hold each moment."""
    changes = [0] * (_MOMENTS + 1)
    width = time.high * 1000 / _MOMENTS
    for begin, end in spans:
        for edge, change in ((begin, 1), (end, -1)):
            changes[min(_MOMENTS, max(0, math.ceil(edge / width - 0.5)))] += change
    running, counts = 0, []
    for change in changes[:-1]:
        running += change
        counts.append(running)
    return counts


def _in_flight(requests: Sequence[Request], time: Scale) -> Html:
    counts = _counts(((one.sent, one.last) for one in requests if one.sent is not None), time)
    plot = _plot("Requests in flight", time, from_zero(counts), "requests")
    edges = [i * time.high / _MOMENTS for i in range(_MOMENTS + 1)]
    plot.steps("in flight", "s2", edges, counts)
    return plot.figure()


def _per_second(
    values: Sequence[float] | None, time: Scale, begin: float, title: str, unit: str, tint: str
) -> Html | None:
    if not values:
        return None
    means, width = buckets(list(values))
    edges = [min(time.high, begin + i * width) for i in range(len(means) + 1)]
    plot = _plot(title, time, from_zero(means), unit, _every(width))
    plot.steps(title, tint, edges, means)
    return plot.figure()


def _failures(values: Sequence[int] | None, time: Scale, begin: float) -> Html | None:
    if not values or not any(values):
        return None
    means, width = buckets(list(values))
    plot = _plot("Failed requests", time, from_zero(means, 0.01), "per s", _every(width))
    edges = [min(time.high, begin + i * width) for i in range(len(means) + 1)]
    tips = [f"{number(mean)} failed a second, from {number(edge)} s" for mean, edge in zip(means, edges, strict=False)]
    boxes = [(edges[i], edges[i + 1], 0.0, mean, tips[i]) for i, mean in enumerate(means) if mean]
    plot.bars("failed", "bad", boxes)
    return plot.figure()


def _stalls(requests: Sequence[Request], time: Scale) -> Html | None:
    found = [(begin / 1000, length, one) for one in requests for begin, length in one.stalls]
    if not found:
        return None
    found.sort(key=lambda row: -row[1])
    shown = found[:_MOST_STALLS]
    note = f"the {len(shown):,} longest of {len(found):,}" if len(shown) < len(found) else plural(len(found), "stall")
    plot = _plot("Stalls", time, around([length for _, length, _ in shown]), "ms long", note=note)
    tips = [(at, length, f"stall of {duration(length)} · {one.tell()}") for at, length, one in shown]
    plot.dots("stalls", "stall", tips, 3)
    return plot.figure()


def _precision(block: Mapping[str, Any] | None, time: Scale, begin: float) -> Html | None:
    if not block or not block.get("timeline"):
        return None
    levels, rows = block["levels"], block["timeline"]
    columns = [buckets([float(row[i]) for row in rows]) for i in range(len(levels))]
    width = columns[0][1]
    totals = [sum(one) for one in zip(*(means for means, _ in columns), strict=True)]
    plot = _plot("Tokens by precision", time, from_zero(totals), "tokens/s", note="by the second of their arrival")
    whole = sum(block["tokens"].values()) or 1
    below = [0.0] * len(totals)
    for place, (level, (means, _)) in enumerate(zip(levels, columns, strict=True)):
        above = [a + b for a, b in zip(below, means, strict=True)]
        count = block["tokens"].get(level, 0)
        name = f"{level} bits" if level.isdecimal() else level
        tip = f"{name}: {plural(count, 'token')}, {percent(count / whole)}"
        plot.area(name, _level_tint(level, place), _stairs(below, begin, width), _stairs(above, begin, width), tip)
        below = above
    return plot.figure()


def _every(width: int) -> str | None:
    return f"means of {width} s" if width > 1 else None


def _level_tint(level: str, place: int) -> str:
    return f"b{level}" if level in "2345678" else f"s{place % 6}"


def _stairs(values: Sequence[float], begin: float, width: int) -> list[tuple[float, float]]:
    return [(begin + (i + j) * width, value) for i, value in enumerate(values) for j in (0, 1)]


def _plot(title: str, time: Scale, y: Scale, y_label: str, note: str | None = None) -> Plot:
    return Plot(title, time, y, "s from the start", y_label, wide=True, height=170, left=_LEFT, note=note)
