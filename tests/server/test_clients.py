"""Other people's clients against a real server: OpenAI's, LangChain, LiteLLM, lm-eval, and schemathesis.

The tests of one that is not installed are skipped; with EVERYBIT_REQUIRE_CLIENTS=1 they fail, for CI.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from tests.server.conftest import Running, running

# Before litellm and langsmith, which would ask the network at their import.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LANGSMITH_TRACING"] = "false"

USER = [{"role": "user", "content": "Name three colours."}]
KEY, SLOW_KEY = "a-key-of-many-characters", "another-key-of-many-characters"
LETTERS = {letter: str(66 + place) for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}  # their tokens
LIKELY = dict.fromkeys(LETTERS.values(), 50)
EVER = 3000  # tokens: longer than any test waits


class Pick(BaseModel):
    """A colour, so many times."""

    colour: Literal["red", "blue"]
    n: Literal[1, 2]


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": CITY}}
FLAT_WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
ONE_CALL: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 5}


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"7 degrees in {city}"


def client_library(name: str, *needs: str) -> Any:
    """The module, where it and what it `needs` are installed."""
    try:
        for need in needs:
            importlib.import_module(need)
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("EVERYBIT_REQUIRE_CLIENTS") == "1":
            pytest.fail(f"{name} cannot be imported: {error}")
        pytest.skip(f"{name} cannot be imported ({error}): pip install 'everybit[clients]'")


@pytest.fixture(scope="module")
def openai() -> Any:
    return client_library("openai")


@pytest.fixture
def client(openai: Any, server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(chat_overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, one of them for one request at a time, that ends every request after 2 s."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"one {KEY}\nslow {SLOW_KEY} concurrency=1\n")
    options = ("--keys", str(folder / "keys"), "--timeout-s", "2")
    with running(chat_overlay, *options, log=folder / "log.jsonl") as found:
        found.headers["authorization"] = f"Bearer {KEY}"
        yield found


def valid(kind: Any, found: Any) -> Any:
    """That an answer is what the SDK's types say, which the SDK itself does not check."""
    TypeAdapter(kind).validate_python(found.to_dict())
    return found


def text_of(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def used(answer: Any) -> dict[str, Any]:
    """The usage, without what depends on earlier requests: tokens that were cached."""
    usage: dict[str, Any] = answer.usage.to_dict()
    return {name: value for name, value in usage.items() if not name.endswith("_details")}


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "chat", "messages": USER, "max_tokens": 12, **fields})


def idle(server: Running) -> bool:
    status = server.get("/status").json()["models"]["chat"]
    return bool(status["running"] == status["waiting"] == 0)


