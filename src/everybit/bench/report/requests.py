"""The rows of a run's table, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everybit.bench.report.figures import duration, plural, share_figure

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One request; times in ms from the run's start, as in `result.table`."""

    number: int
    scored: bool
    intended: float
    sent: float | None
    first: float | None
    end: float | None
    prompt: int | None
    tokens: int
    fluidity: float | None
    error: str
    client_stalled: bool
    stalls: tuple[tuple[float, float], ...]

    @property
    def counts(self) -> bool:
        """It has latencies that count."""
        return self.scored and not self.error

    @property
    def last(self) -> float:
        """When the last was seen of it."""
        return max(when for when in (self.intended, self.sent, self.first, self.end) if when is not None)

    @property
    def failed(self) -> bool:
        return bool(self.error) and self.error != "cancelled"

    def tell(self) -> str:
        parts = [f"request {self.number}, due at {duration(self.intended)}"]
        if self.sent is not None and self.sent - self.intended >= 1:
            parts.append(f"sent {duration(self.sent - self.intended)} late")
        if self.first is not None:
            parts.append(f"first token after {duration(self.first - self.intended)}")
        if self.end is not None:
            parts.append(f"end after {duration(self.end - self.intended)}")
        parts.append(plural(self.tokens, "token"))
        if self.fluidity is not None:
            parts.append(f"fluidity {share_figure(self.fluidity)}")
        if self.stalls:
            parts.append(f"{plural(len(self.stalls), 'stall')}, longest {duration(max(n for _, n in self.stalls))}")
        if self.client_stalled:
            parts.append("this client stood still")
        return " · ".join([*parts, self.error] if self.error else parts)


def read_requests(run: Document) -> list[Request]:
    """By intended time."""
    table = run.get("requests") or {}
    columns = table.get("columns", [])
    return [_request(dict(zip(columns, row, strict=False))) for row in table.get("rows", [])]


def _request(row: dict[str, Any]) -> Request:
    return Request(
        number=row["number"],
        scored=bool(row.get("scored")),
        intended=row["intended_ms"],
        sent=row.get("sent_ms"),
        first=row.get("first_ms"),
        end=row.get("end_ms"),
        prompt=row.get("prompt"),
        tokens=row.get("tokens") or 0,
        fluidity=row.get("fluidity"),
        error=row.get("error") or "",
        client_stalled=bool(row.get("client_stalled")),
        stalls=tuple((begin, length) for begin, length in row.get("stalls") or ()),
    )
