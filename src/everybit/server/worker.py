"""The thread that runs the models: requests go in, tokens come out, and nothing else touches a batcher.

Requests come from an event loop, through `Worker`; their tokens go back to it into an `Inbox`, all of a step at once.
Several models take turns, a step each, so that they do not fight for the processor.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everybit.batching.batcher import Batcher, Event
from everybit.batching.fluidity import Target
from everybit.batching.scheduler import Counts, Request
from everybit.batching.speculation import Speculated
from everybit.engine.plan import Precision
from everybit.engine.sampling import Constraint, Sampling
from everybit.errors import EverybitError, ModelError

LOG = logging.getLogger("everybit.server")
IDLE_CHECK_S = 1.0  # without work the block accounts are checked, once
FAILURES = 3  # steps in a row that fail before everything that runs is given up


@dataclass(frozen=True)
class Job:
    """One sequence for a batcher; as Batcher.submit takes it."""

    request: Request
    sampling: Sampling
    stop_ids: Collection[int] = ()
    target: Target | None = None
    constraint: Constraint | None = None
    top: int = -1


@dataclass(frozen=True)
class Load:
    """A glance at one batcher: its counts, the precision of `auto` requests, and what speculation did."""

    counts: Counts
    bits: int
    speculated: Speculated


class Inbox:
    """Where the events of one client's sequences arrive. Belongs to an event loop."""

    def __init__(self) -> None:
        self._events: deque[Event | BaseException] = deque()
        self._arrived = asyncio.Event()
        self.closed = False

    def put(self, events: Sequence[Event | BaseException]) -> None:
        self._events.extend(events)
        self._arrived.set()

    def close(self) -> None:
        """Nobody reads it any more; a reader that waits gets nothing."""
        self.closed = True
        self._arrived.set()

    async def get(self) -> list[Event]:
        """All that is there, at least one event; empty where the inbox was closed. Raises: what the worker put in"""
        await self._arrived.wait()
        self._arrived.clear()
        if self.closed:
            return []
        found: list[Event] = []
        while self._events:
            one = self._events.popleft()
            if isinstance(one, BaseException):
                if not found:
                    raise one
                self._events.appendleft(one)  # after what came before it
                self._arrived.set()
                break
            found.append(one)
        return found