def wait_until_idle(server: Running, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not idle(server):
        assert time.monotonic() < end, "something still runs"
        time.sleep(0.02)


# ---- OpenAI's client: chat


def test_openai_chat_answers_have_the_types_of_the_sdk(client: Any) -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    extra = {"ignore_eos": True, "precision": 4}  # auto follows the load
    asked = {"seed": 3, "logprobs": True, "top_logprobs": 3, "n": 2, "extra_body": extra}
    whole = valid(ChatCompletion, chat(client, **asked))
    chunks = [
        valid(ChatCompletionChunk, c)
        for c in chat(client, **asked, stream=True, stream_options={"include_usage": True})
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
        scores = [score for c in own if c.logprobs for score in c.logprobs.content or []]
        assert scores == choice.logprobs.content
        assert len(scores) == 12
        for score in scores:
            assert len(score.top_logprobs) == 3
            assert score.top_logprobs[0].logprob >= score.logprob
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert used(chunks[-1]) == used(whole)
    assert sum(whole.usage.tokens_by_bits.values()) == whole.usage.completion_tokens == 24


def test_openai_async_clients_get_what_others_get(openai: Any, server: Running) -> None:
    async def ask() -> tuple[str, str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            fields = {"model": "chat@8bit", "messages": USER, "max_tokens": 12, "seed": 3}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**fields), client.chat.completions.create(**fields, stream=True)
            )
            streamed = text_of([chunk async for chunk in stream])
            prompt = await client.completions.create(model="chat@8bit", prompt="abc", max_tokens=4, temperature=0)
            return whole.choices[0].message.content, streamed, prompt.choices[0].text

    whole, streamed, text = asyncio.run(ask())
    assert whole == streamed
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        assert chat(client, model="chat@8bit", seed=3).choices[0].message.content == whole
        assert (
            client.completions.create(model="chat@8bit", prompt="abc", max_tokens=4, temperature=0).choices[0].text
            == text
        )


def test_openai_parameters_do_what_they_say(client: Any) -> None:
    def content(**fields: Any) -> str:
        asked = {"model": "chat@8bit", "seed": 11, "extra_body": {"ignore_eos": True}, **fields}
        return str(chat(client, **asked).choices[0].message.content)

    text = content()
    assert content() == text
    assert content(seed=12) != text
    assert content(temperature=0, seed=1) == content(temperature=1e-8, seed=2)
    assert content(logit_bias={LETTERS["e"]: 100}) == "e" * 12
    assert content(frequency_penalty=2, presence_penalty=2, temperature=0) != content(temperature=0)
    assert content(top_p=1e-6) == content(temperature=0)
    text = content(logit_bias=LIKELY)
    assert text.isalpha()
    assert content(logit_bias=LIKELY, stop=[text[4:6]]) == text[: text.index(text[4:6])]
    assert len(content(logit_bias=LIKELY, max_tokens=None, max_completion_tokens=7)) == 7
    with pytest.raises(Exception, match="max_completion_tokens"):
        content(max_tokens=3, max_completion_tokens=3)


def test_openai_raw_and_streamed_responses_show_the_headers(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="chat", messages=USER, max_tokens=3, extra_body={"nonsense": 1}, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-everybit-ignored"] == "nonsense"
    assert raw.headers["x-request-id"] == raw.request_id == "mine-1"
    assert raw.parse().usage.completion_tokens <= 3
    asked = {"model": "chat", "messages": USER, "max_tokens": 3, "stream": True}
    with client.chat.completions.with_streaming_response.create(**asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(response.iter_lines())[-2] == "data: [DONE]"


def test_openai_precisions_by_name_and_by_field(client: Any) -> None:
    from openai.types import Model

    cards = {card.id: valid(Model, card) for card in client.models.list()}
    assert set(cards) == {"chat", *(f"chat@{b}bit" for b in (2, 3, 4, 6, 8))}
    assert cards["chat@3bit"].everybit["alias_of"] == "chat"
    for name, alias_of in (("chat", None), ("chat@3bit", "chat"), ("chat@auto", "chat")):
        card = valid(Model, client.models.retrieve(name))
        assert (card.id, card.everybit["alias_of"]) == (name, alias_of)
    fields = {"seed": 3, "extra_body": {"ignore_eos": True}}
    by_name = chat(client, model="chat@3bit", **fields)
    by_field = chat(client, seed=3, extra_body={"ignore_eos": True, "precision": 3})
    assert by_name.choices == by_field.choices
    assert by_name.system_fingerprint == by_field.system_fingerprint
    assert by_field.usage.tokens_by_bits == {"3": 12}
    assert by_field.usage.prompt_tokens_details.cached_tokens >= 0
    chunks = list(chat(client, stream=True, extra_body={"precision": 6, "ignore_eos": True}))
    assert [b for chunk in chunks for b in chunk.bits] == [6] * 12
    assert chat(
        client, model="chat@auto", extra_body={"precision_ceiling": 2, "ignore_eos": True}
    ).usage.tokens_by_bits == {"2": 12}


# ---- OpenAI's client: tools and structured output


@pytest.mark.parametrize("choice", ["required", "named", "parallel", "auto"])
def test_openai_tools_whole_and_streamed(client: Any, choice: str) -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "max_tokens": 400, "seed": 4, "model": "chat@8bit"}
    match choice:
        case "required":
            fields |= {"tool_choice": "required", "parallel_tool_calls": False}
        case "named":
            named = {"type": "function", "function": {"name": "clock"}}
            fields |= {"tool_choice": named, "parallel_tool_calls": False}
        case "parallel":
            fields |= {"tool_choice": "required"}
            some = (
                seed
                for seed in range(16)
                if len(chat(client, **fields | {"seed": seed}).choices[0].message.tool_calls) > 1
            )
            fields["seed"] = next(some)
        case "auto":
            fields |= {"tool_choice": "auto", "max_tokens": 20}
    whole = valid(ChatCompletion, chat(client, **fields)).choices[0]
    chunks = [valid(ChatCompletionChunk, chunk) for chunk in chat(client, **fields, stream=True)]
    deltas = [c.delta for chunk in chunks for c in chunk.choices]
    calls: dict[int, dict[str, str]] = {}
    for part in (part for delta in deltas for part in delta.tool_calls or ()):
        call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
        call["id"] += part.id or ""
        call["name"] += part.function.name or ""
        call["arguments"] += part.function.arguments or ""
    expected = [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in whole.message.tool_calls or ()
    ]
    assert list(calls.values()) == expected
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    if choice in ("required", "named"):
        assert len(expected) == 1
        assert whole.finish_reason == "tool_calls"
    if choice == "named":
        assert expected[0]["name"] == "clock"
    for call in expected[: None if whole.finish_reason == "tool_calls" else -1]:
        assert json.loads(call["arguments"])["city"] in ("Rome", "Oslo")
    if choice == "required":
        called = whole.message.to_dict()
        history = [*USER, called, {"role": "tool", "tool_call_id": expected[0]["id"], "content": "7 degrees"}]
        assert chat(client, messages=history, tools=[WEATHER]).usage.prompt_tokens > 100


def test_openai_streaming_helper_finds_text_models_and_calls(openai: Any, client: Any) -> None:
    fields = {"model": "chat@8bit", "messages": USER, "max_tokens": 600, "seed": 2}
    with client.chat.completions.stream(**fields, response_format=Pick) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Pick)
    assert (
        final.choices[0].message.parsed
        == client.chat.completions.parse(**fields, response_format=Pick).choices[0].message.parsed
    )
    tools = [openai.pydantic_function_tool(Pick)]
    with client.chat.completions.stream(**fields | ONE_CALL, tools=tools) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(call.function.parsed_arguments, Pick)
    (again,) = client.chat.completions.parse(**fields | ONE_CALL, tools=tools).choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments


def test_openai_response_formats(openai: Any, client: Any) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    found = chat(client, response_format=format, max_tokens=400, seed=1).choices[0]
    assert json.loads(found.message.content)["city"] in ("Rome", "Oslo")
    for seed in range(20):  # some objects of random weights do not end within 400 tokens
        found = chat(client, response_format={"type": "json_object"}, max_tokens=400, seed=seed).choices[0]
        assert found.message.content.lstrip().startswith("{")
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.message.content), dict)
            break
    else:
        pytest.fail("no object was complete")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="chat", messages=USER, max_tokens=2, response_format=Pick)
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, response_format={"type": "xml"})
    assert caught.value.param == "response_format"


