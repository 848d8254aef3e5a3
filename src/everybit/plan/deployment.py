"""Simulated replicas of a model on a card: KV blocks of the memory that is left, step times of the roofline, watts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count as numbers
from typing import TypedDict

from everybit.batching.fluidity import Target
from everybit.batching.precision import Auto
from everybit.batching.scheduler import Scheduler
from everybit.errors import SourceError
from everybit.plan.cost import Cost, Parallel
from everybit.plan.efficiency import Efficiency
from everybit.plan.estimate import place, with_bits
from everybit.plan.hardware import Hardware
from everybit.plan.memory import device_cache, fit
from everybit.plan.offload import Placement
from everybit.plan.operators import Model
from everybit.plan.power import power_of
from everybit.plan.simulate.engine import Engine
from everybit.plan.simulate.engines import ENGINES, make_engine
from everybit.plan.simulate.lockstep import Lockstep
from everybit.plan.simulate.ours import Ours
from everybit.plan.simulate.replica import Pipeline, Replica
from everybit.plan.simulate.router import make_router
from everybit.plan.simulate.run import Pool
from everybit.plan.speculation import Speculation
from everybit.plan.step import Step, StepTime

_BLOCK_TOKENS = 16
_QUEUE = 1_000_000  # a simulation has no reason to turn requests away
_Watts = Callable[[Step, float, int | None], float]


class _Sizes(TypedDict):
    blocks: int
    block_tokens: int
    context: int
    budget: int
    most: int


@dataclass(frozen=True)
class Deployment:
    """`rungs`: the models of an overlay's precisions, by bits (0: a width that is none); of several, everybit's ladder
    chooses while it runs.

    `split`: data-parallel groups are replicas of their own, or engines in lockstep where they share experts; pipeline
    stages overlap as many micro-batches, each with its share of the KV blocks (see `Pipeline`). `engine`: whose
    scheduler is simulated, everybit or vllm. `pace`: step times are multiplied by it. `offload`: weights that do not
    fit are streamed, as `estimate.place` says, beside the caches of `most` sequences, or of its share of the `users`
    where the load has so many; of an overlay the top planes stay, so that lower precisions stream less. `seed`: of
    right and wrong guesses. Raises: SourceError
    """

    rungs: Mapping[int, Model]
    card: Hardware
    split: Parallel
    efficiency: Efficiency
    engine: str
    budget: int = 2048
    most: int = 128
    pace: float = 1.0
    speculation: Speculation | None = None
    offload: bool = False
    seed: int = 0
    users: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SourceError(f"engine {self.engine!r} is not simulated, expected one of {', '.join(ENGINES)}")
        if len(self.rungs) > 1 and self.engine != "everybit":
            raise SourceError(f"{len(self.rungs)} precisions and engine {self.engine}: only everybit changes them")
        drafts = self.speculation
        if drafts and self.engine != "everybit":
            raise SourceError(f"speculation with engine {self.engine}: only everybit drafts with fewer planes")
        if drafts and not (drafts.draft_bits == int(drafts.draft_bits) and drafts.draft_bits < max(self.rungs)):
            raise SourceError(
                f"drafts at {drafts.draft_bits:g} bits for {max(self.rungs) or 'a width without planes'}: expected "
                "whole bits below those that are served, such as 3 for --bits 8"
            )
        if self._lockstep and (drafts or len(self.rungs) > 1):
            raise SourceError(
                f"dp {self.split.dp} of a model with experts runs in lockstep, with one precision and without drafts: "
                "leave them out, or give dp 1"
            )

    @property
    def model(self) -> Model:
        """What lies in memory: the highest precision, whose planes the others are part of."""
        return self.rungs[max(self.rungs)]

    @property
    def _lockstep(self) -> bool:
        return self.split.dp > 1 and any(layer.experts for layer in self.model.layers)

    def pool(
        self, count: int, context: int, target: Target, router: str, *, name: str = "replica", holds: bool = False
    ) -> Pool:
        """`count` new replicas for requests of up to `context` tokens. Raises: SourceError where nothing fits

        Groups and micro-batches that are simulated apart are replicas in the pool.
        """
        groups, engines = (1, self.split.dp) if self._lockstep else (self.split.dp, 1)
        split = self.split if self._lockstep else replace(self.split, dp=1)
        blocks, placements = self._memory(split, context, count * self.split.dp)
        stages, seeds = split.pp, numbers(self.seed)
        if stages > 1 and blocks // stages < -(-context // _BLOCK_TOKENS):
            raise SourceError(
                f"{blocks} KV blocks of {_BLOCK_TOKENS} tokens for {stages} micro-batches, each of which has to hold "
                f"{context}: pass fewer stages or a shorter context"
            )
        time, cost = self._time(split, placements)
        watts, idle_w = self._power(cost)
        replicas = []
        for i in range(count * groups):
            pipeline = Pipeline(stages) if stages > 1 else None
            told = f"{name} {i // groups + 1}" + (f", group {i % groups + 1}" if groups > 1 else "")
            for stage in range(stages):
                made = [self._engine(blocks // stages, context, target, holds, next(seeds)) for _ in range(engines)]
                label = told + (f", batch {stage + 1}" if stages > 1 else "")
                replicas.append(Replica(label, made, time, watts, idle_w * engines, pipeline))
        return Pool(tuple(replicas), make_router(router), self.efficiency.first_s)

    def _engine(self, blocks: int, context: int, target: Target, holds: bool, seed: int) -> Engine:
        sizes = _Sizes(blocks=blocks, block_tokens=_BLOCK_TOKENS, context=context, budget=self.budget, most=self.most)
        if self.engine == "vllm" or holds:
            return make_engine(self.engine, **sizes, holds=holds)
        bits = Auto(min(self.rungs), max(self.rungs)) if len(self.rungs) > 1 else max(self.rungs)
        scheduler = Scheduler(**sizes, queue=_QUEUE)
        rungs = sorted(self.rungs)
        return Ours(scheduler, bits, rungs=rungs, target=target, speculation=self.speculation, seed=seed)

    def _models(self) -> dict[int, Model]:
        """By the bits of a pass."""
        models = dict(self.rungs)
        if self.speculation:
            bits = int(self.speculation.draft_bits)
            models.setdefault(bits, with_bits(self.model, bits))
        return models

    def _time(self, split: Parallel, placements: Mapping[int | None, Placement]) -> tuple[StepTime, Cost]:
        models = self._models()
        by_bits = models if len(models) > 1 else None
        cost = Cost(self.model, self.card, split, self.efficiency, by_bits=by_bits, placements=placements)
        if not self._lockstep:
            return _Paced(cost, self.pace), cost
        whole = Cost(self.model, self.card, split, self.efficiency)
        stream_s = placements[None].stream_s if placements else 0.0
        return Lockstep(whole, stream_s, self.pace), cost

    def _memory(self, split: Parallel, context: int, groups: int) -> tuple[int, dict[int | None, Placement]]:
        """KV blocks of one of `groups`, and what is streamed at which bits (None: of a pass that names none)."""
        placements: dict[int | None, Placement] = {}
        needed = -(-context // _BLOCK_TOKENS)
        context = min(needed * _BLOCK_TOKENS, self.model.context)
        if self.offload:
            sequences = self.most if self.users is None else min(self.most, self.users / groups)
            for bits, rung in (None, self.model), *self._models().items():
                placed = place(self.model, self.card, split, context, sequences, self.efficiency, rung)
                if placed:
                    placements[bits] = placed
        pinned = placements[None].pinned_bytes if placements else None
        room = fit(self.model, self.card, split, context=context, pinned_bytes=pinned)
        if not room.sequences:
            raise SourceError(room.why)
        each = device_cache(self.model, split, context) / context * _BLOCK_TOKENS
        most = room.sequences // split.dp * needed
        return int(room.room_bytes / each + 1e-6) if each else most, placements

    def _power(self, cost: Cost) -> tuple[_Watts | None, float]:
        """Of the devices that an engine keeps busy: those of one stage, as each of `pp` batches is in one at a time."""
        if self.card.tdp_w is None:
            return None, 0.0
        curve, devices = power_of(self.card), self.split.tp

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
