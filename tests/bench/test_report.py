"""The HTML report: what it says and escapes, as text; and how it behaves in a browser, opened from a file.

The browser tests need playwright and a Chromium (see scripts/screenshots.py). Where those are missing they skip, or
fail with EVERYBIT_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scripts import screenshots

from everybit.bench.fluidity import Deadlines
from everybit.bench.metrics import measure
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.report import render, render_many, write_report
from everybit.bench.report.figures import duration, number, percent, share_figure
from everybit.bench.report.pareto import undominated
from everybit.bench.report.scale import Scale, around, from_zero
from everybit.bench.result import run_document, series_document, validity
from everybit.bench.targets import Targets, Window, parse_slo
from everybit.errors import OutputError, SourceError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</script><img src=x onerror=\"window.pwned=1\"><b>'bold'</b>&amp;\u202e\ud800\x00"
SLO = "ttft=200ms,tpot=40ms,share=0.99"


def one_record(number: int, dice: random.Random, rate: float, gap_ms: float, nasty: bool) -> Record:
    intended = int(number * SECOND / rate)
    sent = intended + dice.randrange(20_000, 400_000)
    prompt, tokens = dice.randrange(20, 900), dice.randrange(30, 90)
    record = Record(number, number, 0, 0, intended, sent, status=200, usage_prompt=prompt, source="usage")
    now = sent + int((90 + prompt / 20 + dice.expovariate(0.1)) * MS)
    bits = 8
    for token in range(tokens):
        record.times_ns.append(now)
        record.tokens.append(1)
        if nasty:
            bits = dice.choice((8, 8, 6, 4, 3)) if token % 12 == 0 else bits
            record.bits.append(bits)
        now += int(gap_ms * MS * dice.uniform(0.8, 1.2))
        if nasty and dice.random() < 0.006:
            now += dice.randrange(300, 2500) * MS
    record.end_ns = record.times_ns[-1] + MS // 4
    record.usage_output = record.counted = tokens
    if nasty and number % 13 == 5:
        record.error, record.status, record.detail = "busy", 429, HOSTILE
        record.times_ns, record.tokens, record.bits = [], [], []
        record.end_ns = sent + 30 * MS
    elif nasty and number % 31 == 7:
        record.error, record.detail = "cut", "the connection ended after 3 of 5 chunks"
    elif nasty and number % 17 == 3:
        record.counted, record.stalled = tokens // 2, True
    return record


def run_of(
    count: int = 120,
    rate: float = 20.0,
    gap_ms: float = 20.0,
    *,
    nasty: bool = False,
    model: str = "mill-1b",
    seed: int = 1,
) -> dict[str, Any]:
    dice = random.Random(seed)
    records = [one_record(number, dice, rate, gap_ms, nasty) for number in range(count)]
    window = Window(SECOND if nasty else 0, int(count / rate * SECOND))
    targets = Targets(Deadlines(300 * MS, 30 * MS), parse_slo(SLO))
    return run_document(
        command=["everybit", "bench", "http://127.0.0.1:8000", "--rate", f"{rate:g}"],
        created="2026-11-26T12:00:00+00:00",
        endpoint={"url": "http://127.0.0.1:8000/v1", "model": model, "api": "chat"},
        load={"kind": "open loop", "seed": seed, "starts": {"kind": "poisson", "rate": rate}, "notes": []},
        targets=targets,
        window=window,
        records=records,
        metrics=measure(records, window, targets),
        validity=validity(records, window, 150 * MS if nasty else 0),
        energy={
            "status": "measured",
            "sources": ["RAPL package-0"],
            "joules": 812.0,
            "joules_per_output_token": 0.4 * gap_ms,
        },
    )


def series(kind: str, block: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return series_document(kind, command=["everybit", "bench", kind], created="2026-11-26", block=block, runs=runs)


def capacity_of() -> dict[str, Any]:
    shares = {5.0: 1.0, 10.0: 0.998, 14.0: 0.991, 16.0: 0.93, 20.0: 0.55}
    points = [
        {"rate": rate, "share": share, "interval": [max(0, share - 0.04), min(1, share + 0.005)], "runs": 1,
         "achieved_rate": min(rate, 15.5), "goodput": min(rate, 15.5) * share}
        for rate, share in shares.items()
    ]  # fmt: skip
    block = {"verdict": "found", "rate": 14.0, "bracket": [14.0, 16.0], "confidence": 0.97, "points": points}
    return series(
        "capacity", {**block, "reason": "the bracket is narrow enough"}, [run_of(60, r, 10 + r) for r in shares]
    )


def sweep_of() -> dict[str, Any]:
    models = [f"m@{bits}bit" for bits in (2, 3, 4, 6, 8)]
    runs = [run_of(60, 10, 8 + 4 * place, model=model) for place, model in enumerate(models)]
    document = series("sweep", {"over": "model", "values": models}, runs)
    losses = (5.9, 4.1, 3.66, 3.7, 3.61)
    document["quality"] = {
        model: {"value": loss, "unit": "nats/token", "lower_is_better": True}
        for model, loss in zip(models, losses, strict=True)
    }
    return document


def compare_of() -> dict[str, Any]:
    rows = [
        {"name": "first token p50", "a": 105.0, "b": 131.0, "ratio": {"low": 1.19, "value": 1.25, "high": 1.31}, "verdict": "B is slower"},
        {"name": "per token p50", "a": 20.1, "b": 20.0, "ratio": {"low": 0.97, "value": 0.995, "high": 1.02}, "verdict": "faster"},
        {"name": "fluidity", "a": 0.98, "b": 0.97, "difference": {"low": -0.03, "value": -0.01, "high": 0.01}, "verdict": ""},
    ]  # fmt: skip
    runs = [run_of(40, seed=seed) for seed in range(4)]
    return series("compare", {"labels": ["ours", "theirs"], "rounds": 2, "rows": rows}, runs)


def sustain_of() -> dict[str, Any]:
    slices = [
        {"begin_s": i * 30, "end_s": i * 30 + 30, "tokens_per_s": 900 - 8 * i, "tpot_p50_ms": 20 + 0.2 * i}
        for i in range(20)
    ]
    return series("sustain", {"slices": slices, "decay": {"share": 0.17, "low": 0.15, "high": 0.19}}, [run_of(60)])


def audit_of() -> dict[str, Any]:
    verdicts = [{"claim": "8", "verdict": "mismatch: serves 4", "found": "4", "distances": {"4": 0.001, "8": 0.2}}]
    return series("audit", {"verdicts": verdicts}, [])


ALL = {
    "run": run_of,
    "nasty": lambda: run_of(300, 20, 24, nasty=True, model=HOSTILE),
    "dense": lambda: run_of(900, 60, 24, nasty=True),
    "capacity": capacity_of,
    "sweep": sweep_of,
    "rates": lambda: series(
        "sweep", {"over": "rate", "values": [5, 10, 20]}, [run_of(60, r, r + 10) for r in (5, 10, 20)]
    ),
    "compare": compare_of,
    "sustain": sustain_of,
    "audit": audit_of,
}
