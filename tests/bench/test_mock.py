"""The mock server: its times, its forms, its faults."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from everybit.bench.mock.asks import read_ask
from everybit.bench.mock.forms import FORMS
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script, parse_script, read_script
from everybit.bench.mock.server import Mock
from everybit.bench.mock.timing import Write, beats, stream
from everybit.bench.mock.truth import fetch_truth
from everybit.bench.records import MS
from everybit.errors import SourceError

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PATHS = (COMPLETIONS, CHAT, RESPONSES)
QUICK: dict[str, Any] = {"ttft_ms": 3, "gap_ms": 1}


@dataclass
class Served:
    """A mock in a thread of this process."""

    mock: Mock
    port: int

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response, response.read()

    def ask(self, path: str = COMPLETIONS, **body: Any) -> Any:
        """The document of an answer in one piece, or the events of a stream."""
        response, data = self.send("POST", path, question(path, **body))
        if response.headers["content-type"] != "text/event-stream":
            return json.loads(data)
        return events(data.decode())

    def status(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        response, data = self.send(method, path, body, **headers)
        return response.status, json.loads(data)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)


@contextlib.contextmanager
def served(**script: Any) -> Iterator[Served]:
    loop, mock = asyncio.new_event_loop(), Mock(Script(**{**QUICK, **script}))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(mock.start(), loop).result(5)
        yield Served(mock, port)
        asyncio.run_coroutine_threadsafe(mock.close(), loop).result(5)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def question(path: str, text: str = "One two three", **body: Any) -> dict[str, Any]:
    prompts = {COMPLETIONS: "prompt", RESPONSES: "input"}
    asked = {prompts[path]: text} if path in prompts else {"messages": [{"role": "user", "content": text}]}
    return {"model": "mock", **asked, **body}


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def text_of(event: Any) -> str:
    """What text an event brings, whatever its form."""
    if event == "[DONE]" or "error" in event:
        return ""
    if "choices" in event:
        return "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in event["choices"])
    return event["delta"] if event["type"] == "response.output_text.delta" else ""


def writes(path: str = COMPLETIONS, number: int = 1, most: int = 1000, **script: Any) -> list[Write]:
    """Of a stream, without its chunks' frames nor its head."""
    found = Script(**{**QUICK, **script})
    ask = read_ask(found, path, question(path, stream=True))
    form = FORMS[path](found, ask, "id")
    out = []
    for at, data, tokens in itertools.islice(stream(found, form, beats(found, number, ask.prompt_tokens), {}), most):
        body = data.rpartition(b"\r\n\r\n" if data.startswith(b"HTTP") else b"\0")[2] if not out else data
        if data.startswith(b"HTTP"):
            body = data.partition(b"\r\n\r\n")[2]
        size, _, rest = body.partition(b"\r\n")
        assert not size or len(rest) == int(size, 16) + 2
        out.append((at, rest[:-2], tokens))
    return out


# ---- times


def test_tokens_are_written_when_they_are_due() -> None:
    with running(Script(ttft_ms=30, gap_ms=5, tokens=20)) as url:
        port = int(url.split(":")[2].removesuffix("/v1"))
        client = Served(Mock(Script()), port)
        with ThreadPoolExecutor(3) as pool:
            sent = time.perf_counter_ns()
            list(
                pool.map(
                    lambda i: client.send("POST", COMPLETIONS, question(COMPLETIONS, stream=True), x_request_id=i),
                    "abc",
                )
            )
            done = time.perf_counter_ns()
        truths = fetch_truth(url)
        assert sorted(one.id for one in truths) == ["a", "b", "c"]
        for one in truths:
            assert sent < one.arrived_ns == one.started_ns
            assert list(one.due_ns) == [one.arrived_ns + (30 + 5 * k) * MS for k in range(20)]
            assert one.ended_ns is not None
            assert one.ended_ns < done + 1000 * MS  # noted after the client has its last byte
        late = [w - d for one in truths for d, w in zip(one.due_ns, one.written_ns, strict=True)]
        assert min(late) >= 0
        assert statistics.median(late) < 1 * MS
        assert client.status("DELETE", "/mock/truth") == (200, [])
        assert fetch_truth(url) == []


