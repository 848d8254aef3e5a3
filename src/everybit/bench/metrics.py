"""What the records of a run say: one pure pass, so that old runs can be scored anew under other targets.

A request counts by its intended time. A failed one counts as an error, as smooth 0 and as outside the SLO; latencies
have no value for it and say beside each summary how many such are `missing`. A request that this bench itself ended is
not scored. Where this client stood still while requests ran, their times are its own: they are in every figure, and
each figure has a `corrected` twin without them.

Goodput counts requests by when they were due, throughput by when they ended, so either may be the larger.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from everybit.bench.fluidity import (
    FAILED,
    SMOOTH,
    Fluidity,
    fluid_token_rate,
    fluidity,
    least_gap,
    p99_gap,
)
from everybit.bench.ideal import Ideal
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.statistics import percentile, summary, wilson
from everybit.bench.targets import Document, Slo, Targets, Window, prompt_tokens
from everybit.errors import SourceError

_EARLY_TOKENS, _EARLY_SHARE = 16, 10  # a stall is early within 16 tokens or a tenth of the stream, whichever is more
_LEAST_RATED_S = 1.0  # of less than this, a request more or less is another rate
_FASTER = 2  # than the stream's own rate: a fluid rate above that is not its doing
_LEVELS = 32  # precisions shown: a server may name as many as it likes


def measure(records: Sequence[Record], window: Window, targets: Targets) -> Document:
    """The `metrics` of a result. Where a figure has no value at all, it is None. Raises: SourceError"""
    due = [record for record in records if window.holds(record.intended_ns)]
    scored = [record for record in due if record.error != "cancelled"]
    complete = [record for record in scored if record.complete]
    if not complete:
        raise SourceError(_nothing(records, due))
    scores = [score(record, targets) for record in scored]
    timeline = _timeline(records, window)
    return {
        "requests": {
            "all": len(records),
            "due": len(due),
            "scored": len(scored),
            "complete": len(complete),
            "failed": len(scored) - len(complete),
            "cancelled": len(due) - len(scored),
            "stalled_client": sum(record.stalled for record in scored),
        },
        "latency": _latency(scored),
        "stalls": _stalls(complete, targets.stall_ns),
        "throughput": _throughput(records, window, timeline),
        "goodput": _goodput(scored, scores, targets.slo, window) if targets.slo else None,
        "fluidity": _fluidity(scored, scores, targets),
        "over_ideal": _over_ideal(scored, targets.ideal) if targets.ideal else None,
        "precision": _precision(complete, window),
        "cached_share": _cached(complete),
        "timeline": timeline,
    }


def score(record: Record, targets: Targets) -> Fluidity:
    return fluidity(arrivals(record), targets.of(record)) if record.complete else FAILED


def latencies(record: Record) -> tuple[float | None, float | None, float | None]:
    """TTFT, TPOT and end to end, in ns from the intended send, as `latency` counts them."""
    first, end = (_since(record, when, record.intended_ns) for when in (record.first_ns, record.end_ns))
    ttft, tpot, e2e = (values[0] if values else None for values in (first, _tpot(record), end))
    return ttft, tpot, e2e


def rated(window: Window) -> bool:
    """Whether it is long enough to tell of rates."""
    return window.seconds >= _LEAST_RATED_S


def arrivals(record: Record) -> list[int]:
    """When each token came, in ns from the intended send."""
    begin = record.intended_ns
    return [now - begin for now, count in zip(record.times_ns, record.tokens, strict=True) for _ in range(count)]


def stalls(record: Record, stall_ns: int) -> list[tuple[int, int, int]]:
    """Waits longer than `stall_ns` after the first piece: (begin, length, tokens before it), ns of the run."""
    before = itertools.accumulate(record.tokens)
    pairs = itertools.pairwise(record.times_ns)
    return [(a, b - a, count) for (a, b), count in zip(pairs, before, strict=False) if b - a > stall_ns]


def _nothing(records: Sequence[Record], due: Sequence[Record]) -> str:
    if not due:
        return f"nothing to measure: of {len(records)} requests none was due within the measured time"
    kinds = Counter(record.error for record in due).most_common()
    return f"nothing to measure: {len(due)} requests, none complete: " + ", ".join(f"{k} {n}" for k, n in kinds)


# --- latency
def _block(records: Iterable[Record], values: Callable[[Record], Sequence[float]], unit: float = MS) -> Document | None:
    """Summary of the values of all records; None where no record has any."""
    found = [(record.stalled, values(record)) for record in records]
    every = sorted(itertools.chain.from_iterable(one for _, one in found))
    if not every:
        return None
    block: Document = {**summary(every, unit), "missing": sum(not one for _, one in found)}
    if any(stalled and one for stalled, one in found):
        clean = [value for stalled, one in found if not stalled for value in one]
        block["corrected"] = summary(clean, unit) if clean else None
    return block


def _latency(scored: Sequence[Record]) -> Document:
    gaps = _block(scored, _token_gaps)
    if gaps is not None:
        every = sorted(itertools.chain.from_iterable(map(_token_gaps, scored)))
        gaps["curve"] = [percentile(every, q) / MS for q in range(101)]
    return {
        "ttft_ms": _block(scored, lambda r: _since(r, r.first_ns, r.intended_ns)),
        "ttft_from_sent_ms": _block(scored, lambda r: _since(r, r.first_ns, r.sent_ns)),
        "e2e_ms": _block(scored, lambda r: _since(r, r.end_ns, r.intended_ns)),
        "e2e_from_sent_ms": _block(scored, lambda r: _since(r, r.end_ns, r.sent_ns)),
        "normalised_ms": _block(scored, _normalised),
        "tpot_ms": _block(scored, _tpot),
        "gap_ms": gaps,
        "piece_gap_ms": _block(scored, _piece_gaps),
        "gap_variation": _block(scored, _variation, 1),
        "lag_ms": _block(scored, lambda r: [] if r.sent_ns is None else [r.sent_ns - r.intended_ns]),
        "connect_ms": _block(scored, lambda r: _since(r, r.connected_ns, r.sent_ns)),
    }


def _since(record: Record, end: int | None, begin: int | None) -> list[int]:
    return [end - begin] if record.complete and end is not None and begin is not None else []


def _normalised(record: Record) -> list[float]:
    """End to end per output token (Orca, vLLM): hides stalls, for comparison with older papers."""
    tokens = record.output_tokens
    return [whole / tokens for whole in _since(record, record.end_ns, record.intended_ns)] if tokens else []


def _tpot(record: Record) -> list[float]:
    tokens = record.output_tokens
    if not record.complete or not record.streamed or tokens < 2:
        return []
    return [(record.times_ns[-1] - record.times_ns[0]) / (tokens - 1)]


def _piece_gaps(record: Record) -> list[int]:
    return [b - a for a, b in itertools.pairwise(record.times_ns)] if record.complete and record.streamed else []


def _token_gaps(record: Record) -> list[int]:
    """A piece of k tokens is one wait and k - 1 of no time."""
    if not record.complete or not record.streamed:
        return []
    return _piece_gaps(record) + [0] * (record.output_tokens - len(record.times_ns))


def _variation(record: Record) -> list[float]:
    """Smoothness: standard deviation over mean of the waits between pieces, of streams with three or more."""
    gaps = _piece_gaps(record)
    whole = sum(gaps)
    if len(gaps) < 2 or not whole:
        return []
    found = summary(gaps)
    return [found["std"] / found["mean"]]


def _stalls(complete: Sequence[Record], stall_ns: int) -> Document | None:
    streams = [record for record in complete if record.streamed and record.times_ns]
    clean = [record for record in streams if not record.stalled]
    if not streams:
        return None
    block = {"longer_than_ms": stall_ns / MS, **_stall_figures(streams, stall_ns)}
    if len(clean) < len(streams):
        block["corrected"] = _stall_figures(clean, stall_ns) if clean else None
    return block


def _stall_figures(streams: Sequence[Record], stall_ns: int) -> Document:
    found = [(record.output_tokens, stalls(record, stall_ns)) for record in streams]
    lengths = [length for _, one in found for _, length, _ in one]
    tokens = sum(count for count, _ in found)
    whole = sum(record.times_ns[-1] - record.times_ns[0] for record in streams)
    early = [before <= max(_EARLY_TOKENS, count // _EARLY_SHARE) for count, one in found for _, _, before in one]
    return {
        "count": len(lengths),
        "early": sum(early),
        "per_1000_tokens": 1000 * len(lengths) / tokens if tokens else None,
        "longest_ms": max(lengths) / MS if lengths else None,
        "streams_share": sum(bool(one) for _, one in found) / len(found),
        "time_share": sum(lengths) / whole if whole else None,
    }


# --- rates
def _throughput(records: Sequence[Record], window: Window, timeline: Document) -> Document:
    """Of what arrived within the window, whichever request it belongs to."""
    prompts = [
        record.usage_prompt
        for record in records
        if record.usage_prompt is not None and record.first_ns is not None and window.holds(record.first_ns)
    ]
    mean, most = _concurrency(records, window)
    return {
        "seconds": window.seconds,
        "output_tokens_per_s": _rate(sum(timeline["tokens"]), window),
        "prompt_tokens_per_s": _rate(sum(prompts), window) if prompts else None,
        "requests_per_s": _rate(sum(timeline["complete"]), window),
        "concurrency_mean": mean,
        "concurrency_max": most,
    }


def _rate(count: int, window: Window) -> float | None:
    return count / window.seconds if rated(window) else None


def _concurrency(records: Sequence[Record], window: Window) -> tuple[float, int]:
    changes: list[tuple[int, int]] = []
    for record in records:
        if record.sent_ns is not None:
            begin = max(record.sent_ns, window.begin_ns)
            end = window.end_ns if record.end_ns is None else min(record.end_ns, window.end_ns)
            if begin < end:
                changes += [(begin, 1), (end, -1)]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return sum(-when * change for when, change in changes) / (window.end_ns - window.begin_ns), most


def _timeline(records: Sequence[Record], window: Window) -> Document:
    """Counts for each second of the window (the last may be a part of one)."""
    seconds = -(-(window.end_ns - window.begin_ns) // SECOND)
    tokens, complete, failed = ([0] * seconds for _ in range(3))
    for record in records:
        for now, count in zip(record.times_ns, record.tokens, strict=True):
            if window.holds(now):
                tokens[(now - window.begin_ns) // SECOND] += count
        if record.end_ns is not None and window.holds(record.end_ns) and record.error != "cancelled":
            (complete if record.complete else failed)[(record.end_ns - window.begin_ns) // SECOND] += 1
    return {"tokens": tokens, "complete": complete, "failed": failed}


# --- targets
def _goodput(scored: Sequence[Record], scores: Sequence[Fluidity], slo: Slo, window: Window) -> Document:
    parts: dict[str, list[bool]] = {}
    if slo.first_ns is not None:
        most = slo.first_ns
        parts["ttft"] = [_within(_since(r, r.first_ns, r.intended_ns), most) for r in scored]
    if slo.gap_ns is not None:  # an answer in one piece has no time per token to be late with
        gap = slo.gap_ns
        parts["tpot"] = [r.complete and _within(_tpot(r) or [0], gap) for r in scored]
    if slo.end_ns is not None:
        end = slo.end_ns
        parts["e2e"] = [_within(_since(r, r.end_ns, r.intended_ns), end) for r in scored]
    if slo.fluidity is not None:
        parts["fluidity"] = [one.index >= slo.fluidity for one in scores]
    kept = sum(map(all, zip(*parts.values(), strict=True)))
    share = wilson(kept, len(scored))
    return {
        "kept": kept,
        "of": len(scored),
        "share": share.value,
        "share_low": share.low,
        "share_high": share.high,
        "met": share.value >= slo.share,
        "requests_per_s": _rate(kept, window),
        "parts": {name: sum(one) / len(one) for name, one in parts.items()},
    }


def _within(values: Sequence[float], most: float) -> bool:
    return bool(values) and values[0] <= most


def _fluidity(scored: Sequence[Record], scores: Sequence[Fluidity], targets: Targets) -> Document:
    gaps = [least_gap(arrivals(record), targets.of(record).first_ns) if record.complete else None for record in scored]
    found = list(zip(scored, scores, gaps, strict=True))
    block = _fluidity_figures(found, targets)
    if targets.slack_ns is not None:
        block["unpredicted"] = sum(record.complete and prompt_tokens(record) is None for record in scored)
    if any(record.stalled for record in scored):
        clean = [one for one in found if not one[0].stalled]
        block["corrected"] = _fluidity_figures(clean, targets) if clean else None
    return block


def _fluidity_figures(found: Sequence[tuple[Record, Fluidity, int | None]], targets: Targets) -> Document:
    """The fluid token rate is None where the pace of the request at the p99 does not bound it."""
    _, scores, gaps = zip(*found, strict=True)
    ordered = sorted(one.index for one in scores)
    p99 = p99_gap(gaps)
    at_p99 = min(((gap, i) for i, gap in enumerate(gaps) if gap is not None and gap >= p99), default=None)
    early = at_p99 is not None and _bounded_by_first(found[at_p99[1]][0], targets, p99)
    return {
        "n": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "p1": percentile(ordered, 1),
        "p10": percentile(ordered, 10),
        "p50": percentile(ordered, 50),
        "smooth_share": (len(ordered) - bisect_left(ordered, SMOOTH)) / len(ordered),
        "deadline_hit_ratio": sum(one.deadline_hit_ratio for one in scores) / len(scores),
        "fluid_token_rate_per_s": None if early else fluid_token_rate(gaps),
        "bounded_by": "first token" if early else None,
        "least_gap_p99_ms": None if early or math.isinf(p99) else p99 / MS,
        "without_gap": gaps.count(None),
    }


def _bounded_by_first(record: Record, targets: Targets, gap_ns: float) -> bool:
    """Whether the time before its first deadline, not its pace, lets a stream be smooth at a gap this small."""
    times = arrivals(record)
    whole = times[-1] - times[0]
    return times[-1] <= targets.of(record).first_ns or whole > _FASTER * (len(times) - 1) * gap_ns


def _over_ideal(scored: Sequence[Record], ideal: Ideal) -> Document | None:
    """Time from the intended send to the last token, over what it takes on an idle endpoint."""

    def ratio(record: Record) -> list[float]:
        prompt = prompt_tokens(record)
        if prompt is None or not record.times_ns:
            return []
        alone = ideal.end_ns(prompt, record.output_tokens)
        return [whole / alone for whole in _since(record, record.times_ns[-1], record.intended_ns) if alone]

    block = _block(scored, ratio, 1)
    if block is not None:
        lengths = [length for r in scored if ratio(r) and (length := prompt_tokens(r)) is not None]
        block["extrapolated"] = sum(not ideal.covers(length) for length in lengths)
    return block


# --- what the server tells of itself
def _precision(complete: Sequence[Record], window: Window) -> Document | None:
    """Tokens by precision; `mean_bits` over those whose precision is a number, the timeline by seconds of arrival."""
    told = [record for record in complete if record.bits]
    if not told:
        return None
    totals = Counter(_level(one) for record in told for one in record.bits[: record.output_tokens])
    shown = [level for level, _ in totals.most_common(_LEVELS)]
    levels = sorted(shown, key=lambda level: (0, int(level), "") if level.isdecimal() else (1, 0, level))
    places = {level: place for place, level in enumerate(levels)}
    timeline: list[list[int]] = []
    for record in told:
        offset = record.intended_ns - window.begin_ns
        for when, one in zip(arrivals(record), record.bits, strict=False):
            second, place = (offset + when) // SECOND, places.get(_level(one))
            while len(timeline) <= second:
                timeline.append([0] * len(levels))
            if place is not None:
                timeline[second][place] += 1
    numbers = [(int(level), totals[level]) for level in levels if level.isdecimal()]
    return {
        "tokens": {level: totals[level] for level in levels},
        "mean_bits": sum(b * n for b, n in numbers) / sum(n for _, n in numbers) if numbers else None,
        "untold_tokens": sum(record.output_tokens for record in complete) - sum(totals[level] for level in levels),
        "requests_told": len(told),
        "requests_with_switch": sum(len(set(record.bits)) > 1 for record in told),
        "levels": levels,
        "timeline": timeline,
    }


def _level(bits: int | str) -> str:
    return str(bits)[:40]


def _cached(complete: Sequence[Record]) -> float | None:
    told = [(r.usage_cached, r.usage_prompt) for r in complete if r.usage_cached is not None and r.usage_prompt]
    return sum(cached for cached, _ in told) / sum(prompt for _, prompt in told) if told else None
