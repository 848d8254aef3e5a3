"""Faults: clients that hang or go, models and disks that fail, signals. Others are served on, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from everybit.batching.batcher import Batcher
from everybit.batching.fluidity import Target
from everybit.errors import ModelError
from everybit.server.app import Server, Settings
from everybit.server.edge import Limits
from everybit.server.served import Served
from tests.server.conftest import Running, running
from tests.server.test_hostile import BASES, COMPLETIONS, check_error, check_healthy, check_idle, metric

LONG = {"model": "chat", "prompt": "abc", "max_tokens": 3000, "ignore_eos": True, "precision": 8}


def connect(server: Running, receive_bytes: int = 0) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    found = socket.socket()
    if receive_bytes:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    found.settimeout(30)
    found.connect((host, int(port)))
    return found


def post(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def status(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/status").json()["models"]["chat"]
    return found


def wait_for(condition: Callable[[], bool], within_s: float = 20) -> float:
    """Seconds until it is so."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < within_s
        time.sleep(0.01)
    return time.monotonic() - begin


def memory_mib(server: Running) -> float:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def connections(server: Running) -> int:
    """Sockets that the server's process holds."""
    folder, found = Path(f"/proc/{server.process.pid}/fd"), 0
    for one in folder.iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(one).startswith("socket:")
    return found


# ---- clients


