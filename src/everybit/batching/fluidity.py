"""When the next token is due, and how many were late: the fluidity index of Etalon (Agrawal et al., 2024), section 4.

A user reads on while tokens come early: time in hand counts for later tokens. A token that is late although all time in
hand is spent counts as many misses as it is deadlines late, and deadlines begin anew from its arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

from everybit.errors import RequestError


@dataclass(frozen=True)
class Target:
    """Nanoseconds to the first token and between tokens that a user should feel. Raises: RequestError"""

    first_ns: int
    gap_ns: int

    def __post_init__(self) -> None:
        if self.first_ns < 1 or self.gap_ns < 1:
            raise RequestError("target", f"{self.first_ns} and {self.gap_ns} ns: expected 1 or more of each")


class Pace:
    """One stream against its target. `due_ns` is when the next token has to be there."""

    __slots__ = ("due_ns", "hits", "misses", "target")

    def __init__(self, target: Target, begin_ns: int) -> None:
        self.target = target
        self.due_ns = begin_ns + target.first_ns
        self.hits = self.misses = 0

    def token(self, now_ns: int) -> None:
        """The next token has arrived."""
        if now_ns <= self.due_ns:
            self.hits += 1
            self.due_ns += self.target.gap_ns
        else:
            self.misses += (now_ns - self.due_ns) // self.target.gap_ns + 1
            self.due_ns = now_ns + self.target.gap_ns

    @property
    def fluidity(self) -> float:
        """The share of deadlines that were met; 0 where no token came."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0
