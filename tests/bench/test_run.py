"""Whole runs against mocks and other servers: every fault is counted, none ends the run, what was intended is kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from everybit.bench.asks import Asking
from everybit.bench.endpoint import PATHS, parse_url
from everybit.bench.energy import Meter
from everybit.bench.fluidity import Deadlines
from everybit.bench.http import Limits
from everybit.bench.load.arrivals import Users, constant, poisson
from everybit.bench.load.lengths import parse_length, parse_lengths, parse_seconds
from everybit.bench.load.texts import random_words
from everybit.bench.load.workload import Drawn, Prefixes, Workload, closed_loop, conversations, open_loop
from everybit.bench.measuring import Measured, Settings, measure_run
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.bench.mock.truth import fetch_truth
from everybit.bench.preflight import Known, look
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.report import render
from everybit.bench.result import read_result
from everybit.bench.runner import Progress, default_workers, run
from everybit.bench.statistics import percentile
from everybit.bench.targets import Targets
from everybit.bench.worker import Job
from everybit.cli.main import main
from everybit.errors import SourceError

TEXTS = random_words()
SOURCE = Drawn(TEXTS, parse_lengths("8", "4"))
SHORT = open_loop(constant(100, count=10), SOURCE)
QUICK: dict[str, Any] = {"ttft_ms": 5, "gap_ms": 2}
PATIENT, IMPATIENT = Limits(idle_s=10, longest_s=20), Limits(idle_s=0.4)


def known_of(url: str, api: str = "chat", **asking: Any) -> Known:
    endpoint, _ = parse_url(url)
    return Known(endpoint.resolved(), Asking(api, **{"model": "mock", **asking}))


def measured(
    url: str, workload: Workload = SHORT, limits: Limits = PATIENT, api: str = "chat", **more: Any
) -> Measured:
    asking = {"model": more.pop("model", "mock")}
    settings = {"workers": 1, "quiet": True, "meter": Meter(()), **more}
    targets = Targets(Deadlines(200 * MS, 50 * MS))
    found = measure_run(Settings(known_of(url, api, **asking), targets, limits, **settings), workload, "test")
    json.dumps(found.document, allow_nan=False)
    assert render(found.document)
    return found


def job_of(url: str, workload: Workload) -> Job:
    known = known_of(url)
    stop_ns = workload.duration_ns if isinstance(workload.starts, Users) else None
    return Job(known.endpoint, PATHS["chat"], known.asking, workload, PATIENT, stop_ns=stop_ns)


def kinds(records: list[Record]) -> dict[str, int]:
    return dict(Counter(record.error for record in records))


# ---- faults of the server


@pytest.mark.parametrize(
    ("kind", "script", "detail"),
    [
        ("key", {"key": "secret"}, "401: the key is missing or wrong"),
        ("context", {"context": 5}, "the context holds 5"),
        ("busy", {"status": 429, "retry_after_s": 3}, "429"),
        ("unavailable", {"status": 503, "retry_after_s": 3}, "503"),
        ("frame", {"end": "error", "end_at": 2}, "the script wants an error here"),
        ("cut", {"end": "cut", "end_at": 2}, "closed"),
        ("endless", {"end": "never", "gap_ms": 1}, "events"),
        ("empty", {"tokens": 0}, ""),
        ("timeout", {"ttft_ms": 60_000}, "nothing arrived for 0.4 s"),
    ],
)
def test_a_fault_of_every_request_is_counted_and_no_figure_made_of_it(
    kind: str, script: dict[str, Any], detail: str
) -> None:
    with running(Script(**{**QUICK, **script})) as url:
        found = measured(url, limits=IMPATIENT if kind == "timeout" else PATIENT)
    errors = found.document["errors"]
    assert (kinds(found.records), {name: one["count"] for name, one in errors.items()}) == ({kind: 10}, {kind: 10})
    assert detail in errors[kind]["example"]
    assert found.document["metrics"] is None
    assert not found.document["validity"]["valid"]
    assert f"none complete: {kind} 10" in found.document["validity"]["reasons"][-1]
    if kind != "endless":
        assert {record.output_tokens for record in found.records} == {2 if kind in ("frame", "cut") else 0}
    assert {record.retry_after_s for record in found.records} == {3 if kind in ("busy", "unavailable") else None}


def test_a_fault_of_some_requests_leaves_the_others() -> None:
    with running(Script(**QUICK, status=503, status_every=5)) as url:
        found = measured(url, api="completions")
    assert kinds(found.records) == {"": 8, "unavailable": 2}
    metrics = found.document["metrics"]
    assert (metrics["requests"]["complete"], metrics["requests"]["failed"]) == (8, 2)
    assert (metrics["latency"]["ttft_ms"]["n"], metrics["latency"]["ttft_ms"]["missing"]) == (8, 2)
    assert metrics["fluidity"]["mean"] == pytest.approx(0.8)  # failed ones are scored zero
    assert "2 of 10 requests failed" in found.document["validity"]["warnings"]


def test_lengths_beyond_the_context() -> None:
    with running(Script(**QUICK, context=40)) as url:
        found = measured(url, open_loop(constant(100, count=20), Drawn(TEXTS, parse_lengths("2-100", "4"))))
    count = kinds(found.records)
    assert set(count) == {"", "context"}
    long = [record.wanted_prompt or 0 for record in found.records if record.error]
    short = [record.wanted_prompt or 0 for record in found.records if not record.error]
    assert max(short) < 50 < max(long)
    assert found.document["errors"]["context"]["count"] == count["context"]


ODD = {"split_frames": True, "crlf": True, "pings": True, "head_ms": 1}
BUNDLES = {"tokens_per_chunk": 3, "bundle_first": 2, "events_per_write": 2, "bits": ((0, 8), (3, 4))}


@pytest.mark.parametrize(
    ("api", "script"), [("chat", ODD), ("responses", ODD), ("completions", BUNDLES), ("responses", BUNDLES)]
)
def test_odd_streams_are_read_whole(api: str, script: dict[str, Any]) -> None:
    with running(Script(**QUICK, tokens=9, **script)) as url:
        found = measured(url, open_loop(constant(100, count=4), Drawn(TEXTS, parse_lengths("8", "9"))), api=api)
        truth = fetch_truth(url)
    assert kinds(found.records) == {"": 4}
    assert {record.output_tokens for record in found.records} == {9}
    assert {record.text for record in found.records} == {(" t\u00f6k" if script is ODD else " tok") * 9}
    assert found.document["tokens"]["mismatch"] is None
    for record in found.records:
        assert record.source == ("usage" if script is ODD else "server")
        assert record.bits == ([] if script is ODD else [8] * 3 + [4] * 6)
    begin_ns = min(one.arrived_ns for one in truth) - min(record.sent_ns or 0 for record in found.records)
    late = [(r.first_ns or 0) + begin_ns - one.written_ns[0] for r, one in zip(found.records, truth, strict=True)]
    assert percentile(sorted(late), 50) < 20 * MS


def test_malformed_events_are_told() -> None:
    with running(Script(**QUICK, end="garbage", end_at=2)) as url:
        found = measured(url)
    assert kinds(found.records) == {"": 10}
    assert {(record.malformed, record.output_tokens) for record in found.records} == {(2, 4)}
    assert "10 of 10 answers held events that could not be read" in found.document["validity"]["warnings"]


def test_a_server_that_does_not_stream() -> None:
    with running(Script(**QUICK, stream=False)) as url:
        found = measured(url)
    assert {(r.error, r.streamed, r.output_tokens, r.source) for r in found.records} == {("", False, 4, "usage")}
    latency = found.document["metrics"]["latency"]
    assert latency["ttft_ms"]["n"] == 10
    assert (latency["tpot_ms"], latency["gap_ms"]) == (None, None)
    assert any("came whole" in one for one in found.document["validity"]["warnings"])


def test_missing_usage() -> None:
    with running(Script(**QUICK, usage="none")) as url:
        found = measured(url)
    assert {(r.error, r.usage_output, r.output_tokens, r.source) for r in found.records} == {("", None, 4, "pieces")}
    assert any("without usage" in one for one in found.document["validity"]["warnings"])
    assert found.document["metrics"]["throughput"]["prompt_tokens_per_s"] is None


def test_wrong_usage_is_loud() -> None:
    with running(Script(**QUICK, usage="wrong")) as url:
        found = measured(url)
    assert {(r.source, r.counted, r.usage_output) for r in found.records} == {("spread", 4, 8)}
    mismatch = found.document["tokens"]["mismatch"]
    assert (mismatch["requests"], mismatch["counted"], mismatch["usage"]) == (10, 40, 80)
    assert any(one.startswith("TOKEN COUNTS DIFFER") for one in found.document["validity"]["warnings"])
    assert "TOKEN COUNTS DIFFER in 10 of 10" in render(found.document)


# ---- the endpoint before the run


def seek(url: str, model: str = "") -> Known:
    return look(parse_url(url)[0], Asking("chat", model), PATIENT, partial(TEXTS.text, "calibration"))


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(SourceError, match=rf"{url}: no connection \("):
            seek(url)
        assert main(["bench", url, "--quiet"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"everybit: error: {url}: no connection")


def test_mistakes_end_the_bench_and_other_faults_do_not() -> None:
    with running(Script(**QUICK, key="secret", models=("a", "b"))) as url:
        for model in ("", "a"):
            with pytest.raises(SourceError, match="the key was refused"):
                seek(url, model)
        with pytest.raises(SourceError, match="TLS failed"):
            seek(url.replace("http:", "https:"))
    with running(Script(**QUICK, models=("a", "b"))) as url:
        with pytest.raises(SourceError, match=r"no such path or model .*; it has a, a@2bit"):
            seek(url, "c")
        assert (seek(url).asking.model, seek(url).usage) == ("a", True)
    for script, note in (
        ({"status": 503}, "a first request failed, 503"),
        (
            {"end": "never", "gap_ms": 1},
            "a first request failed, the answer went on past the longest time, size or token count (513 events",
        ),
        ({"usage": "none"}, "the server gives no usage"),
        ({"stream": False}, "the server does not stream"),
    ):
        with running(Script(**{**QUICK, **script})) as url:
            assert note in seek(url).notes[0]


# ---- what was intended


def test_intended_times_do_not_depend_on_the_server() -> None:
    load = open_loop(poisson(50, count=25, seed=3), SOURCE)
    found = []
    for script in ({"ttft_ms": 1}, {"ttft_ms": 60, "slots": 2}):
        with running(Script(**{**QUICK, **script})) as url:
            found.append(measured(url, load).records)
    fast, slow = found
    assert [r.intended_ns for r in fast] == [r.intended_ns for r in slow] == list(poisson(50, count=25, seed=3))
    assert kinds(slow) == {"": 25}
    assert percentile(sorted((r.sent_ns or 0) - r.intended_ns for r in slow), 50) < 10 * MS
    assert (slow[-1].end_ns or 0) - slow[-1].intended_ns > 250 * MS  # it had to wait for a slot


def test_a_frozen_server_is_seen_by_all_who_were_due() -> None:
    with running(Script(**QUICK, freeze=(0.4, 2.0))) as url:
        found = measured(url, open_loop(constant(40, duration_s=2.8), SOURCE))
        truth = fetch_truth(url)
    assert kinds(found.records) == {"": 112}
    waited = sorted((one.written_ns[0] - one.arrived_ns) / MS for one in truth)
    first = found.document["metrics"]["latency"]["ttft_ms"]
    assert percentile(waited, 99) > 1900
    assert first["p99"] == pytest.approx(percentile(waited, 99), rel=0.1)
    assert first["mean"] == pytest.approx(sum(waited) / len(waited), rel=0.1)  # a fifth of it where senders wait


def test_users_wait_for_their_answers_and_think() -> None:
    load = closed_loop(Users(3), SOURCE, duration_s=0.7, think=parse_seconds("0.05"))
    with running(Script(ttft_ms=30, gap_ms=2)) as url:
        found = measured(url, load)
    sessions = {n: [r for r in found.records if r.session == n] for n in range(3)}
    for one in sessions.values():
        assert len(one) >= 3
        assert [r.turn for r in one] == list(range(len(one)))
        assert all(b.intended_ns - (a.end_ns or 0) == 50 * MS for a, b in itertools.pairwise(one))
    assert found.document["metrics"]["throughput"]["concurrency_max"] <= 3
    assert max(r.intended_ns for r in found.records) < 0.7 * SECOND
    assert kinds(found.records) == {"": len(found.records)}  # those that ran at the end were waited for


def test_a_user_who_is_refused_does_not_hammer() -> None:
    with running(Script(**QUICK, status=429)) as url:
        found = measured(url, closed_loop(Users(1), SOURCE, duration_s=0.6))
    assert 3 <= len(found.records) <= 6


# ---- what is sent


class Recorder(BaseHTTPRequestHandler):
    """Keeps what it is asked, and answers with a number of its own."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        text = f"answer {len(self.bodies)} to {asked(body)[-1]}"
        choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
        data = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def asked(body: dict[str, Any]) -> list[str]:
    if "messages" in body:
        return [one["content"] for one in body["messages"]]
    return str(body["prompt"]).split("\n")