def test_prompt_length_moves_the_first_token() -> None:
    script = Script(ttft_ms=10, prefill_ms_per_token=0.5, gap_ms=2)
    assert list(itertools.islice(beats(script, 1, 40), 3)) == [30 * MS, 32 * MS, 34 * MS]


def test_a_stall_is_in_each_nth_request() -> None:
    script = Script(ttft_ms=0, gap_ms=1, stall_at_token=2, stall_ms=50, stall_every=2)
    assert list(itertools.islice(beats(script, 1, 0), 4)) == [0, MS, 2 * MS, 3 * MS]
    assert list(itertools.islice(beats(script, 2, 0), 4)) == [0, MS, 52 * MS, 53 * MS]


def test_jitter_is_bounded_and_depends_on_the_seed() -> None:
    def drawn(seed: int) -> list[int]:
        return list(itertools.islice(beats(Script(gap_ms=10, jitter_ms=4, seed=seed), 1, 0), 50))

    late = [at - (100 + 10 * k) * MS for k, at in enumerate(drawn(1))]
    assert 0 <= min(late) < 1 * MS
    assert 3 * MS < max(late) <= 4 * MS
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_freeze_holds_all_writes_until_its_end() -> None:
    with served(ttft_ms=0, gap_ms=10, tokens=12, freeze=(0.035, 0.06)) as server:
        server.ask(stream=True)
        truth = server.mock.truth()[0]
    end = truth.arrived_ns + 95 * MS
    held = [w for d, w in zip(truth.due_ns, truth.written_ns, strict=True) if 35 * MS <= d - truth.arrived_ns < 95 * MS]
    assert len(held) == 6
    assert all(end <= written < end + 20 * MS for written in held)
    assert all(truth.due_ns[k] == truth.arrived_ns + 10 * k * MS for k in range(12))


def test_slots_are_handed_on_without_a_gap() -> None:
    with served(ttft_ms=20, gap_ms=5, tokens=5, slots=2) as server:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: server.ask(stream=True), range(6)))
        found = server.mock.truth()
    ends = [one.due_ns[-1] for one in found]
    assert [one.started_ns for one in found[2:]] == ends[:4]
    assert all(one.due_ns[-1] - (one.started_ns or 0) == 40 * MS for one in found)


def test_a_full_queue_refuses_and_a_client_that_leaves_makes_room() -> None:
    with served(ttft_ms=60_000, slots=1, queue=1) as server:
        body = json.dumps(question(COMPLETIONS)).encode()
        message = b"POST %b HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(body), body)
        first, second = server.raw(), server.raw()
        for number, one in enumerate((first, second), 1):
            one.sendall(message)
            wait_until(lambda n=number: len(server.mock.truth()) == n)
        response, data = server.send("POST", COMPLETIONS, question(COMPLETIONS))
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert json.loads(data)["error"]["code"] == "queue_full"
        assert server.mock.truth()[1].started_ns is None
        first.close()
        wait_until(lambda: server.mock.truth()[1].started_ns is not None)
        second.close()
        assert [one.status for one in server.mock.truth()] == [200, 200, 429]


def wait_until(reached: Any) -> None:
    deadline = time.monotonic() + 5
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- forms


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_and_a_whole_answer_hold_the_same(path: str) -> None:
    with served() as server:
        limit = {"max_output_tokens" if path == RESPONSES else "max_tokens": 4}
        more = {} if path == RESPONSES else {"stream_options": {"include_usage": True}}
        found = server.ask(path, stream=True, **limit, **more)
        whole = server.ask(path, **limit)
        truth = server.mock.truth()
    assert [text for event in found if (text := text_of(event))] == [" tok"] * 4
    assert [len(one.due_ns) for one in truth] == [4, 4]
    assert len(set(truth[1].due_ns)) == 1
    if path == RESPONSES:
        assert [one["sequence_number"] for one in found] == list(range(len(found)))
        assert [one["type"] for one in found[:4]] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert found[-1]["type"] == "response.incomplete"
        usage = found[-1]["response"]["usage"]
        assert usage == whole["usage"] == {"input_tokens": 4, "output_tokens": 4, "total_tokens": 8}
        assert whole["output"][0]["content"][0]["text"] == " tok" * 4
    else:
        assert found[-1] == "[DONE]"
        usage = found[-2]["usage"]
        assert usage == whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
        assert found[-3]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
        choice = whole["choices"][0]
        assert (choice["text"] if path == COMPLETIONS else choice["message"]["content"]) == " tok" * 4


