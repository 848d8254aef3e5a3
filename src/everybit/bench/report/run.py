"""The parts of one run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everybit.bench.report.distributions import fluidity_chart, latency, prompt_chart, run_cdfs
from everybit.bench.report.figures import NONE, duration, figure, number, percent, plural, share_figure
from everybit.bench.report.markup import Child, Html, charts, facts, section, table, tag, words
from everybit.bench.report.requests import Document, read_requests
from everybit.bench.report.timelines import run_timelines

_LATENCIES = {
    "ttft_ms": "first token",
    "ttft_from_sent_ms": "first token, from the actual send",
    "tpot_ms": "per token after the first (TPOT)",
    "gap_ms": "between tokens",
    "piece_gap_ms": "between pieces",
    "e2e_ms": "end",
    "e2e_from_sent_ms": "end, from the actual send",
    "normalised_ms": "end, per output token",
    "lag_ms": "intended to actual send (this client)",
    "connect_ms": "connecting",
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True)
class KeyFigure:
    name: str
    value: str
    note: str = ""


def run_page(run: Document) -> list[Child]:
    requests = read_requests(run)
    return [
        tag("div", tiles, class_="tiles") if (tiles := _tiles(run)) else None,
        section("How long it takes", charts(*run_cdfs(run, requests), prompt_chart(run, requests))),
        section("What happened when", *run_timelines(run, requests)),
        section("How smooth it felt", charts(fluidity_chart(requests), *_smoothness(run))),
        section("All latencies", _latencies(run)),
        section("Failures", _errors(run)),
        section("Where token counts come from", _sources(run)),
        section("Energy and carbon", _energy(run.get("energy"))),
        details(run),
    ]


def run_brief(run: Document) -> list[Child]:
    """For a page of many runs."""
    requests = read_requests(run)
    return [
        tag("p", verdict(run)),
        alarms(run),
        charts(*run_cdfs(run, requests), fluidity_chart(requests)),
        _latencies(run),
        _errors(run),
    ]


def verdict(run: Document) -> str:
    """The run in one sentence."""
    metrics = run.get("metrics")
    if not metrics:
        return "Nothing was measured"
    counts, seconds = metrics["requests"], metrics["throughput"]["seconds"]
    parts = []
    first, pace = latency(run).get("ttft_ms"), latency(run).get("tpot_ms")
    if first:
        then = f", then {number(1000 / pace['p50'])} tokens/s" if pace and pace["p50"] else ""
        parts.append(f"first token {duration(first['p50'])} (p99 {duration(first['p99'])}){then}")
    if goodput := metrics.get("goodput"):
        parts.append(f"{percent(goodput['share'])} kept the SLO")
    parts.append(f"fluidity {share_figure(metrics['fluidity']['mean'])}")
    failed = counts["failed"]
    parts.append(f"{failed:,} of {counts['scored']:,} failed" if failed else "no failures")
    rate = rate_of(run)
    asked = plural(counts["due"], "request") + " in" if rate is None else f"{number(rate)} requests/s for"
    return f"{asked} {number(seconds)} s: " + "; ".join(parts)


def rate_of(run: Document) -> float | None:
    """Requests a second that were due."""
    metrics = run.get("metrics")
    if not metrics or metrics["throughput"]["requests_per_s"] is None:
        return None
    return float(metrics["requests"]["due"] / metrics["throughput"]["seconds"])


def alarms(run: Document) -> Child:
    """What makes the figures doubtful, to be seen before any of them."""
    validity = run.get("validity") or {}
    reasons, warnings = invalid(run), validity.get("warnings") or []
    mismatch = (run.get("tokens") or {}).get("mismatch")
    message = mismatch["message"] if mismatch else None
    head = "Invalid: these figures are not the server's alone" if run.get("metrics") else "Invalid"
    bad = tag("div", tag("b", head), _bullets(reasons), class_="alarm", role="alert") if reasons else None
    loud = tag("div", tag("b", message), class_="alarm", role="alert") if message else None
    rest = [one for one in warnings if not (message and one.startswith(message.partition(" in ")[0]))]
    return [bad, loud, tag("div", tag("b", "To bear in mind"), _bullets(rest), class_="warning") if rest else None]


def invalid(run: Document) -> list[str]:
    """Why a run does not count; empty where it does."""
    validity = run.get("validity") or {}
    reasons = validity.get("reasons") or []
    return list(reasons) if reasons or validity.get("valid", True) else ["no reason is given"]


def key_figures(run: Document) -> list[KeyFigure]:
    """In the order that matters to a user; where a run has no value, a dash, so that runs compare line by line."""
    metrics, times = run.get("metrics") or {}, latency(run)
    counts, rates = metrics.get("requests") or {}, metrics.get("throughput") or {}
    fluidity, stalls, goodput = (metrics.get(name) or {} for name in ("fluidity", "stalls", "goodput"))
    pace, energy, ideal = times.get("tpot_ms") or {}, run.get("energy") or {}, metrics.get("over_ideal") or {}
    speed = 1000 / pace["p50"] if pace.get("p50") else None
    found = [
        _timed("First token", times.get("ttft_ms")),
        KeyFigure("Then", f"{number(speed)} tokens/s" if speed else NONE, _note("p99", pace.get("p99"), " ms a token")),
        _timed("End", times.get("e2e_ms")),
        KeyFigure("Fluidity", share_figure(fluidity.get("mean")), f"{percent(fluidity.get('smooth_share'))} smooth"),
        KeyFigure("Fluid token rate", f"{number(fluidity.get('fluid_token_rate_per_s'))} /s", "kept up by 99 %"),
        KeyFigure("SLO kept", percent(goodput.get("share")), _interval(goodput)),
        KeyFigure("Goodput", f"{number(goodput.get('requests_per_s'))} /s", "within the SLO, by when due"),
        KeyFigure("Stalls", figure(stalls.get("count")), _note("longer than", stalls.get("longer_than_ms"), " ms")),
        KeyFigure("Output", f"{number(rates.get('output_tokens_per_s'))} tokens/s", "of all requests"),
        KeyFigure(
            "Requests", figure(counts.get("complete")), f"complete, {counts['failed']:,} failed" if counts else ""
        ),
        KeyFigure("In flight", number(rates.get("concurrency_mean")), _note("at most", rates.get("concurrency_max"))),
        KeyFigure("Over ideal", f"{number(ideal.get('p50'))} \u00d7", _note("p90", ideal.get("p90"), " \u00d7")),
        KeyFigure("Energy", f"{number(energy.get('joules_per_output_token'))} J/token", energy.get("status", "")),
    ]
    return [one if NONE not in one.value else KeyFigure(one.name, NONE) for one in found]


def details(run: Document) -> Html:
    """How the figures came about."""
    names = ("endpoint", "load", "targets", "window", "tool", "machine")
    parts = [tag("div", tag("h3", name), facts(run[name]), class_="part") for name in names if run.get(name)]
    command = " ".join(run.get("command") or [])
    return tag(
        "details",
        tag("summary", "Load, endpoint, machine and command"),
        tag("pre", command) if command else None,
        tag("div", *parts, class_="parts"),
    )


def _tiles(run: Document) -> list[Html]:
    return [
        tag("div", tag("span", one.name), tag("b", one.value), tag("small", one.note) if one.note else None)
        for one in key_figures(run)
        if one.value != NONE
    ]


def _timed(name: str, block: Mapping[str, Any] | None) -> KeyFigure:
    if not block:
        return KeyFigure(name, NONE)
    corrected = block.get("corrected")
    more = f", corrected {duration(corrected['p99'])}" if corrected else ""
    return KeyFigure(name, duration(block["p50"]), f"p99 {duration(block['p99'])}{more}")


def _note(before: str, value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{before} {number(value)}{unit}"


def _interval(goodput: Mapping[str, Any]) -> str:
    if not goodput:
        return ""
    return (
        f"{percent(goodput['share_low'])} to {percent(goodput['share_high'])}: {'met' if goodput['met'] else 'missed'}"
    )


def _bullets(lines: Sequence[str]) -> Html:
    return tag("ul", *(tag("li", line) for line in lines))


def _smoothness(run: Document) -> list[Child]:
    metrics = run.get("metrics") or {}
    parts: list[Child] = []
    for name in ("fluidity", "stalls"):
        block = metrics.get(name)
        if block:
            parts.append(tag("div", tag("h3", name.title()), _with_corrected(block)))
    if parts_kept := (metrics.get("goodput") or {}).get("parts"):
        rows = [(name.upper() if name != "fluidity" else name, percent(share)) for name, share in parts_kept.items()]
        parts.append(tag("div", tag("h3", "Kept, by part of the SLO"), table(("part", "requests"), rows)))
    return parts


def _with_corrected(block: Mapping[str, Any]) -> Html:
    corrected = block.get("corrected")
    unsaid = ("corrected", *(["bounded_by"] if block.get("bounded_by") is None else []))
    names = [name for name, value in block.items() if not isinstance(value, Mapping) and name not in unsaid]
    head = ("", "value", *(["without this client's stalls"] if corrected else []))
    rows = [
        (_plain(name), _by_unit(name, block[name]), *([_by_unit(name, corrected.get(name))] if corrected else []))
        for name in names
    ]
    return table(head, rows)


_PLAIN = {
    "n": "requests",
    "mean": "mean index",
    "p1": "index, p1",
    "p10": "index, p10",
    "p50": "index, p50",
    "smooth_share": "smooth requests",
    "fluid_token_rate_per_s": "fluid token rate, per s",
    "bounded_by": "fluid token rate bounded by",
    "least_gap_p99_ms": "smallest smooth gap, p99",
    "without_gap": "requests smooth at no gap",
    "longer_than_ms": "longer than",
    "early": "early in the stream",
    "per_1000_tokens": "per 1,000 tokens",
    "longest_ms": "longest",
    "streams_share": "streams with one",
    "time_share": "of the streams' time",
}


def _plain(name: str) -> str:
    return _PLAIN.get(name, name.replace("_", " "))


def _by_unit(name: str, value: Any) -> str:
    if name.endswith("_share"):
        return percent(value)
    if name.endswith("_ms"):
        return duration(value)
    return share_figure(value) if name in ("mean", "p1", "p10", "p50", "deadline_hit_ratio") else figure(value)


def _latencies(run: Document) -> Child:
    rows: list[list[str]] = []
    for name, label in _LATENCIES.items():
        block = latency(run).get(name)
        if block:
            rows.append(_summary(label, block, figure(block.get("missing", 0))))
            if corrected := block.get("corrected"):
                rows.append(_summary(f"{label}, without this client's stalls", corrected, ""))
    if not rows:
        return None
    few = any("*" in cell for row in rows for cell in row[1:])
    note = "* of fewer than 100 values, so hardly more than the maximum" if few else None
    return [table(("ms", "values", *_COLUMNS, "missing"), rows, "numbers"), tag("small", note) if note else None]


def _summary(label: str, block: Mapping[str, Any], missing: str) -> list[str]:
    doubt = "*" if block.get("few") else ""
    values = [number(block[name]) + (doubt if name == "p99" else "") for name in _COLUMNS]
    return [label, figure(block["n"]), *values, missing]


def _errors(run: Document) -> Child:
    found = run.get("errors") or {}
    rows = [(kind, figure(one["count"]), one["meaning"], tag("code", one["example"])) for kind, one in found.items()]
    return table(("kind", "count", "meaning", "what one said"), rows) if rows else None


def _sources(run: Document) -> Child:
    block = run.get("tokens") or {}
    rows = [(name, figure(count)) for name, count in (block.get("sources") or {}).items()]
    return [
        table(("source", "requests"), rows) if rows else None,
        facts({**block["mismatch"], "message": None}) if block.get("mismatch") else None,
    ]


def _energy(block: Mapping[str, Any] | None) -> Child:
    if not block:
        return None
    if block.get("status") == "unavailable":
        return tag("p", f"Unavailable: {block.get('reason') or 'no counter'}.")
    carbon = block.get("carbon") or {}
    grams = {
        words(f"{name}_of_CO2e"): f"{number(carbon[name][0])} ({number(carbon[name][1])} to {number(carbon[name][2])})"
        for name in ("grams", "grams_above_idle")
        if carbon.get(name)
    }
    return facts({**block, "carbon": None, **grams, "carbon_intensity_g_per_kWh": carbon.get("intensity")})
