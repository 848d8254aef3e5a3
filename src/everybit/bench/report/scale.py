"""Axes: values to places, and ticks at round values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_STEPS = (1, 2, 2.5, 5, 10)
_WIDE = 30.0  # largest over middle value from which a logarithmic axis shows more


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`; what lies outside is put on the border."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 5) -> list[tuple[float, str]]:
        """Values and their labels, about as many as `wanted`."""
        if not self.log or self.high < 3 * self.low:
            step = _step(self.high - self.low, wanted)
            places = max(0, -math.floor(math.log10(step) + 1e-9) + (step / 10 ** math.floor(math.log10(step)) == 2.5))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [(i * step, f"{i * step:,.{places}f}") for i in range(first, last + 1)]
        decades = math.log10(self.high / self.low)
        signs = (1, 2, 5) if decades < 3 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = max(1, round(decades / 6))
        values = [sign * 10.0**power for power in powers if power % every == 0 for sign in signs]
        return [(v, f"{v:,.10g}") for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def from_zero(values: Iterable[float], least: float = 1.0) -> Scale:
    """0 to a round value at or above all."""
    high = max([least, *values])
    step = _step(high)
    return Scale(0, math.ceil(high / step - 1e-9) * step)


def around(values: Iterable[float], log: bool | None = None) -> Scale:
    """Holds all values. `log` None: where they are above 0 and the largest is far above the middle."""
    ordered = sorted(values) or [0.0, 1.0]
    low, high = ordered[0], ordered[-1]
    if log is None:
        log = low > 0 and high > _WIDE * ordered[len(ordered) // 2]
    if log and low > 0:
        room = max(1.05, (high / low) ** 0.04)
        return Scale(low / room, high * room, True)
    if high - low < 1e-3 * abs(high) or high == low:
        room = max(abs(high) * 0.05, 1e-6)
        low, high = low - room if low else 0.0, high + room
    step = _step(high - low)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def buckets(values: list[float], most: int = 300) -> tuple[list[float], int]:
    """Means of `width` values each, so that there are at most `most`; and the width."""
    width = -(-len(values) // most) or 1
    edges = [*range(0, len(values), width), len(values)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)], width


def _step(span: float, wanted: int = 5) -> float:
    power = 10.0 ** math.floor(math.log10(span / wanted))
    return next(step for step in _STEPS if step * power >= span / wanted * 0.9999) * power