@pytest.mark.parametrize("path", PATHS)
def test_every_event_of_tokens_tells_their_bits(path: str) -> None:
    data = b"".join(data for _, data, _ in writes(path, tokens=5, tokens_per_chunk=2, bits=((0, 8), (3, 4))))
    assert [one["bits"] for one in events(data.decode()) if text_of(one)] == [[8, 8], [8, 4], [4]]


def test_events_of_several_tokens_are_due_with_their_last() -> None:
    found = [(at // MS, tokens) for at, _, tokens in writes(tokens=8, tokens_per_chunk=2, bundle_first=3) if tokens]
    assert found == [(5, 3), (7, 2), (9, 2), (10, 1)]


def test_several_events_go_into_one_write() -> None:
    found = [
        (at // MS, len(events(data.decode())), tokens) for at, data, tokens in writes(tokens=5, events_per_write=3)
    ]
    assert found == [(5, 3, 3), (7, 4, 2), (7, 0, 0)]  # the second with the finish and [DONE]; the last chunk


def test_frames_are_cut_in_the_middle_of_a_character() -> None:
    found = writes(tokens=2, split_frames=True)
    assert [tokens for _, _, tokens in found] == [0, 1, 0, 1, 0, 0, 0]
    assert [found[1][0] - found[0][0], found[2][0]] == [1 * MS, found[1][0]]
    with pytest.raises(UnicodeDecodeError):
        found[0][1].decode()
    assert [text_of(one) for one in events(b"".join(data for _, data, _ in found).decode())][:2] == [" tök"] * 2


def test_line_ends_pings_and_an_early_head() -> None:
    found = writes(CHAT, tokens=2, ttft_ms=10, gap_ms=4, crlf=True, pings=True, head_ms=2)
    assert [at // MS for at, _, _ in found] == [2, 5, 10, 12, 14, 14, 14]
    assert [data for _, data, _ in found][1:4:2] == [b": ping\r\n\r\n"] * 2
    assert b"\n" not in b"".join(data for _, data, _ in found).replace(b"\r\n", b"")
    assert events(found[0][1].decode())[0]["choices"][0]["delta"]["role"] == "assistant"


def test_a_script_may_refuse_to_stream_and_to_say_anything() -> None:
    with served(stream=False, tokens=0) as server:
        assert server.ask(CHAT, stream=True)["choices"][0]["message"]["content"] == ""
    assert [text_of(one) for one in events(b"".join(data for _, data, _ in writes(tokens=0)).decode())] == ["", ""]


@pytest.mark.parametrize(("usage", "wanted"), [("right", 16), ("wrong", 32), ("none", None)])
def test_usage_as_scripted(usage: str, wanted: int | None) -> None:
    with served(usage=usage) as server:
        assert server.ask().get("usage", {}).get("completion_tokens") == wanted


# ---- faults


def test_a_cut_stream_ends_without_its_last_chunk() -> None:
    with served(end="cut", end_at=3) as server:
        with pytest.raises(http.client.IncompleteRead) as caught:
            server.ask(stream=True)
        assert caught.value.partial.count(b" tok") == 3
        with pytest.raises(http.client.IncompleteRead):
            server.ask()


@pytest.mark.parametrize("path", PATHS)
def test_an_error_comes_after_some_tokens(path: str) -> None:
    with served(end="error", end_at=2) as server:
        found = server.ask(path, stream=True)
        assert server.status("POST", path, question(path))[0] == 500
    assert [text for one in found if (text := text_of(one))] == [" tok"] * 2
    failed = found[-1]["response"] if path == RESPONSES else found[-2]
    assert failed["error"]["code"] == "scripted_error"


def test_garbage_is_two_events_between_good_ones() -> None:
    data = b"".join(data for _, data, _ in writes(tokens=4, end="garbage", end_at=2))
    good = bad = 0
    for event in data.split(b"\n\n")[:-2]:
        try:
            json.loads(event.removeprefix(b"data: ").decode())
            good += 1
        except ValueError:
            bad += 1
    assert (good, bad) == (5, 2)
    assert data.endswith(b"data: [DONE]\n\n")


def test_an_endless_answer_goes_on_past_its_limit() -> None:
    assert sum(tokens for _, _, tokens in writes(tokens=2, end="never", most=500)) == 500


def test_a_missing_end() -> None:
    assert b"[DONE]" not in b"".join(data for _, data, _ in writes(done=False))
    assert b"response.incomplete" not in b"".join(data for _, data, _ in writes(RESPONSES, done=False))


def test_refusals() -> None:
    with served(key="secret", context=40, status=503, status_every=3, retry_after_s=7) as server:
        key = {"authorization": "Bearer secret"}
        ask = question(COMPLETIONS, max_tokens=1)
        assert server.status("POST", COMPLETIONS, ask)[0] == 401
        assert server.status("POST", COMPLETIONS, {**ask, "max_tokens": 38}, **key)[1]["error"]["code"] == (
            "context_length_exceeded"
        )
        response, _ = server.send("POST", COMPLETIONS, ask, **key)
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert server.status("POST", COMPLETIONS, ask, **key)[0] == 200
        assert server.status("POST", COMPLETIONS, {**ask, "model": "other"}, **key)[0] == 404
        assert server.status("POST", COMPLETIONS, ask, **key)[0] == 503
        assert server.status("POST", COMPLETIONS, [1], **key)[0] == 400
        for wrong in ({"prompt": 3}, {"prompt": "a", "max_tokens": "many"}, {}, {"prompt": "a", "n": 2}):
            server.status("POST", COMPLETIONS, wrong, **key)
        assert server.status("GET", "/nothing")[0] == 404
        assert server.status("GET", "/health") == (200, {"status": "ok"})
        assert server.status("GET", "/v1/models")[0] == 401
        names = [one["id"] for one in server.status("GET", "/v1/models", **key)[1]["data"]]
        assert names == ["mock", *(f"mock@{bits}bit" for bits in range(2, 9))]
        statuses = [one.status for one in server.mock.truth()]
        assert statuses == [401, 400, 503, 200, 404, 503, 400, 400, 503, 400, 400]


def test_requests_on_one_connection_are_answered_in_turn() -> None:
    with served(tokens=1) as server, server.raw() as connection:
        messages = [json.dumps(question(COMPLETIONS, user=name)).encode() for name in "ab"]
        head = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(b"".join(head % len(one) + one for one in messages))
        data = b""
        while b"mock-2" not in data:
            data += connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert connection.recv(65536) == b""
        assert data.index(b'"id":"mock-1"') < data.index(b'"id":"mock-2"')
        assert [one.id for one in server.mock.truth()] == ["a", "b"]


# ---- log-probabilities


def echoed(server: Served, model: str) -> dict[str, Any]:
    answer = server.ask(model=model, text="The cat sat\non a mat ", echo=True, logprobs=2, max_tokens=0)
    return dict(answer["choices"][0]["logprobs"])


def test_an_echo_scores_the_words_of_the_prompt() -> None:
    with served() as server:
        found = echoed(server, "mock@4bit")
        assert server.status("POST", COMPLETIONS, question(COMPLETIONS, echo=True, stream=True))[0] == 400
        ids = server.ask(text=[5, 6], echo=True, logprobs=1, max_tokens=1)
    assert found["tokens"] == ["The", " cat", " sat", "\non", " a", " mat", " "]
    assert found["text_offset"] == [0, 3, 7, 11, 14, 16, 20]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(-9 < value < 0 for value in found["token_logprobs"][1:])
    assert [len(one) for one in found["top_logprobs"][1:]] == [2] * 6
    assert found["top_logprobs"][1][" cat"] == found["token_logprobs"][1]
    assert ids["choices"][0]["logprobs"]["tokens"] == [" 5", " 6", " tok"]
    assert ids["usage"]["prompt_tokens"] == 2


def test_precisions_differ_the_less_the_more_bits() -> None:
    text = " ".join(f"w{i}" for i in range(60))

    def scores(bits: int, **script: Any) -> list[float]:
        with served(**script) as server:
            answer = server.ask(model=f"mock@{bits}bit", text=text, echo=True, logprobs=1, max_tokens=0)
            return list(answer["choices"][0]["logprobs"]["token_logprobs"][1:])

    def apart(a: list[float], b: list[float]) -> float:
        return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))

    best = scores(8)
    far = [apart(scores(bits), best) for bits in range(2, 8)]
    assert far == sorted(far, reverse=True)
    assert 0 < far[-1] < 0.1 < far[0] < 2
    assert scores(8) == best
    assert apart(scores(8, identity="another"), best) > 1
    assert scores(8, always_bits=3) == scores(3)


def test_chats_score_their_tokens_in_streams_too() -> None:
    with served(tokens=2) as server:
        whole = server.ask(CHAT, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
        parts = [
            one["choices"][0].get("logprobs")
            for one in server.ask(CHAT, stream=True, logprobs=True, top_logprobs=3)
            if text_of(one)
        ]
    assert [one["content"][0] for one in parts] == whole
    assert len(whole[0]["top_logprobs"]) == 3
    assert whole[0]["logprob"] != whole[1]["logprob"]


# ---- scripts and starting


def test_a_script_is_read_from_json(tmp_path: Path) -> None:
    file = tmp_path / "script.json"
    file.write_text('{"gap_ms": 7.5, "freeze": [1, 2.5], "bits": [[0, 8], [10, 4]], "models": ["a", "b"]}')
    assert read_script(file) == Script(gap_ms=7.5, freeze=(1, 2.5), bits=((0, 8), (10, 4)), models=("a", "b"))
    file.write_text("{")
    with pytest.raises(SourceError, match="not a script in JSON"):
        read_script(file)
    with pytest.raises(SourceError, match="No such file"):
        read_script(tmp_path / "none.json")


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"gap": 1},
        {"gap_ms": -1},
        {"gap_ms": "1"},
        {"gap_ms": float("nan")},
        {"tokens": 1.5},
        {"tokens": True},
        {"slots": 0},
        {"tokens_per_chunk": 0},
        {"stream": 1},
        {"status": 200},
        {"usage": "maybe"},
        {"end": None},
        {"freeze": [1]},
        {"freeze": 3},
        {"freeze": [1, -1]},
        {"bits": [[1, 8]]},
        {"bits": [[0, 8], [0, 4]]},
        {"bits": [0, 8]},
        {"models": []},
        {"models": "mock"},
        {"always_bits": 9},
        {"tls_key": "key.pem"},
        {"end": "never", "gap_ms": 0},
    ],
)
def test_a_wrong_script_is_refused(document: Any) -> None:
    with pytest.raises(SourceError, match=r"script|go together"):
        parse_script(document)


