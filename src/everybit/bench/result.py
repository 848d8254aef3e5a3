"""The result of a bench as one JSON document (schema.json, version 1), and its files.

A document of kind run, audit or selftest stands alone. The others (sweep, capacity, compare, sustain) hold the whole
documents of their runs, and a block of their own name. A run's table has a row for each request, so that a report needs
the document and nothing else.
"""

from __future__ import annotations

import csv
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from everybit import __version__
from everybit.bench.metrics import latencies, measure, rated, score, stalls
from everybit.bench.records import ERRORS, MS, SECOND, Record, read_records, write_records
from everybit.bench.statistics import percentile
from everybit.bench.targets import Document, Targets, Window
from everybit.errors import OutputError, SourceError

SCHEMA = "everybit-bench-result"
VERSION = 1
SERIES = ("sweep", "capacity", "compare", "sustain")
ALONE = ("run", "audit", "selftest")
RUN_PARTS = ("endpoint", "load", "targets", "window", "requests", "tokens", "errors", "metrics", "validity", "energy")
COLUMNS = (
    *("number", "session", "turn", "scored", "intended_ms", "sent_ms", "first_ms", "end_ms", "prompt", "tokens"),
    *("source", "fluidity", "status", "error", "client_stalled", "bits", "stalls", "ttft_ms", "tpot_ms", "e2e_ms"),
    "detail",
)
_LAG_P99_NS = 10 * MS
_STALLED_SHARE = 0.01
_CLOCK_WARN_NS, _CLOCK_NS = 100 * MS, SECOND


# --- documents
def run_document(
    *,
    command: Sequence[str],
    created: str,
    endpoint: Mapping[str, Any],
    load: Mapping[str, Any],
    targets: Targets,
    window: Window,
    records: Sequence[Record],
    metrics: Document | None,
    validity: Document,
    energy: Mapping[str, Any] | None = None,
) -> Document:
    """A document of kind run. `created`: ISO 8601. `metrics` None: nothing was complete, `validity` says why."""
    return {
        **_head("run", command, created),
        "endpoint": dict(endpoint),
        "load": dict(load),
        "targets": targets.document(),
        "window": {"begin_ms": window.begin_ns / MS, "end_ms": window.end_ns / MS},
        "requests": table(records, window, targets),
        "tokens": token_sources(records),
        "errors": errors(records),
        "metrics": metrics,
        "validity": validity,
        "energy": None if energy is None else dict(energy),
    }


def series_document(
    kind: str, *, command: Sequence[str], created: str, block: Mapping[str, Any], runs: Sequence[Document] = ()
) -> Document:
    """A document of any other kind: its own block, and the runs it is made of. Raises: SourceError"""
    if kind not in (*SERIES, "audit", "selftest"):
        raise SourceError(f"a result of kind {kind!r}: expected one of {', '.join((*SERIES, 'audit', 'selftest'))}")
    document = {**_head(kind, command, created), kind: dict(block)}
    return {**document, "runs": list(runs)} if kind in SERIES else document


def _head(kind: str, command: Sequence[str], created: str) -> Document:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "kind": kind,
        "created": created,
        "command": list(command),
        "tool": {"name": "everybit bench", "version": __version__},
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
    }


def table(records: Sequence[Record], window: Window, targets: Targets) -> Document:
    """A row for each request, by intended time; times in ms from the run's start. `bits`: tokens by precision.

    `stalls`: [begin, length] of each wait after the first token that was longer than the targets allow. `ttft_ms`,
    `tpot_ms`, `e2e_ms`: of complete answers, from the intended send, as in the metrics.
    """
    ordered = sorted(records, key=lambda record: (record.intended_ns, record.number))
    return {"columns": list(COLUMNS), "rows": [_row(record, window, targets) for record in ordered]}


