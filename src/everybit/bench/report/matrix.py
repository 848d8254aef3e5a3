"""An audit as one table: what each claim was found to be, and its distance to every reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everybit.bench.report.figures import figure, percent
from everybit.bench.report.markup import Child, table, tag

_NOTE = "distances: root mean square, nats a token; confidence: share of resamples with the same nearest reference"


def matrix(block: Mapping[str, Any]) -> Child:
    """Claims by references; the nearest is bold."""
    found = block.get("verdicts") or []
    if not found:
        return None
    references = list(dict.fromkeys(name for one in found for name in one["distances"]))
    head = ("claim", "verdict", *(f"from {name}" for name in references), "confidence")
    return [table(head, (_row(one, references) for one in found), "numbers"), tag("small", _NOTE)]


def _row(one: Mapping[str, Any], references: list[str]) -> list[Child]:
    away = {name: distance["rms"] for name, distance in one["distances"].items()}
    nearest = min(away, key=lambda name: away[name], default=None)
    cells = [tag("b" if name == nearest else "span", figure(away.get(name))) for name in references]
    return [one["claim"], one["verdict"], *cells, percent(one["confidence"])]
