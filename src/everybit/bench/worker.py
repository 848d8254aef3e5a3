"""A process that sends its share of the sessions at their times and hands on what came, unread.

Several of them run beside each other: one event loop that sends and reads everything adds its own delays to the first
tokens it measures (Measurement bias, arXiv 2605.24217). A worker therefore reads an answer's text only where the next
turn of its session needs it; times are taken as the bytes come, and all else happens in the main process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection

from everybit.bench.answers import read_answer
from everybit.bench.asks import Asking
from everybit.bench.endpoint import Endpoint
from everybit.bench.http import Client, Exchange, Limits
from everybit.bench.load.workload import Workload
from everybit.bench.loop import exact_loop
from everybit.bench.records import Record, Session, Turn

_BEAT_NS = 20_000_000
_STALL_NS = 100_000_000  # a beat this late: the process, not the server, stood still
_AHEAD = 64  # sessions whose requests are written before their time
_SPARE_EVENTS = 256  # a stream may have more events than 8 a token and these, not more

_Ready = tuple[Session, Iterator[Turn], Turn, bytes]  # with the first turn, the others, and its request


@dataclass(frozen=True)
class Job:
    """What all workers of a run share."""

    endpoint: Endpoint
    path: str
    asking: Asking
    workload: Workload
    limits: Limits
    reuse: bool = True
    stop_ns: int | None = None  # no request is sent later than this
    drain_ns: int = 60_000_000_000


@dataclass(frozen=True)
class Report:
    """What a worker says: ended exchanges, its stalls (begin, end), and how many requests run."""

    worker: int
    ended: list[tuple[Record, Exchange]]
    stalls: list[tuple[int, int]]
    running: int
    last: bool = False
    problem: str = ""


def work(job: Job, worker: int, workers: int, pipe: Connection) -> None:
    """The process: says that it is ready, waits for the start time, ends with a last report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells us
    _raise_file_limit()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            with asyncio.Runner(loop_factory=exact_loop) as loop:
                loop.run(_Worker(job, worker, workers, pipe).run())
        except Exception as error:
            pipe.send(Report(worker, [], [], 0, last=True, problem=f"{type(error).__name__}: {error}"))


