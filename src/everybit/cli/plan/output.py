"""What commands print: tables, figures with their intervals, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.errors import OutputError

if TYPE_CHECKING:
    from everybit.plan.power import Interval


def print_json(document: Any) -> None:
    print(json.dumps(plain(document), allow_nan=False))


def plain(value: Any) -> Any:
    """Dataclasses, and tuples with names, as objects."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width, the first to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def figure(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent; - for None."""
    if value is None:
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.{digits}g}"
    whole = abs(value) >= 10 ** (digits - 1)
    return f"{value:,.0f}" if whole else f"{float(f'{value:.{digits}g}'):g}"


def interval(one: Interval | None, scale: float = 1.0) -> str:
    """As 12.3 (10.1-15)."""
    if one is None:
        return "-"
    value, low, high = (figure(each * scale) for each in (one.value, one.low, one.high))
    return f"{value} ({low}-{high})"


def gb(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def write_text(path: Path, text: str) -> None:
    """Raises: OutputError"""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name that is no UTF-8
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; choose a place that can be written") from None
