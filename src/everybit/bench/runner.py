"""One measured run: starts the workers, gathers what they saw, reads the answers, shows how it goes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import FrameType

from everybit.bench.answers import Tokenize, read_answer
from everybit.bench.records import Record
from everybit.bench.worker import Job, Report, work
from everybit.errors import SourceError

_START_S = 60.0


@dataclass
class Outcome:
    """What a run gave. `stalls` are (worker, begin, end) in ns from the start when a worker itself stood still."""

    records: list[Record] = field(default_factory=list)
    stalls: list[tuple[int, int, int]] = field(default_factory=list)
    began_wall_s: float = 0.0
    clock_jump_ns: int = 0
    ended_ns: int = 0
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass
class Progress:
    """How a run stands: seconds since its start, requests that run, records so far."""

    seconds: float
    running: int
    records: list[Record]


def run(
    job: Job,
    workers: int,
    tokenize: Tokenize | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Runs `job`. Ctrl-C ends it early and keeps what was measured. Raises: SourceError if a worker fails"""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for worker in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(job, worker, workers, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            if not pipe.poll(_START_S):
                raise SourceError(f"a worker process was not ready in {_START_S:g} s")
            _receive_ready(pipe)
        with _interrupts() as interrupted:
            return _gather(job, pipes, tokenize, show, interrupted)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _receive_ready(pipe: Connection) -> None:
    try:
        said = pipe.recv()
    except EOFError:
        raise SourceError("a worker process ended before it was ready; run with --workers 1 --debug") from None
    if isinstance(said, Report):
        raise SourceError(f"a worker process failed: {said.problem}")


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Is set by Ctrl-C or SIGTERM, which would cut a worker's message in two if it were raised; a second one is."""
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():  # no other one hears of it
        yield pressed
        return
    before = [(one, signal.signal(one, note)) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield pressed
    finally:
        for one, handler in before:
            signal.signal(one, handler)


def _gather(
    job: Job,
    pipes: list[Connection],
    tokenize: Tokenize | None,
    show: Callable[[Progress], None],
    interrupted: threading.Event,
) -> Outcome:
    begin_ns = time.perf_counter_ns() + 100_000_000
    outcome = Outcome(began_wall_s=time.time() + 0.1)
    for pipe in pipes:
        pipe.send(begin_ns)
    open_pipes, running, problems = set(pipes), dict.fromkeys(range(len(pipes)), 0), outcome.problems
    while open_pipes:
        for ready in wait(list(open_pipes), timeout=0.25):
            pipe = next(one for one in open_pipes if one is ready)
            try:
                report: Report = pipe.recv()
            except (EOFError, OSError):  # killed, perhaps in the midst of a message
                open_pipes.discard(pipe)
                problems.append(f"worker {pipes.index(pipe)} ended before the run did")
                continue
            for record, exchange in report.ended:
                read_answer(record, exchange, job.asking.api, tokenize, begin_ns)
                outcome.records.append(record)
            outcome.stalls += [(report.worker, *stall) for stall in report.stalls]
            running[report.worker] = report.running
            if report.problem:
                problems.append(report.problem)
            if report.last:
                open_pipes.discard(pipe)
        show(Progress((time.perf_counter_ns() - begin_ns) / 1e9, sum(running.values()), outcome.records))
        if interrupted.is_set() and not outcome.interrupted:
            outcome.interrupted = True
            for pipe in open_pipes:
                with contextlib.suppress(OSError):
                    pipe.send("stop")
    outcome.ended_ns = time.perf_counter_ns() - begin_ns
    outcome.clock_jump_ns = round((time.time() - outcome.began_wall_s) * 1e9) - outcome.ended_ns
    if problems and not outcome.records:
        raise SourceError(f"the run failed: {problems[0]}")
    outcome.records.sort(key=lambda record: (record.intended_ns, record.session, record.turn))
    for number, record in enumerate(outcome.records):
        record.number = number
        record.stalled = any(
            worker == record.worker and begin < (record.end_ns or end) and end > record.intended_ns
            for worker, begin, end in outcome.stalls
        )
    return outcome


def default_workers(expected_per_s: float | None, users: int | None) -> int:
    """Processes for a load: each reads some thousand pieces a second without its own delays showing."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = max((expected_per_s or 0) / 25, (users or 0) / 25, 1)
    return max(1, min(processors, 8, round(wanted)))
