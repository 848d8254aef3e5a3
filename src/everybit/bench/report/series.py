"""Pages of all results but single runs: sweep, capacity, compare, sustain, audit, selftest; and several together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from everybit.bench.card import trend
from everybit.bench.report.curves import capacity_charts, sustain_charts, sweep_charts
from everybit.bench.report.distributions import cdf, ends_of, firsts_of, gap_cdf
from everybit.bench.report.figures import NONE, figure, number, plural
from everybit.bench.report.forest import SAME, forest, forest_table, said
from everybit.bench.report.markup import Child, Html, charts, facts, section, table, tag, words
from everybit.bench.report.matrix import matrix
from everybit.bench.report.pareto import pareto
from everybit.bench.report.requests import Document, Request, read_requests
from everybit.bench.report.run import (
    KeyFigure,
    alarms,
    details,
    invalid,
    key_figures,
    rate_of,
    run_brief,
    run_page,
    verdict,
)
from everybit.bench.result import interrupted
from everybit.errors import SourceError

MOST_RUNS = 24  # whose charts are on the page; of more, only the table is
_MOST_COLUMNS, _MOST_CURVES = 4, 12
_UNITS = {"rate": "requests/s", "users": "users"}
_DRAWN = ("points", "rows", "slices", "values", "labels", "over", "decay")
Named = Sequence[tuple[str, Document]]
Curves = Sequence[tuple[str, Sequence[Request]]]


def headline(document: Document) -> str:
    """What a result found, in one line."""
    kind = str(document.get("kind"))
    block = document.get(kind) or {}
    if kind == "capacity":
        return _capacity(block)
    if kind == "sweep":
        return f"{plural(len(document.get('runs') or []), 'run')} over {block.get('over', 'settings')}"
    if kind == "compare":
        rows = [said(row) for row in block.get("rows") or []]
        found = f": {SAME} in {rows.count(SAME)} of {plural(len(rows), 'figure')}" if rows else ""
        return " against ".join(map(str, block.get("labels") or ["A", "B"])) + found
    if kind == "sustain":
        decay = block.get("decay") or {}
        if "per_hour" not in decay:
            return "Under load for long"
        return trend(decay).capitalize()
    if kind == "audit":
        verdicts = [one["verdict"] for one in block.get("verdicts") or []]
        found = ", ".join(f"{name}: {count}" for name, count in Counter(verdicts).items())
        return f"Does it serve the precisions it claims? {found}".rstrip()
    if kind == "selftest":
        return "This instrument's own error" + ("" if block.get("ok", True) else ": too large")
    return verdict(document)


def series_page(document: Document) -> list[Child]:
    runs = name_runs(document)
    return [
        alarms(runs[0][1]) if len(runs) == 1 else _invalid(runs),
        section("Result", *_result(document, runs)),
        *(run_page(runs[0][1]) if len(runs) == 1 else [*side_by_side(runs, _curves(document, runs)), _about(document)]),
    ]


def _result(document: Document, runs: Named) -> list[Child]:
    """What a result says beside its runs."""
    kind = str(document.get("kind"))
    block: dict[str, Any] = document.get(kind) or {}
    drawn: list[Child] = []
    if kind == "capacity":
        drawn = list(capacity_charts(block, [run for _, run in runs]))
    elif kind == "sweep":
        values = _values(block)
        quality = document.get("quality") or {}
        drawn = [pareto(runs, quality) if block.get("over") == "model" else sweep_charts(block, values, runs)]
    elif kind == "compare":
        drawn = [forest(block), forest_table(block)]
    elif kind == "sustain":
        drawn = list(sustain_charts(block))
    lines = block.get("lines")
    told = {"lines", "verdicts", *(_DRAWN if document.get("runs") else ())}
    rest = {name: value for name, value in block.items() if name not in told}
    return [
        tag("pre", "\n".join(map(str, lines))) if lines else None,
        matrix(block) if kind == "audit" else None,
        charts(*drawn),
        *_rest(rest),
    ]


def _rest(block: Mapping[str, Any]) -> list[Child]:
    """What no chart shows: single facts, then tables."""
    tables = {
        name: value
        for name, value in block.items()
        if isinstance(value, list) and any(isinstance(one, dict) for one in value)
    }
    single = {name: value for name, value in block.items() if name not in tables}
    return [facts(single) if single else None, *([tag("h3", words(name)), facts(one)] for name, one in tables.items())]


def many_page(documents: Sequence[Document], names: Sequence[str]) -> tuple[str, list[Child]]:
    """Title and body: what each result says by itself, then all their runs. Raises: SourceError"""
    if len(documents) != len(names):
        raise SourceError(f"{len(documents)} results and {len(names)} names: expected a name for each")
    runs: list[tuple[str, Document]] = []
    results: list[Child] = []
    for document, name in zip(documents, names, strict=True):
        if document.get("kind") == "run":
            runs.append((name, document))
        else:
            inner = name_runs(document)
            runs += [(f"{name}: {one}", run) for one, run in inner]
            results.append(section(name, *_result(document, inner)))
    rows = [(name, headline(document)) for document, name in zip(documents, names, strict=True)]
    found = section("Results", table(("", "result"), rows))
    return f"{plural(len(documents), 'result')} side by side", [_invalid(runs), found, *results, *side_by_side(runs)]


def name_runs(document: Document) -> list[tuple[str, Document]]:
    """Each run of a result, by what was different about it."""
    kind, runs = str(document.get("kind")), document.get("runs") or []
    block = document.get(kind) or {}
    labels = [f"run {i}" for i in range(1, len(runs) + 1)]
    values, over = _values(block), str(block.get("over", ""))
    if kind == "sweep" and len(values) == len(runs):
        unit = "" if over == "model" else f" {_UNITS.get(over, over)}"
        labels = [figure(value) + unit for value in values]
    elif kind == "capacity":
        rates = map(rate_of, runs)
        labels = [f"{a}, {number(b)} requests/s" if b else a for a, b in zip(labels, rates, strict=True)]
    elif kind == "compare":
        labels = [f"{'AB'[i % 2]}, round {i // 2 + 1}" for i in range(len(runs))]
    marks = [", interrupted" if interrupted(run) else "" for run in runs]
    return [(label + mark, run) for label, mark, run in zip(labels, marks, runs, strict=True)]


def side_by_side(runs: Named, curves: Curves | None = None) -> list[Child]:
    """Key figures, CDFs over each other, and each run to be unfolded. `curves`: the CDFs' names and requests."""
    if not runs:
        return []
    lists = [key_figures(run) for _, run in runs]
    rows = [list(row) for row in zip(*lists, strict=True) if any(one.value != NONE for one in row)]
    if len(runs) <= _MOST_COLUMNS:
        figures = table(("", *(name for name, _ in runs)), ([row[0].name, *map(_cell, row)] for row in rows), "figures")
    else:
        lines = [[name, *(tag("b", row[i].value) for row in rows)] for i, (name, _) in enumerate(runs)]
        figures = table(("", *(row[0].name for row in rows)), lines, "figures many")
    some = runs[:_MOST_CURVES]
    drawn = curves or [(name, read_requests(run)) for name, run in some]
    note = f"the first {_MOST_CURVES} of {len(runs)} runs" if len(some) < len(runs) and not curves else None
    cdfs = [
        cdf("Time to the first token", [(name, firsts_of(one)) for name, one in drawn], note=note),
        None if curves else gap_cdf("Time between tokens", some, note=note),
        cdf("Time to the end", [(name, ends_of(one)) for name, one in drawn], note=note),
    ]
    return [
        section("Figures side by side", figures),
        section("Distributions", charts(*cdfs)),
        section("Each run", *(_fold(name, run) for name, run in runs)) if len(runs) <= MOST_RUNS else None,
    ]


