"""The client against servers that do what a test wants, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everybit.bench import http
from everybit.bench.endpoint import Endpoint, parse_url
from everybit.bench.http import Client, Exchange, Limits
from everybit.errors import SourceError

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
STREAM = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
IMPATIENT = Limits(idle_s=0.3, longest_s=5)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Peer:
    """The server's end of one connection, the `number`-th."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: list[bytes]

    async def request(self) -> bytes:
        """Raises EOFError where the client closed."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")]
        body = await self.reader.readexactly(int(lengths[0].split()[1])) if lengths else b""
        self.seen.append(head + body)
        return body

    async def send(self, *pieces: bytes, pause: float = 0.01) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(pause)

    def reset(self) -> None:
        found: socket.socket = self.writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Serve = Callable[[Peer], Awaitable[None]]


@dataclass
class World:
    client: Client
    seen: list[bytes] = field(default_factory=list)
    connections: int = 0

    async def ask(self, most_events: int = 1 << 30) -> Exchange:
        return await self.client.send("POST", "/completions", b"{}", most_events)


@contextlib.asynccontextmanager
async def world(
    serve: Serve,
    limits: Limits = IMPATIENT,
    reuse: bool = True,
    serve_tls: ssl.SSLContext | None = None,
    **endpoint: Any,
) -> AsyncIterator[World]:
    """Each connection is served by `serve` and closed when that returns."""
    tasks = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        found.connections += 1
        with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
            await serve(Peer(found.connections, reader, writer, found.seen))
        with contextlib.suppress(ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=serve_tls)
    port = server.sockets[0].getsockname()[1]
    address = Endpoint(**{"host": "127.0.0.1", "port": port, "tls": False, "prefix": "/v1", **endpoint})
    found = World(Client(address, limits, reuse))
    reaper = asyncio.create_task(found.client.keep_reaping())
    try:
        yield found
    finally:
        reaper.cancel()
        found.client.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def asked(serve: Serve, limits: Limits = IMPATIENT, most_events: int = 1 << 30, **more: Any) -> Exchange:
    """One request to a server of its own."""

    async def go() -> Exchange:
        async with world(serve, limits, **more) as found:
            return await found.ask(most_events)

    return asyncio.run(go())


def always(*pieces: bytes, then: float = 0) -> Serve:
    """Takes a request, sends `pieces`, waits, closes."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)
        await asyncio.sleep(then)

    return serve


# ---- bodies


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([HELLO], b"hello"),
        ([HELLO[:9], HELLO[9:40], HELLO[40:]], b"hello"),
        ([CHUNKED + chunk(b"he"), chunk(b"llo")[:4], chunk(b"llo")[4:] + b"0\r\n\r\n"], b"hello"),
        ([CHUNKED + b"5;x=1\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n"], b"hello"),
        ([OK + b"\r\nhel", b"lo"], b"hello"),
        ([b"HTTP/1.0 200 OK\r\n\r\nhello"], b"hello"),
        ([OK + b"content-length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + HELLO], b"hello"),
    ],
    ids=["length", "head in pieces", "chunked", "extensions", "until close", "HTTP/1.0", "empty", "1xx before"],
)
def test_bodies(pieces: list[bytes], body: bytes) -> None:
    found = asked(always(*pieces))
    assert (found.error, found.status, found.body) == ("", 200, body)
    assert found.begin_ns < (found.connected_ns or 0) < (found.head_ns or 0) <= found.end_ns


@pytest.mark.parametrize("status", [204, 302, 404, 429, 500, 599])
def test_any_status_is_an_answer(status: int) -> None:
    body = b"" if status == 204 else b"no"
    head = b"HTTP/1.1 %d Some\r\nretry-after: 3\r\n" % status
    found = asked(always(head + (b"content-length: 2\r\n" if body else b"") + b"\r\n" + body))
    assert (found.error, found.status, found.body, found.headers["retry-after"]) == ("", status, body, "3")


