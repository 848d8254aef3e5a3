"""A result as lines for a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everybit.bench.result import interrupted

Document = dict[str, Any]
_WIDEST_TREND = 2.0  # from the lower to the upper end of its interval: 100 % an hour up or down


def card(document: Document) -> str:
    lines = _run if document["kind"] == "run" else _series
    return "\n".join(lines(document))


def _run(document: Document) -> Iterator[str]:
    endpoint, metrics, valid = document["endpoint"], document["metrics"], document["validity"]
    yield f"{endpoint['model']} at {endpoint['url']} ({endpoint['api']})"
    for reason in valid["reasons"]:
        yield f"  INVALID: {reason}"
    for warning in valid["warnings"]:
        yield f"  warning: {warning}"
    for note in document["load"].get("notes", ()):
        yield f"  note: {note}"
    for kind, found in document["errors"].items():
        example = f" ({found['example']})" if found["example"] else ""
        what = found["count"] if kind == "cancelled" else f"failed: {found['count']} {kind},"
        yield f"  {what} {found['meaning']}{example}"
    if metrics is None:
        return
    count, speed, latency = metrics["requests"], metrics["throughput"], metrics["latency"]
    yield (
        f"  requests     {count['complete']} complete, {count['failed']} failed in {speed['seconds']:.1f} s:"
        f" {_rate(speed['requests_per_s'])}/s, {_rate(speed['output_tokens_per_s'], 1)} tokens/s,"
        f" {speed['concurrency_mean']:.1f} at once"
    )
    for name, block in (
        ("first token", latency["ttft_ms"]),
        ("  from sent", latency["ttft_from_sent_ms"]),
        ("per token", latency["tpot_ms"]),
        ("gaps", latency["gap_ms"]),
        ("whole answer", latency["e2e_ms"]),
    ):
        if block is not None:
            yield f"  {name:<13}" + _latency(block)
    if metrics["stalls"]:
        stalls = metrics["stalls"]
        longest = f", longest {stalls['longest_ms']:.0f} ms" if stalls["longest_ms"] is not None else ""
        yield f"  {'stalls':<13}{stalls['count']} over {stalls['longer_than_ms']:.0f} ms{longest}"
    smooth = metrics["fluidity"]
    targets = document["targets"]
    slack, rate = targets["slack_ms"], smooth["fluid_token_rate_per_s"]
    first = f"{targets['first_ms']:g} ms" if slack is None else f"the ideal's time and {slack:g} ms"
    fluid = "" if rate is None else f"; {rate:.1f} fluid tokens/s"
    if by := smooth.get("bounded_by"):  # older results have none
        fluid = f"; fluid tokens/s: bounded by the {by} only"
    yield (
        f"  {'fluidity':<13}{smooth['mean']:.3f} (worst 1 %: {smooth['p1']:.3f}) at deadlines of {first}"
        f" and {targets['gap_ms']:g} ms{fluid}"
    )
    if good := metrics["goodput"]:
        yield (
            f"  {'SLO':<13}{'kept' if good['met'] else 'NOT KEPT'}: {good['kept']} of {good['of']}"
            f" ({good['share']:.1%}), goodput {_rate(good['requests_per_s'])} requests/s of those due in that time"
        )
    if over := metrics["over_ideal"]:
        yield f"  {'over ideal':<13}{over['p50']:.2f}x median, {over['p90']:.2f}x p90"
    if precision := metrics["precision"]:
        shares = ", ".join(f"{level}: {count}" for level, count in precision["tokens"].items())
        yield f"  {'precision':<13}tokens by bits {shares}; {precision['requests_with_switch']} requests switched"
    sources = ", ".join(f"{name} {count}" for name, count in document["tokens"]["sources"].items())
    yield f"  {'counted by':<13}{sources or 'nothing'}"
    yield from _energy(document["energy"])


def _rate(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _latency(block: Document) -> str:
    text = f"mean {block['mean']:.1f}  p50 {block['p50']:.1f}  p90 {block['p90']:.1f}  p99 {block['p99']:.1f} ms"
    text += "  (few)" if block["few"] else ""
    if clean := block.get("corrected"):
        text += f"; without this client's own stalls mean {clean['mean']:.1f}  p99 {clean['p99']:.1f} ms"
    return text


def _energy(energy: Document | None) -> Iterator[str]:
    if energy is None:
        return
    if energy["status"] != "measured":
        yield f"  {'energy':<13}unavailable: {energy['reason']}"
        return
    above = energy["joules_above_idle"]
    per_token = energy["joules_per_output_token"]
    text = f"{energy['joules']:.0f} J" + (f", {above:.0f} J above rest" if above is not None else "")
    yield f"  {'energy':<13}{text}" + (f", {per_token:.2f} J a token" if per_token is not None else "")
    if carbon := energy["carbon"]:
        value, low, high = carbon["grams"]
        yield f"  {'CO2e':<13}{value:.3g} g ({low:.3g} to {high:.3g}) at {carbon['intensity']} g/kWh"


def _series(document: Document) -> Iterator[str]:
    kind, runs = document["kind"], document.get("runs", [])
    block = document[kind]
    if kind == "sweep":
        yield from _sweep(block, runs)
    else:
        yield from {"capacity": _capacity, "compare": _compare, "sustain": _sustain}.get(kind, _lines)(block)
    for number, run in enumerate(runs, 1):
        for reason in run["validity"]["reasons"]:
            yield f"  INVALID run {number}: {reason}"
        for kind, found in run["errors"].items():
            what = found["meaning"] if kind == "cancelled" else f"failed, {kind}"
            yield f"  run {number}: {found['count']} {what}"
        if mismatch := run["tokens"]["mismatch"]:
            yield f"  run {number}: {mismatch['message']}"


def _lines(block: Document) -> Iterator[str]:
    yield from block["lines"]


def _sweep(block: Document, runs: Sequence[Document]) -> Iterator[str]:
    names = ("requests/s", "tokens/s", "ttft p50", "ttft p99", "tpot p50", "fluidity", "SLO %")
    yield f"{block['over']:<16}" + "".join(f"{name:>11}" for name in names)
    for point, run in zip(block["points"], runs, strict=True):
        mark = "  interrupted" if interrupted(run) else ""
        if point["failed"]:
            yield f"{point['value']!s:<16} {point['failed']}{mark}"
            continue
        share = None if point["slo_share"] is None else 100 * point["slo_share"]
        figures = (point["requests_per_s"], point["output_tokens_per_s"], point["ttft_p50_ms"], point["ttft_p99_ms"])
        cells = [_cell(one, 11) for one in (*figures, point["tpot_p50_ms"])]
        yield f"{point['value']!s:<16}" + "".join(cells) + f"{point['fluidity']:>11.3f}" + _cell(share, 11) + mark


def _cell(value: float | None, width: int = 10) -> str:
    return f"{'-' if value is None else format(value, '.1f'):>{width}}"


def _capacity(block: Document) -> Iterator[str]:
    low, high = block["bracket"]
    known = [f"{low:.3g} passes" if low else "", f"{high:.3g} fails" if high else ""]
    said = {
        "found": f"capacity {block['rate'] or 0:.3g} requests/s (fails at {high or 0:.3g})",
        "at least": f"capacity at least {block['rate'] or 0:.3g} requests/s: nothing failed",
        "unsure": "capacity not found: " + (", ".join(filter(None, known)) or "no rate was judged"),
        "none": "no rate keeps the SLO",
    }
    yield f"{said[block['verdict']]}; {block['reason']}"
    for point in block["points"]:
        low, high = point["interval"]
        yield (
            f"  {point['rate']:>9.3f}/s  {point['share']:7.1%} keep the SLO ({low:.1%} to {high:.1%}),"
            f" {point['achieved_rate']:.2f}/s done, {point['runs']} runs"
        )


def _compare(block: Document) -> Iterator[str]:
    a, b = block["labels"]
    yield f"A = {a}, B = {b}; {block['rounds']} rounds"
    for row in block["rows"]:
        found = row["ratio"] or row["difference"]
        kind = "B/A" if row["ratio"] else "B-A"
        yield (
            f"  {row['name']:<22}{row['a']:>10.2f}{row['b']:>10.2f}  {kind} {found['value']:.3f}"
            f" ({found['low']:.3f} to {found['high']:.3f}): {row['verdict']}"
        )


def _sustain(block: Document) -> Iterator[str]:
    yield f"{'from s':>8}{'tokens/s':>10}{'tpot p50':>10}{'ttft p50':>10}"
    length = block["slices"][0]["end_s"] - block["slices"][0]["begin_s"]
    places = 0 if length >= 10 else 1 if length >= 1 else 2
    for one in block["slices"]:
        figures = f"{one['tokens_per_s']:>10.1f}{_cell(one['tpot_p50_ms'])}{_cell(one['ttft_p50_ms'])}"
        yield f"{one['begin_s']:>8.{places}f}{figures}"
    yield trend(block["decay"])


def trend(decay: Mapping[str, Any]) -> str:
    """Of a sustained run's throughput."""
    low, high = decay["low"], decay["high"]
    if high - low > _WIDEST_TREND:
        return "throughput: too short to tell a trend"
    return f"throughput changes by {decay['per_hour']:+.1%} an hour ({low:+.1%} to {high:+.1%}): {decay['verdict']}"
