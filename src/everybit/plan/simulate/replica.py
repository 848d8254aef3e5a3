"""One replica: an engine, or several in lockstep (data and expert parallel), and how long its steps take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from everybit.errors import SourceError
from everybit.plan.simulate.engine import Batch, Engine, Load
from everybit.plan.simulate.requests import Request
from everybit.plan.step import Step, StepTime

Watts = Callable[[Step, float, int | None], float]  # of a step, the seconds it takes, and its bits


@runtime_checkable
class JointTime(Protocol):
    """A StepTime that knows what engines in lockstep share: their experts."""

    def seconds(self, step: Step, bits: int | None = None) -> float: ...

    def seconds_together(self, steps: Sequence[Step], bits: int | None = None) -> float: ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that ran. `blocks_used`: a share of all."""

    begin_s: float
    took_s: float
    prompt_tokens: int
    decodes: int
    bits: int | None
    running: int
    waiting: int
    blocks_used: float
    joules: float


class Pipeline:
    """`stages` that the batches of several replicas pass one after another, each for its share of the step's time.

    Stages take equally long, and a batch waits where the one before it is still in the next stage. So as many batches
    as there are stages overlap, one of each replica: its sequences are a micro-batch of their own, as with the virtual
    engines of vLLM's v0. What is in a batch is chosen when the last one of its replica is through.
    """

    def __init__(self, stages: int) -> None:
        self._free_s = [0.0] * stages

    def end_s(self, begin_s: float, seconds: float) -> float:
        """When a batch is through that takes `seconds` alone; it takes its turn after those before it."""
        each, at_s = seconds / len(self._free_s), begin_s
        for stage, free_s in enumerate(self._free_s):
            self._free_s[stage] = at_s = max(at_s, free_s) + each
        return at_s


class Replica:
    """`watts` and `idle_w` where energy is wanted: of each engine's share of the devices, and of all of them.

    `engines` of a lockstep begin and end their steps together, an idle one included (vLLM's DP + EP). `pipeline`: what
    its batches pass, shared with other replicas. Raises: SourceError
    """

    def __init__(
        self,
        name: str,
        engines: Sequence[Engine],
        time: StepTime,
        watts: Watts | None = None,
        idle_w: float = 0.0,
        pipeline: Pipeline | None = None,
    ) -> None:
        if not engines or not 0 <= idle_w < math.inf:
            raise SourceError(
                f"replica {name}: {len(engines)} engines, {idle_w} W idle; expected 1 or more and 0 or more"
            )
        self.name, self.engines, self.time, self.watts, self.idle_w = name, tuple(engines), time, watts, idle_w
        self.pipeline, self.ends_s = pipeline, math.inf
        self.ran: list[Ran] = []
        self.work_tokens = [0] * len(engines)  # of each engine: prompts and answers yet to be computed
        self._begin_s = 0.0
        self._took: list[list[float]] = []
        self._now: list[Batch | None] = []
        self._later: list[Batch | None] = [None] * len(engines)

    @property
    def blocks(self) -> int:
        return sum(engine.load().blocks for engine in self.engines)

    @property
    def preempted(self) -> int:
        return sum(engine.load().preempted for engine in self.engines)

    def loads(self) -> list[Load]:
        return [engine.load() for engine in self.engines]

    def submit(self, place: int, request: Request, now_s: float, produced: int = 0) -> None:
        """Raises: RequestError, BusyError"""
        self.engines[place].submit(request, now_s, produced)
        self.work_tokens[place] += request.output_tokens - produced + (0 if produced else request.prompt_tokens)

    def start(self, now_s: float) -> tuple[tuple[int, int], ...]:
        """Begin a step, if it is idle and there is one. Requests that begin to run: (id, cached tokens)."""
        if self.ends_s < math.inf:
            return ()
        ready = zip(self.engines, self._later, strict=True)
        self._now = [later or engine.next(now_s) for engine, later in ready]
        self._later = [None] * len(self.engines)
        if not any(self._now):
            return ()
        self._begin_s = now_s
        seconds = self._time()
        self.ends_s = self.pipeline.end_s(now_s, seconds) if self.pipeline else now_s + seconds
        if self.pipeline:
            stretched = (self.ends_s - now_s) / seconds
            self._took = [[stretched * took for took in passes] for passes in self._took]
        self._log(self.ends_s - now_s)
        self._later = [engine.next(now_s) if engine.overlaps else None for engine in self.engines]
        batches = [batch for batch in (*self._now, *self._later) if batch]
        return tuple(one for batch in batches for one in batch.started)

    def finish(self) -> list[tuple[int, list[tuple[int, int | None]]]]:
        """The step has run. Of each engine that ran: its place, and (request, bits) of each token."""
        now_s, self.ends_s = self.ends_s, math.inf
        ran = [(place, one) for place, (one, batch) in enumerate(zip(self.engines, self._now, strict=True)) if batch]
        return [(place, engine.done(now_s, self._took[place])) for place, engine in ran]

    def _time(self) -> float:
        """Seconds of the step; those of an engine's passes go to `_took`."""
        if len(self._now) == 1 or not isinstance(self.time, JointTime):
            self._took = [
                [self.time.seconds(one.step, one.bits) for one in batch.passes] if batch else [] for batch in self._now
            ]
            seconds = max(map(sum, self._took))
        else:
            passes = [batch.passes if batch else () for batch in self._now]
            if max(map(len, passes)) > 1:
                raise SourceError(f"replica {self.name}: several passes of engines in lockstep: expected one precision")
            seconds = self.time.seconds_together([one[0].step if one else Step() for one in passes])
            self._took = [[seconds] * len(one) for one in passes]
        if not 0 < seconds < math.inf:
            raise SourceError(f"replica {self.name}: a step of {seconds} s; expected a time above 0: mend its StepTime")
        return seconds

    def _log(self, took_s: float) -> None:
        passes = [one for batch in self._now if batch for one in batch.passes]
        joules = 0.0
        if self.watts is not None:
            for batch, took in zip(self._now, self._took, strict=True):
                for one, seconds in zip(batch.passes if batch else (), took, strict=True):
                    joules += self.watts(one.step, seconds, one.bits) * seconds
                joules += self.idle_w / len(self.engines) * (took_s - sum(took))
        loads = self.loads()
        self.ran.append(
            Ran(
                self._begin_s,
                took_s,
                sum(new for one in passes for new, _ in one.step.chunks),
                sum(len(one.step.decodes) for one in passes),
                passes[0].bits,
                sum(load.running for load in loads),
                sum(load.waiting for load in loads),
                sum(load.blocks_used for load in loads) / sum(load.blocks for load in loads),
                joules,
            )
        )
