"""The scheduler and a native model together: requests in, tokens out, one step at a time.

A step runs the model once for each precision that occurs in it: a precision is a property of the whole pass over the
weights. One thread at a time; a server puts a queue before it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from everybit.engine.native import BLOCK_TOKENS, make_step
from everybit.engine.runtime import Runtime, blocks_of
from everybit.engine.sampling import F32, Sampler, Sampling
from everybit.errors import ModelError
from everybit.serve.scheduler import Counts, Part, Request, Scheduler


@dataclass(frozen=True)
class Event:
    """A token of a request and the precision it was computed at.

    `reason` where the request has ended: at a stop token, which is left out, at its length, or because no token could
    be chosen, and `problem` says why.
    """

    id: Hashable
    token: int | None
    bits: Hashable
    reason: Literal["", "stop", "length", "error"]
    problem: str = ""


class Batcher:
    """All KV blocks of `runtime` are shared by the requests; its own sequences are not to be used meanwhile."""

    def __init__(self, runtime: Runtime, *, budget: int = 512, most: int = 64, queue: int = 1024) -> None:
        self._runtime = runtime
        self._scheduler = Scheduler(
            blocks=blocks_of(runtime.context) * runtime.sequences,
            block_tokens=BLOCK_TOKENS,
            context=runtime.context,
            budget=min(budget, runtime.native.most_tokens),
            most=min(most, budget, runtime.native.most_tokens),
            queue=queue,
        )
        self._samplers: dict[Hashable, tuple[Sampler, Collection[int], int]] = {}

    def submit(self, request: Request, sampling: Sampling, stop_ids: Collection[int] = ()) -> None:
        """Verifies what the precision needs, at its first use. Raises: RequestError, BusyError, PrecisionError"""
        self._runtime.native.prepare(request.bits)  # type: ignore[arg-type]  # a precision or a plan
        self._scheduler.submit(request)
        self._samplers[request.id] = Sampler(sampling, request.prompt), stop_ids, request.max_tokens

    def cancel(self, id: Hashable) -> bool:
        """Between steps. False where it has ended."""
        self._samplers.pop(id, None)
        return self._scheduler.cancel(id)

    def set_bits(self, id: Hashable, bits: Hashable) -> None:
        """From the next step on. Raises: PrecisionError"""
        self._runtime.native.prepare(bits)  # type: ignore[arg-type]
        self._scheduler.set_bits(id, bits)

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
        for event in events:
            if event.reason:
                del self._samplers[event.id]
        return events

    def _run(self, parts: list[Part], bits: Hashable) -> dict[Hashable, F32]:
        """The logits f32[V] of the parts that sample."""
        pieces = [(np.asarray(p.tokens, np.int32), p.past, np.asarray(p.blocks, np.int32)) for p in parts]
        ends = np.cumsum([len(p.tokens) for p in parts]) - 1
        sampling = [i for i, p in enumerate(parts) if p.samples]
        step = make_step(pieces, [int(ends[i]) for i in sampling])
        rows = self._runtime.native.run(step, bits)  # type: ignore[arg-type]
        return {parts[i].id: row for i, row in zip(sampling, rows, strict=True)}

    def _choose(self, part: Part, logits: F32) -> Event:
        sampler, stop_ids, left = self._samplers[part.id]
        try:
            token = sampler.choose(logits).token
        except ModelError as error:
            return Event(part.id, None, part.bits, "error", str(error))
        if token in stop_ids:
            return Event(part.id, None, part.bits, "stop")
        self._samplers[part.id] = sampler, stop_ids, left - 1
        return Event(part.id, token, part.bits, "length" if left == 1 else "")
