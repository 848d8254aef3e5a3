"""HTML that is safe by construction: every text is escaped unless this module made it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everybit.bench.report.figures import figure

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # also what turns text around
_LONGEST = 2000
_ROWS = 500


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = Html | str | Sequence["Child"] | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """An element. Attributes: `class_` is class, `data_tip` is data-tip; one of None is left out."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = "".join([name, *(f' {key}="{_text(str(value))}"' for key, value in pairs)])
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    return Html("".join(map(_child, children)))


def data(name: str, document: Any) -> Html:
    """JSON inside a script element that a browser does not run."""
    text = json.dumps(document, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], class_: str | None = None) -> Html:
    """The first column names the rows. On a narrow screen it scrolls sideways."""
    body = [
        tag("tr", *(tag("td" if i else "th", cell, scope=None if i else "row") for i, cell in enumerate(row)))
        for row in rows
    ]
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    return tag("div", tag("table", top, tag("tbody", *body), class_=class_), class_="scroll", tabindex=0)


def section(title: str, *children: Child) -> Html:
    """Empty where all `children` are."""
    inner = join(children)
    return tag("section", tag("h2", title), inner) if inner else inner


def charts(*children: Child) -> Html:
    """Beside each other where there is room; empty where all `children` are."""
    inner = join(children)
    return tag("div", inner, class_="charts") if inner else inner


def facts(value: Any) -> Child:
    """Any part of a document: objects as lists of terms, lists of objects as tables."""
    if isinstance(value, Mapping):
        shown = [(key, one) for key, one in value.items() if one is not None and one != {} and one != []]
        return tag("dl", *(tag("div", tag("dt", words(key)), tag("dd", facts(one))) for key, one in shown))
    if isinstance(value, list | tuple):
        some = value[:_ROWS]
        if some and all(isinstance(one, Mapping) for one in some):
            head = list(dict.fromkeys(key for one in some for key in one))
            return table([words(key) for key in head], ([facts(one.get(key)) for key in head] for one in some))
        return [[", " if i else None, facts(one)] for i, one in enumerate(some)]
    return figure(value)


def words(name: str) -> str:
    """Of a document's `joules_per_token`: joules per token."""
    return str(name).replace("_", " ")


def _child(child: Child) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    if isinstance(child, str):
        return _text(child if len(child) <= _LONGEST else child[:_LONGEST] + " …")
    return join(child)


def _text(text: str) -> str:
    return html.escape(_UNSEEN.sub("\ufffd", text))
