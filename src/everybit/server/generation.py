"""One client's request while it runs: its sequences in the worker, and the pieces of text that come of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from everybit.batching.batcher import Event
from everybit.batching.fluidity import Target
from everybit.batching.precision import Auto
from everybit.batching.scheduler import Request
from everybit.engine.plan import Precision
from everybit.engine.sampling import Choice, Sampling
from everybit.errors import BusyError, RequestError
from everybit.server.grammar import Grammar
from everybit.server.problems import Problem
from everybit.server.served import Served
from everybit.server.text import Written
from everybit.server.worker import Inbox, Job, Worker


@dataclass(frozen=True)
class Ask:
    """What a request for text comes down to. `top` as Sampler.choose takes it; `scores`: of the prompt, too."""

    served: Served
    prompts: Sequence[tuple[int, ...]]
    n: int
    max_tokens: int | None
    bits: Precision | Auto
    sampling: Sampling
    stops: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    grammar: Grammar | None = None
    shown: Collection[int] = ()
    top: int = -1
    scores: bool = False
    tenant: Any = None
    priority: int = 0
    target: Target | None = None


@dataclass
class Piece:
    """What is new in one choice. `prompt`: log-probabilities of its prompt, in the first piece where it scores."""

    index: int
    text: str = ""
    bits: list[int | str] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    prompt: Sequence[Choice] = ()
    finish: str | None = None


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    tokens_by_bits: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "tokens_by_bits": self.tokens_by_bits,
        }


class Live:
    """The generations of a server that run, and the limits for them."""

    def __init__(self, worker: Worker, timeout_s: float) -> None:
        self.worker, self.timeout_s = worker, timeout_s
        self.generations: dict[str, Generation] = {}

    def sequences(self, served: Served) -> int:
        return sum(len(g.running) for g in self.generations.values() if g.ask.served is served)

    def end(self, problem: Problem) -> None:
        """Ends everything that runs with an error."""
        for generation in list(self.generations.values()):
            generation.fail(problem)


class Generation:
    """Choices of one or more prompts. `id` is the response's; `key` whose it is.

    The first choice of a prompt runs ahead: the others find the prompt in the cache.
    """

    def __init__(self, live: Live, ask: Ask, id: str, key: str) -> None:
        self.ask, self.id, self.key = ask, id, key
        self.usage = Usage(prompt_tokens=sum(len(p) for p in ask.prompts))
        self.running: set[int] = set()
        self.began = self.complete = False  # complete: every choice came to its end
        self.first_s: float | None = None  # from the beginning to the first token
        self.seconds = 0.0  # from the beginning to the end
        self._live, self._inbox = live, Inbox()
        self._begin = time.perf_counter()
        self._written: dict[int, Written] = {}
        self._jobs = [self._job(prompt, choice) for prompt in ask.prompts for choice in range(ask.n)]
        self._seen_prompts: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def new_id(kind: str) -> str:
        return f"{kind}-{uuid.uuid4().hex}"

    def _job(self, prompt: tuple[int, ...], choice: int) -> Job:
        ask = self.ask
        more = ask.served.runtime.context - len(prompt) if ask.max_tokens is None else ask.max_tokens
        sampling = replace(ask.sampling, seed=(ask.sampling.seed + choice) % 2**63)
        request = Request(
            None,
            prompt,
            max(more, 1),
            ask.bits,
            tenant=ask.tenant,
            priority=ask.priority,
            scores=ask.scores and choice == 0,
        )
        return Job(request, sampling, ask.stop_ids, ask.target, None, ask.top)

    def start(self) -> None:
        """Hands the sequences over. Raises: RequestError, ModelError, ContextError, BusyError; then nothing runs"""
        served = self.ask.served
        for job in self._jobs[:: self.ask.n]:
            served.batcher.require_fit(job.request)
        if any(token >= served.runtime.vocabulary for token, _ in self.ask.sampling.logit_bias):
            raise RequestError("logit_bias", f"expected token ids below {served.runtime.vocabulary}")
        active, most, more = self._live.sequences(served), served.batcher.capacity, len(self._jobs)
        if more > most:
            raise RequestError("n", f"makes {more} sequences of this request, the most that may run and wait is {most}")
        if active + more > most:
            raise BusyError(f"{active} sequences run or wait and {more} more came, the most is {most}: try again later")
        self.running, self.began = set(range(len(self._jobs))), True
        self._live.generations[self.id] = self
        loop = asyncio.get_running_loop()
        late = Problem(504, f"not done within {self._live.timeout_s:g} s, the most a request may take", code="timeout")
        self._timer = loop.call_later(self._live.timeout_s, self.fail, late)
        for index in range(0, len(self._jobs), self.ask.n):
            self._submit(index)

    def _submit(self, index: int) -> None:
        job, ask = self._jobs[index], self.ask
        self._written[index] = Written(ask.served.tokenizer, job.request.prompt, ask.stops, ask.shown)
        constraint = ask.grammar.start() if ask.grammar else None
        job = replace(job, request=replace(job.request, id=(self.id, index)), constraint=constraint)
        self._live.worker.submit(ask.served.name, job, self._inbox)

    def fail(self, problem: BaseException) -> None:
        self._inbox.put([problem])

    def abandon(self) -> None:
        """The client is gone."""
        self._inbox.close()

    async def set_bits(self, bits: Precision, recompute: bool) -> int:
        """All choices that run, from the next step on. Returns how many. Raises: as Batcher.set_bits"""
        worker, name = self._live.worker, self.ask.served.name
        self._jobs = [replace(job, request=replace(job.request, bits=bits)) for job in self._jobs]  # those to come
        return sum([await worker.set_bits(name, (self.id, i), bits, recompute) for i in sorted(self.running)])

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What arrives, as it arrives; ends with the last choice, or early where the client is gone.

        Raises: whatever went wrong; end it with `close` in any case
        """
        while self.running:
            events = await self._inbox.get()
            if not events:
                return
            if self.first_s is None:
                self.first_s = time.perf_counter() - self._begin
            found: dict[int, Piece] = {}
            for event in events:
                index = event.id[1]  # type: ignore[index]
                if index in self.running:
                    self._add(event, found.setdefault(index, Piece(index)))
            if found:
                yield list(found.values())

    def _add(self, event: Event, piece: Piece) -> None:
        if event.reason == "error":
            raise Problem(500, event.problem, code="model_failed")
        if piece.index % self.ask.n == 0:  # the prompt counts once, too
            self.usage.cached_tokens += event.cached
        first = piece.index - piece.index % self.ask.n
        if first not in self._seen_prompts:
            self._seen_prompts.add(first)
            for index in range(first + 1, first + self.ask.n):
                self._submit(index)
        written = self._written[piece.index]
        if event.prompt:
            piece.prompt = event.prompt
        if event.token is not None:
            piece.text += written.add(event.token)
            label = self.ask.served.label(event.bits)
            piece.bits.append(label)
            self.usage.completion_tokens += 1
            self.usage.tokens_by_bits[str(label)] = self.usage.tokens_by_bits.get(str(label), 0) + 1
            if event.choice is not None and self.ask.top >= 0:
                piece.choices.append(event.choice)
        if event.reason or written.stopped:
            if not written.stopped:
                piece.text += written.finish()
            piece.finish = "stop" if written.stopped else event.reason
            self.running.discard(piece.index)
            if not event.reason:
                self._live.worker.cancel(self.ask.served.name, [(self.id, piece.index)])

    def close(self) -> None:
        """Whatever still runs is cancelled before the next step."""
        if self._timer is not None:
            self._timer.cancel()
        self.seconds = time.perf_counter() - self._begin
        self._inbox.close()
        self.complete = self.began and not self.running
        if self.running:
            self._live.worker.cancel(self.ask.served.name, [(self.id, index) for index in self.running])
        self.running = set()
        self._live.generations.pop(self.id, None)
