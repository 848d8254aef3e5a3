"""Server-sent events out of timed pieces of a body (WHATWG HTML, section 9.2), after the fact."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


def events(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str, bytes]]:
    """(time, event name, data) of each event, at the arrival of its last byte.

    Comments and fields other than `event` and `data` are left out. An event that the end cuts off is given too: servers
    leave out the last blank line.
    """
    rest, now, first = b"", 0, True
    for now, data in pieces:
        rest += data
        if first and len(rest) >= 3:
            rest, first = rest.removeprefix(b"\xef\xbb\xbf"), False
        if b"\n" not in data and b"\r" not in data:
            continue
        *whole, rest = _BLANK.split(rest)
        for block in whole:
            if found := _event(block):
                yield now, *found
    if found := _event(rest):
        yield now, *found


def _event(block: bytes) -> tuple[str, bytes] | None:
    if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:  # nearly all of them
        return "", block[6:]
    name, data = "", []
    for line in _LINE.split(block):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
        elif field and line[:1] != b":" and field not in (b"id", b"retry"):
            data.append(line)  # no field of an event stream: let the reader of the data refuse it
    return (name, b"\n".join(data)) if data else None
