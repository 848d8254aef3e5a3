"""What a bench sends and what came of it: the types between the load, the workers, the metrics and the report.

All times are whole nanoseconds from the run's start on one monotonic clock that every process of the machine shares.
A record holds everything that was seen of one request, so that metrics are computed offline and can be computed anew
under another target. A file of records is JSON lines: one header, then one record a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from everybit.errors import SourceError

MS = 1_000_000
SECOND = 1_000_000_000
HEADER = {"format": "everybit-bench-records", "version": 1}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session: `text` is what its user adds, `output_tokens` the most that may come.

    `think_ns` passes between the end of the turn before and the intended send. `prompt_tokens` is how long the load
    wanted the whole prompt to be (None: whatever the text has); how long it was, the server's usage tells.
    """

    text: str
    output_tokens: int
    think_ns: int = 0
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A user: turns one after another. An open loop is many sessions of one turn, a closed loop few of many turns.

    `at_ns` is when the first turn is to be sent, from the run's start: fixed before the run, whatever the server does.
    With `history` every turn's prompt holds the turns and answers before it. `prefix` stands before all turns (a
    system prompt, a document); equal prefixes of several sessions are equal text.
    """

    number: int
    at_ns: int
    turns: Iterable[Turn]
    history: bool = False
    prefix: str = ""


@dataclass(slots=True)
class Record:
    """One request. Times are ns from the run's start; what did not happen is None.

    `times_ns`, `tokens`: arrival of each piece that carried tokens, and how many. `bits`: precision of each token,
    where the server tells (else empty). `source` says where `tokens` came from (see tokens.py). `error` is a kind of
    ERRORS, empty for a complete answer; `detail` quotes the server. `stalled`: this client itself stood still while
    the request ran, so its times are the instrument's and not the server's.
    """

    number: int
    session: int
    turn: int
    worker: int
    intended_ns: int
    sent_ns: int | None = None
    connected_ns: int | None = None  # None too where a connection was there
    head_ns: int | None = None  # the status line
    end_ns: int | None = None
    status: int = 0
    error: str = ""
    detail: str = ""
    streamed: bool = True
    finish: str = ""
    times_ns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bits: list[int | str] = field(default_factory=list)
    source: str = ""
    wanted_prompt: int | None = None
    wanted_output: int = 0
    usage_prompt: int | None = None
    usage_output: int | None = None
    usage_cached: int | None = None
    counted: int | None = None  # tokens that the pieces have by themselves, when usage says otherwise
    malformed: int = 0  # events of the stream that could not be read
    retry_after_s: float | None = None
    stalled: bool = False
    model: str = ""
    text: str = ""

    @property
    def complete(self) -> bool:
        return not self.error

    @property
    def output_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def first_ns(self) -> int | None:
        """When the first token came."""
        return self.times_ns[0] if self.times_ns else None


# Kinds of failure, each counted and reported.
ERRORS = {
    "resolve": "the host name has no address",
    "connect": "no connection",
    "tls": "TLS failed",
    "key": "401 or 403: the key was refused",
    "missing": "404: no such path or model",
    "context": "400: more tokens than the context holds",
    "refused": "another 4xx: the request was refused",
    "busy": "429: too many requests",
    "unavailable": "503: unavailable",
    "server": "another 5xx",
    "redirect": "3xx: redirects are not followed",
    "http": "an answer that is not HTTP/1.1",
    "malformed": "an answer whose pieces could not be read",
    "frame": "an error in the middle of the stream",
    "cut": "the connection ended before the answer did",
    "empty": "an answer without a token",
    "endless": "the answer went on past the longest time, size or token count",
    "timeout": "nothing arrived for too long",
    "cancelled": "ended by this bench (Ctrl-C or the end of the drain); not scored",
}


def write_records(file: IO[str], records: Iterable[Record], header: dict[str, Any]) -> None:
    file.write(json.dumps({**HEADER, **header}) + "\n")
    for record in records:
        file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records. Raises: SourceError"""
    lines = _documents(path)
    header = next(lines, None)
    if header is None or header.get("format") != HEADER["format"]:
        raise SourceError(f"{path}: expected records that everybit bench wrote")
    if header.get("version") != HEADER["version"]:
        raise SourceError(
            f"{path}: records of version {header.get('version')}; this everybit reads {HEADER['version']}"
        )
    known = {one.name for one in fields(Record)}
    try:
        return header, [Record(**{k: v for k, v in line.items() if k in known}) for line in lines]
    except TypeError as error:
        raise SourceError(f"{path}: a record without what it needs ({error})") from None


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    document = json.loads(line)
                except ValueError:
                    document = None
                if not isinstance(document, dict):
                    raise SourceError(f"{path}: line {number} is not a JSON object")
                yield document
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not UTF-8 text") from None
