"""A step of an engine: what runs in it, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """`chunks`: (new tokens, tokens before them) of each prompt piece. `decodes`: tokens before each decoded token."""

    chunks: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.chunks) + len(self.decodes)


class StepTime(Protocol):
    """How long a step takes on one replica, in seconds; `bits` is the precision that serves it (None: the only one)."""

    def seconds(self, step: Step, bits: int | None = None) -> float: ...