def test_a_port_that_is_taken() -> None:
    with served() as server, pytest.raises(SourceError, match="another port"):
        asyncio.run(Mock(Script()).start(port=server.port))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=mock", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*new, *named, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with running(Script(tls_certificate=certificate, tls_key=key)) as url:
        assert url.startswith("https://")
        assert fetch_truth(url, ssl.create_default_context(cafile=certificate)) == []
        with pytest.raises(OSError, match="CERTIFICATE"):
            fetch_truth(url)


def test_a_mock_ends_with_the_process_that_started_it() -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "everybit.bench.mock"], stdin=reader, stderr=subprocess.PIPE)
    os.close(reader)
    os.write(writer, b"{}\n")
    assert process.stderr is not None
    with process.stderr:
        assert b"ready" in process.stderr.readline()
        os.close(writer)
        assert process.wait(5) == 0


def test_a_client_that_does_not_read_is_waited_for() -> None:
    with served(ttft_ms=0, gap_ms=0, tokens=60_000) as server, server.raw() as connection:
        body = json.dumps(question(COMPLETIONS, stream=True)).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.mock.truth() and server.mock.truth()[0].due_ns)
        assert server.status("GET", "/health")[0] == 200
        truth = server.mock.truth()[0]
        written = len(truth.written_ns)
        assert written < 60_000
        for _ in range(40):
            connection.recv(65536)
        wait_until(lambda: len(truth.written_ns) > written)


def test_a_mock_that_cannot_start_says_why(tmp_path: Path) -> None:
    script = Script(tls_certificate=str(tmp_path / "none.pem"), tls_key=str(tmp_path / "none.key"))
    with pytest.raises(SourceError, match=r"none\.pem: no TLS certificate"), running(script):
        pass