@pytest.fixture(scope="module")
def patient(chat_overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Who does not read for a second is dropped; room for one sequence."""
    folder = tmp_path_factory.mktemp("patient")
    with running(chat_overlay, "--send-s", "1", "--sequences", "1", log=folder / "log.jsonl") as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def half_said(patient: Running) -> Iterator[tuple[float, list[socket.socket]]]:
    """Since when three clients owe the server the rest of what they say."""
    with connect(patient) as silent, connect(patient) as head, connect(patient) as body:
        head.sendall(b"GET /health HTTP/1.1\r\nHost: lo")
        body.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345")
        answer = b""
        while not answer.endswith(b"}"):
            answer += body.recv(65536)
        yield time.monotonic(), [silent, head, body]


def test_who_does_not_read_is_dropped_and_costs_little(patient: Running) -> None:
    check_healthy(patient)
    before, held = memory_mib(patient), connections(patient)
    clients = [connect(patient, receive_bytes=4096) for _ in range(2)]
    for client in clients:
        client.sendall(post({**LONG, "stream": True, "logprobs": 20, "max_tokens": 600, "n": 16}))
    wait_for(lambda: any("the client does not read" in line.get("problem", "") for line in patient.lines()), 60)
    assert memory_mib(patient) - before < 100
    wait_for(lambda: status(patient)["running"] == status(patient)["waiting"] == 0, 60)
    wait_for(lambda: connections(patient) <= held)
    for client in clients:
        client.close()
    check_healthy(patient)


def test_who_reads_slowly_gets_everything(patient: Running) -> None:
    with connect(patient, receive_bytes=4096) as client:
        client.sendall(post({**LONG, "stream": True, "max_tokens": 400, "logprobs": 20}))
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += client.recv(8192)
            time.sleep(0.002)
    assert b"data: [DONE]" in found
    check_idle(patient)


def test_a_thousand_that_say_nothing_and_others_that_dribble(server: Running) -> None:
    """The others are served; the 200 get a byte of a header a second."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(1000)]
        slow = [stack.enter_context(connect(server)) for _ in range(200)]
        for one in silent[:500]:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        for _ in range(3):
            for one in slow:
                one.sendall(b"G" if _ == 0 else b"E" if _ == 1 else b"T")
            begin = time.monotonic()
            assert server.post(COMPLETIONS, {**BASES[COMPLETIONS], "max_tokens": 10}).status_code == 200
            assert time.monotonic() - begin < 5
            time.sleep(0.5)
    check_healthy(server)


def test_a_client_that_goes_frees_its_memory_at_once(server: Running) -> None:
    with (
        server.client() as client,
        client.stream("POST", COMPLETIONS, json={**LONG, "n": 16, "stream": True}) as response,
    ):
        lines = response.iter_lines()  # which closes the connection when nobody holds it
        next(lines)
        wait_for(lambda: status(server)["running"] == 16)
    left = time.monotonic()
    check_idle(server)
    assert time.monotonic() - left < 1.5
    assert [line for line in server.lines() if 16 <= line.get("completion_tokens", 0) < 40_000]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_the_first_token(patient: Running, stream: bool) -> None:
    """The room for one sequence is taken: the others wait, and go."""
    with connect(patient) as first:
        first.sendall(post({**LONG, "max_tokens": 4000, "n": 1}))
        wait_for(lambda: status(patient)["running"] == 1)
        others = [connect(patient) for _ in range(5)]
        for one in others:
            one.sendall(post({**LONG, "stream": stream, "prompt": "x" * 3000, "max_tokens": 900}))
        wait_for(lambda: status(patient)["running"] + status(patient)["waiting"] == 6)
        for one in others:
            one.close()
        wait_for(lambda: status(patient)["running"] + status(patient)["waiting"] == 1, 2)
    wait_for(lambda: status(patient)["running"] == 0, 2)
    check_healthy(patient)


def test_a_client_that_goes_in_the_middle_of_its_body(server: Running) -> None:
    for _ in range(20):
        with connect(server) as client:
            client.sendall(post(LONG)[:-5])
    check_healthy(server)
    assert not [line for line in server.lines() if line.get("status") == 500]


def test_more_than_the_memory_holds_is_done_one_after_the_other(patient: Running) -> None:
    answers: list[httpx.Response] = []
    body = {**LONG, "max_tokens": 1200, "precision": 2}
    threads = [
        threading.Thread(target=lambda i=i: answers.append(patient.post(COMPLETIONS, {**body, "prompt": f"{i}" * 500})))
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {1200}
    error = check_error(patient.post(COMPLETIONS, {**body, "max_tokens": 4090, "prompt": "x" * 50}), 400)
    assert "4141 tokens in 259 KV blocks of 16" in error["message"]
    check_healthy(patient)


# ---- models that fail, in a server of this process


Test = Callable[[Server, httpx.AsyncClient], Coroutine[Any, Any, None]]


def serve_here(folder: Path, test: Test, bits: str = "auto", **settings: Any) -> None:
    """Runs `test` with a server in this process and a client of it, whose own errors are not the test's."""

    async def run() -> None:
        server = Server({"chat": served}, Settings(**settings))
        transport = httpx.ASGITransport(app=server.app, raise_app_exceptions=False)
        async with (
            server.running(),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client,
        ):
            await test(server, client)

    served = Served.open(
        "chat",
        folder,
        bits=bits,
        plans={},
        threads=1,
        mode="fast",
        context=None,
        sequences=2,
        kv_dtype="float16",
        budget=512,
        queue=64,
        target=Target(10**9, 10**8),
        speculate=False,
    )
    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        served.runtime.close()


class Panic(BaseException):
    """What a Rust library raises in a panic: no Exception."""


FAILURES = [ModelError("the weights are gone"), RuntimeError("secret detail"), Panic("secret detail"), SystemExit(3)]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "always"])
def test_a_step_that_fails(
    chat_overlay: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, times: int
) -> None:
    """Clients are told, or notice nothing where it can be tried again; then all is as before."""
    step, left = Batcher.step, [0]

    def failing(self: Batcher) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise type(error)(*error.args)  # each of its own: one would keep the frames that it went through
        return step(self)

    monkeypatch.setattr(Batcher, "step", failing)

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        body = {**BASES[COMPLETIONS], "max_tokens": 5}
        left[0] = times
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json={**body, "stream": s}) for s in (False, True)))
        tried = isinstance(error, ModelError) or times > 1
        assert (500 in [answer.status_code for answer in answers]) == tried
        for answer in answers:
            assert "secret" not in answer.text
            if answer.status_code != 200:
                found = check_error(answer, 500)
                assert ("weights are gone" in found["message"]) == isinstance(error, ModelError)
        assert times == 1 or 200 not in [answer.status_code for answer in answers]
        left[0] = 0
        stream = await client.post(COMPLETIONS, json={**LONG, "max_tokens": 50, "stream": True})
        assert stream.text.endswith("data: [DONE]\n\n")
        assert (await client.get("/ready")).status_code == 200
        assert not server.busy
        for _ in range(200):
            counts = (await client.get("/status")).json()["models"]["chat"]
            if counts["kv_blocks_free"] == counts["kv_blocks"]:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail(f"blocks were lost: {counts}")

    serve_here(chat_overlay, test)


