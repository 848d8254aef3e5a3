"""How smooth a stream felt: the fluidity index of Etalon (Agrawal et al., arXiv 2507.09019), in whole nanoseconds.

A user reads on while tokens come early: time in hand counts for later tokens. A token that is late although all time in
hand is spent counts as many misses as deadlines have passed, and deadlines begin anew from its arrival.

The index never falls as `first_ns` or `gap_ns` grows. By induction no deadline of the wider target is earlier: after a
hit both move on by their gap, after a late token they begin from the same arrival or a later deadline. So no token is
late that was not, and none misses more. `least_gap` therefore may bisect.

Time in hand has no bound, like that of a playback buffer: bursts are forgiven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from everybit.bench.records import SECOND
from everybit.bench.statistics import percentile
from everybit.errors import SourceError

SMOOTH = 0.9  # the least index of a stream that felt smooth (the paper)


@dataclass(frozen=True)
class Deadlines:
    """Nanoseconds to the first token and from token to token. Raises: SourceError"""

    first_ns: int
    gap_ns: int

    def __post_init__(self) -> None:
        if self.first_ns < 1 or self.gap_ns < 1:
            raise SourceError(f"deadlines of {self.first_ns} and {self.gap_ns} ns: expected 1 or more of each")


@dataclass(frozen=True)
class Fluidity:
    """Deadlines that were met (one token each), those that passed without a token, and all tokens."""

    hits: int
    misses: int
    tokens: int

    @property
    def index(self) -> float:
        """Share of deadlines that were met; 0 for a stream without tokens."""
        return self.hits / (self.hits + self.misses) if self.tokens else 0.0

    @property
    def deadline_hit_ratio(self) -> float:
        """Share of tokens in time, as etalon's manual has it: the length of a stall does not count."""
        return self.hits / self.tokens if self.tokens else 0.0


FAILED = Fluidity(0, 0, 0)


def fluidity(times: Sequence[int], deadlines: Deadlines) -> Fluidity:
    """`times`: arrival of each token, ascending, in ns from the intended send."""
    gap, due = deadlines.gap_ns, deadlines.first_ns
    late = misses = 0
    for now in times:
        if now <= due:
            due += gap
        else:
            late += 1
            misses += (now - due) // gap + 1
            due = now + gap
    return Fluidity(len(times) - late, misses, len(times))


def least_gap(times: Sequence[int], first_ns: int, share: float = SMOOTH) -> int | None:
    """The smallest gap, in ns, for which the index is `share` or more; None where no gap reaches it."""
    if not times:
        return None
    low, high = 0, max(1, times[-1])  # with a gap as long as the stream only the first token can be late, by one miss
    if fluidity(times, Deadlines(first_ns, high)).index < share:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fluidity(times, Deadlines(first_ns, middle)).index >= share:
            high = middle
        else:
            low = middle
    return high


def fluid_token_rate(gaps: Sequence[int | None]) -> float:
    """Tokens a second that all but one stream in a hundred kept up: 1 / p99 of `least_gap` over requests.

    0 where more than one in a hundred has no such gap. Raises: SourceError
    """
    return SECOND / p99_gap(gaps)


def p99_gap(gaps: Sequence[int | None]) -> float:
    """The 99th percentile of `least_gap`, in ns; infinite where it falls on a stream without. Raises: SourceError"""
    return percentile(sorted(math.inf if gap is None else gap for gap in gaps), 99)
