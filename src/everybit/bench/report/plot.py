"""One chart as a figure: axes, lines, areas, bars and dots in SVG, a legend where there is more than one series.

Colours are classes of the style sheet. The script reads values back from the lines' own coordinates, by `data-x` and
`data-y`: low, high, where those lie, and whether the scale is logarithmic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from everybit.bench.report.markup import Child, Html, tag
from everybit.bench.report.scale import Scale

Point = tuple[float, float]
HALF, WIDE = 470, 980
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 22, 26, 38


class Plot:
    """`x_label`, `y_label` hold the units. Nothing is drawn outside the axes."""

    def __init__(
        self,
        title: str,
        x: Scale,
        y: Scale,
        x_label: str,
        y_label: str,
        *,
        wide: bool = False,
        height: int = 250,
        left: int = _LEFT,
        rows: bool = False,
        note: Child = None,
    ) -> None:
        """`rows`: the y axis only numbers rows, and has no ticks."""
        self.title, self.x, self.y, self.x_label, self.y_label, self.note = title, x, y, x_label, y_label, note
        self.width, self.height, self.wide, self.left, self.rows = WIDE if wide else HALF, height, wide, left, rows
        self._marks: list[Child] = []
        self._keys: list[tuple[str, str]] = []
        self._limits = 0

    def px(self, value: float) -> float:
        return round(self.left + self.x.share(value) * (self.width - self.left - _RIGHT), 1)

    def py(self, value: float) -> float:
        return round(self.height - _BOTTOM - self.y.share(value) * (self.height - _TOP - _BOTTOM), 1)

    def line(self, name: str, tint: str, points: Iterable[Point], style: str = "") -> None:
        """`style`: dashed, dotted, or broad for what others may cover."""
        path = _path((self.px(x), self.py(y)) for x, y in points)
        look = f"{tint} {style}".rstrip()
        self._add(name, look, tag("path", d=path, class_=f"line {look}", data_name=name or None))

    def steps(self, name: str, tint: str, edges: Sequence[float], values: Sequence[float]) -> None:
        """`values[i]` from `edges[i]` to `edges[i + 1]`, filled."""
        points = [(edges[i + j], value) for i, value in enumerate(values) for j in (0, 1)]
        path = _path((self.px(x), self.py(y)) for x, y in points)
        floor = self.py(self.y.low)
        closed = f"{path}V{floor:g}H{self.px(edges[0]):g}Z"
        self._add(
            name,
            tint,
            tag("path", d=closed, class_=f"wash {tint}"),
            tag("path", d=path, class_=f"line {tint}", data_name=name),
        )

    def area(self, name: str, tint: str, lower: Sequence[Point], upper: Sequence[Point], tip: str) -> None:
        around = [*upper, *reversed(lower)]
        path = _path((self.px(x), self.py(y)) for x, y in around)
        self._add(name, tint, tag("path", d=path + "Z", class_=f"area {tint}", data_tip=tip))

    def bars(self, name: str, tint: str, boxes: Iterable[tuple[float, float, float, float, str]]) -> None:
        """Boxes: left, right, low, high and what to say of it."""
        marks = []
        for a, b, low, high, tip in boxes:
            x, y = self.px(a), self.py(high)
            size = {"width": max(0.8, round(self.px(b) - x - 1, 1)), "height": max(0.8, round(self.py(low) - y, 1))}
            marks.append(tag("rect", x=x, y=y, class_=f"area {tint}", data_tip=tip, **size))
        self._add(name, tint, *marks)

    def dots(self, name: str, tint: str, points: Iterable[tuple[float, float, str]], radius: float = 2.5) -> None:
        """Points, and what to say of each."""
        marks = [tag("circle", cx=self.px(x), cy=self.py(y), r=radius, data_tip=tip) for x, y, tip in points]
        self._add(name, tint, tag("g", *marks, class_=f"dots {tint}"))

    def spans(self, tint: str, spans: Iterable[tuple[float, float, float]]) -> None:
        """Intervals as lines with ends: x, low, high."""
        for x, low, high in spans:
            a, b, c = self.px(x), self.py(low), self.py(high)
            self._marks.append(tag("path", d=f"M{a - 3:g} {b:g}h6m-3 0V{c:g}m-3 0h6", class_=f"span {tint}"))

    def limit(self, value: float, text: str) -> None:
        """A vertical line with words, such as a limit of the SLO."""
        x, y = self.px(value), self.height - _BOTTOM - 8 - 13 * self._limits
        self._limits += 1
        right = self.x.share(value) > 0.6
        self._marks.append(tag("path", d=f"M{x:g} {_TOP}V{self.height - _BOTTOM}", class_="limit"))
        self.words(x + (-4 if right else 4), y, text, "end" if right else "start")

    def level(self, value: float, text: str) -> None:
        """The same across."""
        y = self.py(value)
        self._marks.append(tag("path", d=f"M{self.left} {y:g}H{self.width - _RIGHT}", class_="limit"))
        below = self.y.share(value) > 0.9
        self.words(self.width - _RIGHT - 2, y + (12 if below else -4), text, "end")

    def words(self, x: float, y: float, text: str, anchor: str = "start", class_: str = "said") -> None:
        """At a place of the picture, not of the axes."""
        self._marks.append(tag("text", text, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor, class_=class_))

    def mark(self, mark: Html) -> None:
        """Any SVG, by px and py."""
        self._marks.append(mark)

    def key(self, name: str, tint: str) -> None:
        """A line of the legend for marks that were made by hand."""
        self._keys.append((name, tint))

    def figure(self) -> Html:
        keys = [tag("li", name, class_=f"key {tint}") for name, tint in self._keys]
        x, y = self.x, self.y
        right, floor = self.width - _RIGHT, self.height - _BOTTOM
        svg = tag(
            "svg",
            self._axes(),
            *self._marks,
            tag("text", self.y_label, x=2, y=14, class_="unit"),
            tag("text", self.x_label, x=right, y=self.height - 5, text_anchor="end", class_="unit"),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=f"{self.title}: {self.y_label} over {self.x_label}",
            data_x=f"{x.low:.9g} {x.high:.9g} {self.left} {right} {int(x.log)}",
            data_y=f"{y.low:.9g} {y.high:.9g} {floor} {_TOP} {int(y.log)}",
            data_names=f"{self.x_label}|{self.y_label}",
        )
        return tag(
            "figure",
            tag("figcaption", tag("b", self.title), tag("span", self.note) if self.note else None),
            tag("ul", *keys, class_="keys") if len(keys) > 1 else None,
            tag("div", svg, class_="scroll"),
            class_="wide" if self.wide else None,
        )

    def _axes(self) -> list[Child]:
        floor, right = self.height - _BOTTOM, self.width - _RIGHT
        parts: list[Child] = []
        for value, label in self.x.ticks(10 if self.wide else 5):
            at = self.px(value)
            parts.append(tag("path", d=f"M{at:g} {_TOP}V{floor}", class_="grid"))
            parts.append(tag("text", label, x=at, y=floor + 14, text_anchor="middle"))
        for value, label in [] if self.rows else self.y.ticks():
            at = self.py(value)
            parts.append(tag("path", d=f"M{self.left} {at:g}H{right}", class_="grid"))
            parts.append(tag("text", label, x=self.left - 6, y=at + 4, text_anchor="end"))
        return [*parts, tag("path", d=f"M{self.left} {floor}H{right}", class_="base")]

    def _add(self, name: str, tint: str, *marks: Child) -> None:
        self._marks.append(tag("g", *marks, data_series=name or None))
        if name:
            self.key(name, tint)


def _path(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
