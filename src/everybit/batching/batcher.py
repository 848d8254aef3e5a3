"""The scheduler and a native model together: requests in, tokens out, one step at a time.

A step runs the model once for each precision that occurs in it: a precision is a property of the whole pass over the
weights. Before that, low precisions may draft tokens for it to verify (speculation.py). One thread at a time; a server
puts a queue before it.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from everybit.batching.fluidity import Pace, Target
from everybit.batching.pacing import TARGET, choose_rung, step_budget
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Counts, Part, Request, Scheduler
from everybit.batching.speculation import Draft, Speculated, Speculation
from everybit.engine.generate import choose_bits
from everybit.engine.native import BLOCK_TOKENS, make_step
from everybit.engine.plan import Precision
from everybit.engine.runtime import Runtime, blocks_of
from everybit.engine.sampling import F32, Choice, Constraint, Sampler, Sampling, score
from everybit.errors import ModelError, PrecisionError, RequestError


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
    cached: int = 0  # tokens of the prompt that were not computed


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

    `speculate`: guess tokens where that is measured to be faster, at `draft_bits` or, None, at precisions found so.
    Tokens stay what they are without it in modes `exact` and `fast`; in `default` the last digits of logits depend on
    the tokens of a step, as they do on other requests. Not for plans and float weights; for a request with penalties
    or a grammar guesses come from its text alone, as their state would have to be copied for each draft.
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
        speculate: bool = True,
        draft_bits: int | None = None,
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
        self._later: deque[Precision] = deque()
        if draft_bits is not None:
            choose_bits(runtime, draft_bits)  # or it is refused
        self._speculation = Speculation(runtime.bits, draft_bits) if speculate and runtime.bits else None

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
            self._prepare(needed)
        except BaseException:
            self._scheduler.cancel(request.id)
            raise
        self._streams[request.id] = stream
        if self._speculation is not None:
            stateless = constraint is None and not sampling.penalizes
            self._speculation.join(request.id, request.prompt, sampling, stateless)

    def prepare_later(self, precisions: Iterable[Precision]) -> None:
        """What `prepare_next` is to make ready, while there is nothing else to do."""
        self._later.extend(precisions)

    def prepare_next(self) -> bool:
        """One of them. False where none is left. Raises: FormatError, ChecksumError"""
        if not self._later:
            return False
        self._runtime.native.prepare(self._later.popleft())
        return True

    def _prepare(self, needed: Sequence[Precision]) -> None:
        """Those, and what may draft for them."""
        for bits in needed:
            self._runtime.native.prepare(bits)
            for draft in self._speculation.candidates(bits) if self._speculation is not None else ():
                self._runtime.native.prepare(draft)

    def cancel(self, id: Hashable) -> bool:
        """Between steps. False where it has ended."""
        self._forget(id)
        return self._scheduler.cancel(id)

    def _forget(self, id: Hashable) -> None:
        self._streams.pop(id, None)
        if self._speculation is not None:
            self._speculation.leave(id)

    def speculated(self) -> Speculated:
        """Tokens guessed and accepted so far."""
        return self._speculation.metrics() if self._speculation is not None else Speculated({}, {}, 0, 1.0)

    @property
    def target(self) -> Target:
        """What streams are held to that bring none of their own."""
        return self._target

    @property
    def bits(self) -> int:
        """The rung that `auto` requests are on."""
        return self._ladder.bits

    @property
    def capacity(self) -> int:
        """Requests that may be there, running or waiting."""
        return self._scheduler.capacity

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._streams)

    def require_fit(self, request: Request) -> None:
        """Any thread may ask. Raises: RequestError and ModelError where `submit` would, whatever else runs"""
        self._runtime.check_tokens(request.prompt)
        self._scheduler.require_fit(request)

    def set_bits(self, id: Hashable, bits: Precision, recompute: bool = False) -> bool:
        """From the next step on; an `auto` request is one no longer. False where it has ended.

        What is in the KV cache stays as other precisions wrote it, or is computed again with `recompute`.

        Raises: PrecisionError, FormatError, ChecksumError
        """
        self._prepare([choose_bits(self._runtime, bits)])
        if id in self._streams:
            self._streams[id].auto = None
        found = self._scheduler.set_bits(id, bits)
        if recompute:
            self._scheduler.recompute(id)
        return found

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
        begin = self._clock()
        ahead = self._speculation.ahead() if self._speculation is not None else None
        planned = self._scheduler.next(ahead, self._budget(begin))
        drafts, drafting_ns = self._draft(planned)
        parts = [
            part._replace(tokens=(*part.tokens, *drafts[part.id].tokens)) if part.id in drafts else part
            for part in planned
        ]
        decodes = all(len(part.tokens) == 1 for part in planned)
        rows: dict[Hashable, F32] = {}
        passes_ns = 0
        for bits in dict.fromkeys(part.bits for part in parts):
            found, took = self._run([part for part in parts if part.bits == bits], bits, decodes)
            rows, passes_ns = rows | found, passes_ns + took
        found_by = {part.id: self._accept(part, rows[part.id], drafts.get(part.id)) for part in parts if part.samples}
        self._scheduler.done({id: [event.token for event in events] for id, events in found_by.items()})
        now, events = self._clock(), [event for events in found_by.values() for event in events]
        for event in events:
            self._streams[event.id].pace.token(now)
            if event.reason:
                self._forget(event.id)
                self._scheduler.cancel(event.id)  # a grammar ends a text before its length does
        self._choose_precision(parts)
        if self._speculation is not None and decodes and events:
            rest_ns = self._clock() - begin - drafting_ns - passes_ns
            self._speculation.note_rest(len(found_by), rest_ns, bool(drafts))
        return events

    def _budget(self, now: int) -> int | None:
        """Tokens of the next step, at most."""
        reading = [stream for stream in self._streams.values() if stream.sampler.position > len(stream.prompt)]
        bits = self._ladder.bits if any(stream.auto for stream in reading) else max(self._runtime.bits or (0,))
        return step_budget([stream.pace for stream in reading], now, bits, self._costs)

    def pace(self, id: Hashable) -> Pace:
        """How a stream does against its target, while it is there."""
        return self._streams[id].pace

    def _choose_precision(self, parts: Sequence[Part]) -> None:
        """Of `auto` requests in the next step."""
        autos = {id: stream.auto for id, stream in self._streams.items() if stream.auto is not None}
        dues_ns = {id: self._streams[id].pace.due_ns for id in autos}
        if autos and choose_rung(self._ladder, self._costs, parts, autos, dues_ns, self._clock()):
            for id, auto in autos.items():
                self._scheduler.set_bits(id, self._ladder.within(auto))

    def _draft(self, parts: Sequence[Part]) -> tuple[dict[Hashable, Draft], int]:
        """What is guessed for parts of this step, and the ns it took.

        What drafts write to the KV cache lies behind what a sequence has computed, and is written again.
        """
        if self._speculation is None:
            return {}, 0
        begin = self._clock()
        rooms = {part.id: self._streams[part.id].pace.due_ns - begin for part in parts}
        drafts = self._speculation.plan(parts, rooms, self._costs)
        begin = self._clock() if drafts else begin  # plain decoding would not have to think
        for source in {draft.source for draft in drafts.values() if draft.length > len(draft.tokens)}:
            mine = [part for part in parts if part.id in drafts and drafts[part.id].source == source]
            self._draft_at(source, mine, drafts)
        return {id: draft for id, draft in drafts.items() if draft.tokens}, self._clock() - begin

    def _draft_at(self, bits: int, parts: Sequence[Part], drafts: Mapping[Hashable, Draft]) -> None:
        """One pass at `bits` for each further token, of all sequences together, drawn as the target will draw."""
        assert self._speculation is not None
        samplers = {part.id: copy.copy(self._streams[part.id].sampler) for part in parts}  # without state of their own
        parts = list(parts)
        while parts:
            begin, now = self._clock(), [drafts[part.id].tokens for part in parts]
            pieces = [
                (np.asarray([tokens[-1] if tokens else part.tokens[0]], np.int32), part.past + len(tokens), part.blocks)
                for part, tokens in zip(parts, now, strict=True)
            ]
            rows = self._runtime.native.run(make_step(pieces, range(len(parts))), bits)
            going = []
            for part, tokens, row in zip(parts, now, rows, strict=True):
                try:
                    token = samplers[part.id].choose(row).token
                except ModelError:
                    continue  # it is the target that says so, if it is so there
                if token in self._streams[part.id].stop_ids:
                    continue
                tokens.append(token)
                if len(tokens) < drafts[part.id].length:
                    going.append(part)
            self._speculation.note_draft(bits, len(parts), self._clock() - begin)
            parts = going

    def _accept(self, part: Part, rows: F32, draft: Draft | None) -> list[Event]:
        """The tokens of a part, up to the first that was guessed wrong. Shapes: rows f32[1 + guesses, V]"""
        guesses, events = draft.tokens if draft is not None else [], list[Event]()
        for place, row in enumerate(rows):
            events.append(self._choose(part, row))
            if events[-1].reason or place == len(guesses) or events[-1].token != guesses[place]:
                break
        tokens = [event.token for event in events if event.token is not None]
        if self._speculation is not None:
            self._speculation.extend(part.id, tokens)
            if draft is not None:
                right = sum(token == guess for token, guess in zip(tokens, guesses, strict=False))
                self._speculation.note(part, draft, right, right < len(guesses) and len(tokens) > right)
        return events

    def _run(self, parts: list[Part], bits: Hashable, decodes: bool) -> tuple[dict[Hashable, F32], int]:
        """The logits f32[n, V] of the parts that sample, one row and one for each guess, and the ns it took."""
        pieces = [(np.asarray(p.tokens, np.int32), p.past, np.asarray(p.blocks, np.int32)) for p in parts]
        ends = np.cumsum([len(p.tokens) for p in parts]).tolist()
        sampled = [(len(p.tokens) if p.ahead else 1) if p.samples else 0 for p in parts]
        rows_of = [
            range(end - len(p.tokens), end) if p.scores else range(end - wanted, end)
            for p, wanted, end in zip(parts, sampled, ends, strict=True)
        ]
        step = make_step(pieces, [row for wanted in rows_of for row in wanted])
        begin = self._clock()
        rows = self._runtime.native.run(step, bits)  # type: ignore[arg-type]
        took = self._clock() - begin
        if isinstance(bits, int):
            tokens = sum(len(p.tokens) for p in parts)
            self._costs.note(bits, tokens, took)
            if self._speculation is not None and decodes:
                self._speculation.note_pass(bits, tokens, took)
        logits, first = {}, 0
        for part, wanted, count in zip(parts, rows_of, sampled, strict=True):
            mine, first = rows[first : first + len(wanted)], first + len(wanted)
            if part.scores:
                self._score(part, mine)
            if part.samples:
                logits[part.id] = mine[-count:]
        return logits, took

    def _score(self, part: Part, rows: F32) -> None:
        """What a part of a prompt says of the tokens that follow its own. Shapes: rows f32[len(part.tokens), V]"""
        stream = self._streams[part.id]
        for place, row in enumerate(rows, part.past + 1):
            if place < len(stream.prompt):
                stream.scored[place] = score(row, stream.prompt[place], max(stream.top, 0))

    def _choose(self, part: Part, logits: F32) -> Event:
        stream = self._streams[part.id]
        prompt, stream.scored = [stream.scored[i] for i in sorted(stream.scored)], {}
        first = stream.sampler.position == len(stream.prompt)
        cached = self._scheduler.cached(part.id) if first else 0
        try:
            choice = stream.sampler.choose(logits, stream.top)
            if choice.token in stream.stop_ids:
                return Event(part.id, None, part.bits, "stop", prompt=prompt, cached=cached)
            constraint = stream.sampler.constraint
            complete = constraint is not None and constraint.complete
        except ModelError as error:
            return Event(part.id, None, part.bits, "error", str(error))
        stream.left -= 1
        reason: Literal["", "stop", "length"] = "stop" if complete else "" if stream.left else "length"
        return Event(part.id, choice.token, part.bits, reason, choice=choice, prompt=prompt, cached=cached)
