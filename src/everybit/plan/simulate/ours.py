"""This project's own engine: its real scheduler, ladder and rules of pacing, without a model.

Where it speculates it always does, and drafts from lower precisions only; the real one does where it was faster.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from everybit.batching.fluidity import Pace, Target
from everybit.batching.pacing import TARGET, choose_rung, step_budget
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Part, Scheduler
from everybit.batching.scheduler import Request as Asked
from everybit.errors import RequestError, SourceError
from everybit.plan.simulate.engine import Batch, Load, Pass
from everybit.plan.simulate.requests import BLOCK_TOKENS, Request
from everybit.plan.speculation import Speculation
from everybit.plan.step import Step

_SECOND = 1_000_000_000


@dataclass(slots=True)
class _Stream:
    request: Request
    token: tuple[int]  # one that no other request has
    left: int
    pace: Pace
    started: bool = False
    reading: bool = False


class Ours:
    """`bits`: one precision for all, or `Auto` on `rungs` with `target` to keep. Steps do not overlap.

    `speculation`: of decodes above the precision that drafts; its guesses are right by chance, of `seed`.
    Raises: PrecisionError for an `Auto` without a rung within its bounds; SourceError where nothing could draft
    """

    overlaps = holds = False

    def __init__(
        self,
        scheduler: Scheduler,
        bits: int | Auto = 0,
        *,
        rungs: Sequence[int] = (0,),
        target: Target = TARGET,
        speculation: Speculation | None = None,
        seed: int = 0,
    ) -> None:
        self._scheduler, self._target = scheduler, target
        self._auto = bits if isinstance(bits, Auto) else None
        self._ladder, self._costs = Ladder(rungs if self._auto else [int(bits)]), Costs()  # type: ignore[arg-type]
        if self._auto is not None:
            self._ladder.allowed(self._auto)
        if speculation and not speculation.draft_bits < self._bits():
            raise SourceError(
                f"drafts at {speculation.draft_bits:g} bits for {self._bits()}: expected fewer, of an overlay's planes"
            )
        self._speculation, self._random = speculation, random.Random(seed)
        self._streams: dict[Hashable, _Stream] = {}
        self._reading: dict[Hashable, Pace] = {}  # of those that have a token
        self._parts: Sequence[Part] = ()
        self._passes: list[Pass] = []  # but those of drafts

    def submit(self, request: Request, now_s: float, produced: int = 0) -> None:
        if produced:
            raise RequestError("pool", "everybit cannot take over a KV cache: use vllm for a pool that only decodes")
        self._scheduler.submit(Asked(request.id, _tokens(request), request.output_tokens, self._bits()))
        pace = Pace(self._target, round(now_s * _SECOND))
        self._streams[request.id] = _Stream(request, (_own(request.id),), request.output_tokens, pace)

    def next(self, now_s: float) -> Batch | None:
        now, bits, one = round(now_s * _SECOND), self._bits(), self._speculation
        ahead = dict.fromkeys(self._reading, one.drafts) if one and bits > one.draft_bits else None
        parts: Sequence[Part]
        parts = self._scheduler.next(ahead, step_budget(self._reading.values(), now, bits, self._costs))
        if ahead:  # as the batcher has them, guesses among their tokens
            parts = [part._replace(tokens=part.tokens * (1 + part.ahead)) if part.ahead else part for part in parts]
        self._parts = parts
        if not parts:
            return None
        steps: dict[Hashable, tuple[list[tuple[int, int]], list[int]]] = {}
        started, last = [], None
        for id, tokens, past, _, at, _, _, _ in parts:
            stream, new = self._streams[id], len(tokens)
            if at != last:
                last, (chunks, decodes) = at, steps.setdefault(at, ([], []))
            if new == 1 and past >= stream.request.prompt_tokens:
                decodes.append(past)
            else:
                chunks.append((new, past))
            if not stream.started:
                stream.started = True
                started.append((id, self._scheduler.cached(id)))
        drafts = self._drafts() if ahead else []
        self._passes = [Pass(Step(tuple(a), tuple(b)), at) for at, (a, b) in steps.items()]  # type: ignore[arg-type]
        return Batch((*drafts, *self._passes), tuple(started))  # type: ignore[arg-type]

    def _drafts(self) -> list[Pass]:
        """One for each further token, of all sequences that guess so many together."""
        assert self._speculation is not None
        most, bits = max(part.ahead for part in self._parts), int(self._speculation.draft_bits)
        return [
            Pass(Step(decodes=tuple(part.past + turn for part in self._parts if part.ahead > turn)), bits)
            for turn in range(most)
        ]

    def done(self, now_s: float, took_s: Sequence[float]) -> list[tuple[int, int | None]]:
        now, tokens = round(now_s * _SECOND), list[tuple[int, int | None]]()
        for one, took in zip(self._passes, took_s[-len(self._passes) :], strict=True):
            self._costs.note(one.bits or 0, one.step.tokens, took * _SECOND)
        sampled: dict[Hashable, Sequence[int]] = {}
        for id, _, _, _, bits, samples, _, ahead in self._parts:
            if not samples:
                continue
            stream, count = self._streams[id], 1
            if ahead:
                count += self._right(ahead)
            sampled[id] = stream.token * count
            for _ in range(count):
                stream.pace.token(now)
                tokens.append((id, bits))  # type: ignore[arg-type]
            if not stream.reading:
                stream.reading = True
                self._reading[id] = stream.pace
            stream.left -= count
            if not stream.left:
                del self._streams[id], self._reading[id]
        self._scheduler.done(sampled)
        if self._auto is not None:
            self._choose_precision(now)
        return tokens

    def _right(self, guesses: int) -> int:
        """How many of them, up to the first wrong one."""
        assert self._speculation is not None
        acceptance, draw = self._speculation.acceptance, self._random.random
        return next((n for n in range(guesses) if draw() >= acceptance), guesses)

    def release(self, id: int) -> None:
        raise RequestError("pool", "everybit holds no KV cache for a transfer")

    def load(self) -> Load:
        counts = self._scheduler.counts()
        used = counts.blocks - counts.blocks_available
        return Load(counts.waiting, counts.running, counts.blocks, used, counts.preempted)

    def _bits(self) -> int:
        return self._ladder.within(self._auto) if self._auto else self._ladder.bits

    def _choose_precision(self, now: int) -> None:
        assert self._auto is not None
        dues_ns = {id: stream.pace.due_ns for id, stream in self._streams.items()}
        autos = dict.fromkeys(self._streams, self._auto)
        if choose_rung(self._ladder, self._costs, self._parts, autos, dues_ns, now):
            bits = self._bits()
            for id in self._streams:
                self._scheduler.set_bits(id, bits)


def _own(id: object) -> int:
    """A token that no other request has."""
    return -1 - id  # type: ignore[operator]


def _tokens(request: Request) -> tuple[int, ...]:
    """Tokens that are equal where the trace says that texts are, as the real prefix cache compares them."""
    if not request.blocks:
        return (_own(request.id),) * request.prompt_tokens
    text = [block for block in request.blocks for _ in range(BLOCK_TOKENS)]
    return tuple(text[: request.prompt_tokens])
