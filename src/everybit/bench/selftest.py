"""The instrument's own error on this machine, against a mock server of exactly known timing.

The mock runs beside the bench and is itself late by a tenth of a millisecond; that too is counted as the bench's error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

from everybit.bench.asks import Asking
from everybit.bench.endpoint import parse_url
from everybit.bench.fluidity import Deadlines
from everybit.bench.http import Limits
from everybit.bench.load.arrivals import poisson
from everybit.bench.load.lengths import parse_lengths
from everybit.bench.load.texts import random_words
from everybit.bench.load.workload import Drawn, open_loop
from everybit.bench.measuring import Measured, Settings, measure_run
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.bench.mock.truth import fetch_truth
from everybit.bench.preflight import look
from everybit.bench.records import MS
from everybit.bench.statistics import percentile
from everybit.bench.targets import Document, Targets
from everybit.errors import SourceError

TTFT_MS, GAP_MS, TOKENS = 100.0, 20.0, 32
STALL_S = 2.0


@dataclass(frozen=True)
class Row:
    """A figure, what it is in truth, and how far off it may be; `unit` of all three."""

    what: str
    truth: float
    measured: float
    allowed: float
    unit: str

    @property
    def error(self) -> float:
        return self.measured - self.truth

    @property
    def ok(self) -> bool:
        return abs(self.error) <= self.allowed

    def document(self) -> Document:
        return {**asdict(self), "error": self.error, "ok": self.ok}


def selftest(seconds: float, workers: int | None, quiet: bool) -> Document:
    """Runs of `seconds` each. Raises: SourceError"""
    rows: list[Row] = []
    for rate, mean_ms, p99_ms in ((20.0, 4.0, 12.0), (100.0, 5.0, 15.0)):
        measured = _run(Script(tokens=TOKENS), rate, seconds, workers, quiet, f"{rate:g} requests/s")
        rows += _timing(measured, f"{rate:g}/s", mean_ms, p99_ms)
    rows += _server_stall(seconds, workers, quiet)
    if hasattr(signal, "SIGSTOP"):
        rows += _client_stall(seconds, quiet)
    width = max(len(row.what) for row in rows)
    lines = [
        f"{row.what:<{width}}  truth {row.truth:9.3f}  measured {row.measured:9.3f} {row.unit:<3}"
        f" error {row.error:+8.3f} (allowed {row.allowed:.3f}) {'ok' if row.ok else 'TOO FAR'}"
        for row in rows
    ]
    return {"rows": [row.document() for row in rows], "ok": all(row.ok for row in rows), "lines": lines}


def _run(script: Script, rate: float, seconds: float, workers: int | None, quiet: bool, title: str) -> Measured:
    with running(script) as url:
        return _measure(url, rate, seconds, workers, quiet, title)


def _measure(url: str, rate: float, seconds: float, workers: int | None, quiet: bool, title: str) -> Measured:
    texts = random_words()
    prompt = partial(texts.text, "calibration")
    known = look(parse_url(url)[0], Asking("completions", ""), Limits(), prompt)
    texts = replace(texts, chars_per_token=known.chars_per_token or texts.chars_per_token)
    source = Drawn(texts, parse_lengths("64", str(TOKENS)))
    targets = Targets(Deadlines(200 * MS, 50 * MS))
    settings = Settings(known, targets, workers=workers, quiet=quiet)
    measured = measure_run(settings, open_loop(poisson(rate, duration_s=seconds), source), title)
    if measured.interrupted:
        raise KeyboardInterrupt
    if measured.document["metrics"] is None:
        raise SourceError("; ".join(measured.document["validity"]["reasons"]))
    return measured


def _timing(measured: Measured, label: str, mean_ms: float, p99_ms: float) -> list[Row]:
    latency = measured.document["metrics"]["latency"]
    first, gap = latency["ttft_ms"], latency["gap_ms"]
    return [
        Row(f"{label}: first token, mean", TTFT_MS, first["mean"], mean_ms, "ms"),
        Row(f"{label}: first token, p99", TTFT_MS, first["p99"], p99_ms, "ms"),
        Row(f"{label}: between tokens, mean", GAP_MS, gap["mean"], 0.005 * GAP_MS, "ms"),
        Row(f"{label}: sent late, p99", 0.0, latency["lag_ms"]["p99"], 10.0, "ms"),
    ]


def _server_stall(seconds: float, workers: int | None, quiet: bool) -> list[Row]:
    """The server writes nothing for 2 s: those whose requests were due then waited, and must be in the figures."""
    with running(Script(tokens=TOKENS, freeze=(seconds / 3, STALL_S))) as url:
        measured = _measure(url, 20.0, seconds, workers, quiet, "the server stalls")
        truth = fetch_truth(url)
    waits = sorted((one.written_ns[0] - one.arrived_ns) / MS for one in truth[2:] if len(one.written_ns))
    p99 = percentile(waits, 99)
    first = measured.document["metrics"]["latency"]["ttft_ms"]
    return [Row("server stalls 2 s: first token, p99", p99, first["p99"], 0.1 * p99, "ms")]


def _client_stall(seconds: float, quiet: bool) -> list[Row]:
    """A sending process stands still for 2 s: figures without what it delayed must be the server's."""
    with running(Script(tokens=TOKENS)) as url, _stopped(seconds / 3):
        measured = _measure(url, 20.0, seconds, 2, quiet, "this client stalls")
    first = measured.document["metrics"]["latency"]["ttft_ms"]
    clean = first.get("corrected") or first
    return [
        Row("client stalls 2 s: first token, corrected p99", TTFT_MS, clean["p99"], 0.1 * TTFT_MS, "ms"),
        Row("client stalls 2 s: seen in the plain maximum", STALL_S * 1000, first["max"], 600.0, "ms"),
    ]


@contextlib.contextmanager
def _stopped(after_s: float) -> Iterator[None]:
    """Stops one worker for a while, `after_s` after workers are there."""

    def stop() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.05)
        time.sleep(after_s)
        pid = children[0].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STALL_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    yield
    thread.join()
