"""What a simulated replica needs of an engine: who runs next, and what came of it. No engine here has a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from everybit.plan.simulate.requests import Request
from everybit.plan.step import Step


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the model at one precision."""

    step: Step
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A step: its passes, one after another, and the requests that run for the first time: (id, tokens cached)."""

    passes: tuple[Pass, ...]
    started: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """A glance at an engine. `blocks_used`: KV blocks that somebody holds."""

    waiting: int
    running: int
    blocks: int
    blocks_used: int
    preempted: int


class Engine(Protocol):
    """`overlaps`: the batch of a step is chosen while the step before it still runs.

    `holds`: KV blocks of a finished request stay taken until `release`.
    """

    overlaps: bool
    holds: bool

    def submit(self, request: Request, now_s: float, produced: int = 0) -> None:
        """`produced` tokens came from elsewhere, with the KV cache of all but the last.

        Raises: RequestError where it can never run, with the arithmetic; BusyError where the queue is full
        """

    def next(self, now_s: float) -> Batch | None:
        """What to run now; None where nothing can run."""

    def done(self, now_s: float, took_s: Sequence[float]) -> list[tuple[int, int | None]]:
        """The oldest batch of `next` has run, its passes for `took_s` each. Who got a token, at which precision."""

    def release(self, id: int) -> None:
        """Let go the KV blocks of a finished request."""

    def load(self) -> Load: ...