class Worker:
    """Runs `batchers`, each under a name. `on_step` is called in its thread after each step with the step's events."""

    def __init__(
        self,
        batchers: dict[str, Batcher],
        loop: asyncio.AbstractEventLoop,
        on_step: Callable[[str, Sequence[Event]], None] = lambda name, events: None,
    ) -> None:
        self._batchers, self._loop, self._on_step = batchers, loop, on_step
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._inboxes: dict[Hashable, tuple[str, Inbox]] = {}
        self._failures = dict.fromkeys(batchers, 0)
        self._stopping = self._broken = False
        self._thread = threading.Thread(target=self._run, name="everybit-worker", daemon=True)
        self.counts: dict[str, Load] = {}  # as of the last step or command, for any thread
        self._count()

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._broken

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step that runs. What was asked for meanwhile is not answered: cancel it first."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, name: str, job: Job, inbox: Inbox) -> None:
        """A refusal by the batcher comes through the inbox."""
        self._do(lambda: self._submit(name, job, inbox))

    def cancel(self, name: str, ids: Sequence[Hashable]) -> None:
        self._do(lambda: self._cancel(name, ids))

    async def set_bits(self, name: str, id: Hashable, bits: Precision, recompute: bool) -> bool:
        """From the next step on. Raises: as Batcher.set_bits"""
        return bool(await self.ask(lambda: self._batchers[name].set_bits(id, bits, recompute)))

    async def ask(self, question: Callable[[], Any]) -> Any:
        """What `question` returns (or raises) between two steps."""
        answer: asyncio.Future[Any] = self._loop.create_future()

        def run() -> None:
            try:
                found, error = question(), None
            except BaseException as caught:
                found, error = None, _ordinary(caught)
            self._loop.call_soon_threadsafe(_settle, answer, found, error)

        self._do(run)
        return await answer

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _submit(self, name: str, job: Job, inbox: Inbox) -> None:
        if inbox.closed:
            return
        if self._broken:
            self._loop.call_soon_threadsafe(inbox.put, [_broken()])
            return
        self._inboxes[job.request.id] = (name, inbox)
        try:
            self._batchers[name].submit(
                job.request, job.sampling, job.stop_ids, target=job.target, constraint=job.constraint, top=job.top
            )
        except BaseException as error:
            if not isinstance(error, EverybitError):
                LOG.error("a request could not be taken: %s", traceback.format_exc())
            self._tell([(job.request.id, _ordinary(error))])

    def _cancel(self, name: str, ids: Sequence[Hashable]) -> None:
        for id in ids:
            self._inboxes.pop(id, None)
            self._batchers[name].cancel(id)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            LOG.critical("the models run no more: %s", traceback.format_exc())
            self._broken = True
            self._tell([(id, _broken()) for id in self._inboxes])
        while not self._stopping:  # whoever still asks is refused
            self._obey()
            self._wake.wait()
            self._wake.clear()

    def _obey(self) -> None:
        while self._commands:
            try:
                self._commands.popleft()()
            except BaseException:
                LOG.error("a command failed: %s", traceback.format_exc())

    def _work(self) -> None:
        """Until it is to stop. Raises: what nobody expected"""
        idle = False
        while not self._stopping:
            self._obey()
            self._count()
            busy = False
            for name, batcher in self._batchers.items():
                if batcher.busy:
                    busy = True
                    self._step(name, batcher)
            if busy or self._prepare():
                idle = False
                continue
            self._wake.wait(None if idle else IDLE_CHECK_S)
            if not idle and not self._wake.is_set():
                idle = True
                self._check()
            self._wake.clear()

    def _prepare(self) -> bool:
        """Makes one more precision ready; false where all are that requests are expected to need."""
        for name, batcher in self._batchers.items():
            try:
                if batcher.prepare_next():
                    return True
            except EverybitError as error:
                LOG.error("%s: %s", name, error)
        return False

    def _step(self, name: str, batcher: Batcher) -> None:
        try:
            events = batcher.step()
            self._failures[name] = 0
        except BaseException as error:
            LOG.error("a step of %s failed: %s", name, traceback.format_exc())
            self._failures[name] += 1
            if isinstance(error, EverybitError) or self._failures[name] >= FAILURES:
                self._give_up(name, _ordinary(error))
            return
        try:
            self._on_step(name, events)
        except Exception:
            LOG.error("a step of %s was not counted: %s", name, traceback.format_exc())
        if events:
            self._tell([(event.id, event) for event in events])

    def _give_up(self, name: str, error: Exception) -> None:
        """Every request of a model is told why it ends."""
        ids = [id for id, (owner, _) in self._inboxes.items() if owner == name]
        self._tell([(id, error) for id in ids])
        for id in ids:
            self._batchers[name].cancel(id)
        self._failures[name] = 0

    def _count(self) -> None:
        self.counts = {
            name: Load(batcher.counts(), batcher.bits, batcher.speculated()) for name, batcher in self._batchers.items()
        }

    def _check(self) -> None:
        for name, batcher in self._batchers.items():
            try:
                batcher.check()
            except EverybitError as error:
                LOG.critical("%s: %s", name, error)

    def _tell(self, news: Sequence[tuple[Hashable, Event | BaseException]]) -> None:
        """Puts a step's events into their inboxes, in the event loop, each inbox once."""
        parcels: dict[Inbox, list[Event | BaseException]] = {}
        for id, one in news:
            found = self._inboxes.get(id)
            if found is None:
                continue
            parcels.setdefault(found[1], []).append(one)
            if isinstance(one, BaseException) or one.reason:
                del self._inboxes[id]
        if parcels:
            self._loop.call_soon_threadsafe(_deliver, parcels)


def _ordinary(error: BaseException) -> Exception:
    """A panic of a library, or a call of exit, is no Exception: in an event loop it would end the server."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def _broken() -> EverybitError:
    return ModelError("the models run no more: the server's log says why")


def _deliver(parcels: Mapping[Inbox, Sequence[Event | BaseException]]) -> None:
    for inbox, events in parcels.items():
        inbox.put(events)


def _settle(answer: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(found)
