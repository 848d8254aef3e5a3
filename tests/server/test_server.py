"""The server over real HTTP: what every endpoint answers, and that a request gets what it gets alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Running, events, running

BITS = (2, 3, 4, 6, 8)
USER = [{"role": "user", "content": "Name three colours."}]


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    response = server.post(
        "/v1/completions", {"model": "chat", "prompt": "abc", "temperature": 0, "precision": 8, **fields}
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    response = server.post(
        "/v1/chat/completions", {"model": "chat", "messages": USER, "max_tokens": 12, "precision": 8, **fields}
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_every_precision_has_a_name_and_says_what_it_was(server: Running) -> None:
    cards = server.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["chat", *(f"chat@{b}bit" for b in BITS)]
    texts = set()
    for bits in BITS:
        by_name = complete(server, model=f"chat@{bits}bit", precision=None, ignore_eos=True)
        by_field = complete(server, precision=bits, ignore_eos=True)
        assert by_name["choices"] == by_field["choices"]
        assert by_name["usage"]["tokens_by_bits"] == {str(bits): 16}
        assert f"-{bits}bit-" in by_name["system_fingerprint"]
        texts.add(by_name["choices"][0]["text"])
    assert len(texts) > 1


def test_auto_keeps_to_its_bounds(server: Running) -> None:
    found = complete(server, precision="auto", precision_ceiling=4, ignore_eos=True)
    assert found["usage"]["tokens_by_bits"] == {"4": 16}
    assert "-auto-" in found["system_fingerprint"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_as_whole_and_in_company_as_alone(server: Running, temperature: float) -> None:
    """Mixed precisions, all at once: the same texts as one after the other."""
    bodies = [
        {"prompt": f"text {i} " * (1 + i % 5), "seed": i, "precision": BITS[i % 5], "temperature": temperature}
        for i in range(25)
    ]
    alone = [complete(server, **body, ignore_eos=True)["choices"][0]["text"] for body in bodies]
    found: list[str] = [""] * len(bodies)

    def stream(i: int) -> None:
        response = server.post("/v1/completions", {"model": "chat", "stream": True, "ignore_eos": True, **bodies[i]})
        documents = events(response)
        assert documents[-1] == "[DONE]"
        found[i] = "".join(document["choices"][0]["text"] for document in documents[:-1])

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_frames_of_a_chat_stream(server: Running) -> None:
    body = {
        "model": "chat",
        "messages": USER,
        "max_tokens": 8,
        "seed": 3,
        "precision": 8,
        "ignore_eos": True,
        "stream": True,
    }
    documents = events(server.post("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}))
    *chunks, usage, done = documents
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons.count("length") == 1
    assert reasons[-1] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert sum(len(chunk["bits"]) for chunk in chunks) == 8
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == chat(server, max_tokens=8, seed=3, ignore_eos=True)["choices"][0]["message"]["content"]


def test_n_choices_and_seeds(server: Running) -> None:
    found = chat(server, n=3, seed=7, ignore_eos=True)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert len(set(texts)) == 3
    assert texts[2] == chat(server, seed=9, ignore_eos=True)["choices"][0]["message"]["content"]
    assert found["usage"]["completion_tokens"] == 36


def test_stop_texts_across_tokens(server: Running) -> None:
    """Every token is a byte: a stop text of three always lies across tokens."""
    text = complete(server, max_tokens=40, ignore_eos=True, temperature=1, seed=1)["choices"][0]["text"]
    stop = text[10:13]
    for stream in (False, True):
        fields = {"max_tokens": 40, "ignore_eos": True, "temperature": 1, "seed": 1, "stop": ["never", stop]}
        if stream:
            body = {"model": "chat", "prompt": "abc", "stream": True, "precision": 8, **fields}
            documents = events(server.post("/v1/completions", body))[:-1]
            found = "".join(document["choices"][0]["text"] for document in documents)
            assert documents[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            choice = complete(server, **fields)["choices"][0]
            found = choice["text"]
            assert choice["finish_reason"] == "stop"
        assert found == text[: text.index(stop)]


def test_echo_scores_the_prompt(server: Running) -> None:
    found = complete(server, prompt="abcd", echo=True, logprobs=2, max_tokens=0, precision=4)
    choice = found["choices"][0]
    assert choice["text"] == "abcd"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "a", "b", "c", "d"]
    assert logprobs["token_logprobs"][0] is None
    assert all(p < 0 for p in logprobs["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    assert found["usage"]["completion_tokens"] == 0


def test_json_schema_and_regex(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    for seed in range(3):
        found = chat(server, response_format=format, seed=seed, max_tokens=500, precision=3)
        document = json.loads(found["choices"][0]["message"]["content"])
        assert document["colour"] in ("red", "blue")
        assert 0 <= document["n"] <= 99
    assert complete(server, regex="(ab){3}c", temperature=1)["choices"][0]["text"] == "abababc"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_streamed_and_not(server: Running) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "seed": 5, "max_tokens": 600, "parallel_tool_calls": False}
    choice = chat(server, **fields)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    body = {"model": "chat", "messages": USER, "stream": True, "precision": 8, **fields}
    deltas = [d["choices"][0]["delta"] for d in events(server.post("/v1/chat/completions", body))[:-1]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "weather"
    assert "".join(c["function"]["arguments"] for c in calls) == call["function"]["arguments"]
    history = [*USER, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "7 degrees"}]
    assert chat(server, messages=history, tools=[TOOL])["choices"][0]["message"]["role"] == "assistant"


def test_tokens_there_and_back(server: Running) -> None:
    tokens = server.post("/tokenize", {"model": "chat", "prompt": "héllo"}).json()
    assert tokens["count"] == 7
    assert server.post("/detokenize", {"model": "chat", "tokens": tokens["tokens"][1:]}).json()["prompt"] == "héllo"


def test_a_running_request_changes_its_precision(server: Running) -> None:
    body = {"model": "chat", "prompt": "abc", "max_tokens": 3000, "precision": 8, "stream": True, "ignore_eos": True}
    bits: list[int] = []
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            document = json.loads(line.removeprefix("data: "))
            if not bits:
                switched = server.post(f"/v1/requests/{document['id']}/precision", {"precision": 3})
                assert switched.json()["sequences"] == 1
            bits += document["bits"]
    assert set(bits) == {8, 3}
    assert bits == sorted(bits, reverse=True)
    assert len(bits) == 3000


def test_a_beginning_that_was_read_before_is_not_read_again(server: Running) -> None:
    body = {"prompt": "long " * 40, "precision": 4, "cache_salt": "one", "max_tokens": 2}
    cached = [complete(server, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached[0] == 0
    assert cached[1] >= 128
    elsewhere = complete(server, **{**body, "cache_salt": "two"})
    assert elsewhere["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert elsewhere["choices"] == complete(server, **body)["choices"]


def test_the_prompt_of_several_choices_is_cached_once(server: Running) -> None:
    usage = complete(server, prompt="once " * 40, precision=4, n=4, max_tokens=2, cache_salt="n")["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["prompt_tokens"] == 201


def test_unknown_parts_of_known_fields_are_refused(server: Running) -> None:
    body = {"model": "chat", "prompt": "abc", "stream": True, "stream_options": {"include_usage": True, "more": 1}}
    assert server.post("/v1/completions", body).status_code == 400
    assert server.post("/tokenize", {"model": "chat", "prompt": "abc", "more": 1}).status_code == 400


def test_float_weights_are_served_and_talked_to(tiny_llama: Path, tmp_path: Path) -> None:
    """And with no queue: what can run runs, more is refused."""
    with running(tiny_llama, "--queue", "0", "--budget", "8", log=tmp_path / "log") as found:
        answer = complete(found, precision=None, max_tokens=20, ignore_eos=True)
        assert answer["usage"]["tokens_by_bits"] == {"0": 20}
        assert len(complete(found, precision=None, n=8)["choices"]) == 8
        refused = found.post("/v1/completions", {"model": "chat", "prompt": "abc", "n": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert found.post("/v1/completions", {"model": "chat", "prompt": "abc", "precision": 4}).status_code == 400
    command = [
        sys.executable,
        "-m",
        "everybit.cli.main",
        "chat",
        str(tiny_llama),
        "--max-tokens",
        "8",
        "--threads",
        "1",
    ]
    said = subprocess.run(command, input="Hello\n/bits 3\n/new\nAgain\n", text=True, capture_output=True, check=True)
    assert said.stderr.count("tokens, first after") == 2
    assert "one precision" in said.stderr


def test_a_key_counts_what_generates(chat_overlay: Path, tmp_path: Path) -> None:
    """A key of one request at a time may ask for tokens, and change the precision of its own, meanwhile."""
    keys = tmp_path / "keys"
    keys.write_text(f"one {'k' * 20} concurrency=1\n")
    with running(chat_overlay, "--keys", str(keys), "--allow-host", "MyBox", log=tmp_path / "log") as found:
        found.headers = {"Authorization": f"Bearer {'k' * 20}", "Host": "mybox"}
        body = {
            "model": "chat",
            "prompt": "abc",
            "max_tokens": 2000,
            "precision": 8,
            "stream": True,
            "ignore_eos": True,
        }
        with found.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            id = json.loads(next(lines).removeprefix("data: "))["id"]
            assert found.post(f"/v1/requests/{id}/precision", {"precision": 3}).status_code == 200
            assert found.post("/tokenize", {"prompt": "abc"}).status_code == 200
            assert found.post("/v1/completions", {"model": "chat", "prompt": "abc"}).status_code == 429


def test_health_metrics_status_and_page(server: Running) -> None:
    assert server.get("/health").json()["status"] == "alive"
    assert server.get("/ready").json()["status"] == "ready"
    assert 'everybit:generation_tokens_total{bits="8",model="chat"}' in server.get("/metrics").text
    status = server.get("/status").json()["models"]["chat"]
    assert status["running"] == status["waiting"] == 0
    assert status["kv_blocks"] == status["kv_blocks_free"] > status["kv_blocks_cached"] > 0
    page = server.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert server.get("/page/app.js").status_code == 200
    assert server.get("/page/..%2fapp.py").status_code == 404


def test_the_log_says_what_was_served(server: Running) -> None:
    complete(server, precision=3, user="somebody", ignore_eos=True)
    for _ in range(50):  # it is written after the answer
        line = server.lines()[-1]
        if line.get("user"):
            break
        time.sleep(0.02)
    assert line["user"] == "somebody"
    assert line["tokens_by_bits"] == {"3": 16}
    assert line["status"] == 200
    assert 0 < line["ttft_s"] <= line["s"]


def test_five_hundred_requests_of_mixed_precision_at_once(server: Running) -> None:
    """Twenty-five different ones, each twenty times: all get what one of them gets alone, and no KV block is lost."""
    bodies = [
        {
            "model": "chat",
            "prompt": f"{i} and {'more ' * (i % 7)}",
            "precision": BITS[i % 5],
            "seed": i,
            "max_tokens": 24,
        }
        for i in range(25)
    ]
    alone = [complete(server, **body, temperature=0.8, ignore_eos=True)["choices"][0]["text"] for body in bodies]
    most = 0

    async def all_at_once() -> list[str]:
        nonlocal most
        limits = httpx.Limits(max_connections=600)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:

            async def ask(number: int) -> str:
                body = {**bodies[number % 25], "temperature": 0.8, "ignore_eos": True, "cache_salt": str(number)}
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                found: str = response.json()["choices"][0]["text"]
                return found

            tasks = [asyncio.create_task(ask(number)) for number in range(500)]
            while not all(task.done() for task in tasks):
                status = (await client.get("/status")).json()["models"]["chat"]
                most = max(most, status["running"] + status["waiting"])
                await asyncio.sleep(0.05)
            return [task.result() for task in tasks]

    assert asyncio.run(all_at_once()) == [alone[number % 25] for number in range(500)]
    assert most > 250
    status = server.get("/status").json()["models"]["chat"]
    assert status["kv_blocks_free"] == status["kv_blocks"]
