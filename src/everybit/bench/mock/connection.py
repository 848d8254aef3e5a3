"""HTTP/1.1 of a mock: requests out of bytes, one after another on a connection that stays open."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from everybit.bench.mock.refusals import Refusal, whole

MOST_BYTES = 64 << 20  # of a body


@dataclass(frozen=True, slots=True)
class Request:
    """`arrived_ns`: when its last byte was read. Names of headers are in small letters."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrived_ns: int
    keep_alive: bool


class Exchange(Protocol):
    """An answer that is under way."""

    def resume(self) -> None:
        """The client reads again."""

    def cancel(self) -> None:
        """The client is gone."""


# It begins an answer, which writes nothing before this returns.
Handle = Callable[["Connection", Request], Exchange]


class Connection(asyncio.Protocol):
    """`handle` begins the answer to a request; the one after it waits until `finish`. `open`: all that are open."""

    def __init__(self, handle: Handle, open: set[Connection]) -> None:
        self._handle, self._open = handle, open
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._request: Request | None = None
        self._now_ns = 0
        self.paused = False

    def finish(self, cut: bool) -> None:
        """The answer is written; cut: nothing more can come on this connection."""
        request, self._exchange, self._request = self._request, None, None
        if cut or request is None or not request.keep_alive:
            self.transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())

    def _begin(self, request: Request) -> None:
        self._request = request
        self._exchange = self._handle(self, request)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.perf_counter_ns()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._request is None:
                self.transport.write(whole(400, Refusal(400, "expected HTTP/1.1").document(), {"connection": "close"}))
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._open.discard(self)
        self._waiting.clear()
        if self._exchange is not None:
            self._exchange.cancel()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._exchange is not None:
            self._exchange.resume()

    # ---- httptools

    def on_message_begin(self) -> None:
        self._url, self._size = b"", 0
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > MOST_BYTES:
            self.transport.close()
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        request = Request(
            self._parser.get_method().decode("latin-1"),
            self._url.partition(b"?")[0].decode("latin-1"),
            self._headers,
            b"".join(self._body),
            self._now_ns,
            self._parser.should_keep_alive(),
        )
        if self._request is None:
            self._begin(request)
        else:
            self._waiting.append(request)