def test_each_piece_has_the_time_it_came() -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM, chunk(b"a"), chunk(b"b"), chunk(b"c") + b"0\r\n\r\n", pause=0.03)

    found = asked(serve)
    times = [now for now, _ in found.pieces]
    assert [data for _, data in found.pieces] == [b"a", b"b", b"c"]
    assert all(b - a > 20e6 for a, b in zip([found.head_ns or 0, *times], times, strict=False))
    assert found.end_ns - times[-1] < 20e6


def test_what_is_sent() -> None:
    async def go() -> bytes:
        async with world(always(HELLO), key="sk-1", headers=(("X-A", "b"),)) as found:
            await found.ask()
            return found.seen[0]

    head, _, body = asyncio.run(go()).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert (lines[0], body) == (b"POST /v1/completions HTTP/1.1", b"{}")
    assert {b"Authorization: Bearer sk-1", b"X-A: b", b"Accept-Encoding: identity", b"Content-Length: 2"} <= {*lines}


# ---- connections


async def keeps(peer: Peer) -> None:
    while True:
        await peer.request()
        await peer.send(HELLO, pause=0)


@pytest.mark.parametrize(("reuse", "connections"), [(True, 1), (False, 3)])
def test_connections_are_kept_where_wanted(reuse: bool, connections: int) -> None:
    async def go() -> None:
        async with world(keeps, reuse=reuse) as found:
            answers = [await found.ask() for _ in range(3)]
            assert [one.error for one in answers] == [""] * 3
            assert [one.connected_ns is None for one in answers] == [False, reuse, reuse]
            assert found.connections == connections

    asyncio.run(go())


def test_requests_at_once_do_not_wait_for_each_other() -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        gathered.release()
        while peer.number == 1 and gathered._value < 20:
            await asyncio.sleep(0.01)
        await peer.send(HELLO)

    async def go() -> None:
        async with world(serve) as found:
            answers = await asyncio.gather(*(found.ask() for _ in range(20)))
            assert [one.error for one in answers] == [""] * 20
            assert found.connections == 20

    gathered = asyncio.Semaphore(0)
    asyncio.run(go())


@pytest.mark.parametrize("close", [b"connection: close\r\n", b""], ids=["connection: close", "HTTP/1.0"])
def test_a_connection_that_the_server_gives_up_is_not_used_again(close: bytes) -> None:
    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send((OK if close else b"HTTP/1.0 200 OK\r\n") + close + b"content-length: 1\r\n\r\na", pause=0)

    async def go() -> None:
        async with world(serve) as found:
            assert [(await found.ask()).error for _ in range(2)] == ["", ""]
            assert found.connections == 2

    asyncio.run(go())


def test_a_kept_connection_that_was_closed_is_replaced_and_the_request_counts_once() -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO, pause=0)
        if peer.number == 1:
            await peer.reader.readexactly(1)  # the next request has begun to arrive: too late for the client to see it
            peer.reset()

    async def go() -> None:
        async with world(serve) as found:
            await found.ask()
            again = await found.ask()
            assert (again.error, again.detail, again.body, len(again.pieces)) == ("", "", b"hello", 1)
            assert found.connections == 2
            assert again.begin_ns < (again.connected_ns or 0) < again.end_ns
            assert len(found.seen) == 2

    asyncio.run(go())


def test_a_fresh_connection_that_is_closed_is_not_tried_again() -> None:
    async def go() -> None:
        async with world(always()) as found:
            assert (await found.ask()).error == "cut"
            assert found.connections == 1

    asyncio.run(go())


def test_an_answer_that_had_begun_is_not_asked_for_again() -> None:
    async def serve(peer: Peer) -> None:
        await keeps_once(peer)
        await peer.request()
        await peer.send(STREAM + chunk(b"a"))
        peer.reset()

    async def keeps_once(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO, pause=0)

    async def go() -> None:
        async with world(serve) as found:
            await found.ask()
            cut = await found.ask()
            assert (cut.error, cut.body, len(found.seen)) == ("cut", b"a", 2)

    asyncio.run(go())


