"""One measured run from its settings to its document: everything the commands build on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from everybit.bench.answers import Tokenize
from everybit.bench.endpoint import PATHS
from everybit.bench.energy import Meter, Power, carbon, energy, find_meter
from everybit.bench.http import Limits
from everybit.bench.load.arrivals import Arrivals, Users
from everybit.bench.load.workload import Workload
from everybit.bench.metrics import measure
from everybit.bench.preflight import Known
from everybit.bench.progress import Display
from everybit.bench.records import SECOND, Record
from everybit.bench.result import run_document, validity
from everybit.bench.runner import Outcome, Progress, default_workers, run
from everybit.bench.targets import Document, Targets, Window
from everybit.bench.worker import Job
from everybit.errors import SourceError


@dataclass(frozen=True)
class Settings:
    """How runs are made, whatever their load. `idle`: what the machine uses at rest, where its energy can be read."""

    known: Known
    targets: Targets
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    reuse: bool = True
    warmup_ns: int = 0
    drain_ns: int = 60 * SECOND
    tokenize: Tokenize | None = None
    meter: Meter = field(default_factory=find_meter)
    idle: Power | None = None
    intensity: str | None = None
    quiet: bool = False
    command: Sequence[str] = ()

    def at_model(self, model: str) -> Settings:
        return replace(self, known=replace(self.known, asking=replace(self.known.asking, model=model)))


@dataclass(frozen=True)
class Measured:
    document: Document
    records: list[Record]
    interrupted: bool


def measure_run(settings: Settings, workload: Workload, title: str) -> Measured:
    """Raises: SourceError"""
    known = settings.known
    if workload.duration_ns is not None and settings.warmup_ns > workload.duration_ns:
        raise _no_window(settings.warmup_ns, workload.duration_ns)
    job = Job(
        known.endpoint,
        PATHS[known.asking.api],
        known.asking,
        workload,
        settings.limits,
        settings.reuse,
        stop_ns=None if workload.kind == "conversations" else workload.duration_ns,  # those end with their turns
        drain_ns=settings.drain_ns,
    )
    workers = settings.workers or _workers(workload)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    expected_s = None if workload.duration_ns is None else workload.duration_ns / SECOND
    meter = _Metered(settings)
    with Display(title, expected_s, workload.count, settings.quiet) as display:

        def show(progress: Progress) -> None:
            meter.tick()
            display(progress)

        outcome = run(job, workers, settings.tokenize, show)
    used = meter.end(outcome.records)
    for record in outcome.records:
        record.detail, record.text = known.endpoint.masked(record.detail), known.endpoint.masked(record.text)
    window = _window(settings, workload, outcome)
    reasons = list(outcome.problems)
    try:
        metrics = measure(outcome.records, window, settings.targets)
    except SourceError as error:
        metrics, reasons = None, [*reasons, str(error)]
    judged = validity(outcome.records, window, outcome.clock_jump_ns, reasons)
    judged["warnings"] += [*known.notes, *(["interrupted: measured until then"] if outcome.interrupted else [])]
    document = run_document(
        command=settings.command,
        created=created,
        endpoint={
            "url": known.endpoint.url,
            "api": known.asking.api,
            "model": known.asking.model,
            "server": known.server,
            "chars_per_token": known.chars_per_token,
            "extra_tokens": known.extra_tokens,
        },
        load={**workload.describe(), "workers": workers, "connections": "kept" if settings.reuse else "new each"},
        targets=settings.targets,
        window=window,
        records=outcome.records,
        metrics=metrics,
        validity=judged,
        energy=used,
    )
    return Measured(document, outcome.records, outcome.interrupted)


def _workers(workload: Workload) -> int:
    if isinstance(workload.starts, Users):
        return default_workers(None, workload.starts.count)
    if workload.count and workload.duration_ns:
        return default_workers(workload.count / (workload.duration_ns / SECOND), None)
    return default_workers(None, None)


def _window(settings: Settings, workload: Workload, outcome: Outcome) -> Window:
    """From the warm-up to when no more was to be sent, or to the last end where requests are counted."""
    last = max((record.intended_ns for record in outcome.records), default=0) + 1
    ended = max((record.end_ns or 0 for record in outcome.records), default=0)
    end = workload.duration_ns or max(last, ended)
    if isinstance(workload.starts, tuple | Arrivals):  # the last one may be due at the end itself
        end = max(end, last)
    if outcome.interrupted:
        end = max(min(end, outcome.ended_ns), 1)
        return Window(min(settings.warmup_ns, end - 1), end)
    if settings.warmup_ns >= end:
        raise _no_window(settings.warmup_ns, end)
    return Window(settings.warmup_ns, end)


def _no_window(warmup_ns: int, end_ns: int) -> SourceError:
    return SourceError(
        f"a warm-up of {warmup_ns / SECOND:g} s in a run of {end_ns / SECOND:.1f} s: expected a longer run"
    )


class _Metered:
    """The energy of a run, where it can be read."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._meter = settings.meter
        self._start = self._meter.read()
        self._next_ns = time.perf_counter_ns()

    def tick(self) -> None:
        """Counters go round: they are read every few seconds."""
        if (now := time.perf_counter_ns()) >= self._next_ns:
            self._meter.read()
            self._next_ns = now + 5 * SECOND

    def end(self, records: Sequence[Record]) -> dict[str, Any]:
        used = energy(
            self._meter,
            self._start,
            self._meter.read(),
            idle=self._settings.idle,
            output_tokens=sum(record.output_tokens for record in records),
            local=self._settings.known.endpoint.local,
        )
        grams = carbon(used, self._settings.intensity) if self._settings.intensity else None
        return {**asdict(used), "carbon": None if grams is None else asdict(grams)}
