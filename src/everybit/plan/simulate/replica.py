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


class Replica:
    """`watts` and `idle_w` where energy is wanted. Raises: SourceError

    `engines` of a lockstep begin and end their steps together, an idle one included (vLLM's DP + EP).
    """

    def __init__(
        self,
        name: str,
        engines: Sequence[Engine],
        time: StepTime,
        watts: Watts | None = None,
        idle_w: float = 0.0,
    ) -> None:
        if not engines or not 0 <= idle_w < math.inf:
            raise SourceError(
                f"replica {name}: {len(engines)} engines, {idle_w} W idle; expected 1 or more and 0 or more"
            )
        self.name, self.engines, self.time, self.watts, self.idle_w = name, tuple(engines), time, watts, idle_w
        self.ends_s = math.inf
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
        took_s = self._time()
        self.ends_s = now_s + took_s
        self._log(took_s)
        self._later = [engine.next(now_s) if engine.overlaps else None for engine in self.engines]
        batches = [batch for batch in (*self._now, *self._later) if batch]
        return tuple(one for batch in batches for one in batch.started)

    def finish(self) -> list[tuple[int, int, int | None]]:
        """The step has run. (engine, request, bits) of each token."""
        now_s, self.ends_s = self.ends_s, math.inf
        tokens = []
        for place, (engine, batch) in enumerate(zip(self.engines, self._now, strict=True)):
            if batch:
                tokens += [(place, id, bits) for id, bits in engine.done(now_s, self._took[place])]
        return tokens

    def _time(self) -> float:
        """Seconds of the step; those of an engine's passes go to `_took`."""
        if len(self._now) == 1 or not isinstance(self.time, JointTime):
            self._took = [
                [self.time.seconds(one.step, one.bits) for one in batch.passes] if batch else [] for batch in self._now
            ]
            seconds = max(map(sum, self._took))
        else:
            steps = [batch.passes[0].step if batch else Step() for batch in self._now]
            seconds = self.time.seconds_together(steps)
            self._took = [[seconds]] * len(steps)
        if not 0 < seconds < math.inf:
            raise SourceError(f"replica {self.name}: a step of {seconds} s; expected a time above 0: mend its StepTime")
        return seconds

    def _log(self, took_s: float) -> None:
        passes = [one for batch in self._now if batch for one in batch.passes]
        joules = 0.0
        if self.watts is not None:
            for batch, took in zip(self._now, self._took, strict=True):
                for one, seconds in zip(batch.passes if batch else (), took, strict=False):
                    joules += self.watts(one.step, seconds, one.bits) * seconds
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