def test_more_bytes_than_the_answer_has_spoil_the_connection() -> None:
    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(HELLO + b"and more\r\n\r\n", pause=0)

    async def go() -> None:
        async with world(serve) as found:
            assert [(await found.ask()).body for _ in range(2)] == [b"hello"] * 2
            assert found.connections == 2

    asyncio.run(go())


def test_no_connection() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, nobody listens

        async def go() -> Exchange:
            return await Client(Endpoint("127.0.0.1", taken.getsockname()[1], False, "/v1"), IMPATIENT).send("GET", "/")

        found = asyncio.run(go())
    assert (found.error, found.status, found.connected_ns) == ("connect", 0, None)
    assert found.end_ns > found.begin_ns


# ---- faults


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH_9\r\n", b"\x00\xff" * 20, b"HTTP/9.9 200 OK\r\n\r\n", OK + b"content-length: many\r\n\r\n",
     CHUNKED + b"zz\r\n", b"HTTP/1.1 101 Switching\r\nupgrade: a\r\nconnection: upgrade\r\n\r\n"],
)  # fmt: skip
def test_what_is_not_http(data: bytes) -> None:
    found = asked(always(data, then=2))
    assert found.error == "http"
    assert found.end_ns - found.begin_ns < 250e6  # at once


@pytest.mark.parametrize(
    "data",
    [OK, b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"content-length: 9\r\n\r\nhel", CHUNKED + chunk(b"hel")],
    ids=["in the head", "after 100", "in a length", "between chunks"],
)
def test_a_connection_that_ends_too_early(data: bytes) -> None:
    assert asked(always(data)).error == "cut"


def test_a_reset_keeps_what_came() -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"\r\ndata: a\n\n", pause=0.05)
        peer.reset()

    found = asked(serve)
    assert (found.error, found.body) == ("cut", b"data: a\n\n")


@pytest.mark.parametrize("begun", [b"", OK, STREAM + chunk(b"data: a\n\n")], ids=["nothing", "a head", "a piece"])
def test_a_server_that_falls_silent(begun: bytes) -> None:
    found = asked(always(begun, then=3))
    assert found.error == "timeout"
    assert 0.3e9 < found.end_ns - found.begin_ns < 2e9


@pytest.mark.parametrize("begun", [b"", STREAM], ids=["headers", "body"])
def test_bytes_without_end(begun: bytes) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(begun or OK)
        block = chunk(b"x" * 1000) if begun else b"x-more: yes\r\n" * 100
        while True:
            await peer.send(block, pause=0)

    found = asked(serve, Limits(longest_s=5, most_bytes=100_000))
    assert found.error == "endless"
    assert 100_000 < found.size < 1_000_000


def test_interim_answers_without_end() -> None:
    found = asked(always(b"HTTP/1.1 100 Continue\r\n\r\n" * 8000, then=1), Limits(longest_s=5, most_bytes=100_000))
    assert (found.error, found.detail.endswith(" bytes")) == ("endless", True)


def test_events_and_time_without_end() -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM)
        while True:
            await peer.send(chunk(b"data: a\n\n"), pause=0.005)

    found = asked(serve, most_events=20)
    assert (found.error, found.events) == ("endless", 21)
    found = asked(serve, Limits(idle_s=9, longest_s=0.2))
    assert (found.error, found.body[:9]) == ("endless", b"data: a\n\n")


