"""The process around the application: its sockets, its signals, and its end.

SIGTERM and SIGINT drain: what runs may finish for a while, what is new is refused; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from everybit.errors import OutputError
from everybit.server.app import Server
from everybit.server.problems import Problem

HEADER_BYTES = 64 << 10
HEADERS = 200
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
LINGER_S = 15.0
HEADER_S = 15.0  # within which a connection must have sent the head of a request
KEEP_ALIVE_S = 75
CONNECTIONS = 4096
BACKLOG = 2048


class _TooLargeError(Exception):
    """A request's head."""


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds on what a client may leave half-said, or unread."""

    _head_bytes = _headers = 0
    _reading_head = True
    _timer: asyncio.TimerHandle | None = None  # until the client must have said the rest
    _linger: asyncio.TimerHandle | None = None  # until it must have read the rest

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES + len(data):
                self._refuse(431, "the head of the request is too large")
                return
            self._start_timer()
            data = _without_upgrade(data)
        super().data_received(data)

    def _unsupported_upgrade_warning(self) -> None:
        self.cycle.keep_alive = False  # what follows is not ours to understand

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers = 0
        self.scope["state"]["abort"] = self.transport.abort

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > HEADER_BYTES:
            raise _TooLargeError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if len(name) + len(value) > HEADER_BYTES or self._headers > HEADERS:
            raise _TooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes, self._reading_head = 0, True
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif not self._reading_head:  # of the request's body something is missing, and nobody waits for it
            self._start_timer()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        if error is not None and isinstance(error.__context__, _TooLargeError):
            self._refuse(431, "the head of the request is too large")
        else:
            self._refuse(400, "this is not an HTTP request")

    def _refuse(self, status: int, message: str) -> None:
        """Says so where no other answer is under way, and closes the connection."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = json.dumps(Problem(status, message).body()).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self._close()

    def _close(self) -> None:
        """What was written may be read for a while."""
        self.transport.close()
        if self._linger is None:
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)

    def _late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer()  # a next request is half-said, while this one is answered
        else:
            self._close()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_S, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request without the wish for another protocol, with which its body would be lost."""
    end = data.find(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", data[:end]) + data[end:] if end > 0 else data


class _Process(uvicorn.Server):
    """Says when it is ready; signals drain it."""

    def __init__(self, config: uvicorn.Config, server: Server, grace_s: float, says: str) -> None:
        super().__init__(config)
        self._server, self._grace_s, self._says = server, grace_s, says

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            say(self._says)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._signal)
        try:
            yield
        finally:
            for one in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(one)

    def _signal(self) -> None:
        if self._server.draining:
            self.force_exit = self.should_exit = True
        else:
            self._server.drain(self._grace_s)
            self._drain = asyncio.ensure_future(self._drained())
            say(f"everybit: draining, {self._grace_s:g} s at most")

    async def _drained(self) -> None:
        """Others are still told that we end, until what runs has ended."""
        last = time.monotonic() + self._grace_s + 1
        while self._server.busy and time.monotonic() < last:
            await asyncio.sleep(0.05)
        self.should_exit = True


def say(text: str) -> None:
    """On stderr, where somebody listens."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """Raises: OutputError"""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise OutputError(f"{host}:{port} cannot be listened on ({error}): choose another --host or --port") from None
    return found


def serve(server: Server, listener: socket.socket, grace_s: float, says: str) -> None:
    """Until a signal comes. `says` goes to stderr when requests are taken."""
    _raise_file_limit()
    config = uvicorn.Config(
        server.app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(grace_s) + 10,
        backlog=BACKLOG,
    )
    process: Any = _Process(config, server, grace_s, says)
    process.run(sockets=[listener])


def _raise_file_limit() -> None:
    """As many connections as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + 256
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