# ---- OpenAI's client: completions


def test_openai_completions_whole_and_streamed(client: Any) -> None:
    from openai.types import Completion

    fields = {
        "model": "chat@8bit",
        "max_tokens": 8,
        "seed": 3,
        "n": 2,
        "logprobs": 2,
        "extra_body": {"ignore_eos": True},
    }
    asked = {**fields, "prompt": ["abc", "The sky"]}
    whole = valid(Completion, client.completions.create(**asked))
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [value for c in own for value in getattr(c.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)
            assert len(streamed) == 8
    assert used(chunks[-1]) == used(whole)
    stopped = client.completions.create(
        **{**fields, "n": 1, "prompt": "abc", "logit_bias": {LETTERS["a"]: 100}, "stop": "aaa"}
    )
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) != ("", "length")
    assert "a" not in stopped.choices[0].text


def test_openai_echo_lists_every_token_at_its_place(client: Any) -> None:
    """Two prompts, two choices of each: all have the scores of their prompt, and offsets into their own text."""
    asked = {
        "model": "chat@4bit",
        "echo": True,
        "logprobs": 5,
        "max_tokens": 6,
        "n": 2,
        "seed": 1,
        "prompt": ["héllo", "sky"],
    }
    found = client.completions.create(**asked, logit_bias=LIKELY)
    for choice, prompt, before in zip(found.choices, ["héllo"] * 2 + ["sky"] * 2, [7, 7, 4, 4], strict=True):
        lists = choice.logprobs
        assert choice.text.startswith(prompt)
        assert (
            len(lists.tokens)
            == len(lists.token_logprobs)
            == len(lists.top_logprobs)
            == len(lists.text_offset)
            == before + 6
        )
        assert lists.tokens[0] == "<s>"
        assert lists.token_logprobs[0] is None
        assert all(p < 0 for p in lists.token_logprobs[1:])
        for token, at in zip(lists.tokens, lists.text_offset, strict=True):
            if token not in ("<s>", "\ufffd"):
                assert choice.text[at : at + len(token)] == token
        for own, likeliest in zip(lists.token_logprobs[1:], lists.top_logprobs[1:], strict=True):
            assert own <= max(likeliest.values())
    assert found.choices[0].logprobs.token_logprobs[:7] == found.choices[1].logprobs.token_logprobs[:7]


