"""Charts over what a series varies: rate, users or time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everybit.bench.report.distributions import latency
from everybit.bench.report.figures import number, percent
from everybit.bench.report.markup import Child, Html, words
from everybit.bench.report.plot import Plot
from everybit.bench.report.requests import Document
from everybit.bench.report.run import rate_of
from everybit.bench.report.scale import Scale, around, from_zero

_AXES = {"rate": "requests/s asked for", "users": "users"}
Points = list[tuple[float, float]]


def capacity_charts(block: Mapping[str, Any], runs: Sequence[Document]) -> Iterator[Html]:
    """The capacity curve: share with its intervals, goodput, latencies, each over the rate asked for."""
    points = [point for point in block.get("points") or [] if point.get("rate") and point.get("share") is not None]
    if not points:
        return
    x = around([point["rate"] for point in points])
    yield _share_chart(block, points, x, _wanted(runs))
    good = [(point["rate"], point["goodput"]) for point in points if point.get("goodput") is not None]
    done = [(point["rate"], point["achieved_rate"]) for point in points if point.get("achieved_rate") is not None]
    if good or done:
        plot = Plot("Goodput", x, from_zero([y for _, y in good + done]), _AXES["rate"], "requests/s")
        for name, tint, curve in (("complete", "s1", done), ("within the SLO", "s0", good)):
            plot.line(name, tint, curve, "dashed" if name == "complete" else "")
            plot.dots("", tint, [(a, b, f"{number(b)} requests/s {name} at {number(a)}") for a, b in curve])
        yield plot.figure()
    yield from _latency_charts([(rate, run) for run in runs if (rate := rate_of(run))], x, _AXES["rate"])


def sweep_charts(block: Mapping[str, Any], values: Sequence[Any], runs: Sequence[tuple[str, Document]]) -> list[Child]:
    pairs = [(v, run) for v, (_, run) in zip(values, runs, strict=False) if isinstance(v, int | float)]
    measured = [(float(value), run) for value, run in pairs if run.get("metrics")]
    if not measured:
        return []
    over = str(block.get("over", "value"))
    label, x = _AXES.get(over, over), around([value for value, _ in measured])
    charts: list[Child] = []
    kept = [
        {"rate": value, "share": one["share"], "interval": (one["share_low"], one["share_high"])}
        for value, run in measured
        if (one := run["metrics"].get("goodput"))
    ]
    if kept:
        charts.append(_share_chart({}, kept, x, _wanted([run for _, run in measured]), label))
    smooth = [(value, run["metrics"]["fluidity"]["mean"]) for value, run in measured]
    charts.append(_lines("Fluidity", [("mean index", smooth)], x, label, "index", Scale(0, 1)))
    speeds = [(value, run["metrics"]["throughput"]["output_tokens_per_s"]) for value, run in measured]
    if output := [(value, speed) for value, speed in speeds if speed is not None]:
        charts.append(_lines("Output of all requests", [("tokens/s", output)], x, label, "tokens/s"))
    return [*charts, *_latency_charts(measured, x, label)]


def sustain_charts(block: Mapping[str, Any]) -> Iterator[Html]:
    """Every figure of the slices over time, those with percentiles of one thing together."""
    slices = [one for one in block.get("slices") or [] if one.get("end_s")]
    if not slices:
        return
    time = Scale(slices[0].get("begin_s", 0), slices[-1]["end_s"])
    names = [name for name in dict.fromkeys(key for one in slices for key in one) if name not in ("begin_s", "end_s")]
    for name in names:
        points = [
            ((one.get("begin_s", 0) + one["end_s"]) / 2, float(one[name]))
            for one in slices
            if isinstance(one.get(name), int | float)
        ]
        if points:
            title, unit = _titled(name)
            yield _lines(title, [(title, points)], time, "s from the start", unit)


def _share_chart(
    block: Mapping[str, Any], points: Sequence[Mapping[str, Any]], x: Scale, wanted: float | None, label: str = ""
) -> Html:
    ends = [end for point in points for end in (point.get("interval") or [point["share"]])]
    low = min([*ends, wanted or 1.0])
    y = Scale(0, 100) if low < 0.5 else around([100 * low, 100.0], log=False)
    plot = Plot("Requests that keep the SLO", x, y, label or _AXES["rate"], "%", note="with 95 % intervals (Wilson)")
    if wanted is not None:
        plot.level(100 * wanted, f"asked for: {100 * wanted:g} %")
    rate = block.get("rate")
    if rate:
        plot.limit(rate, f"capacity {number(rate)}")
    shares = [(point["rate"], 100 * point["share"]) for point in points]
    plot.line("share", "s0", shares)
    plot.spans(
        "s0",
        [(one["rate"], 100 * one["interval"][0], 100 * one["interval"][1]) for one in points if one.get("interval")],
    )
    plot.dots("", "s0", [(a, b, f"{percent(b / 100)} at {number(a)}") for a, b in shares], 3)
    return plot.figure()


def _latency_charts(runs: Sequence[tuple[float, Document]], x: Scale, label: str) -> Iterator[Html]:
    for name, title in (("ttft_ms", "Time to the first token"), ("tpot_ms", "Time per token after it")):
        blocks = [(value, latency(run).get(name)) for value, run in sorted(runs, key=lambda one: one[0])]
        found = [(value, block) for value, block in blocks if block]
        if found:
            curves = [(q, [(value, block[q]) for value, block in found]) for q in ("p50", "p90", "p99")]
            yield _lines(title, curves, x, label, "ms", around([y for _, curve in curves for _, y in curve]))


def _lines(
    title: str, curves: Sequence[tuple[str, Points]], x: Scale, x_label: str, y_label: str, y: Scale | None = None
) -> Html:
    plot = Plot(title, x, y or from_zero([v for _, curve in curves for _, v in curve], 0.01), x_label, y_label)
    for i, (name, curve) in enumerate(curves):
        plot.line(name, f"s{i}", curve)
        plot.dots("", f"s{i}", [(a, b, f"{name}: {number(b)} {y_label} at {number(a)}") for a, b in curve])
    return plot.figure()


def _titled(name: str) -> tuple[str, str]:
    """Of `tpot_p50_ms`: what it is and its unit."""
    name = name.replace("tpot", "time_per_token").replace("ttft", "time_to_the_first_token")
    for end, unit in (("_per_s", "per s"), ("_ms", "ms"), ("_s", "s"), ("_share", "share")):
        if name.endswith(end):
            return words(name.removesuffix(end)).capitalize(), unit
    return words(name).capitalize(), ""


def _wanted(runs: Sequence[Document]) -> float | None:
    """The share of requests that the SLO asks for."""
    shares = [slo["share"] for run in runs if (slo := (run.get("targets") or {}).get("slo"))]
    return shares[0] if shares else None
