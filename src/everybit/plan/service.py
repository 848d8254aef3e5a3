"""A deployment under steady load, in closed form: how long a request waits, per token and in all.

`concurrency` clients each send a request, wait for its last token and send the next. While one decodes its output,
each of the others has one prompt read:

    TPOT = t_decode + overlap * (running - 1) * t_prefill / output

Requests beyond what fits in memory wait (Little's law). The formula hides the queueing of bursts; `everybit plan
simulate` has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from everybit.errors import SourceError
from everybit.plan.cost import Cost, Parallel, Times, Work, times
from everybit.plan.efficiency import Efficiency
from everybit.plan.hardware import Hardware
from everybit.plan.memory import device_cache, fit
from everybit.plan.operators import Model
from everybit.plan.step import Step

MOST_TOKENS = 1 << 24
_MIXED = ("compute_s", "memory_s", "rows", "weights", "byte_s")


class Latency(NamedTuple):
    """Means, in seconds."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True)
class Service:
    """Compiled once, so that a fit can try many efficiencies. Of one data-parallel group: `clients`, of which
    `running` fit in memory; `decode` and `prefill`: their operators, `batch` sequences a decoding step, in the mean."""

    parallel: Parallel
    prompt: int
    output: int
    clients: float
    running: float
    batch: float
    layers: int
    decode: tuple[Work, ...]
    prefill: tuple[Work, ...]
    stream_s: float

    def steps(self, efficiency: Efficiency) -> tuple[Times, Times]:
        """A decoding step, and reading one prompt alone."""
        decode = times(self.decode, efficiency, self.layers, self.batch, self.stream_s)
        return decode, times(self.prefill, efficiency, self.layers, 1, self.stream_s)

    def latency(self, efficiency: Efficiency, gain: float = 1.0) -> Latency:
        """`gain`: how much faster speculation makes decoding; prompts between the steps take what they took."""
        decode, prefill = (one.total_s for one in self.steps(efficiency))
        others = self.running - 1
        tpot = decode / gain + efficiency.overlap * others * prefill / self.parallel.pp / self.output
        decoded = (self.output - 1) * tpot
        ttft = sum(self._first(efficiency, prefill, decoded))
        return Latency(ttft, tpot, ttft + decoded)

    def first(self, efficiency: Efficiency, gain: float = 1.0) -> dict[str, float]:
        """What a first token waits for, in seconds."""
        decoded = (self.output - 1) * self.latency(efficiency, gain).tpot_s
        parts = self._first(efficiency, self.steps(efficiency)[1].total_s, decoded)
        return dict(zip(("HTTP and tokenizing", "its prompt", "other prompts", "room in memory"), parts, strict=True))

    def _first(self, efficiency: Efficiency, prefill: float, decoded: float) -> tuple[float, float, float, float]:
        queued = efficiency.queue * (self.running - 1) * prefill
        admitted = efficiency.first_s + prefill + queued
        return efficiency.first_s, prefill, queued, (admitted + decoded) * (self.clients / self.running - 1)

    def batch_latency(self, efficiency: Efficiency) -> Latency:
        """Where all begin together and none follows: prompts are read first, in waves of what fits."""
        decode, prefill = (one.total_s for one in self.steps(efficiency))
        waves = math.ceil(self.clients / self.running)
        ttft = efficiency.first_s + prefill * self.running / self.parallel.pp
        return Latency(ttft, decode, waves * (ttft + (self.output - 1) * decode))


def compile_service(
    model: Model,
    hardware: Hardware,
    parallel: Parallel,
    *,
    concurrency: int,
    prompt: int,
    output: int,
    ahead: float,
    cost: Cost | None = None,
    pinned_bytes: float | None = None,
    stream_s: float = 0.0,
) -> Service:
    """Raises: SourceError for a load that makes no sense, or a model that does not fit"""
    for name, value, limit in (
        ("concurrency", concurrency, 1 << 20),
        ("prompt", prompt, MOST_TOKENS),
        ("output", output, MOST_TOKENS),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise SourceError(f"{name} {value!r} arrived, expected a whole number from 1 to {limit}: fix it")
    if model.head is None:
        raise SourceError(f"{model.name} writes no tokens, as far as it is counted (an encoder): expected a decoder")
    if prompt + output > model.context:
        raise SourceError(
            f"{prompt} + {output} tokens, but {model.name} has a context of {model.context}: shorten them"
        )
    cost = cost or Cost(model, hardware, parallel)
    room = fit(model, hardware, parallel, context=prompt + output, pinned_bytes=pinned_bytes)
    if not room.sequences:
        raise SourceError(room.why)
    kept = device_cache(model, parallel, max(1, round(prompt + ahead * output)))
    most = room.room_bytes / kept if kept else float(room.sequences)
    clients = max(1.0, concurrency / parallel.dp)
    running = min(clients, max(1.0, most))
    batch = max(1.0, running / parallel.pp)
    return Service(
        parallel,
        prompt,
        output,
        clients,
        running,
        batch,
        cost.layers,
        _decode(cost, prompt + output // 2, batch),
        tuple(cost.works(Step(chunks=((prompt, 0),)))),
        stream_s,
    )


def _decode(cost: Cost, past: int, batch: float) -> tuple[Work, ...]:
    """The operators of a decoding step of `batch` sequences; between two whole batches their work is, too."""
    low, share = int(batch), batch % 1
    works = cost.works(Step(decodes=(past,) * low))
    if not share:
        return tuple(works)
    more = cost.works(Step(decodes=(past,) * (low + 1)))
    return tuple(_between(*pair, share) for pair in zip(works, more, strict=True))


def _between(one: Work, more: Work, share: float) -> Work:
    mixed = {name: (1 - share) * getattr(one, name) + share * getattr(more, name) for name in _MIXED}
    return one._replace(**mixed)
