"""When sessions start, in ns from the run's start: fixed before the run, whatever the server does.

An open loop's arrivals are a renewal process of mean gap 1 (constant, exponential or gamma gaps), laid over a rate that
changes linearly in stages: an arrival is due when the integral of the rate reaches its place in the process
(time-rescaling; Cinlar, Introduction to Stochastic Processes, 1975, section 4.7). A Poisson process stays one that way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from everybit.bench.records import SECOND
from everybit.errors import SourceError

LEAST_RATE, MOST_RATE = 1e-6, 1e6
MOST_USERS = 100_000  # each has a connection of its own
MOST_ARRIVALS = 10_000_000  # a day at 100 a second: their times are drawn by every worker
MOST_BURSTINESS = 1e6
CONSTANT = math.inf  # as burstiness: gamma gaps of endless shape are all equal


@dataclass(frozen=True)
class Stage:
    """The rate goes linearly from `first` to `last` per second; `duration_s` may be endless where both are equal.

    Raises: SourceError
    """

    first: float
    last: float
    duration_s: float = math.inf

    def __post_init__(self) -> None:
        for rate in (self.first, self.last):
            if not LEAST_RATE <= rate <= MOST_RATE:
                raise SourceError(f"rate {rate}: expected {LEAST_RATE:g} to {MOST_RATE:.0f} requests a second")
        if not self.duration_s > 0 or (self.first != self.last and math.isinf(self.duration_s)):
            raise SourceError(f"duration {self.duration_s} s: expected a finite number above 0")

    @property
    def arrivals(self) -> float:
        """The mean count: the integral of the rate."""
        return (self.first + self.last) / 2 * self.duration_s

    def reach_s(self, arrivals: float) -> float:
        """When the integral of the rate is `arrivals`."""
        slope = (self.last - self.first) / self.duration_s
        return 2 * arrivals / (self.first + math.sqrt(max(self.first**2 + 2 * slope * arrivals, 0.0)))


@dataclass(frozen=True)
class Arrivals:
    """Stages one after another, ended by their durations or after `count` arrivals, whichever is first.

    `burstiness` is the gamma shape of the gaps, as in vLLM's bench: 1 is Poisson, less comes in bursts, more is
    steadier, `CONSTANT` is evenly spaced. Raises: SourceError
    """

    stages: tuple[Stage, ...]
    burstiness: float = 1.0
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0.01 <= self.burstiness <= MOST_BURSTINESS or self.burstiness == CONSTANT):
            raise SourceError(f"burstiness {self.burstiness}: expected 0.01 to {MOST_BURSTINESS:.0f} (1 is Poisson)")
        if self.count is not None and self.count < 1:
            raise SourceError(f"{self.count} requests: expected 1 or more")
        if not self.stages or (self.duration_ns is None and self.count is None):
            raise SourceError("arrivals without an end: give a duration or a count")
        expected = min(sum(stage.arrivals for stage in self.stages), self.count or math.inf)
        if expected > MOST_ARRIVALS:
            raise SourceError(f"{expected:.0f} arrivals: expected {MOST_ARRIVALS} at most")

    def __iter__(self) -> Iterator[int]:
        return islice(self._due_ns(), self.count)

    @property
    def duration_ns(self) -> int | None:
        """How long arrivals may come; None where only their count ends them."""
        total = sum(stage.duration_s for stage in self.stages)
        return None if math.isinf(total) else round(total * SECOND)

    def describe(self) -> dict[str, Any]:
        return {
            "stages": [
                {"first": one.first, "last": one.last, "duration_s": _finite(one.duration_s)} for one in self.stages
            ],
            "burstiness": _finite(self.burstiness) or "constant",
        }

    def _due_ns(self) -> Iterator[int]:
        places = self._places()
        place, begun, begin_s = next(places), 0.0, 0.0
        for stage in self.stages:
            while place - begun < stage.arrivals:
                due_ns = round((begin_s + stage.reach_s(max(0.0, place - begun))) * SECOND)
                if due_ns >= (begin_s + stage.duration_s) * SECOND:  # by rounding
                    break
                yield due_ns
                place = next(places)
            begun += stage.arrivals
            begin_s += stage.duration_s

    def _places(self) -> Iterator[float]:
        random, place, shape = Random(f"{self.seed} arrivals"), 0.0, self.burstiness
        while True:
            if math.isinf(shape):
                yield place
                place += 1
            else:
                place += random.expovariate(1) if shape == 1 else random.gammavariate(shape, 1 / shape)
                yield place


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def constant(rate: float, *, duration_s: float = math.inf, count: int | None = None) -> Arrivals:
    """Evenly spaced from 0. Raises: SourceError"""
    return Arrivals((Stage(rate, rate, duration_s),), CONSTANT, count)


def poisson(rate: float, *, duration_s: float = math.inf, count: int | None = None, seed: int = 0) -> Arrivals:
    """Independent of one another, as those of many users are. Raises: SourceError"""
    return gamma(rate, 1.0, duration_s=duration_s, count=count, seed=seed)


def gamma(
    rate: float, burstiness: float, *, duration_s: float = math.inf, count: int | None = None, seed: int = 0
) -> Arrivals:
    """In bursts (`burstiness` below 1) or steadier than Poisson (above). Raises: SourceError"""
    return Arrivals((Stage(rate, rate, duration_s),), burstiness, count, seed)


def ramp(
    first: float, last: float, duration_s: float, *, burstiness: float = 1.0, count: int | None = None, seed: int = 0
) -> Arrivals:
    """The rate goes linearly from `first` to `last`. Raises: SourceError"""
    return Arrivals((Stage(first, last, duration_s),), burstiness, count, seed)


def steps(
    rates: Sequence[tuple[float, float]], *, burstiness: float = 1.0, count: int | None = None, seed: int = 0
) -> Arrivals:
    """(seconds, rate) one after another. Raises: SourceError"""
    return Arrivals(tuple(Stage(rate, rate, seconds) for seconds, rate in rates), burstiness, count, seed)


@dataclass(frozen=True)
class Users:
    """A fixed number of users, who start evenly over `ramp_s`. Raises: SourceError"""

    count: int
    ramp_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_USERS:
            raise SourceError(f"{self.count} users: expected 1 to {MOST_USERS}")
        if not (self.ramp_s >= 0 and math.isfinite(self.ramp_s)):
            raise SourceError(f"a ramp of {self.ramp_s} s: expected a finite number, 0 or more")

    def __iter__(self) -> Iterator[int]:
        ramp_ns = round(self.ramp_s * SECOND)
        return (number * ramp_ns // self.count for number in range(self.count))

    def describe(self) -> dict[str, Any]:
        return {"users": self.count, "ramp_s": self.ramp_s}
