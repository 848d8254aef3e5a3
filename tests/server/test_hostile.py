"""A hostile client: whatever it sends is refused in OpenAI's form, quickly, and the server serves on."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from everybit.server.text import StopText
from tests.server.conftest import Running, running

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "chat", "messages": USER, "max_tokens": 2, "precision": 4},
    COMPLETIONS: {"model": "chat", "prompt": "abc", "max_tokens": 2, "precision": 4},
    RESPONSES: {"model": "chat", "input": "hi", "max_output_tokens": 2, "precision": 4},
}
QUICK_S = 0.25  # by the server's own clock, on a machine that is not busy
SLOW_S = 5.0  # on one that is
KEYS = {"alice": "alice-secret-0123456789", "bob": "bob-secret-0123456789"}
_MISSING: Any = object()
INVALID = 2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("\u0122")  # a token of the byte 0x80


def check_error(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """That it is an error in OpenAI's form; the error."""
    assert response.status_code in (statuses or range(400, 500)), f"{response.status_code} {response.text[:500]}"
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 3000
    assert error["type"].endswith("_error")
    return error


def check_healthy(server: Running) -> None:
    """It answers, nothing of what came before runs on, and no KV block is lost."""
    assert server.get("/health").status_code == 200
    check_idle(server)
    response = server.post(COMPLETIONS, {**BASES[COMPLETIONS], "ignore_eos": True})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 2


def check_idle(server: Running, within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while True:
        status = server.get("/status").json()["models"]["chat"]
        if status["running"] == status["waiting"] == 0 and status["kv_blocks_free"] == status["kv_blocks"]:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.02)


def metric(server: Running, name: str) -> float:
    """Of /metrics, the only value of its name."""
    (found,) = (line for line in server.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    return float(found.rpartition(" ")[2])


@pytest.fixture(scope="module", autouse=True)
def _quick_enough(server: Running) -> Iterator[None]:
    """The refusals of this file by the server's clock: the middle one, and a bound for a busy machine on each."""
    yield
    refused = {line["id"]: line["s"] for line in server.lines() if line.get("id", "").startswith("refused-")}
    slowest = sorted(refused.items(), key=lambda item: -item[1])[:5]
    print(f"\n{len(refused)} refusals, slowest in s:", ", ".join(f"{id[8:]} {s:.3f}" for id, s in slowest))
    if refused:
        assert statistics.median(refused.values()) < QUICK_S
        assert slowest[0][1] < SLOW_S, slowest


def nested(depth: int, mark: str = "[") -> str:
    return "[" * depth + "]" * depth if mark == "[" else '{"a":' * depth + "1" + "}" * depth


def schema_of(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}]}


def format_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def parameters_of(**schema: Any) -> dict[str, Any]:
    return tool({"type": "object", "properties": {"a": schema}})


