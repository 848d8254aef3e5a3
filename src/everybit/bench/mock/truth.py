"""What a mock really did: when requests arrived and when their tokens were written."""

from __future__ import annotations

import json
import ssl
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

TRUTH = "/mock/truth"


def _times() -> array[int]:
    return array("q")  # compact: a long run has millions


@dataclass(slots=True)
class Truth:
    """One request. Times are ns of `time.perf_counter_ns()`, one clock for all processes of a machine on Linux.

    `started_ns`: when a slot was free (at once without `slots`). `due_ns`, `written_ns`: one entry a token, when it
    should have been and when it was handed to the system. `ended_ns`: after the last byte; None while it runs and
    where the client left.
    """

    number: int
    id: str
    path: str
    arrived_ns: int
    status: int = 200
    started_ns: int | None = None
    ended_ns: int | None = None
    due_ns: array[int] = field(default_factory=_times)
    written_ns: array[int] = field(default_factory=_times)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, array) else value for name, value in values.items()}


def read_truth(documents: Iterable[dict[str, Any]]) -> list[Truth]:
    """The inverse of `document`."""

    def times(value: Any) -> Any:
        return array("q", value) if isinstance(value, list) else value

    return [Truth(**{name: times(value) for name, value in one.items()}) for one in documents]


def fetch_truth(url: str, context: ssl.SSLContext | None = None) -> list[Truth]:
    """Of the mock that serves `url`, a base URL with or without /v1. Raises: OSError"""
    parts = urlsplit(url)
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    with opener.open(urlunsplit((parts.scheme, parts.netloc, TRUTH, "", "")), timeout=60) as response:
        return read_truth(json.load(response))