def test_a_failure_in_the_middle_of_a_stream_is_a_frame(chat_overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Batcher.step, [0]

    def failing(self: Batcher) -> Any:
        steps[0] += 1
        if steps[0] > 20:
            raise RuntimeError("secret detail")
        return step(self)

    monkeypatch.setattr(Batcher, "step", failing)

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        paths = {
            COMPLETIONS: {**LONG, "stream": True},
            "/v1/responses": {"model": "chat", "input": "hi", "ignore_eos": True, "stream": True},
        }
        for path, body in paths.items():
            steps[0] = 0
            answer = await client.post(path, json=body)
            assert answer.status_code == 200
            assert "secret" not in answer.text
            last = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")][-1]
            error = last["error"] if path == COMPLETIONS else last["response"]["error"]
            assert "the server failed" in error["message"]

    serve_here(chat_overlay, test)


def test_a_worker_that_dies_says_so(chat_overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, broken = Batcher.counts, [False]

    def counting(self: Batcher) -> Any:
        if broken[0]:
            raise RuntimeError("secret detail")
        return counts(self)

    monkeypatch.setattr(Batcher, "counts", counting)

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        running = [asyncio.create_task(client.post(COMPLETIONS, json={**LONG, "stream": s})) for s in (False, True)]
        while not server.busy:
            await asyncio.sleep(0.01)
        broken[0] = True
        whole, stream = await asyncio.gather(*running)
        check_error(whole, 500)
        assert '"error"' in stream.text
        assert "secret" not in whole.text + stream.text
        for method, path, body in (("GET", "/ready", None), ("GET", "/status", None), ("POST", COMPLETIONS, LONG)):
            answer = await client.request(method, path, json=body)
            check_error(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/health")).status_code == 200

    serve_here(chat_overlay, test)


def test_metrics_that_fail_stop_nothing(chat_overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("everybit.server.metrics.Metrics.step", failing)

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        assert (await client.post(COMPLETIONS, json=BASES[COMPLETIONS])).status_code == 200

    serve_here(chat_overlay, test)


def test_weights_that_are_cut_off_while_it_runs(chat_overlay: Path, tmp_path: Path) -> None:
    """An error for each request, and no crash."""
    folder = tmp_path / "overlay"
    shutil.copytree(chat_overlay, folder)

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        body = {**BASES[COMPLETIONS], "precision": 2}
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200
        weights = next(folder.glob("*.safetensors"))
        os.truncate(weights, weights.stat().st_size // 2)
        for bits in (8, 2, 8):
            for stream in (False, True):
                error = check_error(
                    await client.post(COMPLETIONS, json={**body, "precision": bits, "stream": stream}), 500
                )
                assert str(tmp_path) not in error["message"]
        assert (await client.get("/health")).status_code == 200

    serve_here(folder, test, bits="2")


def test_a_request_takes_so_long_and_no_longer(chat_overlay: Path) -> None:
    async def test(server: Server, client: httpx.AsyncClient) -> None:
        check_error(await client.post(COMPLETIONS, json={**LONG, "n": 8}), 504)
        stream = await client.post(COMPLETIONS, json={**LONG, "n": 8, "stream": True})
        assert '"code":"timeout"' in stream.text
        assert not server.busy

    serve_here(chat_overlay, test, timeout_s=0.3)


def test_a_body_takes_so_long_and_no_longer(chat_overlay: Path) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def test(server: Server, client: httpx.AsyncClient) -> None:
        begin = time.monotonic()
        found: list[dict[str, Any]] = []
        waiting = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await waiting.wait()
            return {}

        async def send(message: Any) -> None:
            found.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
        await server.app(scope, receive, send)
        assert found[0]["status"] == 408
        assert time.monotonic() - begin < 3

    serve_here(chat_overlay, test, limits=Limits(body_s=0.2))


# ---- signals


def stream_until_end(server: Running, begun: threading.Event, found: list[str], **fields: Any) -> None:
    body = {**LONG, "stream": True, **fields}
    with server.client() as client, client.stream("POST", COMPLETIONS, json=body) as response:
        for line in response.iter_lines():
            begun.set()
            found.append(line)


@contextlib.contextmanager
def streamed(server: Running, **fields: Any) -> Iterator[list[str]]:
    """The lines of a stream that has begun, whole at the end of the block."""
    begun, found = threading.Event(), list[str]()
    thread = threading.Thread(target=stream_until_end, args=(server, begun, found), kwargs=fields)
    thread.start()
    assert begun.wait(30)
    yield found
    thread.join()


def test_sigterm_lets_streams_end_and_takes_nothing_new(chat_overlay: Path, tmp_path: Path) -> None:
    with running(chat_overlay, "--drain-s", "30", log=tmp_path / "log") as server, server.client() as idle:
        assert idle.get("/health").status_code == 200  # and the connection stays open
        with streamed(server, max_tokens=2500) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.get("/ready").status_code == 503)
            assert check_error(server.post(COMPLETIONS, BASES[COMPLETIONS]), 503)["code"] == "draining"
            assert server.get("/health").status_code == 200
        assert lines[-2:] == ["data: [DONE]", ""]
        assert not [line for line in lines if '"error"' in line]
        begin = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 3


def test_sigterm_ends_what_takes_too_long_with_an_error(chat_overlay: Path, tmp_path: Path) -> None:
    with running(chat_overlay, "--drain-s", "0.3", log=tmp_path / "log") as server:
        with streamed(server, n=16) as lines:
            server.process.send_signal(signal.SIGTERM)
        documents = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert documents[-1]["error"]["code"] == "draining"
        assert lines[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(5) == 0


def test_a_second_sigterm_ends_at_once(chat_overlay: Path, tmp_path: Path) -> None:
    with (
        running(chat_overlay, "--drain-s", "60", log=tmp_path / "log") as server,
        connect(server) as client,
        connect(server),
    ):
        client.sendall(post({**LONG, "n": 64, "stream": True}))
        client.recv(100)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/ready").status_code == 503)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 5


# ---- disks, ports, and nobody who listens


def test_a_log_that_is_full_loses_lines_and_stops_nothing(chat_overlay: Path, tmp_path: Path) -> None:
    """And nobody reads stderr any more; it still ends when it is told to."""
    with running(chat_overlay, log=Path("/dev/full")) as server:
        assert server.process.stderr is not None
        server.process.stderr.close()
        check_healthy(server)

        def lost() -> float:
            return metric(server, "everybit:log_lines_lost")

        before = lost()
        assert before > 0
        assert server.post(COMPLETIONS, BASES[COMPLETIONS]).status_code == 200
        assert lost() > before
        assert server.stop(10) == 0


def test_without_standard_streams_it_serves(chat_overlay: Path, tmp_path: Path) -> None:
    """A client's socket must not become file 2, where libraries write."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    script = f'exec "$0" -m everybit.cli.main serve chat="$1" --port {port} --threads 1 --log "$2" <&- >&- 2>&-'
    process = subprocess.Popen(["sh", "-c", script, sys.executable, str(chat_overlay), str(tmp_path / "log")])
    server = Running(process, f"http://127.0.0.1:{port}", tmp_path / "log")

    def ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return server.get("/ready").status_code == 200
        return False

    try:
        wait_for(ready, 60)
        check_healthy(server)
        files = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)]
        assert files == ["/dev/null"] * 3
        assert server.stop(10) == 0
    finally:
        process.kill()
        process.wait()


def refused(*options: str) -> str:
    command = [sys.executable, "-m", "everybit.cli.main", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("everybit: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_cannot_be_served_is_one_line(chat_overlay: Path, tmp_path: Path, server: Running) -> None:
    port = server.url.rpartition(":")[2]
    assert "cannot be listened on" in refused(str(chat_overlay), "--port", port)
    assert "no/log" in refused(str(chat_overlay), "--port", "0", "--log", str(tmp_path / "no" / "log"))


# ---- the end of what was begun at the top


def test_half_a_request_was_waited_for_so_long(half_said: tuple[float, list[socket.socket]]) -> None:
    """15 s, for a head, and for the rest of a body that nobody asked for. The last test: they wait meanwhile."""
    begin, clients = half_said
    for client in clients:
        client.settimeout(max(0.1, begin + 20 - time.monotonic()))
        assert client.recv(65536) == b""
    assert time.monotonic() - begin > 14