def _row(record: Record, window: Window, targets: Targets) -> list[Any]:
    scored = window.holds(record.intended_ns) and record.error != "cancelled"
    return [
        record.number,
        record.session,
        record.turn,
        scored,
        _ms(record.intended_ns),
        _ms(record.sent_ns),
        _ms(record.first_ns),
        _ms(record.end_ns),
        record.usage_prompt,
        record.output_tokens,
        record.source,
        round(score(record, targets).index, 6) if scored else None,
        record.status,
        record.error,
        record.stalled,
        dict(Counter(map(str, record.bits))) or None,
        [[_ms(begin), _ms(length)] for begin, length, _ in stalls(record, targets.stall_ns)],
        *map(_ms, latencies(record)),
        record.detail,
    ]


def _ms(ns: float | None) -> float | None:
    return None if ns is None else round(ns / MS, 3)


def token_sources(records: Sequence[Record]) -> Document:
    """Where token counts came from, and where the stream and the server's usage do not agree."""
    answered = [record for record in records if record.tokens]
    told = [r for r in answered if r.counted is not None and r.usage_output is not None]
    differ = [(r.number, r.counted or 0, r.usage_output or 0) for r in told if r.counted != r.usage_output]
    block: Document = {"sources": dict(Counter(record.source for record in answered)), "mismatch": None}
    if differ:
        counted, usage = sum(c for _, c, _ in differ), sum(u for _, _, u in differ)
        number, one, other = max(differ, key=lambda row: abs(row[1] - row[2]))
        block["mismatch"] = {
            "requests": len(differ),
            "of": len(answered),
            "counted": counted,
            "usage": usage,
            "largest": {"number": number, "counted": one, "usage": other},
            "message": f"TOKEN COUNTS DIFFER in {len(differ)} of {len(answered)} requests: the streams have {counted}"
            f" tokens, the server's usage says {usage}; times per token depend on whom you believe",
        }
    return block


def errors(records: Sequence[Record]) -> dict[str, Document]:
    """By kind, the most frequent first: how many, what it means, and what one said."""
    counts = Counter(record.error for record in records if record.error)
    found: dict[str, Document] = {}
    for kind, count in counts.most_common():
        example = next((r.detail for r in records if r.error == kind and r.detail), "")
        found[kind] = {"count": count, "meaning": ERRORS.get(kind, kind), "example": example}
    return found


def validity(
    records: Sequence[Record], window: Window, clock_jump_ns: int = 0, reasons: Sequence[str] = ()
) -> Document:
    """Whether the run measured the server, not this client. `reasons`: further ones that make it invalid.

    `clock_jump_ns`: how far the wall clock moved against the monotonic one during the run.
    """
    due = [record for record in records if window.holds(record.intended_ns)]
    bad, doubts = list(reasons), []
    lags = sorted(record.sent_ns - record.intended_ns for record in due if record.sent_ns is not None)
    if lags and (lag := percentile(lags, 99)) > _LAG_P99_NS:
        bad.append(f"this client sent late: lag p99 {lag / MS:.1f} ms, at most {_LAG_P99_NS // MS} expected")
    if (stalled := sum(record.stalled for record in due)) > _STALLED_SHARE * len(due):
        bad.append(f"this client stood still during {stalled} of {len(due)} requests")
    elif stalled:
        doubts.append(f"this client stood still during {stalled} of {len(due)} requests: see the corrected figures")
    if abs(clock_jump_ns) >= _CLOCK_NS:
        bad.append(f"the clock jumped by {clock_jump_ns / SECOND:.1f} s: it was set, or this machine slept")
    elif abs(clock_jump_ns) >= _CLOCK_WARN_NS:
        doubts.append(f"the wall clock moved by {clock_jump_ns / MS:.0f} ms; times are of the monotonic clock")
    if not rated(window):
        doubts.append(f"the measured time is {window.seconds:.3g} s: no rates")
    return {"valid": not bad, "reasons": bad, "warnings": doubts + _doubts(due)}


