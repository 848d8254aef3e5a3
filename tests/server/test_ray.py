"""Replicas on Ray Serve: two of them answer as one server, and one may be killed while it works.

Skipped where ray is not installed; with EVERYBIT_REQUIRE_RAY=1 it fails instead. One start serves all tests, in order.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Running, running

KEY, NARROW = "the-key-of-the-tests", "the-key-of-a-narrow-user"
BITS = (2, 3, 4, 6, 8)
REPLICA = "x-everybit-replica"
LOADED, TOKENS = 24, 600  # clients while a replica dies, half of them streaming; tokens for each
RECOVERY_S = 60


@pytest.fixture(scope="module")
def ray_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if importlib.util.find_spec("ray") is None:
        message = "ray is not installed: pip install 'everybit[ray]'"
        if os.environ.get("EVERYBIT_REQUIRE_RAY") == "1":
            pytest.fail(message)
        pytest.skip(message)
    overlay = request.getfixturevalue("chat_overlay")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "keys").write_text(f"tests {KEY}\nnarrow {NARROW} concurrency=2\n")
    options = ("--ray", "--replicas", "2", "--keys", str(folder / "keys"), "--drain-s", "20", "--queue", "64")
    with running(overlay, *options, log=folder / "log.jsonl", ready_s=110) as found:
        found.headers["authorization"] = f"Bearer {KEY}"
        yield found


def body(seed: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "chat", "prompt": f"text {seed}", "seed": seed, "temperature": 1, "precision": BITS[seed % 5],
        "ignore_eos": True, "max_tokens": 32, **fields,
    }  # fmt: skip


def complete(server: Running, **fields: Any) -> httpx.Response:
    response = server.post("/v1/completions", body(**fields))
    assert response.status_code == 200, response.text
    return response


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["text"])


def replicas_seen(server: Running, requests: int) -> set[str]:
    return {complete(server, seed=1, max_tokens=1).headers[REPLICA] for _ in range(requests)}


def descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def replica_processes(server: Running) -> list[int]:
    return [pid for pid in descendants(server.process.pid) if command(pid).startswith("ray::ServeReplica")]


def test_both_replicas_answer_alike_at_every_precision(ray_server: Running) -> None:
    assert len(replica_processes(ray_server)) == 2
    texts: dict[int, set[str]] = {bits: set() for bits in BITS}
    seen = set()
    for _ in range(4):
        for bits in BITS:
            response = complete(ray_server, seed=7, precision=bits)
            assert response.json()["usage"]["tokens_by_bits"] == {str(bits): 32}
            texts[bits].add(text_of(response))
            seen.add(response.headers[REPLICA])
    assert len(seen) == 2
    assert all(len(found) == 1 for found in texts.values())
    assert len(set.union(*texts.values())) == len(BITS)
    auto = complete(ray_server, seed=1, precision="auto", precision_ceiling=4).json()
    assert auto["usage"]["tokens_by_bits"] == {"4": 32}
    assert {line["replica"] for line in ray_server.lines() if line.get("path") == "/v1/completions"} == seen


def test_a_stream_arrives_in_pieces(ray_server: Running) -> None:
    sent = body(seed=3, stream=True, max_tokens=600)
    pieces, times, began = [], [], time.perf_counter()
    with ray_server.client() as client, client.stream("POST", "/v1/completions", json=sent) as response:
        for piece in response.iter_raw():
            pieces.append(piece)
            times.append(time.perf_counter() - began)
    whole = b"".join(pieces).decode()
    assert whole.endswith("data: [DONE]\n\n")
    assert len(pieces) > 60
    assert times[0] < times[-1] / 3
    frames = [json.loads(line.removeprefix("data: ")) for line in whole.splitlines() if line.startswith("data: {")]
    assert "".join(one["choices"][0]["text"] for one in frames) == text_of(complete(ray_server, seed=3, max_tokens=600))


def test_a_running_request_is_switched_wherever_it_runs(ray_server: Running) -> None:
    for attempt in range(4):
        bits: list[int] = []
        sent = body(seed=attempt, precision=8, stream=True, max_tokens=1000)
        with ray_server.client() as client, client.stream("POST", "/v1/completions", json=sent) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    document = json.loads(line.removeprefix("data: "))
                    if not bits:
                        path = f"/v1/requests/{document['id']}/precision"
                        switched = ray_server.post(path, {"precision": 3})
                        assert switched.json().get("sequences") == 1, switched.text
                    bits += document["bits"]
        assert set(bits) == {8, 3}
    missing = ray_server.post("/v1/requests/cmpl-none/precision", {"precision": 3})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "request_not_found"


def test_metrics_and_status_of_all_replicas(ray_server: Running) -> None:
    seen = replicas_seen(ray_server, 12)
    lines = ray_server.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("everybit:generation_tokens_total{") and 'bits="3"' in line]
    assert {line.partition('replica="')[2].partition('"')[0] for line in found} == seen
    assert lines.count("# TYPE everybit:generation_tokens_total counter") == 1
    status = ray_server.get("/status").json()
    assert set(status["replicas"]) == seen
    each = [one["chat"] for one in status["replicas"].values()]
    assert status["models"]["chat"]["kv_blocks"] == sum(one["kv_blocks"] for one in each)
    assert ray_server.get("/ready").json()["status"] == "ready"


def test_errors_are_openais_and_keys_count_once(ray_server: Running) -> None:
    assert ray_server.get("/-/routes").json()["error"]["type"] == "not_found_error"
    assert ray_server.get("/nothing").json()["error"]["type"] == "not_found_error"
    wrong = ray_server.post("/v1/completions", body(seed=1, precision=5))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "precision")
    assert len(wrong.headers.get_list("x-request-id")) == 1
    with httpx.Client(base_url=ray_server.url, trust_env=False) as client:
        assert client.post("/v1/completions", json=body(seed=1)).json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").json()["status"] == "alive"
        large = client.post("/v1/completions", content=b"x" * (5 << 20), headers={"authorization": f"Bearer {KEY}"})
        assert large.status_code in (413, 415)
    headers = {"authorization": f"Bearer {NARROW}"}
    with httpx.Client(base_url=ray_server.url, trust_env=False, headers=headers) as client:
        sent = body(seed=1, stream=True, max_tokens=3000)
        with (
            client.stream("POST", "/v1/completions", json=sent) as first,
            client.stream("POST", "/v1/completions", json=sent) as second,
        ):
            held = [first.iter_raw(), second.iter_raw()]  # an iterator that is dropped closes its connection
            for pieces in held:
                next(pieces)
            for _ in range(4):
                refused = client.post("/v1/completions", json=body(seed=1))
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "key_busy"


def test_who_leaves_stops_what_ran(ray_server: Running) -> None:
    with ray_server.client() as client:
        for _ in range(4):
            with client.stream("POST", "/v1/completions", json=body(seed=1, stream=True, max_tokens=4000)) as response:
                next(response.iter_raw())
    deadline = time.monotonic() + 10
    while ray_server.get("/status").json()["models"]["chat"]["running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray_server.get("/status").json()["models"]["chat"]["running"] == 0


def test_nothing_of_ray_listens_for_others(ray_server: Running) -> None:
    """Every port is one of the loopback address, and asks for the token."""
    inodes = set()
    for pid in descendants(ray_server.process.pid):
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(path).partition("socket:[")[2].rstrip("]"))
            except OSError:
                continue
    local = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    ports = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                address, port = words[1].split(":")
                assert address in local, f"{address}:{int(port, 16)} is open to others"
                ports.append(int(port, 16))
    assert len(ports) > 5
    agents = 0
    for port in ports:
        try:
            with httpx.Client(trust_env=False, timeout=2) as client:
                jobs = client.get(f"http://127.0.0.1:{port}/api/job_agent/jobs/")
        except (OSError, httpx.HTTPError):
            continue
        assert jobs.status_code != 200 or jobs.text.startswith("# HELP")  # metrics, and nothing but them
        agents += jobs.status_code == 401
    assert agents


@dataclass
class Client:
    """What one client got: the `text` if it was whole, else how it `failed`."""

    seed: int
    stream: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str | None = None
    failed: str = ""
    pieces: int = 0

    def run(self, server: Running) -> None:
        sent = body(seed=self.seed, stream=self.stream, max_tokens=TOKENS)
        try:
            with server.client(120) as client:
                client.headers["x-request-id"] = self.id
                if self.stream:
                    self._read(client, sent)
                    return
                response = client.post("/v1/completions", json=sent)
                if response.status_code == 200:
                    self.text = text_of(response)
                else:
                    error = response.json()["error"]
                    self.failed = f"{response.status_code} {error['code']} {response.headers.get('retry-after')}"
        except httpx.HTTPError as error:
            self.failed = self.failed or type(error).__name__

    def _read(self, client: httpx.Client, sent: dict[str, Any]) -> None:
        text = ""
        with client.stream("POST", "/v1/completions", json=sent) as response:
            if response.status_code != 200:
                self.failed = f"{response.status_code} {json.loads(response.read())['error']['code']}"
                return
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    assert not self.failed
                    self.text = text
                elif line.startswith("data: "):
                    document = json.loads(line.removeprefix("data: "))
                    if "error" in document:
                        self.failed = f"frame {document['error']['code']}"
                        continue
                    self.pieces += 1
                    text += document["choices"][0]["text"]
            if self.text is None and not self.failed:
                self.failed = "the stream ended early, as if it were whole"


def test_a_replica_is_killed_under_load(ray_server: Running) -> None:
    alone = [text_of(complete(ray_server, seed=seed, max_tokens=TOKENS)) for seed in range(6)]
    before = replicas_seen(ray_server, 12)
    assert len(before) == 2
    clients = [Client(i % 6, stream=i % 2 == 0) for i in range(LOADED)]
    threads = [threading.Thread(target=client.run, args=(ray_server,)) for client in clients]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while any(client.stream and client.pieces < 3 for client in clients) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert all(client.text is None for client in clients), "the load was over before the kill"
    os.kill(replica_processes(ray_server)[0], signal.SIGKILL)
    killed = time.monotonic()
    later = [Client(i % 6, stream=i % 2 == 0) for i in range(6)]  # they come while a replica is missing
    more = [threading.Thread(target=client.run, args=(ray_server,)) for client in later]
    for thread in more:
        thread.start()
    for thread in threads + more:
        thread.join(120)
    for client in clients + later:
        assert (client.text is None) != (client.failed == ""), client
        assert client.text is None or client.text == alone[client.seed]
        assert client.failed in ("", "frame replica_lost", "503 replica_lost 1", "503 replica_lost"), client

    time.sleep(0.5)
    served = {line["id"]: line for line in ray_server.lines() if "id" in line}
    for client in clients + later:
        line = served[client.id]
        assert (client.text is None) == ("replica" not in line), "another replica's request failed, or a line is wrong"
        assert client.text is not None or "ended before it was done" in line["problem"]
    lost = [client for client in clients if client.failed]
    assert {client.stream for client in lost} == {True, False}
    assert LOADED / 6 < len(lost) < LOADED * 5 / 6

    while len(after := replicas_seen(ray_server, 8)) < 2:
        assert time.monotonic() < killed + RECOVERY_S
        time.sleep(0.2)
    print(f"\n{len(lost)} of {LOADED} lost, {sum(bool(c.failed) for c in later)} of {len(later)} later ones;")
    print(f"two replicas again after {time.monotonic() - killed:.1f} s")
    assert len(after - before) == 1
    assert len(replica_processes(ray_server)) == 2
    again = [Client(i % 6, stream=i % 2 == 0) for i in range(12)]
    threads = [threading.Thread(target=client.run, args=(ray_server,)) for client in again]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [client.text for client in again] == [alone[client.seed] for client in again]


def test_it_drains_and_leaves_nothing(ray_server: Running) -> None:
    """The last one: what runs is finished, what is new refused."""
    alone = text_of(complete(ray_server, seed=2, max_tokens=2500))
    processes = {pid: command(pid) for pid in descendants(ray_server.process.pid)}
    last = Client(2, stream=True)
    result: list[str] = []

    def run() -> None:
        with ray_server.client(120) as client:
            sent = body(seed=2, stream=True, max_tokens=2500)
            with client.stream("POST", "/v1/completions", json=sent) as response:
                for line in response.iter_lines():
                    last.pieces += 1
                    if line.startswith("data: {"):
                        result.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    elif line == "data: [DONE]":
                        last.text = "".join(result)

    thread = threading.Thread(target=run)
    thread.start()
    while last.pieces < 2:
        time.sleep(0.005)
    ray_server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert last.text is None
    try:
        refused = ray_server.post("/v1/completions", body(seed=1))
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"
    finally:
        thread.join(60)
    assert last.text == alone
    assert ray_server.process.wait(60) == 0
    time.sleep(0.5)
    assert [text for pid, text in processes.items() if command(pid) == text] == []
