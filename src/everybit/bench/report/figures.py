"""Numbers as people read them: three digits that matter, and their unit."""

from __future__ import annotations

import math
from typing import Any

NONE = "\u2013"


def figure(value: Any) -> str:
    """Numbers with four significant digits, whole ones in full; other things as text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    text = number(value, 4)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return NONE if value is None else "∞" if value > 0 else str(value)
    if value == 0 or abs(value) < 1e-9:
        return "0"
    if abs(value) >= 1e12 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text and value == round(value) else text


def duration(ms: float | None) -> str:
    """112 ms, 1.05 s."""
    if ms is None:
        return NONE
    return f"{number(ms / 1000)} s" if ms >= 1000 else f"{number(ms)} ms"


def percent(share: float | None) -> str:
    """One decimal, and 100 % only where it is all."""
    if share is None:
        return NONE
    tenths = math.floor(share * 1000) if share > 0.5 else math.ceil(share * 1000)
    return f"{tenths / 10:.1f} %" if tenths % 1000 else f"{tenths // 10} %"


def share_figure(value: float | None) -> str:
    """An index from 0 to 1, in two decimals: 1 only where it is."""
    if value is None:
        return NONE
    return f"{math.floor(value * 1000) / 1000:.3f}" if 0.99 <= value < 1 else f"{value:.2f}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
