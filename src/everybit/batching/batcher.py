"""The scheduler and a native model together: requests in, tokens out, one step at a time.

A step runs the model once for each precision that occurs in it: a precision is a property of the whole pass over the
weights. One thread at a time; a server puts a queue before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from everybit.batching.fluidity import Pace, Target
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Counts, Part, Request, Scheduler
from everybit.engine.generate import choose_bits
from everybit.engine.native import BLOCK_TOKENS, make_step
from everybit.engine.plan import Precision
from everybit.engine.runtime import Runtime, blocks_of
from everybit.engine.sampling import F32, Choice, Constraint, Sampler, Sampling, score
from everybit.errors import ModelError, PrecisionError, RequestError

TARGET = Target(first_ns=1_000_000_000, gap_ns=100_000_000)  # a reader's pace: ten tokens a second


@dataclass(frozen=True)
class Event:
    """A token of a request and the precision it was computed at.

    `reason` where the request has ended: at a stop token, which is left out, at the end of its grammar, at its length,
    or because no token could be chosen, and `problem` says why. `choice` holds log-probabilities where they were asked
    for; `prompt`, in the first event of a request that scores, those of its prompt's tokens but the first.
    """

    id: Hashable
    token: int | None
    bits: Hashable
    reason: Literal["", "stop", "length", "error"]
    problem: str = ""
    choice: Choice | None = None
    prompt: Sequence[Choice] = ()


@dataclass
class _Stream:
    sampler: Sampler
    stop_ids: Collection[int]
    left: int
    auto: Auto | None
    pace: Pace
    top: int
    prompt: tuple[int, ...]
    scored: dict[int, Choice] = field(default_factory=dict)  # by place in the prompt


class Batcher:
    """All KV blocks of `runtime` are shared by the requests; its own sequences are not to be used meanwhile.

    `target` is what every stream is held to, and what `auto` requests lower their precision for.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        budget: int = 512,
        most: int = 64,
        queue: int = 1024,
        target: Target = TARGET,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._runtime, self._target, self._clock = runtime, target, clock
        self._ladder, self._costs = Ladder(runtime.bits or (0,)), Costs()
        self._scheduler = Scheduler(
            blocks=blocks_of(runtime.context) * runtime.sequences,
            block_tokens=BLOCK_TOKENS,
            context=runtime.context,
            budget=min(budget, runtime.native.most_tokens),
            most=min(most, budget, runtime.native.most_tokens),
            queue=queue,
        )
        self._streams: dict[Hashable, _Stream] = {}

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        *,
        target: Target | None = None,
        constraint: Constraint | None = None,
        top: int = -1,
    ) -> None:
        """Its `bits` are a precision, a plan or `Auto`. Verifies what a precision needs, at its first use.

        `target` in place of the batcher's own; `top` as Sampler.choose takes it.

        Raises: RequestError, BusyError, PrecisionError, ModelError (tokens), FormatError, ChecksumError
        """
        self._runtime.check_tokens(request.prompt)
        auto = request.bits if isinstance(request.bits, Auto) else None
        if auto is not None and not self._runtime.bits:
            raise PrecisionError("auto was asked of float weights, which have one precision: leave bits out")
        needed: Sequence[Precision]
        if auto is None:
            needed = [choose_bits(self._runtime, request.bits)]  # type: ignore[arg-type]
        else:
            needed = self._ladder.allowed(auto)
            request = replace(request, bits=self._ladder.within(auto))
        if any(token >= self._runtime.vocabulary for token, _ in sampling.logit_bias):
            raise RequestError("logit_bias", f"expected token ids below {self._runtime.vocabulary}")
        pace = Pace(target or self._target, self._clock())
        sampler = Sampler(sampling, request.prompt, constraint)
        stream = _Stream(sampler, stop_ids, request.max_tokens, auto, pace, top, request.prompt)
        self._scheduler.submit(request)
        try:
            for bits in needed:
                self._runtime.native.prepare(bits)
        except BaseException:
            self._scheduler.cancel(request.id)
            raise
        self._streams[request.id] = stream

    def cancel(self, id: Hashable) -> bool:
        """Between steps. False where it has ended."""
        self._streams.pop(id, None)
        return self._scheduler.cancel(id)

    def set_bits(self, id: Hashable, bits: Precision) -> bool:
        """From the next step on; an `auto` request is one no longer. False where it has ended.

        Raises: PrecisionError, FormatError, ChecksumError
        """
        self._runtime.native.prepare(choose_bits(self._runtime, bits))
        if id in self._streams:
            self._streams[id].auto = None
        return self._scheduler.set_bits(id, bits)

    def counts(self) -> Counts:
        return self._scheduler.counts()

    def check(self) -> None:
        """That no KV block is lost. Raises: EverybitError"""
        self._scheduler.check()

    def step(self) -> list[Event]:
        """Run what can run. An empty list where nothing is left, or where prompts are not through yet.

        Where the model itself fails nothing has happened: cancel what is to blame, or try again.
        Raises: as Native.run
        """
        parts = self._scheduler.next()
        logits: dict[Hashable, F32] = {}
        for bits in dict.fromkeys(part.bits for part in parts):
            logits |= self._run([part for part in parts if part.bits == bits], bits)
        events = [self._choose(part, logits[part.id]) for part in parts if part.samples]
        self._scheduler.done({event.id: event.token for event in events})
        now = self._clock()
        for event in events:
            self._streams[event.id].pace.token(now)
            if event.reason:
                del self._streams[event.id]
                self._scheduler.cancel(event.id)  # a grammar ends a text before its length does
        self._choose_precision(parts)
        return events

    def pace(self, id: Hashable) -> Pace:
        """How a stream does against its target, while it is there."""
        return self._streams[id].pace

    def _choose_precision(self, parts: Sequence[Part]) -> None:
        """For the next step: one rung for all `auto` requests, within the bounds of each.

        The next step is taken to be like the last, `parts`. A request that waits counts while it can still be in time.
        """
        autos = {id: stream.auto for id, stream in self._streams.items() if stream.auto is not None}
        if not autos:
            return
        bounds = Auto(min(a.floor for a in autos.values()), max(a.ceiling for a in autos.values()))
        ran, now = {part.id for part in parts}, self._clock()
        lowest = self._predict(parts, autos, bounds.floor)
        rooms = [self._streams[id].pace.due_ns - now for id in autos if id in ran]
        rooms += [room for id in autos if id not in ran and (room := self._streams[id].pace.due_ns - now) >= lowest]
        if rooms:
            here, above = (self._predict(parts, autos, bits) for bits in (self._ladder.bits, self._ladder.above))
            self._ladder.step(min(rooms), here, above, bounds)
        for id, auto in autos.items():
            self._scheduler.set_bits(id, self._ladder.within(auto))

    def _predict(self, parts: Sequence[Part], autos: Mapping[Hashable, Auto], rung: int) -> float:
        """Nanoseconds of a step of these parts, one pass for each precision, with `auto` requests at `rung`."""
        tokens: dict[Hashable, int] = {}
        for part in parts:
            bits = self._ladder.within(autos[part.id], rung) if part.id in autos else part.bits
            tokens[bits] = tokens.get(bits, 0) + len(part.tokens)
        return sum(self._costs.predict(bits, n) for bits, n in tokens.items() if isinstance(bits, int))

    def _run(self, parts: list[Part], bits: Hashable) -> dict[Hashable, F32]:
        """The logits f32[V] of the parts that sample."""
        pieces = [(np.asarray(p.tokens, np.int32), p.past, np.asarray(p.blocks, np.int32)) for p in parts]
        ends = np.cumsum([len(p.tokens) for p in parts]).tolist()
        rows_of = [
            range(end - len(p.tokens), end) if p.scores else range(end - p.samples, end)
            for p, end in zip(parts, ends, strict=True)
        ]
        step = make_step(pieces, [row for wanted in rows_of for row in wanted])
        begin = self._clock()
        rows = self._runtime.native.run(step, bits)  # type: ignore[arg-type]
        if isinstance(bits, int):
            self._costs.note(bits, sum(len(p.tokens) for p in parts), self._clock() - begin)
        logits, first = {}, 0
        for part, wanted in zip(parts, rows_of, strict=True):
            mine, first = rows[first : first + len(wanted)], first + len(wanted)
            if part.scores:
                self._score(part, mine)
            if part.samples:
                logits[part.id] = mine[-1]
        return logits

    def _score(self, part: Part, rows: F32) -> None:
        """What a part of a prompt says of the tokens that follow its own. Shapes: rows f32[len(part.tokens), V]"""
        stream = self._streams[part.id]
        for place, row in enumerate(rows, part.past + 1):
            if place < len(stream.prompt):
                stream.scored[place] = score(row, stream.prompt[place], max(stream.top, 0))

    def _choose(self, part: Part, logits: F32) -> Event:
        stream = self._streams[part.id]
        prompt, stream.scored = [stream.scored[i] for i in sorted(stream.scored)], {}
        try:
            choice = stream.sampler.choose(logits, stream.top)
            if choice.token in stream.stop_ids:
                return Event(part.id, None, part.bits, "stop", prompt=prompt)
            constraint = stream.sampler.constraint
            complete = constraint is not None and constraint.complete
        except ModelError as error:
            return Event(part.id, None, part.bits, "error", str(error))
        stream.left -= 1
        reason: Literal["", "stop", "length"] = "stop" if complete else "" if stream.left else "length"
        return Event(part.id, choice.token, part.bits, reason, choice=choice, prompt=prompt)
