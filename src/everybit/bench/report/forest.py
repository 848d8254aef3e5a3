"""Two endpoints compared: ratios with their intervals on one logarithmic axis, and the table of all figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from everybit.bench.report.figures import figure, number
from everybit.bench.report.markup import Html, table, tag
from everybit.bench.report.plot import Plot
from everybit.bench.report.scale import around

SAME = "indistinguishable"
_ROW, _NAMES = 26, 230


def forest(block: Mapping[str, Any]) -> Html | None:
    rows = [(row["name"], row["ratio"], said(row)) for row in block.get("rows") or [] if _positive(row.get("ratio"))]
    if not rows:
        return None
    labels = [*map(str, block.get("labels") or []), "A", "B"]
    ends = [one[name] for _, one, _ in rows for name in ("low", "high")]
    x = around([*ends, 0.9, 1.1], log=True)
    plot = Plot(
        f"B ({labels[1]}) over A ({labels[0]})", x, around([0, 1]), "ratio", "", wide=True, rows=True, left=_NAMES,
        height=70 + _ROW * len(rows), note="with 95 % intervals; 1 is no difference",
    )  # fmt: skip
    plot.limit(1, "")
    for place, (name, one, verdict) in enumerate(rows):
        y = plot.py(1) + (place + 0.7) * _ROW
        low, value, high = (plot.px(one[end]) for end in ("low", "value", "high"))
        tint = "soft" if verdict == SAME else "s0"
        tip = f"{name}: {number(one['value'])}, from {number(one['low'])} to {number(one['high'])}"
        path = f"M{low:g} {y - 4:g}v8m0 -4H{high:g}m0 -4v8"
        dot = tag("circle", cx=value, cy=y, r=4)
        plot.mark(tag("g", tag("path", d=path, class_=f"span {tint}"), dot, class_=f"dots {tint}", data_tip=tip))
        plot.words(_NAMES - 8, y + 4, name, "end", "row-name")
        right = plot.x.share(one["high"]) > 0.75
        plot.words(low - 8 if right else high + 8, y + 4, verdict, "end" if right else "start")
    return plot.figure()


def forest_table(block: Mapping[str, Any]) -> Html | None:
    rows = block.get("rows") or []
    if not rows:
        return None
    a, b = ([*map(str, block.get("labels") or []), "A", "B"])[:2]
    body = [[row["name"], figure(row.get("a")), figure(row.get("b")), _interval(row), said(row)] for row in rows]
    return tag("div", table(("", f"A: {a}", f"B: {b}", "B over A, or B less A", ""), body), class_="wide")


def said(row: Mapping[str, Any]) -> str:
    """Indistinguishable where the interval holds no difference, whatever else the row says."""
    for name, none in (("ratio", 1), ("difference", 0)):
        one = row.get(name)
        if one and one["low"] <= none <= one["high"]:
            return SAME
    return str(row.get("verdict") or "")


def _interval(row: Mapping[str, Any]) -> str:
    for name in ("ratio", "difference"):
        if one := row.get(name):
            sign = "\u00d7 " if name == "ratio" else ""
            return f"{sign}{number(one['value'])} ({number(one['low'])} to {number(one['high'])})"
    return ""


def _positive(one: Mapping[str, Any] | None) -> bool:
    return one is not None and all(math.isfinite(one[end]) and one[end] > 0 for end in ("low", "value", "high"))
