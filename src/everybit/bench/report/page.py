"""The page around a report, and its file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from everybit.bench.report.markup import Child, Html, data, tag
from everybit.bench.report.run import alarms, run_page
from everybit.bench.report.series import headline, many_page, series_page
from everybit.errors import OutputError

Document = dict[str, Any]
MOST_DATA_BYTES = 2_000_000


def render(document: Document) -> str:
    """One result of any kind, as HTML that needs no other file."""
    body = [alarms(document), *run_page(document)] if document.get("kind") == "run" else series_page(document)
    endpoint = document.get("endpoint") or next((run.get("endpoint") for run in document.get("runs") or []), None) or {}
    about = [str(one) for one in (document.get("kind"), endpoint.get("model"), document.get("created")) if one]
    return _page(headline(document), about, body, document)


def render_many(documents: Sequence[Document], names: Sequence[str]) -> str:
    """Several results side by side. Raises: SourceError"""
    title, body = many_page(documents, names)
    return _page(title, [], body, None)


def write_report(path: Path, document: Document) -> None:
    """Raises: OutputError"""
    write_text(path, render(document))


def write_text(path: Path, page: str) -> None:
    """Under another name first, so that what lies at `path` is whole. Raises: OutputError"""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def _page(title: str, about: Sequence[str], body: Child, document: Document | None) -> str:
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    sources = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"
    raw = data("data", document) if document is not None and _size(document) < MOST_DATA_BYTES else Html()
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("title", f"{title} · everybit bench"),
        Html(f"<style>{style}</style>"),
    ]
    top = tag("header", tag("p", " · ".join(["everybit bench", *about]), class_="about"), tag("h1", title))
    foot = tag("footer", Html('<button type="button" id="save" hidden>Save the data as JSON</button>') if raw else None)
    main = tag("main", top, body, foot)
    end = [raw, Html(f"<script>{script}</script>")]
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}{tag("body", main, *end)}</html>\n'


def _size(document: Document) -> int:
    return len(json.dumps(document, separators=(",", ":")))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
