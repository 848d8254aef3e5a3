"""Server-sent events out of a generation, and answers in one piece; both end what runs when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from everybit.server.generation import Generation, Piece
from everybit.server.problems import Problem, problem_of

DONE = b"data: [DONE]\n\n"


# Line ends to some clients, which split streams as Python's splitlines does.
_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def frame(document: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    text = _encode(document)
    body = text.encode() if text.isascii() else text.translate(_LINE_ENDS).encode("utf-8", "replace")
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + body + b"\n\n"


@asynccontextmanager
async def _watched(generation: Generation, receive: Receive, note: Callable[[], None]) -> AsyncIterator[None]:
    """Abandons the generation when the client goes; at the end closes it, and notes it where it began."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.abandon()

    watch = asyncio.ensure_future(wait())
    try:
        yield
    finally:
        watch.cancel()
        generation.close()
        if generation.began:
            note()


class Gone(Exception):  # noqa: N818 - nobody's error
    """The client left; there is nobody to answer."""


async def collect(
    generation: Generation,
    receive: Receive,
    take: Callable[[Piece], object],
    headers: Mapping[str, str],
    document: Callable[[], dict[str, Any]],
    note: Callable[[], None],
) -> Response:
    """Everything in one JSON answer. Raises: what went wrong, Gone"""
    async with _watched(generation, receive, note):
        generation.start()
        async for pieces in generation.pieces():
            for piece in pieces:
                take(piece)
    if not generation.complete:
        raise Gone
    return JSONResponse(document(), headers=dict(headers))


class EventStream(Response):
    """`frames(pieces)` makes the frames of what arrived, `last()` those that end the stream.

    The answer begins with the first token: what goes wrong before is a status code, and after it an error frame.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        frames: Callable[[list[Piece]], bytes],
        last: Callable[[], bytes],
        headers: Mapping[str, str],
        note: Callable[[], None],
        error: Callable[[Problem], bytes] = lambda problem: frame(problem.body()) + DONE,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self._generation, self._frames, self._last, self._note, self._error = generation, frames, last, note, error
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(body: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with _watched(self._generation, receive, self._note):
                self._generation.start()
                async for pieces in self._generation.pieces():
                    await write(self._frames(pieces))
                if not self._generation.running:
                    await write(self._last(), more=False)
            if not started:
                raise Gone
        except (ConnectionError, Gone):
            raise
        except Exception as error:
            if not started:
                raise
            scope["state"]["line"]["problem"] = f"{type(error).__name__}: {error}"[:500]
            await write(self._error(problem_of(error)), more=False)
