"""The process around the application: its sockets, its signals, and its end.

SIGTERM and SIGINT drain: what runs may finish for a while, what is new is refused; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from everybit.errors import OutputError
from everybit.server.app import Server

HEADER_BYTES = 64 << 10
HEADER_S = 15.0  # within which a connection must have sent the head of a request
KEEP_ALIVE_S = 75
CONNECTIONS = 4096
BACKLOG = 2048


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds on what a client may leave half-said."""

    _head_bytes = 0
    _reading_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self._timer = self.loop.call_later(HEADER_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES + len(data):
                self.send_400_response("The head of the request is too large.")
                return
            if self._timer is None:
                self._timer = self.loop.call_later(HEADER_S, self._late)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes, self._reading_head = 0, True
        super().on_message_complete()

    def _late(self) -> None:
        self._timer = None
        if self._reading_head and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Process(uvicorn.Server):
    """Says when it is ready; signals drain it."""

    def __init__(self, config: uvicorn.Config, server: Server, grace_s: float, says: str) -> None:
        super().__init__(config)
        self._server, self._grace_s, self._says = server, grace_s, says

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._says, file=sys.stderr, flush=True)

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
            self.force_exit = True
        else:
            print(f"everybit: draining, {self._grace_s:g} s at most", file=sys.stderr, flush=True)
            self._server.drain(self._grace_s)
        self.should_exit = True


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