def _raise_file_limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Worker:
    def __init__(self, job: Job, worker: int, workers: int, pipe: Connection) -> None:
        self._job, self._worker, self._workers, self._pipe = job, worker, workers, pipe
        self._client = Client(job.endpoint, job.limits, job.reuse)
        self._ended: list[tuple[Record, Exchange]] = []
        self._stalls: list[tuple[int, int]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._count = 0
        self._begin_ns = 0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        sessions = self._job.workload.sessions(self._worker, self._workers)
        ready = self._prepared(sessions)
        ahead = deque(islice(ready, _AHEAD))
        self._pipe.send("ready")
        told: asyncio.Queue[object] = asyncio.Queue()
        loop.add_reader(self._pipe.fileno(), self._hear, told)
        self._begin_ns = await told.get()  # type: ignore[assignment]
        if not isinstance(self._begin_ns, int):
            return
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the midst of a stream would be measured; records have no cycles
        helpers = [asyncio.create_task(self._beat()), asyncio.create_task(self._tell())]
        listener = asyncio.create_task(self._listen(told))
        try:
            await self._send_all(ahead, ready)
            await self._drain()
        finally:
            self._client.close()
            await asyncio.sleep(0)  # what was open ends by itself, with the pieces that it has
            for task in (*helpers, listener, *self._running):
                task.cancel()
            await asyncio.gather(*helpers, listener, *self._running, return_exceptions=True)
            self._client.close()
        self._pipe.send(self._report(last=True))

    def _hear(self, told: asyncio.Queue[object]) -> None:
        try:
            told.put_nowait(self._pipe.recv())
        except (EOFError, OSError):  # the main process is gone
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            told.put_nowait(None)

    async def _listen(self, told: asyncio.Queue[object]) -> None:
        await told.get()  # whatever it is, it means stop
        self._stop.set()

    # --- sending
    def _prepared(self, sessions: Iterator[Session]) -> Iterator[_Ready]:
        """Sessions with their first request written: at its time nothing is left to do but to send it."""
        for session in sessions:
            turns = iter(session.turns)
            turn = next(turns, None)
            if turn is not None:
                yield session, turns, turn, self._job.asking.body(session, turn)

    async def _send_all(self, ahead: deque[_Ready], ready: Iterator[_Ready]) -> None:
        while ahead and not self._stop.is_set():
            due = ahead[0][0].at_ns
            while len(ahead) < _AHEAD and self._now() < due - 2_000_000:  # while there is time, write the next ones
                await asyncio.sleep(0)  # a long prompt takes milliseconds: what is due goes first, what came is noted
                following = next(ready, None)
                if following is None:
                    break
                ahead.append(following)
            if not await self._until(due):
                return
            task = asyncio.create_task(self._session(*ahead.popleft()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            if not ahead and (following := next(ready, None)) is not None:
                ahead.append(following)

    async def _drain(self) -> None:
        """Waits for what runs, no longer than the drain allows after the last that may be sent."""
        stop = asyncio.create_task(self._stop.wait())
        while self._running and not self._stop.is_set():
            left = None
            if self._job.stop_ns is not None:
                left = (self._job.stop_ns + self._job.drain_ns - self._now()) / 1e9
                if left <= 0:
                    break
            await asyncio.wait((*self._running, stop), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()

    async def _session(self, session: Session, turns: Iterator[Turn], turn: Turn, body: bytes) -> None:
        intended, place, past = session.at_ns, 0, []
        while True:
            record = Record(
                number=-1,
                session=session.number,
                turn=place,
                worker=self._worker,
                intended_ns=intended,
                wanted_prompt=turn.prompt_tokens,
                wanted_output=turn.output_tokens,
                model=self._job.asking.model,
            )
            exchange = await self._ask(record, body, turn)
            following = next(turns, None)
            if following is None or self._stop.is_set():
                return
            if session.history:
                read_answer(record, exchange, self._job.asking.api, None, self._begin_ns)
                if record.error:
                    return  # a conversation cannot go on without its answer
                past.append((turn.text, record.text))
            turn, place = following, place + 1
            body = self._job.asking.body(session, turn, past)
            intended = exchange.end_ns - self._begin_ns + turn.think_ns
            if exchange.error or exchange.status != 200:
                intended += 100_000_000  # a user whose request failed does not try again ten thousand times a second
            if self._past_stop(intended) or not await self._until(intended):
                return

    async def _ask(self, record: Record, body: bytes, turn: Turn) -> Exchange:
        record.sent_ns = self._now()
        most = 8 * turn.output_tokens + _SPARE_EVENTS
        self._count += 1
        try:
            exchange = await self._client.send("POST", self._job.path, body, most)
        except asyncio.CancelledError:  # it was still connecting
            begin_ns, end_ns = self._begin_ns + record.sent_ns, time.perf_counter_ns()
            self._ended.append((record, Exchange(begin_ns, end_ns=end_ns, error="cancelled")))
            raise
        finally:
            self._count -= 1
        self._ended.append((record, exchange))
        return exchange

    # --- time
    def _now(self) -> int:
        return time.perf_counter_ns() - self._begin_ns

    def _past_stop(self, when_ns: int) -> bool:
        return self._job.stop_ns is not None and when_ns >= self._job.stop_ns

    async def _until(self, when_ns: int) -> bool:
        """Waits; False where the run is stopped before."""
        while (left := when_ns - self._now()) > 0:
            if self._stop.is_set():
                return False
            await asyncio.sleep(min(left / 1e9, 0.25))
        return not self._stop.is_set()

    async def _beat(self) -> None:
        """Notes when this process stood still, and ends what takes too long."""
        due, reap = self._now() + _BEAT_NS, 0
        while True:
            await asyncio.sleep(max(0, due - self._now()) / 1e9)
            now = self._now()
            if now - due > _STALL_NS:
                self._stalls.append((due, now))
                reap = now + _STALL_NS  # what came meanwhile is read first
            due = max(due + _BEAT_NS, now)
            if now > reap:
                self._client.reap()
                reap = now + 250_000_000

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            self._pipe.send(self._report())

    def _report(self, last: bool = False) -> Report:
        ended, self._ended = self._ended, []
        stalls, self._stalls = self._stalls, []
        return Report(self._worker, ended, stalls, self._count, last)
