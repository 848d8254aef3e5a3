"""A small HTTP/1.1 client that notes the time of every piece as it comes from the kernel, and reads it later.

General clients spend more on a piece than many servers do, and that time is then taken for the server's: a bare aiohttp
client was measured to add 5 ms to a first token at 4 requests/s and 19 ms at 100. Here a piece is a time, a call into
httptools (the parser of uvicorn) and an append.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import deque
from dataclasses import dataclass, field

import httptools

from everybit.bench.endpoint import Endpoint

_LAST = re.compile(rb"[\r\n](?:data: ?\[DONE\]|event: ?response\.(?:completed|incomplete|failed))")
_TAIL = 32  # bytes, more than any of these has
_GRACE_S = 0.05  # for what may follow the last event; a user whose answer is there does not wait for the connection


@dataclass(frozen=True)
class Limits:
    """When to give up: nothing arrives for `idle_s`, or an answer takes `longest_s` or `most_bytes`."""

    idle_s: float = 120.0
    longest_s: float = 600.0
    most_bytes: int = 64 << 20


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times are `perf_counter_ns`. `error` is a kind of records.ERRORS."""

    begin_ns: int
    connected_ns: int | None = None
    head_ns: int | None = None
    end_ns: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0
    events: int = 0
    most_events: int = 1 << 30
    error: str = ""
    detail: str = ""

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.done: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0
        self._whole = False
        self._grace: asyncio.TimerHandle | None = None
        self._tail = b""
        self.used = False
        self.last_ns = 0

    # --- asyncio's calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = self.last_ns = time.perf_counter_ns()
        exchange = self.exchange
        if exchange is None:  # bytes that nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.finish("http", "the server changed the protocol")
        except httptools.HttpParserError as error:
            self.finish("http", f"{error}: {data[:60]!r}")
            self.close()
        if self.exchange is None:
            return
        exchange.size += len(data)
        if exchange.size > self._client.limits.most_bytes or exchange.events > exchange.most_events:
            self.finish("endless", f"{exchange.events} events, {exchange.size} bytes")

    def connection_lost(self, problem: Exception | None) -> None:
        if self.exchange is not None:
            until_close = "content-length" not in self.exchange.headers and self.exchange.status >= 200
            chunked = "chunked" in self.exchange.headers.get("transfer-encoding", "")
            if problem is None and until_close and not chunked:
                self.finish("", "")  # an answer that ends with its connection
            else:
                kind = "tls" if isinstance(problem, ssl.SSLError) else "cut"
                self.finish(kind, str(problem or "the server closed the connection"))
        self._client.forget(self)

    # --- httptools' calls
    def on_status(self, status: bytes) -> None:
        pass

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.exchange is not None:
            self.exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.status = self._parser.get_status_code()
            self.exchange.head_ns = self._now

    def on_body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        exchange.pieces.append((self._now, data))
        exchange.events += data.count(b"data:")
        recent = self._tail + data
        if self._grace is not None or _LAST.search(recent):
            if self._grace is not None:
                self._grace.cancel()
            self._grace = asyncio.get_running_loop().call_later(_GRACE_S, self.finish, "", "")
            exchange.end_ns = self._now
        self._tail = recent[-_TAIL:]

    def on_message_complete(self) -> None:
        if self.exchange is not None and self.exchange.status >= 200:
            self._whole = True
            self.finish("", "")

    # --- ours
    def begin(self, exchange: Exchange, data: bytes, done: asyncio.Future[None]) -> None:
        assert self.transport is not None
        self.exchange, self.done, self._whole, self._grace = exchange, done, False, None
        self._tail = b"\n"
        self._parser = httptools.HttpResponseParser(self)
        self.last_ns = time.perf_counter_ns()
        self.transport.write(data)

    def finish(self, error: str, detail: str) -> None:
        """The exchange is over; a connection whose answer is not whole is not used again."""
        exchange, done = self.exchange, self.done
        if exchange is None or done is None:
            return
        if self._grace is not None:
            self._grace.cancel()
        self.exchange = self.done = None
        exchange.end_ns = exchange.end_ns or time.perf_counter_ns()
        exchange.error, exchange.detail = error, detail
        if not done.done():
            done.set_result(None)
        if self._whole and not error and self._parser.should_keep_alive():
            self._client.keep(self)
        else:
            self.close()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close() if self._whole else self.transport.abort()


class Client:
    """As many connections as are needed at once: a client that waits for a free one measures itself."""

    def __init__(self, endpoint: Endpoint, limits: Limits, reuse: bool = True) -> None:
        self._endpoint, self.limits, self._reuse = endpoint, limits, reuse
        self._context = endpoint.context()
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()

    async def send(self, method: str, path: str, body: bytes = b"", most_events: int = 1 << 30) -> Exchange:
        """One request. What goes wrong is in the exchange, not raised."""
        exchange = Exchange(time.perf_counter_ns(), most_events=most_events)
        data = self._endpoint.head(method, path, len(body)) + body
        while True:
            connection = self._idle.pop() if self._idle else await self._connect(exchange)
            if connection is None:
                return exchange
            reused, connection.used = connection.used, True
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            connection.begin(exchange, data, done)
            try:
                await done
            except asyncio.CancelledError:
                connection.finish("cancelled", "")
                raise
            if exchange.error == "cut" and reused and not exchange.status:
                exchange.error = exchange.detail = ""  # it was closed while idle: the request never arrived
                exchange.end_ns = 0
                continue
            return exchange

    async def _connect(self, exchange: Exchange) -> _Connection | None:
        endpoint, loop = self._endpoint, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.idle_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self),
                    endpoint.address or endpoint.host,
                    endpoint.port,
                    ssl=self._context,
                    server_hostname=endpoint.host if self._context else None,
                )
        except TimeoutError:
            exchange.error, exchange.detail = "connect", f"no connection in {self.limits.idle_s:g} s"
        except ssl.SSLError as error:
            exchange.error, exchange.detail = "tls", str(error)
        except OSError as error:
            exchange.error, exchange.detail = "connect", str(error)
        if exchange.error:
            exchange.end_ns = time.perf_counter_ns()
            return None
        exchange.connected_ns = time.perf_counter_ns()
        self._open.add(connection)
        return connection

    def reap(self) -> None:
        """Ends what takes too long; to be called now and then."""
        now = time.perf_counter_ns()
        for connection in list(self._open):
            exchange = connection.exchange
            if exchange is None:
                continue
            if now - connection.last_ns > self.limits.idle_s * 1e9:
                connection.finish("timeout", f"nothing arrived for {self.limits.idle_s:g} s")
            elif now - exchange.begin_ns > self.limits.longest_s * 1e9:
                connection.finish("endless" if exchange.status else "timeout", f"{self.limits.longest_s:g} s")

    async def keep_reaping(self) -> None:
        """`reap`, for as long as this runs."""
        while True:
            await asyncio.sleep(0.25)
            self.reap()

    def keep(self, connection: _Connection) -> None:
        if self._reuse:
            self._idle.append(connection)
        else:
            connection.close()

    def forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        for connection in list(self._open):
            connection.finish("cancelled", "")
            connection.close()
