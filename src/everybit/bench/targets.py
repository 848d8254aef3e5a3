"""What a run is held against: its window, its SLO and the deadlines of its tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from everybit.bench.fluidity import Deadlines
from everybit.bench.ideal import Ideal
from everybit.bench.records import MS, SECOND, Record
from everybit.errors import SourceError

Document = dict[str, Any]
_UNITS = {"us": 1_000, "ms": MS, "s": SECOND}


@dataclass(frozen=True)
class Window:
    """Requests that count: intended from `begin_ns` (before it is warm-up) to before `end_ns`. Raises: SourceError"""

    begin_ns: int
    end_ns: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin_ns < self.end_ns:
            raise SourceError(
                f"a window from {self.begin_ns} to {self.end_ns} ns: expected one that ends after it begins"
            )

    def holds(self, when_ns: int) -> bool:
        return self.begin_ns <= when_ns < self.end_ns

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / SECOND


@dataclass(frozen=True)
class Slo:
    """What `share` of the requests must keep; None: not asked for.

    `first_ns`, `end_ns`: first and last token, from the intended send. `gap_ns`: mean time per token after the first.
    `fluidity`: least index. Raises: SourceError
    """

    first_ns: int | None = None
    gap_ns: int | None = None
    end_ns: int | None = None
    fluidity: float | None = None
    share: float = 0.99

    def __post_init__(self) -> None:
        if (self.first_ns, self.gap_ns, self.end_ns, self.fluidity) == (None,) * 4:
            raise SourceError("an SLO that asks for nothing: expected one or more of ttft, tpot, e2e and fluidity")

    def document(self) -> Document:
        times = {"ttft_ms": self.first_ns, "tpot_ms": self.gap_ns, "e2e_ms": self.end_ns}
        return {
            **{name: None if ns is None else ns / MS for name, ns in times.items()},
            "fluidity": self.fluidity,
            "share": self.share,
        }


def parse_slo(text: str) -> Slo:
    """Of "ttft=200ms,tpot=50ms,e2e=5s,fluidity=0.9,share=0.99", any part but one at least. Raises: SourceError"""
    times = {"ttft": "first_ns", "tpot": "gap_ns", "e2e": "end_ns"}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        field = times.get(name, name)
        if field in found or name not in (*times, "fluidity", "share"):
            raise SourceError(f"SLO {part.strip()!r}: expected each of ttft, tpot, e2e, fluidity, share at most once")
        found[field] = parse_time(f"SLO {name}=", value) if name in times else _share(name, value)
    return Slo(**found)


def parse_time(what: str, text: str) -> int:
    """Nanoseconds of "200ms" or "1.5s"; `what` names it in an error. Raises: SourceError"""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", text.strip())
    length = int(Fraction(match[1]) * _UNITS[match[2]]) if match else 0
    if length < 1:
        raise SourceError(f"{what} {text}: expected a time such as 200ms or 1.5s")
    return length


def _share(name: str, value: str) -> float:
    if not re.fullmatch(r"\d(\.\d{1,9})?", value) or not 0 < float(value) <= 1:
        raise SourceError(f"SLO {name}={value}: expected more than 0 and at most 1, such as 0.9")
    return float(value)


@dataclass(frozen=True)
class Targets:
    """What answers are held against. Raises: SourceError

    With `slack_ns` the first token is due that long after the ideal's prediction for the prompt (the paper's way), and
    at `deadlines.first_ns` only where the prompt's length is unknown.
    """

    deadlines: Deadlines
    slo: Slo | None = None
    ideal: Ideal | None = None
    slack_ns: int | None = None
    stall_ns: int = 250 * MS

    def __post_init__(self) -> None:
        if self.slack_ns is not None and (self.ideal is None or self.slack_ns < 0):
            raise SourceError(f"slack of {self.slack_ns} ns: expected 0 or more, and an ideal to add it to")
        if self.stall_ns < 1:
            raise SourceError(f"stalls longer than {self.stall_ns} ns: expected 1 or more")

    def of(self, record: Record) -> Deadlines:
        prompt = prompt_tokens(record)
        if self.slack_ns is None or self.ideal is None or prompt is None:
            return self.deadlines
        return Deadlines(max(1, self.ideal.first_ns(prompt) + self.slack_ns), self.deadlines.gap_ns)

    def document(self) -> Document:
        return {
            "first_ms": self.deadlines.first_ns / MS,
            "slack_ms": None if self.slack_ns is None else self.slack_ns / MS,
            "gap_ms": self.deadlines.gap_ns / MS,
            "stall_ms": self.stall_ns / MS,
            "slo": self.slo.document() if self.slo else None,
            "ideal": self.ideal.document() if self.ideal else None,
        }


def prompt_tokens(record: Record) -> int | None:
    """As the server's usage tells, or else as the load wanted it."""
    return record.wanted_prompt if record.usage_prompt is None else record.usage_prompt
