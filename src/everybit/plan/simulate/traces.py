"""Traces as requests: Azure, BurstGPT, Mooncake, records of `everybit bench`, and replays with known timings.

Azure: Patel et al. (Splitwise, ISCA 2024); Mooncake: Qin et al. (FAST 2025); BurstGPT: Wang et al. (2024).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from everybit.errors import SourceError
from everybit.plan.simulate.requests import BLOCK_TOKENS, Request, check

_EXPECTED = (
    "an Azure csv (TIMESTAMP,ContextTokens,GeneratedTokens), "
    "a BurstGPT csv (Timestamp,Request tokens,Response tokens), "
    "Mooncake JSON lines (timestamp, input_length, output_length, hash_ids), records of everybit bench or a replay csv "
    "(queued_s,input_tokens,output_tokens)"
)
_COLUMNS = {  # of a csv: when, prompt, output
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "replay": ("queued_s", "input_tokens", "output_tokens"),
}
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a real server did with a request, in seconds."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """`requests` by time, the first at 0, numbered from 0; `rows` that were read, and those `skipped`, by reason."""

    requests: list[Request]
    rows: int
    skipped: Mapping[str, int]


def read_trace(path: Path) -> list[Request]:
    """The requests of `load_trace`. Raises: SourceError naming the line"""
    return load_trace(path).requests


def load_trace(path: Path) -> Trace:
    """Requests without prompt or output tokens are skipped. Raises: SourceError naming the line"""
    found: Iterable[Request]
    lines = _lines(path)
    if lines[0].lstrip().startswith("{"):
        objects = _objects(path, lines)
        header = next(objects)
        ours = header[1].get("format") == "everybit-bench-records"
        found = _records(path, objects) if ours else _mooncake(path, chain([header], objects))
    else:
        found = _table(path, *_rows(path, lines))
    rows, requests, skipped = 0, list[Request](), Counter[str]()
    for one in found:
        rows += 1
        if one.prompt_tokens > 0 and one.output_tokens > 0:
            requests.append(one)
        else:
            skipped["no output tokens" if one.prompt_tokens > 0 else "no prompt tokens"] += 1
    if not requests:
        why = f"{rows} rows, {tell_skipped(skipped)}" if rows else "no rows"
        raise SourceError(f"{path}: no requests ({why}); expected {_EXPECTED}")
    requests.sort(key=lambda one: one.at_s)
    begin_s = requests[0].at_s
    requests = [replace(one, id=id, at_s=one.at_s - begin_s) for id, one in enumerate(requests)]
    check(requests)
    return Trace(requests, rows, skipped)


def tell_skipped(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in skipped.items())


def read_timings(path: Path) -> list[Timing]:
    """Of a replay csv with first_token_s and last_token_s, in `read_trace`'s order. Raises: SourceError"""
    header, rows = _rows(path, _lines(path))
    wanted = ("queued_s", "first_token_s", "last_token_s", "output_tokens")
    if not set(wanted) <= set(header):
        raise SourceError(f"{path}: columns {', '.join(header)[:80]}; expected {', '.join(wanted)}")
    found = []
    for line, row in rows:
        queued, first, last, tokens = (_number(path, line, row, name) for name in wanted)
        tpot = (last - first) / (tokens - 1) if tokens > 1 else None
        found.append((queued, Timing(first - queued, tpot, last - queued)))
    return [timing for _, timing in sorted(found, key=lambda one: one[0])]


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start}); expected {_EXPECTED}") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; expected {_EXPECTED}") from None
    if not any(line.strip() for line in lines):
        raise SourceError(f"{path}: an empty file; expected {_EXPECTED}")
    return lines


def _rows(path: Path, lines: list[str]) -> tuple[list[str], Rows]:
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader)]

    def rows() -> Rows:
        for row in reader:
            if row and len(row) != len(header):
                raise SourceError(f"{path}: line {reader.line_num}: {len(row)} columns; expected {len(header)}")
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))

    return header, rows()


def _objects(path: Path, lines: list[str]) -> Rows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise SourceError(f"{path}: line {number}: {line[:40]!r}; expected a JSON object")
        yield number, document


def _table(path: Path, header: list[str], rows: Rows) -> Iterator[Request]:
    format = next((name for name, columns in _COLUMNS.items() if set(columns) <= set(header)), None)
    if format is None:
        raise SourceError(f"{path}: columns {', '.join(header)[:80]}; expected {_EXPECTED}")
    when, prompt, output = _COLUMNS[format]
    sessions: dict[str, int] = {}
    for line, row in rows:
        at_s = _moment(path, line, row[when]) if format == "azure" else _number(path, line, row, when)
        name = row.get("Session ID", "")
        session = sessions.setdefault(name, len(sessions)) if name else None
        yield Request(0, at_s, _count(path, line, row, prompt), _count(path, line, row, output), session=session)


def _mooncake(path: Path, objects: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Request]:
    for line, row in objects:
        prompt, output = (_count(path, line, row, name) for name in ("input_length", "output_length"))
        blocks = row.get("hash_ids", [])
        known = isinstance(blocks, list) and all(type(one) is int for one in blocks)
        if not known or len(blocks) not in (0, -(-prompt // BLOCK_TOKENS)):
            raise SourceError(
                f"{path}: line {line}: hash_ids {str(blocks)[:40]} for {prompt} tokens; expected one per {BLOCK_TOKENS}"
            )
        yield Request(0, _number(path, line, row, "timestamp") / 1e3, prompt, output, tuple(blocks))


def _records(path: Path, objects: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Request]:
    """What was wanted, else what usage told; a failed request wants its answer again."""
    for line, row in objects:
        prompt = row.get("wanted_prompt") or row.get("usage_prompt") or 0
        given = row.get("usage_output") or sum(row.get("tokens", ()))
        output = row.get("wanted_output", 0) if row.get("error") else given
        lengths = {"prompt": prompt, "output": output}
        at_s = _number(path, line, row, "intended_ns") / 1e9
        yield Request(
            0,
            at_s,
            _count(path, line, lengths, "prompt"),
            _count(path, line, lengths, "output"),
            (),
            row.get("session"),
        )


def _number(path: Path, line: int, row: dict[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = float("nan")
    if not abs(value) < 1e15:
        raise SourceError(f"{path}: line {line}: {name} {str(row.get(name))[:40]!r}; expected a number")
    return value


def _count(path: Path, line: int, row: dict[str, Any], name: str) -> int:
    value = _number(path, line, row, name)
    if value != int(value):
        raise SourceError(f"{path}: line {line}: {name} {str(row[name])[:40]!r}; expected a whole number of tokens")
    return int(value)


def _moment(path: Path, line: int, text: str) -> float:
    """Seconds since 1970; a time without a zone is taken as UTC. Digits below a microsecond are dropped."""
    head, dot, tail = text.strip().partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    try:
        moment = datetime.fromisoformat(
            head + (dot + tail[: min(digits, 6)].ljust(6, "0") + tail[digits:] if dot else "")
        )
    except ValueError:
        raise SourceError(
            f"{path}: line {line}: TIMESTAMP {text[:40]!r}; expected one like 2023-11-16 18:15:46.68"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
