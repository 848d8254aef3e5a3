"""What a mock server does: times, shapes of its answers, faults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason

HIGHEST_BITS = 8
LOWEST_BITS = 2

_KINDS: dict[str, set[type]] = {"int": {int}, "float": {int, float}, "str": {str}, "bool": {bool}, "None": {type(None)}}
_LEAST = {"tokens_per_chunk": 1, "bundle_first": 1, "events_per_write": 1, "stall_every": 1, "slots": 1, "status": 400}
_LEAST |= {"status_every": 1, "always_bits": LOWEST_BITS}
_MOST = {"status": 599, "always_bits": HIGHEST_BITS}
_WORDS = {"usage": ("right", "none", "wrong"), "end": ("ends", "never", "cut", "error", "garbage")}


@dataclass(frozen=True)
class Script:
    """Token k (from 0) of a request that begins at t is due at t + ttft + prefill x prompt tokens + k x gap.

    A request begins when it arrives, or with `slots` when one is free. An event of several tokens is due with its
    last one, and so is a write of several events. Requests count from 1: "each n-th" are n, 2n, ... A list in JSON is
    a tuple here.

    Raises: SourceError
    """

    # When tokens are due.
    ttft_ms: float = 100
    prefill_ms_per_token: float = 0
    gap_ms: float = 20
    jitter_ms: float = 0  # each token up to this much later, drawn anew from `seed` and the request's number
    seed: int = 0
    stall_at_token: int = 0  # this token and those after it are `stall_ms` later, in each `stall_every`-th request
    stall_ms: float = 0
    stall_every: int = 1
    freeze: tuple[float, float] | None = None  # (from, for) in s after the first request: all is written at its end
    slots: int | None = None  # requests served at once; others wait in the order they came
    queue: int | None = None  # where more than this many wait: 429

    # What comes.
    tokens: int | None = None  # of each answer (0: empty); None: as many as the request allows, or 16
    tokens_per_chunk: int = 1
    bundle_first: int | None = None  # tokens of the first event; None: as the others
    events_per_write: int = 1
    split_frames: bool = False  # events come in two writes 1 ms apart, cut in the middle of a character
    crlf: bool = False
    pings: bool = False  # a comment halfway before each event of tokens
    head_ms: float | None = None  # when a stream's head comes, and what precedes tokens; None: with the first token
    stream: bool = True  # False: JSON though a stream was asked for
    usage: str = "right"  # none, or wrong: twice the output tokens
    done: bool = True  # False: the event that ends a stream is missing
    end: str = "ends"  # never, or after `end_at` tokens: cut, error; garbage: two unreadable events in between
    end_at: int = 1

    # What is refused.
    status: int | None = None  # answers this to each `status_every`-th request
    status_every: int = 1
    retry_after_s: float = 1  # with 429 and 503
    key: str | None = None
    context: int | None = None  # tokens of prompt and answer together
    tls_certificate: str | None = None  # PEM files
    tls_key: str | None = None

    # Models and precisions.
    models: tuple[str, ...] = ("mock",)  # each also as NAME@2bit to NAME@8bit; without an alias 8 bits
    identity: str = "mock"  # another one is another model: other log-probabilities
    always_bits: int | None = None  # answers with the log-probabilities of this precision whatever was asked
    bits: tuple[tuple[int, int], ...] = ()  # (from token, bits), told in every event of tokens

    def __post_init__(self) -> None:
        for one in fields(self):
            if "tuple" not in str(one.type):
                _check(one.name, getattr(self, one.name), str(one.type))
        if self.freeze is not None:
            _check_pairs("freeze", (self.freeze,), (int, float))
        _check_pairs("bits", self.bits, (int,))
        starts = [start for start, _ in self.bits]
        if self.bits and (starts != sorted(set(starts)) or starts[0] != 0):
            raise SourceError(f"bits {self.bits} of the script: expected (from token, bits), rising from token 0")
        if not (isinstance(self.models, tuple) and self.models and all(isinstance(m, str) and m for m in self.models)):
            raise SourceError(f"models {self.models!r} of the script: expected one name or more")
        if self.end == "never" and not self.gap_ms:
            raise SourceError("a script that never ends needs gap_ms above 0")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise SourceError("tls_certificate and tls_key go together: the script has only one of them")

    def bits_at(self, first: int, count: int) -> list[int]:
        """Precision of `count` tokens from token `first` on; empty where the script has none."""
        if not self.bits:
            return []
        return [[bits for start, bits in self.bits if start <= k][-1] for k in range(first, first + count)]


def parse_script(document: Any) -> Script:
    """From JSON's types. Raises: SourceError"""
    if not isinstance(document, Mapping):
        raise SourceError(f"a script is a JSON object, got {type(document).__name__}")
    known = [one.name for one in fields(Script)]
    for name in document:
        if name not in known:
            raise SourceError(f"the script has {str(name)[:40]!r}, which is unknown: expected {', '.join(known)}")
    return Script(**{name: _tuples(value) for name, value in document.items()})


def read_script(path: Path) -> Script:
    """From a JSON file. Raises: SourceError"""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SourceError(f"{path}: not a script in JSON ({reason(error)})") from None
    return parse_script(document)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _check(name: str, value: Any, wanted: str) -> None:
    """Raises: SourceError"""
    if type(value) not in {kind for word in wanted.split(" | ") for kind in _KINDS[word]}:
        raise SourceError(f"{name} {str(value)[:40]!r} of the script: expected {wanted.replace('None', 'null')}")
    if isinstance(value, str):
        if value not in _WORDS.get(name, (value,)):
            raise SourceError(f"{name} {value[:40]!r} of the script: expected one of {', '.join(_WORDS[name])}")
    elif value is not None:
        least, most = _LEAST.get(name, 0), _MOST.get(name, math.inf)
        if not (least <= value <= most and math.isfinite(value)):
            raise SourceError(f"{name} {value} of the script: expected {least} to {most}")


def _check_pairs(name: str, pairs: Any, kinds: tuple[type, ...]) -> None:
    """Raises: SourceError"""
    for pair in pairs if isinstance(pairs, tuple) else (None,):
        right = isinstance(pair, tuple) and len(pair) == 2 and all(type(one) in kinds for one in pair)
        if not right or not all(0 <= one < math.inf for one in pair):
            raise SourceError(f"{name} {str(pair)[:40]} of the script: expected pairs of two numbers from 0 on")