# (a name, the path, fields of the body, the field to blame or None)
REFUSED: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("n-huge", COMPLETIONS, {"n": 10**9}, "n"),
    ("n-past-digits", COMPLETIONS, {"n": 10**400}, "n"),
    ("n-zero", COMPLETIONS, {"n": 0}, "n"),
    ("n-negative", CHAT, {"n": -1}, "n"),
    ("n-129", CHAT, {"n": 129}, "n"),
    ("n-times-prompts", COMPLETIONS, {"n": 100, "prompt": ["a", "b"]}, "n"),
    ("best-of", COMPLETIONS, {"best_of": 5}, "best_of"),
    ("no-prompt", COMPLETIONS, {"prompt": []}, "prompt"),
    ("no-tokens", COMPLETIONS, {"prompt": [[]]}, "prompt"),
    ("no-messages", CHAT, {"messages": []}, "messages"),
    ("no-input", RESPONSES, {"input": []}, None),
    ("ten-thousand-prompts", COMPLETIONS, {"prompt": ["a"] * 10_000}, "prompt"),
    ("ten-thousand-lists", COMPLETIONS, {"prompt": [[1]] * 10_000}, "prompt"),
    ("half-a-million-bools", COMPLETIONS, {"prompt": [True] * 500_000}, None),
    ("half-a-million-stops", COMPLETIONS, {"stop": [1] * 500_000}, None),
    ("half-a-million-parts", CHAT, {"messages": [{"role": "user", "content": [1] * 500_000}]}, None),
    ("half-a-million-calls", CHAT, {"messages": [{"role": "assistant", "tool_calls": [1] * 500_000}]}, None),
    ("biases-of-text", COMPLETIONS, {"logit_bias": {str(i): "x" for i in range(200_000)}}, None),
    ("metadata-of-numbers", CHAT, {"metadata": {str(i): i for i in range(200_000)}}, None),
    ("token-too-high", COMPLETIONS, {"prompt": [258]}, "prompt"),
    ("token-negative", COMPLETIONS, {"prompt": [-1]}, "prompt"),
    ("token-past-int32", COMPLETIONS, {"prompt": [2**40]}, "prompt"),
    ("token-past-int64", COMPLETIONS, {"prompt": [[1], [2**70]]}, None),
    ("token-list-and-text", COMPLETIONS, {"prompt": [1, "a"]}, None),
    ("token-bool", COMPLETIONS, {"prompt": [True]}, None),
    ("token-float", COMPLETIONS, {"prompt": [1.0]}, None),
    ("prompt-null", COMPLETIONS, {"prompt": None}, None),
    ("prompt-object", COMPLETIONS, {"prompt": {"a": 1}}, None),
    ("prompt-past-context", COMPLETIONS, {"prompt": "a" * 5000}, None),
    ("prompt-of-megabytes", COMPLETIONS, {"prompt": "ab " * (1 << 20)}, None),
    ("tokens-past-context", COMPLETIONS, {"prompt": [5] * 5000}, None),
    ("tokens-of-megabytes", COMPLETIONS, {"prompt": [5] * 1_000_000}, None),
    ("chat-past-context", CHAT, {"messages": [{"role": "user", "content": "a" * 5000}]}, None),
    ("chat-of-megabytes", CHAT, {"messages": [{"role": "user", "content": "ab " * (1 << 20)}]}, None),
    ("input-of-megabytes", RESPONSES, {"input": "ab " * (1 << 20)}, None),
    ("max-tokens-zero", COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    ("max-tokens-negative", CHAT, {"max_tokens": -5}, "max_tokens"),
    ("max-tokens-past-context", COMPLETIONS, {"max_tokens": 4096}, "max_tokens"),
    ("max-tokens-10-400", COMPLETIONS, {"max_tokens": 10**400}, "max_tokens"),
    ("max-tokens-4300-digits", COMPLETIONS, {"max_tokens": 10**4299}, "max_tokens"),
    ("max-tokens-text", COMPLETIONS, {"max_tokens": "5"}, "max_tokens"),
    ("max-tokens-bool", COMPLETIONS, {"max_tokens": True}, "max_tokens"),
    ("max-tokens-float", COMPLETIONS, {"max_tokens": 5.0}, "max_tokens"),
    ("max-tokens-twice", CHAT, {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ("output-tokens-zero", RESPONSES, {"max_output_tokens": 0}, None),
    ("seed-huge", COMPLETIONS, {"seed": 10**400}, "seed"),
    ("seed-negative", COMPLETIONS, {"seed": -1}, "seed"),
    ("seed-bool", COMPLETIONS, {"seed": False}, "seed"),
    ("temperature-text", CHAT, {"temperature": "hot"}, "temperature"),
    ("temperature-3", CHAT, {"temperature": 3}, "temperature"),
    ("temperature-10-400", CHAT, {"temperature": 10**400}, "temperature"),
    ("temperature-list", CHAT, {"temperature": [1]}, "temperature"),
    ("top-p-0", CHAT, {"top_p": 0}, "top_p"),
    ("top-p-2", CHAT, {"top_p": 2}, "top_p"),
    ("top-k-huge", CHAT, {"top_k": 2**31}, "top_k"),
    ("top-k-2", CHAT, {"top_k": -2}, "top_k"),
    ("min-p-2", CHAT, {"min_p": 2}, "min_p"),
    ("presence-3", CHAT, {"presence_penalty": 3}, "presence_penalty"),
    ("repetition-0", CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    ("bias-no-id", CHAT, {"logit_bias": {"a": 1}}, "logit_bias"),
    ("bias-negative-id", CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("bias-other-digits", CHAT, {"logit_bias": {"\u0663": 1}}, "logit_bias"),
    ("bias-id-too-high", CHAT, {"logit_bias": {"258": 1}}, "logit_bias"),
    ("bias-id-of-digits", CHAT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ("bias-101", COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias"),
    ("bias-list", COMPLETIONS, {"logit_bias": [5]}, "logit_bias"),
    ("bias-too-many", COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("stop-empty", CHAT, {"stop": ""}, "stop"),
    ("stop-many", CHAT, {"stop": ["a"] * 17}, "stop"),
    ("stop-long", CHAT, {"stop": "a" * 1025}, "stop"),
    ("stop-ids-many", CHAT, {"stop_token_ids": list(range(17))}, "stop_token_ids"),
    ("stop-ids-high", CHAT, {"stop_token_ids": [258]}, "stop_token_ids"),
    ("stop-ids-huge", CHAT, {"stop_token_ids": [10**30]}, None),
    ("model-unknown", CHAT, {"model": "gpt-5"}, "model"),
    ("model-long", CHAT, {"model": "a" * 100_000}, "model"),
    ("model-precision", CHAT, {"model": "chat@5bit"}, "model"),
    ("model-number", CHAT, {"model": 3}, "model"),
    ("precision-5", CHAT, {"precision": 5}, "precision"),
    ("precision-9", CHAT, {"precision": 9}, "precision"),
    ("precision-minus-1", COMPLETIONS, {"precision": -1}, "precision"),
    ("precision-x", COMPLETIONS, {"precision": "x"}, "precision"),
    ("precision-true", COMPLETIONS, {"precision": True}, None),
    ("precision-long", COMPLETIONS, {"precision": "x" * 100_000}, "precision"),
    ("precision-10-400", COMPLETIONS, {"precision": 10**400}, None),
    ("auto-of-nothing", CHAT, {"precision": "auto", "precision_floor": 5, "precision_ceiling": 5}, "precision"),
    ("auto-upside-down", CHAT, {"precision": "auto", "precision_floor": 8, "precision_ceiling": 2}, "precision"),
    ("floor-without-auto", CHAT, {"precision": 4, "precision_floor": 3}, "precision_floor"),
    ("ceiling-without-auto", CHAT, {"precision": 4, "precision_ceiling": 6}, "precision_ceiling"),
    ("two-precisions", CHAT, {"model": "chat@3bit", "precision": 4}, "precision"),
    ("user-long", CHAT, {"user": "u" * 257}, "user"),
    ("user-of-megabytes", CHAT, {"user": "u" * 3_000_000}, "user"),
    ("user-number", CHAT, {"user": 7}, "user"),
    ("salt-long", CHAT, {"cache_salt": "s" * 257}, "cache_salt"),
    ("metadata-many", CHAT, {"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ("metadata-long", CHAT, {"metadata": {"a": "v" * 513}}, None),
    ("metadata-long-key", CHAT, {"metadata": {"k" * 65: "v"}}, None),
    ("metadata-nested", CHAT, {"metadata": {"a": {}}}, None),
    ("logprobs-21", COMPLETIONS, {"logprobs": 21}, "logprobs"),
    ("logprobs-negative", COMPLETIONS, {"logprobs": -1}, "logprobs"),
    ("logprobs-true", COMPLETIONS, {"logprobs": True}, "logprobs"),
    ("top-logprobs-21", CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("top-logprobs-alone", CHAT, {"top_logprobs": 2}, "top_logprobs"),
    ("stream-options-alone", CHAT, {"stream_options": {}}, "stream_options"),
    ("chat-template", CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    ("template-kwargs", CHAT, {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ("priority", CHAT, {"priority": -5}, "priority"),
    ("stored-prompt", CHAT, {"prompt": {"id": "p"}}, "prompt"),
    ("format-unknown", CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
    ("format-list", CHAT, {"response_format": []}, "response_format"),
    ("format-of-list", CHAT, {"response_format": {"type": ["text"]}}, "response_format"),
    ("format-no-schema", CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    ("schema-list", CHAT, format_of([]), "response_format"),
    ("schema-type", CHAT, format_of({"type": "strang"}), "response_format"),
    ("schema-deep", CHAT, format_of(schema_of(300)), None),
    ("schema-remote", CHAT, format_of({"$ref": "http://169.254.169.254/latest"}), "response_format"),
    ("schema-file", CHAT, format_of({"$ref": "file:///etc/passwd"}), "response_format"),
    ("schema-to-itself", CHAT, format_of({"$ref": "#"}), "response_format"),
    ("schema-large", CHAT, format_of({"enum": [str(i) for i in range(30_000)]}), "response_format"),
    ("pattern-open", CHAT, format_of({"type": "string", "pattern": "a{3"}), "response_format"),
    ("text-format-unknown", RESPONSES, {"text": {"format": {"type": "yaml"}}}, None),
    ("text-format-list", RESPONSES, {"text": {"format": []}}, None),
    ("tool-pattern-open", CHAT, parameters_of(type="string", pattern="("), None),
    ("tool-pattern-number", CHAT, parameters_of(type="string", pattern=5), None),
    ("tool-type-unknown", CHAT, parameters_of(type="something"), None),
    ("tool-type-object", CHAT, parameters_of(type={"a": 1}), None),
    ("tool-type-numbers", CHAT, parameters_of(type=[1, None]), None),
    ("tool-not-an-object", CHAT, tool({"type": "string"}), None),
    ("tool-deep", CHAT, tool(schema_of(300)), None),
    ("tool-remote", CHAT, tool({"$ref": "https://example.com/s.json"}), None),
    ("tool-no-name", CHAT, {"tools": [{"type": "function", "function": {}}]}, None),
    ("tool-name", CHAT, tool({}, name="a b"), None),
    ("tool-builtin", CHAT, {"tools": [{"type": "web_search"}]}, None),
    ("tools-many", CHAT, {"tools": tool({})["tools"] * 129}, "tools"),
    ("tools-twice", CHAT, {"tools": tool({})["tools"] * 2}, None),
    ("choice-absent", CHAT, tool({}) | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ("choice-alone", CHAT, {"tool_choice": "required"}, "tool_choice"),
    ("choice-unknown", CHAT, tool({}) | {"tool_choice": "sometimes"}, "tool_choice"),
    ("choice-list", CHAT, tool({}) | {"tool_choice": ["auto"]}, "tool_choice"),
    ("choice-nothing", RESPONSES, {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "x"}}, None),
    ("regex-of-groups", COMPLETIONS, {"regex": "(" * 60_000 + "a" + ")" * 60_000}, "regex"),
    ("regex-of-few-groups", COMPLETIONS, {"regex": "(" * 8_000 + "a" + ")" * 8_000}, "regex"),
    ("regex-open", COMPLETIONS, {"regex": "["}, "regex"),
    ("regex-look", CHAT, {"regex": "(?=a)b"}, "regex"),
    ("regex-and-grammar", CHAT, {"regex": "a", "grammar": 'start: "a"'}, "grammar"),
    ("grammar-of-nothing", COMPLETIONS, {"grammar": "hello"}, "grammar"),
    ("grammar-and-eos", COMPLETIONS, {"regex": "a", "ignore_eos": True}, "ignore_eos"),
    (
        "image",
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}
            ]
        },
        None,
    ),
    ("sound", CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, None),
    (
        "file",
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "file:///etc/passwd"}]}]},
        None,
    ),
    ("part-without-text", CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None),
    ("role", CHAT, {"messages": [{"role": "root", "content": "a"}]}, None),
    ("message-field", CHAT, {"messages": [{"role": "user", "content": "a", "x": 1}]}, None),
    ("message-null", CHAT, {"messages": [{"role": "user", "content": None}]}, None),
    ("message-no-object", CHAT, {"messages": ["a"]}, None),
    ("calls-of-nothing", CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, None),
    (
        "calls-arguments",
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
        None,
    ),
    ("item", RESPONSES, {"input": [{"type": "computer_call"}]}, None),
    ("item-role", RESPONSES, {"input": [{"role": 5, "content": "a"}]}, None),
    ("previous-response", RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    ("background", RESPONSES, {"background": True}, "background"),
    ("modalities", CHAT, {"modalities": ["audio"]}, "modalities"),
    ("stream-text", CHAT, {"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("name", "path", "changes", "param"), REFUSED, ids=[one[0] for one in REFUSED])
def test_it_is_refused(server: Running, name: str, path: str, changes: dict[str, Any], param: str | None) -> None:
    body = {**BASES[path], **changes}
    short = len(json.dumps(changes)) < 1000 and not name.startswith("stream-")
    for stream in (False, True) if short else (False,):
        response = server.post(
            path, {**body, **({"stream": True} if stream else {})}, headers={"x-request-id": f"refused-{name}"}
        )
        error = check_error(response, 400, 404, 413)
        if param is not None:
            assert error["param"] == param, error


def test_it_is_healthy_after_all_these(server: Running) -> None:
    check_healthy(server)
    assert not [line for line in server.lines() if line.get("status") == 500]


RAW: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no-json", b"model=chat&prompt=abc"),
    ("half", b'{"model": "chat"'),
    ("list", b"[]"),
    ("text", b'"abc"'),
    ("number", b"1"),
    ("null", b"null"),
    ("twice", b'{"model": "chat", "model": "other", "prompt": "abc"}'),
    ("twice-inside", b'{"model": "chat", "prompt": "abc", "logit_bias": {"5": 1, "5": 2}}'),
    ("nan", b'{"model": "chat", "prompt": "abc", "temperature": NaN}'),
    ("infinity", b'{"model": "chat", "prompt": "abc", "x": -Infinity}'),
    ("1e999", b'{"model": "chat", "prompt": "abc", "x": [1e999]}'),
    ("5000-digits", b'{"model": "chat", "prompt": "abc", "seed": ' + b"1" * 5000 + b"}"),
    ("4300-digits", b'{"model": "chat", "prompt": "abc", "max_tokens": ' + b"9" * 4300 + b"}"),
    ("half-pair", b'{"model": "chat", "prompt": "abc\\ud800"}'),
    ("half-pair-model", b'{"model": "\\ud800", "prompt": "abc"}'),
    ("half-pair-stop", b'{"model": "chat", "prompt": "abc", "stop": "\\udc00"}'),
    ("half-pair-key", b'{"model": "chat", "prompt": "abc", "\\uDFFF": 1}'),
    ("half-pair-bias", b'{"model": "chat", "prompt": "abc", "logit_bias": {"\\ud800": 1}}'),
    ("no-utf-8", b'{"model": "chat", "prompt": "\xff"}'),
    ("half-pair-bytes", b'{"model": "chat", "prompt": "\xed\xa0\x80"}'),
    ("utf-16", '{"model": "chat", "prompt": "abc"}'.encode("utf-16")),
    ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"),
    ("deep-lists", b'{"model": "chat", "prompt": ' + nested(100_000).encode() + b"}"),
    ("deep-objects", b'{"model": "chat", "x": ' + nested(100_000, "{").encode() + b"}"),
    ("deep-open", b"[" * 4_000_000),
    ("deep-65", b'{"model": "chat", "prompt": "abc", "x": ' + nested(64).encode() + b"}"),
    ("open-text-of-escapes", b"[" * 65 + b'"' + b'\\"' * 2_000_000),
    ("a-million-lists", b'{"model": "chat", "prompt": [' + b"[]," * 1_000_000 + b"[]]}"),
    ("nul", b'{"model": "chat", "prompt": "a\x00b"}'),
]


@pytest.mark.parametrize(("name", "body"), RAW, ids=[one[0] for one in RAW])
def test_a_body_that_is_none_is_refused(server: Running, name: str, body: bytes) -> None:
    headers = {"content-type": "application/json", "x-request-id": f"refused-body-{name}"}
    with server.client() as client:
        error = check_error(client.post(COMPLETIONS, content=body, headers=headers), 400)
    assert "\ud800" not in error["message"]


def test_brackets_in_texts_are_not_depth_and_nul_is_text(server: Running) -> None:
    response = server.post(
        COMPLETIONS, {**BASES[COMPLETIONS], "prompt": '[{"\\' * 200 + "\x00", "stop": "\x00", "x": nested(62)}
    )
    assert response.status_code == 200, response.text
    deep = {**BASES[COMPLETIONS], "x": json.loads(nested(63))}
    assert server.post(COMPLETIONS, deep).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, "/tokenize", "/detokenize", "/v1/embeddings"])
@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/jsonx"],
)
def test_another_content_type_is_refused(server: Running, path: str, kind: str | None) -> None:
    """A page of somebody else can send these without asking first."""
    headers = {"content-type": kind} if kind else {}
    with server.client() as client:
        check_error(client.post(path, content=json.dumps(BASES[COMPLETIONS]).encode(), headers=headers), 415)


def test_a_body_over_the_limit_is_refused_and_not_kept(server: Running) -> None:
    large = b'{"model": "chat", "prompt": "' + b"a" * (5 << 20) + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    headers = {"content-type": "application/json"}
    with server.client() as client:
        assert check_error(client.post(COMPLETIONS, content=large, headers=headers), 413)["code"] == "too_large"
        assert check_error(client.post(COMPLETIONS, content=pieces(), headers=headers), 413)["code"] == "too_large"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in (b"5000000", b"99999999999999999999", b"18446744073709551615"):
        begin = time.monotonic()
        answer = raw(server, head + b"Content-Length: " + length + b"\r\n\r\n")  # and nothing of it
        assert status_of(answer) in (400, 413), answer
        assert time.monotonic() - begin < SLOW_S
    check_healthy(server)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_tokens_that_are_none_are_refused(server: Running, path: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"tokens": [258], "prompt": None},
        {"tokens": [-1]},
        {"tokens": [2**63]},
        {"tokens": "a", "prompt": 5},
        {"tokens": ["a"] * 500_000, "messages": [1] * 500_000},
        {"prompt": "a", "messages": USER, "tokens": None},
    ]
    for body in bodies:
        check_error(server.post(path, {"model": "chat", **body}), 400)


def test_nothing_is_remembered_of_unknown_fields(server: Running) -> None:
    """llama.cpp's n_discard is not ours; a line's end in a name would be another header."""
    response = server.post(COMPLETIONS, {**BASES[COMPLETIONS], "n_discard": -5, "a\r\nset-cookie: b": 1, "\u00e9,": 2})
    assert response.status_code == 200, response.text
    assert response.headers["x-everybit-ignored"] == "n_discard,a??set-cookie: b,??"
    assert "set-cookie" not in response.headers
    many = server.post(COMPLETIONS, {**BASES[COMPLETIONS], **{f"{i}" * 100: i for i in range(1000)}})
    assert many.status_code == 200
    assert len(many.headers["x-everybit-ignored"]) < 1000


def test_a_line_of_the_log_stays_a_line(server: Running) -> None:
    user = 'a\n{"level": "critical"}\r\u2028\x00\x1b[31m'
    response = server.post(
        CHAT, {**BASES[CHAT], "user": user, "metadata": {"k\n": "v\n"}}, headers={"x-request-id": "a b"}
    )
    assert response.status_code == 200
    server.get("/a%0a%7b%22level%22:%22critical%22%7d%0d%00?q=%0a")
    time.sleep(0.2)  # a line is written after its answer
    lines = server.lines()  # every line is JSON
    assert [line for line in lines if line.get("user") == user and line["metadata"] == {"k\n": "v\n"}]
    assert not [line for line in lines if line["level"] == "critical"]
    assert b"\x1b" not in server.log.read_bytes()


def test_paces_that_are_none_are_refused(server: Running) -> None:
    for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"):
        for value in ("", "fast", "0", "-1", "nan", "inf", "1e400", "3600001", "1,2", "9" * 5000):
            error = check_error(server.post(CHAT, BASES[CHAT], headers={name: value}), 400)
            assert error["param"] == name
    assert server.post(CHAT, BASES[CHAT], headers={"x-slo-ttft-ms": "250"}).status_code == 200


def test_other_names_of_the_host_are_refused(server: Running) -> None:
    """A page whose name was made to mean 127.0.0.1 asks for its own name."""
    port = server.url.rpartition(":")[2]
    with server.client() as client:
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            "",
            "127.0.0.1.evil.example",
            "[::2]",
        ):
            check_error(client.get("/health", headers={"host": host}), 403)
            check_error(client.post(COMPLETIONS, json=BASES[COMPLETIONS], headers={"host": host}), 403)
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
            assert client.get("/health", headers={"host": host}).status_code == 200


def test_pages_of_others_are_allowed_nothing(server: Running) -> None:
    foreign = {"origin": "https://evil.example"}
    asking = {**foreign, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with server.client() as client:
        answers = [client.get(path, headers=foreign) for path in ("/status", "/v1/models", "/metrics", "/", "/health")]
        answers.append(client.post(COMPLETIONS, json=BASES[COMPLETIONS], headers=foreign))
        for path in (COMPLETIONS, CHAT, "/status"):
            answers.append(client.options(path, headers=asking))
            check_error(answers[-1], 405)
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_other_methods_and_paths_are_refused(server: Running) -> None:
    with server.client() as client:
        for path in (CHAT, COMPLETIONS, RESPONSES, "/v1/models", "/health", "/status", "/"):
            for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
                check_error(client.request(method, path), 405)
                check_error(client.request(method, path, content=b"a" * 100_000), 405)
            assert client.request("HEAD", path).status_code in (200, 405)
        check_error(client.get(CHAT), 405)
        check_error(client.post("/health", json={}), 405)
        for path in (
            "/v1",
            "/v1/nothing",
            "/v1/completions/",
            "/v2/../etc",
            "/%00",
            "/%ff",
            "/docs",
            "/v1/models/nothing",
            "/v1/models/",
        ):
            check_error(client.get(path), 404, 405)


TRAVERSALS = [
    "../app.py",
    "..%2fapp.py",
    "%2e%2e/app.py",
    "..%5capp.py",
    "%2e%2e%2fapp.py",
    "....//app.py",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "app.js%00.py",
    ".",
    "..",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_only_the_page_is_on_the_page(server: Running, name: str) -> None:
    answer = raw(server, f"GET /page/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == 404, answer[:300]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_what_a_text_is_made_of_holds_nobody_up(server: Running) -> None:
    """Stop texts that nearly come, bytes that are no character, patterns with many ways: others go on."""
    (a,) = server.post("/tokenize", {"model": "chat", "prompt": "a", "add_special_tokens": False}).json()["tokens"]
    long = {**BASES[COMPLETIONS], "max_tokens": 300, "n": 16, "ignore_eos": True}
    patterns = [
        "((((a{1,99}){1,99}){1,99}){1,99}){1,99}",
        "(a|b|ab)*" + "(.{40}x|.{41}y|.{42}z)" * 20,
        "((.|\n){1,99}b){1,99}",
    ]
    bodies: list[dict[str, Any]] = [
        {**long, "stop": ["a" * 1023 + chr(98 + i) for i in range(16)], "logit_bias": {str(a): 100}},
        {**long, "max_tokens": 3000, "n": 4, "logit_bias": {str(INVALID): 100}},
        *({**long, "n": 2, "ignore_eos": False, "regex": pattern} for pattern in patterns),
    ]
    for body in bodies:
        answer, slowest = beside_health(server, body)
        assert answer.status_code == 200
        assert slowest < 2, body
    text = server.post(COMPLETIONS, {**bodies[1], "n": 1}).json()["choices"][0]["text"]
    assert text == "\ufffd" * 3000


def beside_health(server: Running, body: dict[str, Any]) -> tuple[httpx.Response, float]:
    """The answer, and the longest that /health took meanwhile."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, body)))
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        begin = time.monotonic()
        assert server.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - begin)
    return answers[0], slowest


# ---- below HTTP


def raw(server: Running, data: bytes, wait_s: float = 10) -> bytes:
    """What comes back for some bytes, until the answer is whole or the connection is closed."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        found = b""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while True:
                head, mark, body = found.partition(b"\r\n\r\n")
                lengths = [
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                if mark and lengths and len(body) >= lengths[0]:
                    break
                new = connection.recv(65536)
                if not new:
                    break
                found += new
    return found


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NO_HTTP: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("noise", b"\x00\x01\x02\x03\r\n\r\n", (400,)),
    ("tls", bytes.fromhex("160301020001") + b"\xfc\x03\x03" + b"a" * 500, (400,)),
    ("http-2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    ("http-0.9", b"GET /health\r\n\r\n", (400, 403)),
    ("http-9.9", b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", (400,)),
    ("no-method", b"GRAB /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (400,)),
    ("connect", b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", (400, 404, 405)),
    ("no-host", b"GET /health HTTP/1.1\r\n\r\n", (400, 403)),
    ("space-before-colon", b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", (400,)),
    ("nul-in-header", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n", (400,)),
    ("folded-header", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n Host: evil.example\r\n\r\n", (200, 400)),
    ("path-of-bytes", b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", (400, 404)),
    ("large-header", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 200_000 + b"\r\n\r\n", (431,)),
    ("large-path", b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", (431,)),
    ("endless-header", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 2_000_000, (431,)),
    ("10000-headers", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", (431,)),
    ("two-lengths", _POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}    ", (400,)),
    ("length-text", _POST + b"Content-Length: five\r\n\r\n{}   ", (400,)),
    ("length-negative", _POST + b"Content-Length: -5\r\n\r\n{}   ", (400,)),
    ("length-plus", _POST + b"Content-Length: +5\r\n\r\n{}   ", (400,)),
    ("length-and-chunks", _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    ("chunks-of-x", _POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", (400,)),
    ("chunks-then-x", _POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", (400,)),
    ("chunks-twice", _POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", (400,)),
    ("chunk-no-hex", _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", (400,)),
    ("chunk-huge", _POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n", (400,)),
    ("bare-line-ends", _POST.replace(b"\r\n", b"\n") + b"Transfer-Encoding: chunked\n\n0\n\n", (400,)),
]


@pytest.mark.parametrize(("name", "data", "statuses"), NO_HTTP, ids=[one[0] for one in NO_HTTP])
def test_what_is_no_http_is_refused(server: Running, name: str, data: bytes, statuses: tuple[int, ...]) -> None:
    begin = time.monotonic()
    answer = raw(server, data)
    assert time.monotonic() - begin < SLOW_S
    assert status_of(answer) in statuses, answer[:300]
    if status_of(answer) >= 400:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert answer.count(b"HTTP/1.1 ") == 1, "one request was taken for two"


def test_old_and_odd_http_is_answered(server: Running) -> None:
    old = raw(server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert status_of(old) == 200
    assert b"connection: close" in old
    body = json.dumps(BASES[COMPLETIONS]).encode()
    head = _POST + b"Content-Length: %d\r\n" % len(body)
    assert status_of(raw(server, head + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n" + body)) == 200
    assert status_of(raw(server, head + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + body)) == 200
    assert status_of(raw(server, head + b"Expect: 100-continue\r\nConnection: close\r\n\r\n" + body)) in (100, 200)
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert status_of(raw(server, _POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)) == 200
    both = raw(
        server,
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") * 50 + b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n",
    )
    assert both.startswith(b"HTTP/1.1 200")


# ---- keys, and a small queue


@pytest.fixture(scope="module")
def guarded(chat_overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two keys, of which bob's may do two things at once; unknown fields are refused; a queue of two."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(
        f"alice {KEYS['alice']}\nbob {KEYS['bob']} concurrency=2\nunicode schl\u00fcssel-0123456789\n"
    )
    options = ("--keys", str(folder / "keys"), "--strict", "--queue", "2")
    with running(chat_overlay, *options, log=folder / "log.jsonl") as found:
        found.headers["authorization"] = f"Bearer {KEYS['alice']}"
        yield found


def as_bob() -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS['bob']}"}


WRONG_KEYS: list[bytes | None] = [
    None,
    b"",
    b"Bearer",
    b"Bearer wrong-0123456789",
    b"Basic " + KEYS["alice"].encode(),
    KEYS["alice"].encode(),
    b"Bearer \xff\xfe",
    "Bearer schl\u00fcssel".encode(),
    b"Bearer " + b"a" * 50_000,
    b"Bearer " + KEYS["alice"].encode() + b"x",
]


@pytest.mark.parametrize("value", WRONG_KEYS, ids=range(len(WRONG_KEYS)))
def test_without_a_key_there_is_nothing(guarded: Running, value: bytes | None) -> None:
    headers = [(b"authorization", value)] if value is not None else []
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/status"),
            ("GET", "/metrics"),
            ("POST", COMPLETIONS),
            ("GET", "/v1/nothing"),
        ):
            answer = client.request(method, path, headers=headers)
            assert check_error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/health", headers=headers).status_code == 200
    assert KEYS["alice"] not in guarded.log.read_text()


def test_a_key_may_hold_other_letters(guarded: Running) -> None:
    headers = [(b"authorization", "Bearer schl\u00fcssel-0123456789".encode())]
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_unknown_fields_are_refused_where_the_server_is_strict(guarded: Running) -> None:
    assert check_error(guarded.post(CHAT, {**BASES[CHAT], "n_discard": 5}), 400)["param"] == "n_discard"


@contextlib.contextmanager
def streaming(
    server: Running, headers: dict[str, str] | None = None, **fields: Any
) -> Iterator[Iterator[dict[str, Any]]]:
    """The documents of a long stream that has begun."""
    body = {
        "model": "chat",
        "prompt": "abc",
        "max_tokens": 3000,
        "ignore_eos": True,
        "stream": True,
        "precision": 8,
        **fields,
    }
    with server.client() as client, client.stream("POST", COMPLETIONS, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        yield (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))


def test_a_key_does_so_much_at_once(guarded: Running) -> None:
    with streaming(guarded, as_bob()) as one, streaming(guarded, as_bob()) as two:
        next(one), next(two)
        refused = guarded.post(COMPLETIONS, BASES[COMPLETIONS], headers=as_bob())
        assert check_error(refused, 429)["code"] == "key_busy"
        assert int(refused.headers["retry-after"]) >= 1
        assert guarded.post(COMPLETIONS, BASES[COMPLETIONS]).status_code == 200
    check_idle(guarded)
    assert guarded.post(COMPLETIONS, BASES[COMPLETIONS], headers=as_bob()).status_code == 200


def test_nobody_switches_the_requests_of_others(guarded: Running) -> None:
    with streaming(guarded) as documents:
        id = next(documents)["id"]
        path = f"/v1/requests/{id}/precision"
        assert check_error(guarded.post(path, {"precision": 3}, headers=as_bob()), 404)["code"] == "request_not_found"
        for precision in (5, "x", "auto", None, True, 10**30):
            check_error(guarded.post(path, {"precision": precision}), 400)
        check_error(guarded.post("/v1/requests/nothing/precision", {"precision": 3}), 404)
        assert {b for _ in range(20) for b in next(documents)["bits"]} == {8}
        assert guarded.post(path, {"precision": 3}).json()["sequences"] == 1
    check_idle(guarded)
    check_error(guarded.post(path, {"precision": 3}), 404)


def test_what_one_key_had_computed_is_not_cached_for_another(guarded: Running) -> None:
    """Else the time to the first token, and usage, tell what others wrote."""

    def cached(headers: dict[str, str] | None = None, **fields: Any) -> float:
        body = {**BASES[COMPLETIONS], "prompt": "a secret that others have written " * 20, **fields}
        response = guarded.post(COMPLETIONS, body, headers=headers)
        assert response.status_code == 200, response.text
        now = metric(guarded, "everybit:prefix_cache_hit_tokens")
        told = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        found, before[0] = now - before[0], now
        assert told in (0, found)
        return found

    before = [0.0]
    cached(prompt="x")
    assert cached() == 0
    assert cached() > 600
    assert cached(as_bob()) == 0
    assert cached(as_bob()) > 600
    assert cached(cache_salt="other") == 0


def test_a_full_queue_says_when_to_come_again(guarded: Running) -> None:
    """66 sequences may be there, 64 that run and two that wait."""
    with streaming(guarded, n=64, max_tokens=200) as documents:
        next(documents)
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(guarded.post(COMPLETIONS, {**BASES[COMPLETIONS], "n": 3})))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert check_error(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    check_idle(guarded)
    assert guarded.post(COMPLETIONS, BASES[COMPLETIONS]).status_code == 200


# ---- what nobody thought of


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.lists(st.text("abc", max_size=4)))
def test_stop_texts_are_found_in_whatever_pieces(stops: list[str], pieces: list[str]) -> None:
    text, stop = "".join(pieces), StopText(stops)
    shown = "".join(map(stop.add, pieces))
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert stop.stopped == bool(ends)
    if ends:
        before = text[: ends[0]]
        assert shown == before[: ends[0] - max(len(one) for one in stops if before.endswith(one))]
    else:
        held = max(n for one in stops for n in range(len(one)) if text.endswith(one[:n]))
        assert shown == text[: len(text) - held]
        assert shown + stop.finish() == text


_ODD: list[Any] = [
    _MISSING,
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "a",
    "auto",
    "none",
    "\x00",
    "a" * 300,
    "\U0001f600\u0301",
    [],
    [None],
    [[]],
    [0],
    ["a"],
    [[1]],
    {},
    {"a": None},
    {"type": "text"},
    {"type": "function"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {}},
    {"name": "f"},
    {"$ref": "#/x"},
    {"5": 1},
]
_VALUES = st.one_of(
    st.sampled_from(_ODD),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    ),
)
_RICH: dict[str, dict[str, Any]] = {
    CHAT: {
        **BASES[CHAT],
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "d"},
        ],
        "tools": tool({"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}})["tools"],
        "tool_choice": "auto",
        "n": 1,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 1,
        "stream": False,
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "seed": 1,
        "top_p": 0.9,
        "top_k": 3,
        "user": "u",
        "parallel_tool_calls": False,
    },
    COMPLETIONS: {
        **BASES[COMPLETIONS],
        "prompt": ["a", "b"],
        "n": 1,
        "echo": True,
        "logprobs": 1,
        "stop": "x",
        "logit_bias": {"5": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
        "regex": "[ab]*",
        "precision": "auto",
        "precision_floor": 3,
        "precision_ceiling": 6,
        "stop_token_ids": [5],
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "seed": 1,
    },
    RESPONSES: {
        **BASES[RESPONSES],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "d"},
        ],
        "instructions": "i",
        "text": {"format": {"type": "json_object"}},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "none",
        "stream": True,
        "metadata": {"a": "b"},
        "temperature": 0.5,
    },
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, by keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    found = changed(copy[at[0]], at[1:], value)
    if found is _MISSING:
        del copy[at[0]]
    else:
        copy[at[0]] = found
    return copy


_CHANGES = st.sampled_from(sorted(_RICH)).flatmap(
    lambda path: st.tuples(
        st.just(path),
        st.lists(st.tuples(st.sampled_from(sorted(places(_RICH[path]), key=repr)), _VALUES), min_size=1, max_size=3),
    )
)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(_CHANGES)
def test_any_change_of_a_body_is_answered_or_refused(
    server: Running, change: tuple[str, list[tuple[tuple[Any, ...], Any]]]
) -> None:
    path, changes = change
    body = _RICH[path]
    for at, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it away
            body = changed(body, at, value)
    response = server.post(path, body)
    if response.status_code != 200:
        check_error(response)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in response.text


def test_bytes_changed_at_random_are_answered_or_refused(server: Running) -> None:
    chance = random.Random(7)
    with server.client() as client:
        for _ in range(60):
            path = chance.choice(sorted(BASES))
            body = bytearray(json.dumps(BASES[path]).encode())
            for _ in range(chance.randint(1, 3)):
                body[chance.randrange(len(body))] = chance.randrange(256)
            response = client.post(path, content=bytes(body), headers={"content-type": "application/json"})
            if response.status_code != 200:
                check_error(response)


def test_it_is_healthy_after_everything(server: Running, guarded: Running) -> None:
    check_healthy(server)
    check_healthy(guarded)
    for one in (server, guarded):
        assert not [line for line in one.lines() if line.get("status") == 500 or line["level"] in ("error", "critical")]
