"""The picture of a report: KL and perplexity against bits per weight."""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.errors import OutputError
from everybit.evaluate.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")


def check_plot(path: str | Path) -> Path:
    """Refuse a plot that could not be written, before hours of evaluation rather than after.

    Raises: OutputError for another suffix, an absent folder or an absent matplotlib
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: cannot plot to {path.suffix or 'a name without suffix'!r}; expected .png or .svg")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError(f'{path}: plotting needs matplotlib; install it with: pip install "everybit[quantize]"')
    return path


def plot(report: Report, path: str | Path) -> None:
    """Draw KL (log axis) and perplexity (log axis) against bits per weight; PNG or SVG by the suffix of `path`.

    Rows without a size are drawn at their bits. A KL of exactly zero (lossless) cannot stand on a log axis: it is
    left out of the line and named in the title. The file appears complete or not at all.
    """
    path = check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes, Report], None]] = [_draw_perplexity]
    if report.reference:
        panels.insert(0, _draw_kl)
    kind = path.suffix.lower().removeprefix(".")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "everybit", "svg.fonttype": "none"}):  # same report, same bytes
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis, report)
            axis.set_xlabel("bits per weight, tables counted")
            axis.grid(True, alpha=0.3, which="both")
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _draw_kl(axis: Any, report: Report) -> None:
    lossless = [str(row.bits) for row in report.rows if row.kl_mean == 0]
    axis.set_title("KL to the float model" + (f" (zero at {', '.join(lossless)} bits)" if lossless else ""))
    axis.set_ylabel("nats per token")
    series: list[tuple[str, Callable[[Row], float | None]]] = [
        ("mean", lambda row: row.kl_mean),
        ("99th percentile", lambda row: row.kl_p99),
    ]
    for label, value in series:
        _line(axis, report.rows, value, label)
    if axis.lines:
        axis.set_yscale("log")
        axis.legend()


def _draw_perplexity(axis: Any, report: Report) -> None:
    axis.set_title("Perplexity")
    axis.set_yscale("log")
    _line(axis, report.rows, lambda row: row.ppl, "everybit")
    if report.reference and math.isfinite(report.reference.ppl):
        axis.axhline(report.reference.ppl, color="black", linestyle="--", linewidth=1, label="float")
        axis.legend()


def _line(axis: Any, rows: list[Row], value: Callable[[Row], float | None], label: str) -> None:
    """One marked line through the rows whose value can stand on a log axis, each point named by its bits."""
    points = []
    for row in rows:
        y = value(row)
        if y is not None and math.isfinite(y) and y > 0:
            points.append((row.bits if row.bpw is None else row.bpw, y, row.bits))
    if not points:
        return
    points.sort()
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
    for x, y, bits in points:
        axis.annotate(str(bits), (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
