"""Server-sent events out of timed pieces of a body (WHATWG HTML, section 9.2), after the fact."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_LINE = re.compile(rb"\r\n|\n|\r")


def events(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str, bytes]]:
    """(time, event name, data) of each event, at the arrival of its last byte.

    Comments and fields other than `event` and `data` are left out. An event that the end cuts off is given too: servers
    leave out the last blank line.
    """
    rest, now = bytearray(), 0
    for now, data in pieces:
        begin = max(0, len(rest) - 2)  # half of a blank line may be there; all else is searched already
        rest += data
        done = 0
        for blank in _BLANK.finditer(rest, begin):
            if found := _event(bytes(rest[done : blank.start()])):
                yield now, *found
            done = blank.end()
        del rest[:done]
    if found := _event(bytes(rest)):
        yield now, *found


def _event(block: bytes) -> tuple[str, bytes] | None:
    """None where it has no data, as comments and pings."""
    block = block.removeprefix(b"\xef\xbb\xbf")
    if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:  # nearly all of them
        return ("", block[6:]) if block[6:] else None
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
    return (name, b"\n".join(data)) if any(data) else None