def test_openai_scoring_counts_an_end_of_text_as_a_token(client: Any) -> None:
    """lm-eval and others ask for one token behind a text and drop the last place, whatever was there."""
    asked = {"model": "chat@4bit", "prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    lists = {}
    for token, reason in (("1", "stop"), (LETTERS["a"], "length")):
        choice = client.completions.create(**asked, logit_bias={token: 100}).choices[0]
        lists[token] = choice.logprobs
        assert choice.finish_reason == reason
        assert choice.text == "abc" + ("" if token == "1" else "a")
    assert lists["1"].tokens[-1] == "</s>"
    assert lists["1"].token_logprobs[:-1] == lists[LETTERS["a"]].token_logprobs[:-1]
    assert len(lists["1"].tokens) == 5


# ---- OpenAI's client: responses


def test_openai_responses_have_the_types_of_the_sdk(client: Any) -> None:
    from openai.types.responses import Response, ResponseStreamEvent

    fields = {"model": "chat@8bit", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 6}
    fields |= {"extra_body": {"seed": 3, "ignore_eos": True}}
    whole = valid(Response, client.responses.create(**fields))
    assert whole.status == whole.output[0].status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.tokens_by_bits == {"8": 6}
    events = [valid(ResponseStreamEvent, event) for event in client.responses.create(**fields, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*begin, *["output_text.delta"] * len(deltas), *end]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    assert used(events[-1].response) == used(whole)
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1


def test_openai_responses_call_functions_and_read_their_results(client: Any) -> None:
    from openai.types.responses import Response, ResponseStreamEvent

    fields = {"model": "chat@8bit", "input": "hi", "max_output_tokens": 600, "tools": [FLAT_WEATHER]}
    fields |= {"tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False}
    fields |= {"extra_body": {"seed": 3}}
    whole = valid(Response, client.responses.create(**fields))
    (call,) = [item for item in whole.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    events = [valid(ResponseStreamEvent, event) for event in client.responses.create(**fields, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    assert done.arguments == "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert [item.type for item in events[-1].response.output] == [item.type for item in whole.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7 degrees"}
    more = {"model": "chat", "max_output_tokens": 4, "tools": [FLAT_WEATHER], "tool_choice": "none"}
    after = client.responses.create(**more, input=[{"role": "user", "content": "hi"}, *whole.output, result])
    before = client.responses.create(**more, input=[{"role": "user", "content": "hi"}])
    assert after.usage.input_tokens > before.usage.input_tokens + len("7 degrees") + len(call.arguments)


def test_openai_responses_items_begin_and_end_one_after_the_other(client: Any) -> None:
    """Text and calls in any order: every item is complete before the next, and no two share an index."""
    for seed in range(16):
        fields = {"model": "chat@8bit", "input": "hi", "max_output_tokens": 300, "tools": [FLAT_WEATHER]}
        events = list(client.responses.create(**fields, tool_choice="required", stream=True, extra_body={"seed": seed}))
        opened: list[int] = []
        running = None
        for event in events:
            if event.type == "response.output_item.added":
                assert running is None
                running = event.output_index
                opened.append(running)
            elif event.type == "response.output_item.done":
                assert event.output_index == running
                running = None
            elif hasattr(event, "output_index"):
                assert event.output_index == running
        assert opened == list(range(len(events[-1].response.output)))
        if len(opened) > 1:
            return
    pytest.fail("no answer had two items")


def test_openai_responses_helpers(client: Any) -> None:
    fields = {"model": "chat@8bit", "input": "hi", "max_output_tokens": 600, "extra_body": {"seed": 3}}
    parsed = client.responses.parse(**fields, text_format=Pick).output_parsed
    assert isinstance(parsed, Pick)
    with client.responses.stream(**fields, text_format=Pick) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == parsed
    assert kinds[-1] == "response.completed"
    with client.responses.stream(
        **fields, tools=[FLAT_WEATHER], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert deltas[-1].snapshot == call.arguments


# ---- OpenAI's client: what goes wrong


def test_openai_errors_have_their_classes(openai: Any, client: Any, server: Running) -> None:
    for code, param, ask in (
        (openai.NotFoundError, "model", lambda: chat(client, model="gpt-4")),
        (openai.NotFoundError, "model", lambda: client.models.retrieve("chat@5bit")),
        (openai.BadRequestError, "temperature", lambda: chat(client, temperature=3)),
        (openai.BadRequestError, "top_p", lambda: chat(client, top_p=2)),
        (openai.BadRequestError, "precision", lambda: chat(client, extra_body={"precision": 5})),
        (openai.BadRequestError, "store", lambda: chat(client, store=True)),
        (openai.BadRequestError, "model", lambda: client.embeddings.create(model="chat", input="x")),
        (openai.BadRequestError, "previous_response_id",
         lambda: client.responses.create(model="chat", input="x", previous_response_id="resp_1")),
    ):  # fmt: skip
        with pytest.raises(code) as caught:
            ask()
        assert caught.value.param == param
        assert caught.value.body["message"]
        assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError, match="reads and writes text"):
        chat(client, messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.NotFoundError):
        client.files.list()


def test_openai_keys_and_limits(openai: Any, guarded: Running) -> None:
    def connect(key: str, retries: int) -> Any:
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=retries)

    with pytest.raises(openai.AuthenticationError) as caught:
        chat(connect("a-wrong-key-of-characters", 0))
    assert caught.value.code == "invalid_api_key"
    assert chat(connect(KEY, 0)).usage.completion_tokens
    with httpx.Client(base_url=guarded.url, trust_env=False) as plain:
        for path, operations in plain.get("/openapi.json").json()["paths"].items():
            for method, operation in operations.items():
                status = plain.request(method, path.replace("{id}", "x").replace("{name}", "chat"), json={}).status_code
                assert (
                    (status == 401)
                    == (operation.get("security") == [{"key": []}])
                    == (path not in ("/health", "/ready"))
                )

    stream = chat(connect(SLOW_KEY, 0), max_tokens=EVER, n=16, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    with pytest.raises(openai.RateLimitError) as caught:
        chat(connect(SLOW_KEY, 0))
    assert caught.value.response.headers["retry-after"] == "1"
    end = threading.Timer(0.2, stream.close)
    end.start()
    began = time.monotonic()
    assert chat(connect(SLOW_KEY, 1)).usage.completion_tokens  # the client waits as it was told, and asks again
    assert time.monotonic() - began > 0.9
    end.join()


def test_openai_errors_within_a_stream(openai: Any, guarded: Running) -> None:
    """The server ends a request that takes too long after its first tokens were sent."""
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    hold = {"ignore_eos": True}
    streams = [chat(client, max_tokens=EVER, n=16, stream=True, extra_body=hold)]
    streams.append(
        client.completions.create(model="chat", prompt="a", max_tokens=EVER, n=16, stream=True, extra_body=hold)
    )
    responses = client.responses.create(model="chat", input="a", max_output_tokens=EVER, stream=True, extra_body=hold)
    found: dict[int, Any] = {}

    def read(place: int, stream: Any) -> None:
        try:
            found[place] = list(stream)[-1]
        except openai.APIError as error:
            found[place] = error

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate([*streams, responses])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        assert isinstance(found[place], openai.APIError)
        assert "not done within 2 s" in found[place].message
        assert found[place].code == "timeout"
    assert found[2].type == "response.failed"
    assert "not done within 2 s" in found[2].response.error.message
    wait_until_idle(guarded)


def test_openai_closing_a_stream_frees_the_request(client: Any, server: Running) -> None:
    hold = {"ignore_eos": True}
    asked = {"model": "chat", "stream": True, "extra_body": hold}
    for ask in (
        lambda: chat(client, max_tokens=EVER, n=16, **asked),
        lambda: client.completions.create(prompt="a", max_tokens=EVER, n=16, **asked),
        lambda: client.responses.create(input="a", max_output_tokens=EVER, **asked),
    ):
        stream = ask()
        next(iter(stream))
        assert not idle(server)
        stream.close()
        wait_until_idle(server, 1)


# ---- LangChain


@pytest.fixture
def langchain(server: Running) -> Any:
    """Makes models of LangChain for the server."""
    library = client_library("langchain_openai")

    def make(**fields: Any) -> Any:
        asked = {"model": "chat@8bit", "base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0, **fields}
        return library.ChatOpenAI(**asked)

    return make


def test_langchain_invokes_streams_and_batches(langchain: Any) -> None:
    model = langchain(max_tokens=8, seed=3, stream_usage=True)
    found = model.invoke("hi")
    assert found.usage_metadata["output_tokens"] <= 8
    assert found.response_metadata["token_usage"]["tokens_by_bits"] == {"8": found.usage_metadata["output_tokens"]}
    assert asyncio.run(model.ainvoke("hi")).content == found.content
    chunks = list(model.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == found.content
    assert (
        sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata)
        == found.usage_metadata["output_tokens"]
    )
    texts = ["hi", "there", "everybody"]
    assert [one.content for one in model.batch(texts)] == [model.invoke(text).content for text in texts]
    scored = model.bind(logprobs=True, top_logprobs=2).invoke("hi").response_metadata["logprobs"]["content"]
    assert len(scored) == found.usage_metadata["output_tokens"]
    three = langchain(model="chat", max_tokens=8, extra_body={"precision": 3}).invoke("hi")
    assert list(three.response_metadata["token_usage"]["tokens_by_bits"]) == ["3"]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_binds_tools(langchain: Any, responses: bool) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    seed = {"extra_body": {"seed": 3}} if responses else {"seed": 3}
    model = langchain(max_tokens=600, use_responses_api=responses, **seed)
    bound = model.bind_tools([weather], tool_choice="required", strict=True, parallel_tool_calls=False)
    answer = bound.invoke("hi")
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    chunks = list(bound.stream("hi"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert [one["args"] for one in total.tool_calls] == [call["args"]]
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    last = model.bind(max_tokens=4).invoke([HumanMessage("hi"), answer, result])
    assert last.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"] / 4


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(langchain: Any, method: str) -> None:
    model = langchain(max_tokens=600, seed=3).with_structured_output(Pick, method=method)
    found = model.invoke("hi")
    assert isinstance(found, Pick)
    assert list(model.stream("hi"))[-1] == found


def test_langchain_completes_texts(server: Running) -> None:
    library = client_library("langchain_openai")
    asked = {"model": "chat@8bit", "base_url": f"{server.url}/v1", "api_key": "any", "max_tokens": 8, "seed": 3}
    model = library.OpenAI(**asked)
    assert "".join(model.stream("abc")) == model.invoke("abc")
    assert len(model.generate(["abc", "The sky"]).generations) == 2


# ---- LiteLLM


@pytest.fixture
def litellm(server: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = client_library("litellm")
    monkeypatch.setattr(library, "suppress_debug_info", True)
    return library


def test_litellm_completes_chats_and_texts(litellm: Any, server: Running) -> None:
    there = {
        "api_base": f"{server.url}/v1",
        "api_key": "any",
        "num_retries": 0,
        "max_tokens": 8,
        "seed": 3,
        "ignore_eos": True,
    }
    asked = {"model": "openai/chat@8bit", "messages": USER, **there}
    found = litellm.completion(**asked)
    assert found.usage.tokens_by_bits == {"8": found.usage.completion_tokens}
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == found.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens
    assert list(litellm.completion(**{**asked, "model": "openai/chat"}, precision=3).usage.tokens_by_bits) == ["3"]

    async def ask() -> Any:
        whole = await litellm.acompletion(**asked)
        stream = await litellm.acompletion(**asked, stream=True)
        return whole, [chunk async for chunk in stream]

    whole, streamed = asyncio.run(ask())
    assert whole.choices[0].message.content == text_of(streamed) == found.choices[0].message.content
    for model in ("openai/chat@8bit", "text-completion-openai/chat@8bit"):
        text = litellm.text_completion(model=model, prompt="abc", **there)
        pieces = litellm.text_completion(model=model, prompt="abc", **there, stream=True)
        assert "".join(c.choices[0].text or "" for c in pieces) == text.choices[0].text != ""
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/other"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked, temperature=3)


def test_litellm_calls_tools_and_follows_schemas(litellm: Any, server: Running) -> None:
    there = {"api_base": f"{server.url}/v1", "api_key": "any", "num_retries": 0, "max_tokens": 600}
    asked = {"model": "openai/chat@8bit", "messages": USER, **there}
    (call,) = litellm.completion(**asked, tools=[WEATHER], **ONE_CALL).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    chunks = list(litellm.completion(**asked, tools=[WEATHER], **ONE_CALL, stream=True))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments
    found = litellm.completion(**asked, response_format=Pick, seed=3).choices[0].message.content
    assert Pick.model_validate_json(found)


# ---- lm-eval

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green as grass"),
    ("", "alone"),
    ("héllo", " wörld ✓"),
    ("a" * 300, "b"),
]


@pytest.fixture(scope="module")
def own_scores(chat_overlay: Path) -> Iterator[Any]:
    """everybit's own model for lm-eval, of the same overlay at the same bits."""
    client_library("lm_eval", "aiohttp", "requests", "tenacity")  # what it needs for servers is an extra of its own
    from everybit.engine.runtime import Runtime
    from everybit.integrations.lm_eval import EverybitLM
    from everybit.tokenizer import Tokenizer

    with Runtime.open(chat_overlay, mode="fast") as runtime:
        yield EverybitLM(runtime, Tokenizer.open(chat_overlay), bits=4, progress=False)


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


@pytest.mark.parametrize("how", ["tokens", "texts", "batches", "concurrently", "server's tokenizer"])
def test_lm_eval_scores_as_the_engine_does(server: Running, chat_overlay: Path, own_scores: Any, how: str) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    more: dict[str, Any] = {"tokenizer": str(chat_overlay), "tokenizer_backend": "huggingface", "add_bos_token": True}
    expected = own_scores.loglikelihood(instances("loglikelihood", PAIRS))
    match how:
        case "texts":
            more["tokenized_requests"] = False
        case "batches":
            more["batch_size"] = 4
        case "concurrently":
            more["num_concurrent"] = 4
        case "server's tokenizer":  # lm-eval adds no BOS then
            more = {}
            ids = [[own_scores.tok_encode(text, add_special_tokens=False) for text in pair] for pair in PAIRS]
            pairs = [(None, before or [own_scores.eot_token_id], after) for before, after in ids]  # it takes 0 for none
            expected = own_scores._loglikelihood_tokens(pairs)
    api = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="chat@4bit", **more)
    found = api.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-12)


def test_lm_eval_knows_what_is_greedy(server: Running, chat_overlay: Path, own_scores: Any) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    options = {"until": ["\n\n"], "max_gen_toks": 1, "do_sample": False}
    prompts = [f"Text {letter}" for letter in LETTERS]
    written = own_scores.generate_until(instances("generate_until", [(prompt, dict(options)) for prompt in prompts]))
    prompt, letter = next(pair for pair in zip(prompts, written, strict=True) if pair[1] in LETTERS)
    more = {"tokenizer": str(chat_overlay), "tokenizer_backend": "huggingface", "add_bos_token": True}
    api = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="chat@4bit", **more)
    pairs = instances("loglikelihood", [(prompt, letter), (prompt, "q" if letter != "q" else "z")])
    for scorer in (api, own_scores):
        assert [greedy for _, greedy in scorer.loglikelihood(pairs, disable_tqdm=True)] == [True, False]


def test_lm_eval_rolls_over_and_generates(server: Running, chat_overlay: Path, own_scores: Any) -> None:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    more = {"tokenizer": str(chat_overlay), "tokenizer_backend": "huggingface"}
    api = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="chat@4bit", **more)
    long = instances("loglikelihood_rolling", [("some long text " * 20,)])
    assert api.loglikelihood_rolling(long, disable_tqdm=True) == pytest.approx(
        own_scores.loglikelihood_rolling(long), rel=1e-12
    )

    options = {"until": ["\n", "zz"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(text, dict(options)) for text in ("abc", "The sky", "héllo")])
    expected = own_scores.generate_until(asked)
    for tokenized in (True, False):
        api = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="chat@4bit",
            **more,
            add_bos_token=True,
            tokenized_requests=tokenized,
        )
        assert api.generate_until(asked, disable_tqdm=True) == expected

    talk = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="chat@4bit", eos_string="</s>")
    asked = instances("generate_until", [(talk.apply_chat_template(USER), dict(options))])
    (said,) = talk.generate_until(asked, disable_tqdm=True)
    body = {"model": "chat@4bit", "messages": USER, "max_tokens": 12, "temperature": 0, "stop": ["\n", "zz"]}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == said != ""


# ---- schemathesis

# Values that a description cannot say, which made-up ones seldom have.
SPECIAL = (
    "regex", "grammar", "precision", "precision_floor", "precision_ceiling", "tools", "tool_choice", "response_format",
    "text", "logit_bias", "stop_token_ids", "stream_options", "top_logprobs", "ignore_eos",
)  # fmt: skip


def test_nothing_that_the_description_allows_breaks_the_server(server: Running) -> None:
    """Every path with made-up requests: answers of the statuses, media types and forms that /openapi.json names."""
    library = client_library("schemathesis")
    from schemathesis import checks

    checks.load_all_checks()
    names = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    wanted = [checks.not_a_server_error, *checks.CHECKS.get_by_names(names)]
    schema = library.openapi.from_url(f"{server.url}/openapi.json")

    def ask(operation: Any) -> set[int]:
        statuses = set()

        @settings(max_examples=25, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(), plain=st.booleans())
        def ask_once(case: Any, plain: bool) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                for name in SPECIAL if plain else ():
                    body.pop(name, None)
                short = {"max_completion_tokens": None, "max_tokens": 3, "max_output_tokens": 3}
                body |= {"model": "chat", **{name: value for name, value in short.items() if name in body or value}}
                if isinstance(body.get("n"), int):
                    body["n"] = min(body["n"], 2)
                if plain and "messages" in body:
                    body["messages"] = USER
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=wanted)

        ask_once()
        return statuses

    seen = {found.ok().path: ask(found.ok()) for found in schema.get_all_operations()}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert 200 in seen[path], f"no made-up request to {path} was right: {seen[path]}"
    wait_until_idle(server)
