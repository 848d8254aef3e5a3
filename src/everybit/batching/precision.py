"""Which precision `auto` requests get: the highest at which tokens are in time, found while serving.

Pure, like the scheduler: times come from the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everybit.errors import PrecisionError

_MEMORY = 0.95  # of what was known of a step's time, after each further step
_SURPRISE = 4  # times what was expected, and no more, a step's time counts: one that waits for a disk is not the rule
_STALE = 256  # steps after which what is known of a precision that is not in use is forgotten


@dataclass(frozen=True)
class Auto:
    """Any of the overlay's precisions from `floor` to `ceiling`."""

    floor: int
    ceiling: int


class Costs:
    """How long a step takes, by precision and tokens: a line for each precision, recent steps counting most.

    The first step of a precision does not count: it reads planes that are not in memory yet.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}  # weight, tokens, tokens^2, ns, tokens * ns
        self._seen: dict[int, int] = {}  # the step in which a precision was last run
        self._steps = 0

    def note(self, bits: int, tokens: int, ns: float) -> None:
        first, self._steps = bits not in self._seen, self._steps + 1
        self._seen[bits] = self._steps
        for stale in [b for b in self._sums if self._steps - self._seen[b] > _STALE]:
            del self._sums[stale]
        if first:
            return
        if bits in self._sums:
            ns = min(ns, _SURPRISE * self.predict(bits, tokens))
        new = (1.0, float(tokens), float(tokens) ** 2, float(ns), float(tokens) * ns)
        self._sums[bits] = [_MEMORY * a + b for a, b in zip(self._sums.get(bits, [0.0] * 5), new, strict=True)]

    def predict(self, bits: int, tokens: int) -> float:
        """Nanoseconds; 0 where nothing is known. A precision not tried yet is taken to cost its share of planes."""
        base, slope = self._line(bits)
        return max(0.0, base + slope * tokens)

    def tokens(self, bits: int, ns: float) -> float:
        """How many a step of so many nanoseconds has, the other way round; infinite where nothing is known."""
        base, slope = self._line(bits)
        return (ns - base) / slope if slope else float("inf")

    def _line(self, bits: int) -> tuple[float, float]:
        """Nanoseconds of a step, and of each token."""
        if not self._sums:
            return 0.0, 0.0
        known = min(self._sums, key=lambda b: abs(b - bits))
        weight, x, xx, y, xy = self._sums[known]
        spread = weight * xx - x * x
        slope = max(0.0, (weight * xy - x * y) / spread) if spread > 1e-6 * weight * xx else 0.0
        share = bits / known if known else 1.0  # float weights are known by 0
        return (y - slope * x) / weight * share, slope * share


class Ladder:
    """One rung down as soon as a token would be late; one up after `dwell` steps in which it would not have been there.

    `margin`: what a step at the rung above may take, of the time there is, is 1 / margin. It keeps the ladder from
    swinging: a rung that was left because it was too slow is not climbed to before there is room to spare.
    """

    def __init__(self, rungs: Sequence[int], dwell: int = 16, margin: float = 1.25) -> None:
        if not rungs or dwell < 1 or margin < 1:
            raise PrecisionError(
                f"rungs {list(rungs)}, dwell {dwell} and margin {margin}: expected a rung, 1 and 1 or more"
            )
        self._rungs = sorted(rungs)
        self._dwell, self._margin = dwell, margin
        self._at, self._calm = len(self._rungs) - 1, 0

    @property
    def bits(self) -> int:
        return self._rungs[self._at]

    @property
    def above(self) -> int:
        """The next rung up, or this one where it is the highest."""
        return self._rungs[min(self._at + 1, len(self._rungs) - 1)]

    def step(self, room_ns: float, here_ns: float, above_ns: float, bounds: Auto) -> int:
        """The precision of the next step, within `bounds`.

        `room_ns` until the first token is due; what the step is predicted to take here and on the rung above.
        """
        if here_ns > room_ns:
            self._at, self._calm = self._at - 1, 0
        elif above_ns * self._margin <= room_ns:
            self._calm += 1
            if self._calm >= self._dwell:
                self._at, self._calm = self._at + 1, 0
        else:
            self._calm = 0
        allowed = [i for i, bits in enumerate(self._rungs) if bounds.floor <= bits <= bounds.ceiling]
        self._at = min(max(self._at, allowed[0]), allowed[-1])
        return self.bits

    def allowed(self, auto: Auto) -> list[int]:
        """The rungs within a request's bounds. Raises: PrecisionError where there is none"""
        found = [bits for bits in self._rungs if auto.floor <= bits <= auto.ceiling]
        if not found:
            raise PrecisionError(
                f"auto from {auto.floor} to {auto.ceiling} bits arrived, the overlay has "
                f"{', '.join(map(str, self._rungs))}: widen the bounds"
            )
        return found

    def within(self, auto: Auto, at: int | None = None) -> int:
        """The highest allowed rung up to the current one (or `at`), else the lowest allowed. Raises: PrecisionError"""
        allowed = self.allowed(auto)
        return max((b for b in allowed if b <= (self.bits if at is None else at)), default=allowed[0])
