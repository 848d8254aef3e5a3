"""Traces: requests with their times and lengths, read from files whose format their content tells.

Azure (Splitwise, Patel et al., ISCA 2024; csv of 2023 and 2024), Mooncake (Qin et al., FAST 2025; JSON lines with the
ids of prefix blocks), BurstGPT (Wang et al., 2024; csv) and the records of this bench.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

from everybit.bench.load.arrivals import MOST_ARRIVALS
from everybit.bench.load.lengths import COLUMNS, MOST_TOKENS, to_tokens
from everybit.bench.load.texts import read_object, read_rows, read_text
from everybit.bench.records import HEADER, MS, SECOND, read_records
from everybit.errors import SourceError

BLOCK_TOKENS = 512  # of a Mooncake hash id
_EXPECTED = (
    "an Azure csv (TIMESTAMP,ContextTokens,GeneratedTokens), "
    "a BurstGPT csv (Timestamp,Request tokens,Response tokens), "
    "Mooncake JSON lines (timestamp, input_length, output_length, hash_ids) or records of everybit bench"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`blocks`: ids of the prompt's blocks, equal for equal text. `session`: the conversation, where one is named."""

    at_ns: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    session: int | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in order of time, the first at 0. `notes` say what was changed or left out.

    Block i of a prompt holds its tokens from `round(i * block_tokens)` on.
    """

    requests: list[TraceRequest]
    notes: list[str]
    format: str
    block_tokens: float = BLOCK_TOKENS


def read_trace(path: Path) -> Trace:
    """Raises: SourceError naming the line that cannot be read"""
    start = read_text(path)[:1000].lstrip()
    if not start:
        raise SourceError(f"{path}: an empty file; expected {_EXPECTED}")
    if start.startswith("{"):
        ours = str(HEADER["format"]) in start.partition("\n")[0]
        format, found = ("everybit", _records(path)) if ours else ("mooncake", _mooncake(path))
    else:
        header, rows = read_rows(path)
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(header):
            format, found = "azure", _azure(path, rows)
        elif {"Timestamp", "Request tokens", "Response tokens"} <= set(header):
            format, found = "burstgpt", _burstgpt(path, rows)
        elif any(set(pair) <= set(header) for pair in COLUMNS):
            raise SourceError(f"{path}: lengths without times; draw lengths from it with file:{path} and choose a rate")
        else:
            raise SourceError(f"{path}: starts with {start[:40]!r}; expected {_EXPECTED}")
    return _tidy(path, list(found), format)


def _tidy(path: Path, found: list[TraceRequest], format: str) -> Trace:
    requests = [one for one in found if one.prompt_tokens > 0 and one.output_tokens > 0]
    notes = []
    if len(requests) < len(found):
        notes.append(f"{len(found) - len(requests)} requests without prompt or output tokens were left out")
    if not requests:
        raise SourceError(f"{path}: no requests with prompt and output tokens among {len(found)}")
    back = sum(after.at_ns < before.at_ns for before, after in pairwise(requests))
    if back:
        notes.append(f"{back} requests were out of order in time and were sorted")
        requests.sort(key=attrgetter("at_ns"))
    if format == "everybit":
        notes.append("recorded requests are sent at their intended times, whenever their answers come")
    return Trace(_from_zero(requests), notes, format)


def _from_zero(requests: list[TraceRequest]) -> list[TraceRequest]:
    begin_ns = requests[0].at_ns
    return [replace(one, at_ns=one.at_ns - begin_ns) for one in requests] if begin_ns else requests


def _azure(path: Path, rows: Iterable[tuple[int, dict[str, str]]]) -> Iterator[TraceRequest]:
    for line, row in rows:
        at_ns = _date_ns(path, line, row["TIMESTAMP"])
        prompt, output = (to_tokens(path, line, name, row[name]) for name in ("ContextTokens", "GeneratedTokens"))
        yield TraceRequest(at_ns, prompt, output)


def _burstgpt(path: Path, rows: Iterable[tuple[int, dict[str, str]]]) -> Iterator[TraceRequest]:
    sessions: dict[str, int] = {}
    for line, row in rows:
        at_ns = _scaled_ns(path, line, row["Timestamp"], SECOND)
        prompt, output = (to_tokens(path, line, name, row[name]) for name in ("Request tokens", "Response tokens"))
        name = row.get("Session ID", "")
        yield TraceRequest(at_ns, prompt, output, session=sessions.setdefault(name, len(sessions)) if name else None)


def _mooncake(path: Path) -> Iterator[TraceRequest]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        document = read_object(f"{path}: line {number}", line)
        missing = [name for name in ("timestamp", "input_length", "output_length") if name not in document]
        if missing:
            raise SourceError(f"{path}: line {number}: no {', '.join(missing)}; expected {_EXPECTED}")
        prompt, output = (to_tokens(path, number, name, document[name]) for name in ("input_length", "output_length"))
        blocks = document.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(type(one) is int for one in blocks):
            raise SourceError(f"{path}: line {number}: hash_ids {str(blocks)[:40]}; expected a list of whole numbers")
        if blocks and len(blocks) != -(-prompt // BLOCK_TOKENS):
            raise SourceError(
                f"{path}: line {number}: {len(blocks)} hash_ids, {prompt} tokens; expected one per {BLOCK_TOKENS}"
            )
        yield TraceRequest(_scaled_ns(path, number, str(document["timestamp"]), MS), prompt, output, tuple(blocks))


def _records(path: Path) -> Iterator[TraceRequest]:
    """What was wanted, else what usage told; a failed request wants its answer again."""
    for line, one in enumerate(read_records(path)[1], 2):
        prompt = one.usage_prompt if one.wanted_prompt is None else one.wanted_prompt
        output = (one.usage_output or one.output_tokens) if one.complete else one.wanted_output
        yield TraceRequest(
            _scaled_ns(path, line, str(one.intended_ns), 1),
            to_tokens(path, line, "prompt", prompt or 0),
            to_tokens(path, line, "output", output),
            session=one.session,
        )


def _date_ns(path: Path, line: int, text: str) -> int:
    """ns since 1970, exact; a time without a zone is taken as UTC."""
    found = _TIME.fullmatch(text.strip())
    try:
        if not found:
            raise ValueError
        moment = datetime.fromisoformat(found[1] + (found[3] or "Z"))
    except ValueError:
        raise SourceError(
            f"{path}: line {line}: TIMESTAMP {text[:40]!r}; expected one like 2023-11-16 18:15:46.6805900"
        ) from None
    return (moment - _EPOCH) // timedelta(seconds=1) * SECOND + int((found[2] or "").ljust(9, "0"))


def _scaled_ns(path: Path, line: int, text: str, unit_ns: int) -> int:
    try:
        value = Decimal(text) * unit_ns
        if not abs(value) < 2**62:
            raise InvalidOperation
    except ArithmeticError:
        raise SourceError(f"{path}: line {line}: timestamp {text[:40]!r}; expected a number") from None
    return int(value)


def select(
    trace: Trace,
    *,
    part: str = "",
    scale_prompt: float = 1.0,
    scale_output: float = 1.0,
    most_prompt: int = MOST_TOKENS,
    most_output: int = MOST_TOKENS,
    speed: float = 1.0,
    loop: int = 1,
) -> Trace:
    """A part of a trace, with other lengths, faster, and several times over: in this order.

    `part`: requests "100:200" or times "60s:120s", either end open. Lengths stay 1 or more; one above `most_...`
    becomes it. Each pass of a `loop` begins one mean gap after the last request, with blocks and sessions of its own,
    so that it finds no cache the first had not. Raises: SourceError
    """
    for name, value in (("speed", speed), ("scale_prompt", scale_prompt), ("scale_output", scale_output)):
        if not 1e-6 <= value <= 1e6:
            raise SourceError(f"{name} {value}: expected 1e-6 to 1e6")
    for name, least in (("most_prompt", most_prompt), ("most_output", most_output), ("loop", loop)):
        if least < 1:
            raise SourceError(f"{name} {least}: expected 1 or more")
    chosen = _from_zero(_slice(trace.requests, part))
    if loop * len(chosen) > MOST_ARRIVALS:
        raise SourceError(f"{len(chosen)} requests {loop} times over: expected {MOST_ARRIVALS} at most")
    cut = 0
    requests = []
    for one in chosen:
        prompt, output = (
            max(1, round(one.prompt_tokens * scale_prompt)),
            max(1, round(one.output_tokens * scale_output)),
        )
        cut += prompt > most_prompt or output > most_output
        requests.append(
            replace(
                one,
                at_ns=round(one.at_ns / speed),
                prompt_tokens=min(prompt, most_prompt),
                output_tokens=min(output, most_output),
            )
        )
    notes = [*trace.notes, *([f"{cut} requests were longer than allowed and were cut"] if cut else [])]
    return replace(trace, requests=_loop(requests, loop), notes=notes, block_tokens=trace.block_tokens * scale_prompt)


def _slice(requests: list[TraceRequest], part: str) -> list[TraceRequest]:
    if not part:
        return requests
    counts = re.fullmatch(r"(\d{0,15}):(\d{0,15})", part)
    times = re.fullmatch(r"(?:(\d{1,9}(?:\.\d{1,9})?)s)?:(?:(\d{1,9}(?:\.\d{1,9})?)s)?", part)
    if counts:
        chosen = requests[int(counts[1] or 0) : int(counts[2]) if counts[2] else None]
    elif times:
        begin_ns, end_ns = int(Decimal(times[1] or 0) * SECOND), int(Decimal(times[2] or 2**32) * SECOND)
        chosen = [one for one in requests if begin_ns <= one.at_ns < end_ns]
    else:
        raise SourceError(f"part {part!r}: expected requests like 100:200 or times like 60s:120s")
    if not chosen:
        raise SourceError(
            f"part {part!r}: no requests there; the trace has {len(requests)} in {requests[-1].at_ns / SECOND:.1f} s"
        )
    return chosen


def _loop(requests: list[TraceRequest], loop: int) -> list[TraceRequest]:
    if loop == 1:
        return requests
    if len(requests) < 2:
        raise SourceError("one request has no gap to go on with; expected two or more for a loop")
    last_ns = requests[-1].at_ns
    length_ns = last_ns + round(last_ns / (len(requests) - 1))
    blocks = 1 + max((max(one.blocks, default=0) for one in requests), default=0)
    sessions = 1 + max((one.session or 0 for one in requests), default=0)
    return [
        replace(
            one,
            at_ns=one.at_ns + turn * length_ns,
            blocks=tuple(block + turn * blocks for block in one.blocks),
            session=None if one.session is None else one.session + turn * sessions,
        )
        for turn in range(loop)
        for one in requests
    ]
