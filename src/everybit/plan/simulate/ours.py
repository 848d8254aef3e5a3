"""This project's own engine: its real scheduler, and its real choice of precision and budget, without a model.

What batching/batcher.py does around a step is repeated here: streams have paces, the budget shrinks before one is late,
and requests of `Auto` precision move on the ladder together. It never speculates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from everybit.batching.fluidity import Pace, Target
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Part, Scheduler
from everybit.batching.scheduler import Request as Asked
from everybit.errors import RequestError
from everybit.plan.simulate.engine import Batch, Load, Pass
from everybit.plan.simulate.requests import BLOCK_TOKENS, Request
from everybit.plan.step import Step

READER = Target(first_ns=1_000_000_000, gap_ns=100_000_000)  # the batcher's own
LEAST_CHUNK = 32  # as the batcher's
_SECOND = 1_000_000_000


@dataclass(slots=True)
class _Stream:
    prompt_tokens: int
    left: int
    pace: Pace
    started: bool = False
    reading: bool = field(default=False)


class Ours:
    """`bits`: one precision for all, or `Auto` on `rungs` with `target` to keep. Steps do not overlap.

    Raises: PrecisionError for an `Auto` without a rung within its bounds
    """

    overlaps = holds = False

    def __init__(
        self, scheduler: Scheduler, bits: int | Auto = 0, *, rungs: Sequence[int] = (0,), target: Target = READER
    ) -> None:
        self._scheduler, self._target = scheduler, target
        self._auto = bits if isinstance(bits, Auto) else None
        self._ladder, self._costs = Ladder(rungs if self._auto else [int(bits)]), Costs()  # type: ignore[arg-type]
        if self._auto is not None:
            self._ladder.allowed(self._auto)
        self._streams: dict[int, _Stream] = {}
        self._parts: tuple[Part, ...] = ()

    def submit(self, request: Request, now_s: float, produced: int = 0) -> None:
        if produced:
            raise RequestError("pool", "everybit cannot take over a KV cache: use vllm for a pool that only decodes")
        asked = Asked(request.id, _tokens(request), request.output_tokens, self._bits())
        self._scheduler.submit(asked)
        pace = Pace(self._target, round(now_s * _SECOND))
        self._streams[request.id] = _Stream(request.prompt_tokens, request.output_tokens, pace)

    def next(self, now_s: float) -> Batch | None:
        self._parts = parts = self._scheduler.next(None, self._budget(round(now_s * _SECOND)))
        if not parts:
            return None
        passes = []
        for bits in dict.fromkeys(part.bits for part in parts):
            mine = [part for part in parts if part.bits == bits]
            passes.append(Pass(self._step(mine), bits))  # type: ignore[arg-type]
        started = []
        for part in parts:
            stream = self._streams[part.id]  # type: ignore[index]
            if not stream.started:
                stream.started = True
                started.append((part.id, self._scheduler.cached(part.id)))
        return Batch(tuple(passes), tuple(started))  # type: ignore[arg-type]

    def done(self, now_s: float, took_s: Sequence[float]) -> list[tuple[int, int | None]]:
        parts, now = self._parts, round(now_s * _SECOND)
        for bits, took in zip(dict.fromkeys(part.bits for part in parts), took_s, strict=True):
            tokens = sum(len(part.tokens) for part in parts if part.bits == bits)
            self._costs.note(bits, tokens, took * _SECOND)  # type: ignore[arg-type]
        sampled = [part for part in parts if part.samples]
        self._scheduler.done({part.id: [_own(part.id)] for part in sampled})
        for part in sampled:
            stream = self._streams[part.id]  # type: ignore[index]
            stream.pace.token(now)
            stream.reading = True
            stream.left -= 1
            if not stream.left:
                del self._streams[part.id]  # type: ignore[arg-type]
        if self._auto is not None:
            self._choose_precision(parts, now)
        return [(part.id, part.bits) for part in sampled]  # type: ignore[misc]

    def release(self, id: int) -> None:
        raise RequestError("pool", "everybit holds no KV cache for a transfer")

    def load(self) -> Load:
        counts = self._scheduler.counts()
        used = counts.blocks - counts.blocks_available
        return Load(counts.waiting, counts.running, counts.blocks, used, counts.preempted)

    def _bits(self) -> int:
        return self._ladder.within(self._auto) if self._auto else self._ladder.bits

    def _step(self, parts: Iterable[Part]) -> Step:
        chunks, decodes = [], []
        for part in parts:
            if len(part.tokens) == 1 and part.past >= self._streams[part.id].prompt_tokens:  # type: ignore[index]
                decodes.append(part.past)
            else:
                chunks.append((len(part.tokens), part.past))
        return Step(tuple(chunks), tuple(decodes))

    def _budget(self, now: int) -> int | None:
        """Batcher._budget."""
        dues = [stream.pace.due_ns for stream in self._streams.values() if stream.reading]
        if not dues:
            return None
        limit = max(min(dues) - now, self._target.gap_ns)
        return len(dues) + int(min(max(self._costs.tokens(self._ladder.bits, limit) - len(dues), LEAST_CHUNK), 1 << 20))

    def _choose_precision(self, parts: Sequence[Part], now: int) -> None:
        """Batcher._choose_precision, where all requests are auto and have the same bounds."""
        assert self._auto is not None
        ran = {part.id for part in parts}
        tokens = sum(len(part.tokens) for part in parts)
        lowest = self._costs.predict(self._ladder.within(self._auto, self._auto.floor), tokens)
        rooms = [stream.pace.due_ns - now for id, stream in self._streams.items() if id in ran]
        rooms += [
            room
            for id, stream in self._streams.items()
            if id not in ran and (room := stream.pace.due_ns - now) >= lowest
        ]
        if rooms:
            here, above = (
                self._costs.predict(self._ladder.within(self._auto, at), tokens)
                for at in (self._ladder.bits, self._ladder.above)
            )
            self._ladder.step(min(rooms), here, above, self._auto)
        for id in self._streams:
            self._scheduler.set_bits(id, self._bits())


def _own(id: object) -> int:
    """A token that no other request has."""
    return -1 - id  # type: ignore[operator]


def _tokens(request: Request) -> tuple[int, ...]:
    """Tokens that are equal where the trace says that texts are, as the real prefix cache compares them."""
    if not request.blocks:
        return (_own(request.id),) * request.prompt_tokens
    text = [block for block in request.blocks for _ in range(BLOCK_TOKENS)]
    return tuple(text[: request.prompt_tokens])