@pytest.mark.parametrize(
    "last",
    [
        [chunk(DONE)],
        [chunk(b"data:[DONE]\r\n\r\n")],
        [chunk(b"data: a\n\nda"), chunk(b"ta: [DO"), chunk(b"NE]\n\n")],
        [chunk(b"event: response.completed\n"), chunk(b"data: {}\n\n")],
        [chunk(b"event: response.failed\ndata: {}\n\n")],
    ],
)
def test_a_server_that_does_not_end_a_stream_after_its_last_event(
    last: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_GRACE_S", 0.2)
    found = asked(always(STREAM, *last, then=3), Limits(idle_s=2))
    assert found.error == ""
    assert found.body == b"".join(one.split(b"\r\n", 1)[1][:-2] for one in last)
    assert found.end_ns - found.pieces[0][0] < 100e6


def test_a_text_about_the_end_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_GRACE_S", 0.2)
    text = chunk(b'data: {"text": "data: [DONE] [DONE] event: response.completed"}\n\n')

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM, text)
        await asyncio.sleep(0.4)
        await peer.send(text + b"0\r\n\r\n")

    found = asked(serve, Limits(idle_s=3))
    assert (found.error, len(found.pieces)) == ("", 2)


def test_a_request_can_be_cancelled() -> None:
    async def go() -> None:
        async with world(always(STREAM, then=3)) as found:
            task = asyncio.create_task(found.ask())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    begin = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - begin < 2


def test_a_client_that_is_closed_ends_what_runs_with_what_came() -> None:
    async def go() -> None:
        async with world(always(STREAM, chunk(b"a"), then=3)) as found:
            task = asyncio.create_task(found.ask())
            await asyncio.sleep(0.15)
            found.client.close()
            ended = await task
            assert (ended.error, ended.body) == ("cancelled", b"a")

    asyncio.run(go())


# ---- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates that sign themselves, each with its key in the same file: of 127.0.0.1 and of another host."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl")
    folder, found = tmp_path_factory.mktemp("tls"), {}
    for name, host in (("ours", "IP:127.0.0.1"), ("other", "DNS:other.test")):
        found[name] = folder / f"{name}.pem"
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        named = ["-subj", "/CN=test", "-addext", f"subjectAltName={host}"]
        files = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
        subprocess.run([*new, *named, *files], check=True, capture_output=True)
        found[name].write_text((folder / "key").read_text() + (folder / "certificate").read_text())
    return found


def over(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize(
    ("serves", "trusts", "insecure", "error", "detail"),
    [
        ("ours", "ours", False, "", ""),
        ("other", None, True, "", ""),
        ("ours", None, False, "tls", "self-signed"),
        ("other", "other", False, "tls", "not valid for '127.0.0.1'"),
    ],
    ids=["trusted", "insecure", "not trusted", "of another host"],
)
def test_tls(
    certificates: dict[str, Path], serves: str, trusts: str | None, insecure: bool, error: str, detail: str
) -> None:
    ca_file = certificates[trusts] if trusts else None
    found = asked(
        always(HELLO), Limits(), serve_tls=over(certificates[serves]), tls=True, ca_file=ca_file, insecure=insecure
    )
    assert found.error == error
    assert detail in found.detail.replace("self signed", "self-signed")
    assert found.body == (b"" if error else b"hello")


def test_tls_on_one_side_only(certificates: dict[str, Path]) -> None:
    async def serve(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    assert asked(serve, tls=True).error == "tls"
    assert asked(always(then=3), tls=True).error == "connect"  # it waits for a request, we for its greeting
    assert asked(always(HELLO), serve_tls=over(certificates["ours"])).error in ("http", "cut")


@pytest.mark.parametrize(("url", "wanted"), [("http://h", "h:80/v1"), ("https://h/", "h:443/v1")])
def test_addresses(url: str, wanted: str) -> None:
    assert parse_url(url)[0].url.endswith(wanted)


def test_a_certificate_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for name in ("ca.pem", "none.pem"):
        with pytest.raises(SourceError, match=f"{name}: no certificates"):
            Endpoint("127.0.0.1", 1, True, "/v1", ca_file=tmp_path / name).context()
