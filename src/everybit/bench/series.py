"""Several runs and what they say together: sweep, capacity, compare, sustain."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from statistics import median
from typing import Any

from everybit.bench.measuring import Measured
from everybit.bench.metrics import score
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.search import Limits, Probe, curve, find_capacity
from everybit.bench.statistics import Interval, difference_interval, percentile, ratio_interval
from everybit.bench.targets import Document, Targets
from everybit.errors import SourceError


def sweep_point(value: object, document: Document) -> Document:
    """A row of a sweep: the figures of its run that curves are drawn of."""
    metrics = document["metrics"]
    if metrics is None:
        return {"value": value, "failed": "; ".join(document["validity"]["reasons"])}
    latency, speed, energy = metrics["latency"], metrics["throughput"], document["energy"] or {}
    return {
        "value": value,
        "failed": "",
        "requests_per_s": speed["requests_per_s"],
        "output_tokens_per_s": speed["output_tokens_per_s"],
        "ttft_p50_ms": _of(latency["ttft_ms"], "p50"),
        "ttft_p99_ms": _of(latency["ttft_ms"], "p99"),
        "tpot_p50_ms": _of(latency["tpot_ms"], "p50"),
        "e2e_p50_ms": _of(latency["e2e_ms"], "p50"),
        "fluidity": metrics["fluidity"]["mean"],
        "slo_share": metrics["goodput"]["share"] if metrics["goodput"] else None,
        "joules_per_token": energy.get("joules_per_output_token"),
    }


def _of(block: Mapping[str, float] | None, name: str) -> float | None:
    return None if block is None else block[name]


# --- capacity
def capacity(
    measure: Callable[[float, int], Measured], hint: float, limits: Limits, seed: int
) -> tuple[Document, list[Document]]:
    """Block and runs. `measure(rate, seed)` makes one run. Raises: SourceError"""
    runs: list[Document] = []
    stopped: list[bool] = []

    async def probe(rate: float, seed: int) -> Probe:
        measured = measure(rate, seed)
        runs.append(measured.document)
        metrics = measured.document["metrics"]
        valid = not measured.interrupted and (measured.document["validity"]["valid"] or metrics is None)
        stopped.append(measured.interrupted)
        if metrics is None:
            scored = sum(row[3] for row in measured.document["requests"]["rows"])
            return Probe(rate, 0, max(1, scored), 0.0, valid)
        good = metrics["goodput"]
        return Probe(rate, good["kept"], good["of"], metrics["throughput"]["requests_per_s"] or 0.0, valid)

    found = asyncio.run(find_capacity(probe, hint, limits, seed))
    block = {name: value for name, value in asdict(found).items() if name != "probes"}
    points = [
        {**asdict(one), "share": one.share.value, "interval": [one.share.low, one.share.high], "goodput": one.goodput}
        for one in curve(found.probes)
    ]
    if stopped[-1]:
        block |= {"reason": "it was interrupted", "interrupted": True}
    return {**block, "share": limits.share, "points": points}, runs


# --- compare
_LATENCIES: dict[str, Callable[[Record], float | None]] = {
    "ttft": lambda r: None if r.first_ns is None else (r.first_ns - r.intended_ns) / MS,
    "tpot": lambda r: (r.times_ns[-1] - r.times_ns[0]) / MS / (r.output_tokens - 1) if r.output_tokens > 1 else None,
    "e2e": lambda r: None if r.end_ns is None else (r.end_ns - r.intended_ns) / MS,
}


def compare(rounds_a: Sequence[Measured], rounds_b: Sequence[Measured], targets: Targets) -> list[Document]:
    """Rows: a figure of A and of B, their ratio or difference with its 95 % interval, and the verdict.

    Requests of a round wait in one queue, so rounds are resampled, not requests. Raises: SourceError
    """
    rows = []
    for name, value in _LATENCIES.items():
        a, b = [_values(one, value) for one in rounds_a], [_values(one, value) for one in rounds_b]
        if not all(a) or not all(b):
            continue
        for label, statistic in (("p50", median), ("p99", _p99)):
            rows.append(_ratio(f"{name} {label} ms", b, a, statistic, less=True))
    speeds = [[_speed(one)] for one in rounds_a], [[_speed(one)] for one in rounds_b]
    if all(one[0] for one in (*speeds[0], *speeds[1])):
        rows.append(_ratio("tokens/s", speeds[1], speeds[0], _mean, less=False))
    scores = [[_scores(one, targets) for one in rounds] for rounds in (rounds_a, rounds_b)]
    found = difference_interval(scores[1], scores[0], _mean)
    rows.append(
        {
            "name": "fluidity",
            "a": _mean(list(chain.from_iterable(scores[0]))),
            "b": _mean(list(chain.from_iterable(scores[1]))),
            "ratio": None,
            "difference": asdict(found),
            "verdict": _verdict(found, 0, less=False),
        }
    )
    return rows


def _ratio(name: str, b: list[list[float]], a: list[list[float]], statistic: Any, less: bool) -> Document:
    found = ratio_interval(b, a, statistic)
    return {
        "name": name,
        "a": statistic(list(chain.from_iterable(a))),
        "b": statistic(list(chain.from_iterable(b))),
        "ratio": asdict(found),
        "difference": None,
        "verdict": _verdict(found, 1, less),
    }


def _verdict(found: Interval, same: float, less: bool) -> str:
    """`less`: whether less is better."""
    if found.low <= same <= found.high:
        return "indistinguishable"
    return "B is better" if (found.high < same) == less else "A is better"


def _values(measured: Measured, value: Callable[[Record], float | None]) -> list[float]:
    found = [value(record) for record in _due(measured) if record.complete and record.streamed]
    return [one for one in found if one is not None]


def _scores(measured: Measured, targets: Targets) -> list[float]:
    return [score(record, targets).index for record in _due(measured) if record.error != "cancelled"]


def _due(measured: Measured) -> list[Record]:
    begin, end = (round(measured.document["window"][name] * MS) for name in ("begin_ms", "end_ms"))
    return [record for record in measured.records if begin <= record.intended_ns < end]


def _speed(measured: Measured) -> float:
    metrics = measured.document["metrics"]
    return float(metrics["throughput"]["output_tokens_per_s"] or 0) if metrics else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _p99(values: Sequence[float]) -> float:
    return percentile(sorted(values), 99)


# --- sustain
def sustain(records: Sequence[Record], begin_ns: int, end_ns: int, slices: int) -> Document:
    """Slices of the run, and the trend of its throughput with a 95 % interval. Raises: SourceError"""
    length = (end_ns - begin_ns) // slices
    found: list[Document] = []
    speeds: list[float] = []
    for place in range(slices):
        begin = begin_ns + place * length
        tokens = sum(
            count
            for record in records
            for now, count in zip(record.times_ns, record.tokens, strict=True)
            if begin <= now < begin + length
        )
        here = [r for r in records if r.complete and begin <= r.intended_ns < begin + length]
        values = {name: sorted(v for r in here if (v := value(r)) is not None) for name, value in _LATENCIES.items()}
        speeds.append(tokens / (length / SECOND))
        found.append(
            {
                "begin_s": begin / SECOND,
                "end_s": (begin + length) / SECOND,
                "tokens_per_s": speeds[-1],
                "requests": len(here),
                "tpot_p50_ms": percentile(values["tpot"], 50) if values["tpot"] else None,
                "ttft_p50_ms": percentile(values["ttft"], 50) if values["ttft"] else None,
                "ttft_p99_ms": percentile(values["ttft"], 99) if values["ttft"] else None,
            }
        )
    return {"slices": found, "decay": _trend(speeds, length / SECOND)}


def _trend(speeds: Sequence[float], seconds: float) -> Document:
    """Least squares over the slices; relative change an hour. Two standard errors make the interval."""
    n = len(speeds)
    mean = _mean(speeds)
    if n < 4 or not mean:
        raise SourceError(f"{n} slices at {mean:.1f} tokens/s: expected 4 or more slices with tokens")
    xs = [(place - (n - 1) / 2) * seconds for place in range(n)]
    spread = sum(x * x for x in xs)
    slope = sum(x * (y - mean) for x, y in zip(xs, speeds, strict=True)) / spread
    rest = sum((y - mean - slope * x) ** 2 for x, y in zip(xs, speeds, strict=True))
    error = math.sqrt(rest / (n - 2) / spread)
    hourly, width = slope * 3600 / mean, 2 * error * 3600 / mean
    steady = hourly - width <= 0 <= hourly + width
    return {
        "per_hour": hourly,
        "low": hourly - width,
        "high": hourly + width,
        "last_over_first": speeds[-1] / speeds[0] if speeds[0] else None,
        "verdict": "no trend" if steady else "it slows down" if hourly < 0 else "it speeds up",
    }