@contextlib.contextmanager
def recording() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type("Handler", (Recorder,), {"bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, 0.02))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", handler.bodies  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_conversation_holds_its_earlier_answers(api: str) -> None:
    load = conversations(
        Users(2), SOURCE, turns=parse_length("3"), think=parse_seconds("0.01"),
        prefixes=Prefixes(TEXTS, parse_length("5"), 1),
    )  # fmt: skip
    with recording() as (url, bodies):
        found = measured(url, load, api=api)
    assert kinds(found.records) == {"": 6}
    talks: dict[str, list[list[str]]] = {}
    for body in bodies:
        talks.setdefault(asked(body)[1], []).append(asked(body))
    answers = [r.text for r in found.records]
    assert len(talks) == 2
    for first, second, third in talks.values():
        assert [len(one) for one in (first, second, third)] == [2, 4, 6]
        assert second[:2] == first
        assert third[:4] == second
        assert first[1] in second[2]
        assert {second[2], third[4]} <= {*answers}
        assert third[4].endswith(second[3])
    if api == "chat":
        roles = [one["role"] for one in max(bodies, key=lambda body: len(body["messages"]))["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_a_conversation_ends_where_an_answer_fails() -> None:
    with running(Script(**QUICK, status=500, status_every=2)) as url:
        found = measured(url, conversations(Users(1), SOURCE, turns=parse_length("5")))
    assert [(r.turn, r.error) for r in found.records] == [(0, ""), (1, "server")]


@pytest.mark.parametrize(("count", "distinct"), [(2, 2), (None, 12)])
def test_shared_prefixes_are_equal_text(count: int | None, distinct: int) -> None:
    load = open_loop(constant(100, count=12), SOURCE, prefixes=Prefixes(TEXTS, parse_length("30"), count))
    with recording() as (url, bodies):
        measured(url, load)
    assert len({asked(body)[0] for body in bodies}) == distinct
    assert len({asked(body)[1] for body in bodies}) == 12


# ---- ends


def test_the_drain_ends_what_still_runs_and_keeps_what_came() -> None:
    load = closed_loop(Users(2), SOURCE, duration_s=0.3)
    with running(Script(ttft_ms=5, gap_ms=50, tokens=10_000)) as url:
        begin = time.monotonic()
        found = measured(url, load, drain_ns=200 * MS)
    assert time.monotonic() - begin < 5
    assert kinds(found.records) == {"cancelled": 2}
    for record in found.records:
        assert 0.4 * SECOND < (record.end_ns or 0) < 2 * SECOND
        assert record.output_tokens >= 5
    assert found.document["metrics"] is None


def test_the_clock_is_set_during_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() - (3600 if next(calls) else 0))
    with running(Script(**QUICK)) as url:
        found = measured(url)
    assert kinds(found.records) == {"": 10}
    assert "the clock jumped by -3600.0 s" in found.document["validity"]["reasons"][0]
    assert 0 < found.document["metrics"]["latency"]["ttft_ms"]["max"] < 1000


@contextlib.contextmanager
def mock_process(**script: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A mock that a test may kill."""
    process = subprocess.Popen(
        [sys.executable, "-m", "everybit.bench.mock"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stderr
    with process:
        process.stdin.write(json.dumps({**QUICK, **script}) + "\n")
        process.stdin.flush()
        yield process.stderr.readline().split()[-1] + "/v1", process
        process.kill()


def after(seconds: float, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Does it once, that long after a run's start."""
    acts = iter([act])

    def show(progress: Progress) -> None:
        if progress.seconds >= seconds:
            next(acts, lambda: None)()

    return show


def test_a_server_that_dies_in_the_middle() -> None:
    with mock_process() as (url, process):
        load = open_loop(constant(50, duration_s=1), SOURCE)
        found = run(job_of(url, load), 1, show=after(0.4, process.kill))
    count = kinds(found.records)
    assert set(count) <= {"", "cut", "connect"}
    assert count[""] >= 15
    assert count["connect"] >= 10
    assert sum(count.values()) == 50
    assert not found.problems


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_a_killed_worker_is_told_and_the_others_go_on() -> None:
    with running(Script(**QUICK)) as url:
        kill = after(0.4, lambda: os.kill(children()[0], signal.SIGKILL))
        found = run(job_of(url, open_loop(constant(50, duration_s=1), SOURCE)), 2, show=kill)
    assert len(found.problems) == 1
    assert "ended before the run did" in found.problems[0]
    lost = int(found.problems[0].split()[1])
    by_worker = Counter(record.worker for record in found.records)
    assert by_worker[1 - lost] == 25
    assert 0 < by_worker[lost] < 25
    assert kinds(found.records) == {"": len(found.records)}


def test_requests_during_a_stop_of_this_client_are_marked() -> None:
    def stop() -> None:
        worker = children()[0]
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(worker, signal.SIGCONT)

    with running(Script(**QUICK)) as url:
        found = run(job_of(url, open_loop(constant(50, duration_s=1.2), SOURCE)), 1, show=after(0.3, stop))
    longest = max(found.stalls, key=lambda stall: stall[2] - stall[1])
    assert longest[2] - longest[1] > 0.3 * SECOND
    marked = [record for record in found.records if record.stalled]
    assert {r.number for r in marked} >= {r.number for r in found.records if longest[1] < r.intended_ns < longest[2]}
    assert 15 <= len(marked) < 50
    assert kinds(found.records) == {"": 60}


def test_all_workers_fail() -> None:
    kill = after(0, lambda: os.kill(children()[0], signal.SIGKILL))
    with running(Script(ttft_ms=60_000)) as url, pytest.raises(SourceError, match="the run failed: worker 0 ended"):
        run(job_of(url, SHORT), 1, show=kill)


def test_workers_by_load() -> None:
    assert default_workers(None, None) == 1
    assert default_workers(1e9, None) >= default_workers(10, None) == 1
    assert default_workers(None, 10**6) <= 8


# ---- Ctrl-C


@contextlib.contextmanager
def bench(url: str, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A bench that has some answers already, in a group of processes as a terminal makes."""
    load = ["--rate", "40", "--duration", "60", "--prompt", "8", "--output-tokens", "4", "--workers", "1"]
    command = [sys.executable, "-m", "everybit.cli.main", "bench", url, *load, "--idle", "0", "-o", str(folder)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while len(fetch_truth(url)) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("warmup", ["0", "30"])
def test_ctrl_c_writes_what_was_measured(warmup: str, tmp_path: Path) -> None:
    with running(Script(**QUICK)) as url, bench(url, tmp_path, "--warmup", warmup) as process:
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "everybit: interrupted; what was measured until then is above\n"
    document = read_result(tmp_path)
    assert len(document["requests"]["rows"]) >= 15
    assert "interrupted: measured until then" in document["validity"]["warnings"]
    if warmup == "0":
        assert document["metrics"]["requests"]["complete"] >= 15
    else:
        assert document["metrics"] is None
    assert (tmp_path / "report.html").exists()
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(document["requests"]["rows"]) + 1
    assert "written:" in out


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with running(Script(**QUICK)) as url, bench(url, tmp_path) as process:
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))
