"""Simulated replicas of a model on a card: KV blocks of the memory that is left, step times of the roofline, watts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from everybit.batching.fluidity import Target
from everybit.batching.precision import Auto
from everybit.batching.scheduler import Scheduler
from everybit.errors import SourceError
from everybit.plan.cost import Cost, Parallel
from everybit.plan.efficiency import Efficiency
from everybit.plan.hardware import Hardware
from everybit.plan.memory import device_cache, fit
from everybit.plan.operators import Model
from everybit.plan.power import power_of
from everybit.plan.simulate.engine import Engine
from everybit.plan.simulate.engines import ENGINES, make_engine
from everybit.plan.simulate.ours import Ours
from everybit.plan.simulate.replica import Replica
from everybit.plan.simulate.router import make_router
from everybit.plan.simulate.run import Pool
from everybit.plan.step import Step

_BLOCK_TOKENS = 16
_QUEUE = 1_000_000  # a simulation has no reason to turn requests away


class _Sizes(TypedDict):
    blocks: int
    block_tokens: int
    context: int
    budget: int
    most: int


@dataclass(frozen=True)
class Deployment:
    """`rungs`: the models of an overlay's precisions, by bits; of several, everybit's ladder chooses while it runs.

    `engine`: whose scheduler is simulated, everybit or vllm. `pace`: step times are multiplied by it.
    """

    rungs: Mapping[int, Model]
    card: Hardware
    split: Parallel
    efficiency: Efficiency
    engine: str
    budget: int = 2048
    most: int = 128
    pace: float = 1.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SourceError(f"engine {self.engine!r} is not simulated, expected one of {', '.join(ENGINES)}")
        if len(self.rungs) > 1 and self.engine != "everybit":
            raise SourceError(f"{len(self.rungs)} precisions and engine {self.engine}: only everybit changes them")

    @property
    def model(self) -> Model:
        """What lies in memory: the highest precision, whose planes the others are part of."""
        return self.rungs[max(self.rungs)]

    def pool(
        self, count: int, context: int, target: Target, router: str, *, name: str = "replica", holds: bool = False
    ) -> Pool:
        """`count` new replicas for requests of up to `context` tokens. Raises: SourceError where nothing fits"""
        cost = Cost(
            self.model,
            self.card,
            self.split,
            self.efficiency,
            by_bits=self.rungs if len(self.rungs) > 1 else None,
        )
        watts, idle_w = self._power(cost)
        blocks, time = self._blocks(context), _Paced(cost, self.pace)
        replicas = [
            Replica(f"{name} {i + 1}", [self._engine(blocks, context, target, holds)], time, watts, idle_w)
            for i in range(count)
        ]
        return Pool(tuple(replicas), make_router(router))

    def _engine(self, blocks: int, context: int, target: Target, holds: bool) -> Engine:
        sizes = _Sizes(blocks=blocks, block_tokens=_BLOCK_TOKENS, context=context, budget=self.budget, most=self.most)
        if self.engine == "vllm" or holds:
            return make_engine(self.engine, **sizes, holds=holds)
        bits = Auto(min(self.rungs), max(self.rungs)) if len(self.rungs) > 1 else max(self.rungs)
        scheduler = Scheduler(**sizes, queue=_QUEUE)
        return Ours(scheduler, bits, rungs=sorted(self.rungs), target=target)

    def _blocks(self, context: int) -> int:
        room = fit(self.model, self.card, self.split, context=context)
        if not room.sequences:
            raise SourceError(room.why)
        each = device_cache(self.model, self.split, context) / context * _BLOCK_TOKENS
        return int(room.room_bytes / each) if each else room.sequences * -(-context // _BLOCK_TOKENS)

    def _power(self, cost: Cost) -> tuple[Callable[[Step, float, int | None], float] | None, float]:
        if self.card.tdp_w is None:
            return None, 0.0
        curve, devices = power_of(self.card), self.split.devices

        def watts(step: Step, seconds: float, bits: int | None) -> float:
            works = [one for one in cost.works(step, bits=bits) if one.kind != "link"]
            compute_s = sum(one.many * one.compute_s for one in works)
            memory_s = sum(one.many * one.memory_s for one in works)
            return devices * curve.watts(compute_s / seconds, memory_s / seconds)

        return watts, devices * curve.idle_w


@dataclass(frozen=True)
class _Paced:
    cost: Cost
    pace: float

    def seconds(self, step: Step, bits: int | None = None) -> float:
        return self.pace * self.cost.seconds(step, bits)