def _curves(document: Document, runs: Named) -> Curves | None:
    """Of a comparison: the requests of all rounds of a side together."""
    labels = (document.get("compare") or {}).get("labels")
    if not labels:
        return None
    sides = [[one for _, run in runs[side::2] for one in read_requests(run)] for side in (0, 1)]
    return [(f"{'AB'[side]}: {labels[side]}", requests) for side, requests in enumerate(sides)]


def _values(block: Mapping[str, Any]) -> list[Any]:
    """What a sweep went over, one for each run."""
    return block.get("values") or [point.get("value") for point in block.get("points") or []]


def _capacity(block: Mapping[str, Any]) -> str:
    low, high = (None if end is None else number(end) for end in (block.get("bracket") or (None, None)))
    said = {
        "found": f"Capacity {number(block.get('rate'))} requests/s; {high} is too much",
        "at least": f"Capacity at least {number(block.get('rate'))} requests/s: nothing failed",
        "unsure": f"Capacity between {low} and {high} requests/s",
        "none": "No rate keeps the SLO",
    }
    return said.get(block.get("verdict", ""), "Capacity")


def _about(document: Document) -> Html:
    return details({**next(iter(document.get("runs") or []), {}), **document})


def _cell(one: KeyFigure) -> list[Child]:
    return [tag("b", one.value), tag("small", one.note) if one.note else None]


def _fold(name: str, run: Document) -> Html:
    return tag("details", tag("summary", name), *run_brief(run))


def _invalid(runs: Named) -> Child:
    """Whose figures measure this client."""
    found = [tag("li", f"{name}: {reason}") for name, run in runs for reason in invalid(run)]
    return tag("div", tag("b", "Not to be trusted"), tag("ul", *found), class_="alarm", role="alert") if found else None
