"""Quality against latency over models or precisions: which ones no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everybit.bench.report.distributions import latency
from everybit.bench.report.figures import number
from everybit.bench.report.markup import Html
from everybit.bench.report.plot import Plot
from everybit.bench.report.requests import Document
from everybit.bench.report.scale import Scale, around


def pareto(runs: Sequence[tuple[str, Document]], quality: Mapping[str, Mapping[str, Any]]) -> Html | None:
    """`quality`: of each model {"value", "unit", "lower_is_better"}. None where no model has both figures."""
    found = [
        (name, latency(run)["tpot_ms"]["p50"], quality[name]["value"], run)
        for name, run in runs
        if latency(run).get("tpot_ms") and quality.get(name, {}).get("value") is not None
    ]
    if not found:
        return None
    first = quality[found[0][0]]
    lower = bool(first.get("lower_is_better"))
    unit = first.get("unit") or "quality"
    best = undominated([(slow, value if lower else -value) for _, slow, value, _ in found])
    x, y = _roomy([slow for _, slow, _, _ in found]), _roomy([value for _, _, value, _ in found])
    plot = Plot(
        "Quality, latency and energy", x, y, "ms per token (p50), lower is better",
        f"{unit}, {'lower' if lower else 'higher'} is better", wide=True, height=420,
        note="joined: those that no other beats in both",
    )  # fmt: skip
    front = sorted((found[i][1], found[i][2]) for i in best)
    plot.line("", "s0", front)
    most = max([joules for *_, run in found if (joules := _joules(run))], default=None)
    for i, (name, slow, value, run) in enumerate(found):
        joules = _joules(run)
        radius = 6.0 if joules is None or most is None else 4 + 14 * (joules / most) ** 0.5
        energy = "" if joules is None else f", {number(joules)} J/token"
        tip = f"{name}: {number(slow)} ms per token, {number(value)} {unit}{energy}"
        plot.dots("", "s0" if i in best else "soft", [(slow, value, tip)], round(radius, 1))
        below = (i in best) == lower  # away from the line
        plot.words(plot.px(slow), plot.py(value) + (radius + 14 if below else -radius - 5), name + energy, "middle")
    return plot.figure()


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of those that no other equals in both and beats in one; less is better."""
    return [i for i, (a, b) in enumerate(points) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)]


def _joules(run: Document) -> float | None:
    value = (run.get("energy") or {}).get("joules_per_output_token")
    return float(value) if value else None


def _roomy(values: Sequence[float]) -> Scale:
    room = 0.12 * (max(values) - min(values) or abs(values[0]) or 1.0)
    return around([min(values) - room, max(values) + room], log=False)