def _doubts(due: Sequence[Record]) -> list[str]:
    complete = [record for record in due if record.complete]
    cases: list[tuple[int, str]] = [
        (sum(r.error == "cancelled" for r in due), "requests were ended by this bench and not scored: figures flatter"),
        (sum(bool(r.error) and r.error != "cancelled" for r in due), "requests failed"),
        (sum(not r.streamed for r in complete), "answers came whole, not as a stream: no times between tokens"),
        (sum(r.usage_output is None for r in complete), "answers without usage: tokens are as the streams had them"),
        (sum(not r.finish for r in complete), "answers ended without a finish_reason: the server may have cut them"),
        (sum(r.malformed > 0 for r in due), "answers held events that could not be read"),
    ]
    found = [f"{count} of {len(due)} {what}" for count, what in cases if count]
    if (mismatch := token_sources(due)["mismatch"]) is not None:
        found.append(mismatch["message"])
    if 0 < len(complete) < 100:
        found.append(f"{len(complete)} complete requests: their p99 is hardly more than the maximum")
    return found


def interrupted(run: Document) -> bool:
    return any(one.startswith("interrupted") for one in (run.get("validity") or {}).get("warnings") or ())


# --- files
def rescored(folder: Path, document: Document, targets: Targets) -> Document:
    """An old run held against other targets, from the records in its folder. Raises: SourceError"""
    if document["kind"] != "run":
        raise SourceError(f"{folder}: a result of kind {document['kind']}; only a run can be scored anew")
    _, records = read_records((folder if folder.is_dir() else folder.parent) / "records.jsonl")
    window = Window(round(document["window"]["begin_ms"] * MS), round(document["window"]["end_ms"] * MS))
    return {
        **document,
        "targets": targets.document(),
        "requests": table(records, window, targets),
        "metrics": measure(records, window, targets),
    }


def write_result(folder: Path, document: Document, records: Sequence[Record] = ()) -> None:
    """records.jsonl and requests.csv where the document has requests; result.json last: it is there, all is.

    Raises: OutputError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "requests" in document:
            header = {name: document[name] for name in ("created", "command", "endpoint", "load", "targets", "window")}
            _replace(folder / "records.jsonl", lambda file: write_records(file, records, header))
            _replace(folder / "requests.csv", lambda file: _write_csv(file, document["requests"]))
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        _replace(folder / "result.json", lambda file: file.write(text + "\n"))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from None
    except ValueError as error:
        raise OutputError(f"{folder / 'result.json'}: not written, a figure is no finite number ({error})") from None


def _replace(path: Path, write: Callable[[IO[str]], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        # A server's words in requests.csv may hold half a surrogate pair.
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            write(file)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write_csv(file: IO[str], requests: Document) -> None:
    """The table's rows; bits and stalls as JSON."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(requests["columns"])
    for row in requests["rows"]:
        writer.writerow([json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in row])


def read_result(path: Path) -> Document:
    """`path`: result.json, or the folder that holds it. Raises: SourceError"""
    file = path / "result.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{file}: not JSON text; expected a result that everybit bench wrote") from None
    _check(document, str(file))
    return document  # type: ignore[no-any-return]


def _check(document: Any, place: str) -> None:
    """What readers rely on; schema.json says all of it."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise SourceError(f"{place}: expected a result that everybit bench wrote")
    if document.get("version") != VERSION:
        raise SourceError(f"{place}: a result of version {document.get('version')}; this everybit reads {VERSION}")
    kind = document.get("kind")
    if kind not in (*ALONE, *SERIES):
        raise SourceError(f"{place}: a result of kind {kind!r}: expected one of {', '.join((*ALONE, *SERIES))}")
    wanted = RUN_PARTS if kind == "run" else (kind, "runs") if kind in SERIES else (kind,)
    if missing := [name for name in wanted if name not in document]:
        raise SourceError(f"{place}: a result of kind {kind} without {', '.join(missing)}")
    if kind in SERIES:
        if not isinstance(document["runs"], list):
            raise SourceError(f"{place}: runs that are no list")
        for number, run in enumerate(document["runs"], 1):
            if not isinstance(run, dict) or run.get("kind") != "run":
                raise SourceError(f"{place}: run {number} is not of kind run")
            _check(run, f"{place}: run {number}")
