"""Requests for text, as the three APIs put them. What changes nothing in a mock is taken, without effect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everybit.bench.mock.logprobs import split_words
from everybit.bench.mock.refusals import Refusal
from everybit.bench.mock.script import HIGHEST_BITS, LOWEST_BITS, Script

DEFAULT_TOKENS = 16
CHARACTERS_PER_TOKEN = 4  # of prompts in text
_LIMITS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
}
PATHS = tuple(_LIMITS)
_ALIAS = re.compile(rf"(.+)@([{LOWEST_BITS}-{HIGHEST_BITS}])bit")


@dataclass(frozen=True, slots=True)
class Ask:
    """`prompt`: its text, of ids their numbers. `tokens`: of the answer. `limit`: how many the request allows.

    `prompt_tokens`: one for every 4 characters begun, or as many as there are ids. `top`: likeliest tokens to name
    with each, None for no log-probabilities.
    """

    model: str
    bits: int
    prompt: str
    prompt_tokens: int
    tokens: int
    limit: int
    stream: bool
    usage: bool
    echo: bool
    top: int | None

    @property
    def words(self) -> list[str]:
        """Of the prompt, one a logprob."""
        return split_words(self.prompt)


def read_body(body: bytes) -> dict[str, Any]:
    """Raises: Refusal"""
    try:
        document = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "the body is not a JSON object")
    return document


def read_ask(script: Script, path: str, body: Mapping[str, Any]) -> Ask:
    """Raises: Refusal"""
    model, bits = _model(script, body.get("model", script.models[0]))
    prompt, prompt_tokens = _prompt(path, body)
    echo, top = _scores(path, body)
    if body.get("n", 1) not in (None, 1):
        raise Refusal(400, "n: expected 1", "invalid_value")
    given = next((body[name] for name in _LIMITS[path] if body.get(name) is not None), None)
    limit = DEFAULT_TOKENS if given is None else _count(_LIMITS[path][0], given)
    if script.context is not None and prompt_tokens + limit > script.context:
        message = f"{prompt_tokens} + {limit} tokens, the context holds {script.context}"
        raise Refusal(400, message, "context_length_exceeded")
    usage = (body.get("stream_options") or {}).get("include_usage") is True or path == "/v1/responses"
    # Who scores a text sends its own limit, 0 or 1, and no script makes that longer.
    tokens = limit if echo or script.tokens is None else script.tokens
    stream = body.get("stream") is True and script.stream
    return Ask(model, bits, prompt, prompt_tokens, tokens, limit, stream, usage, echo, top)


def _model(script: Script, name: Any) -> tuple[str, int]:
    """Name as it was asked, and the precision that answers."""
    if not isinstance(name, str):
        raise Refusal(400, "model: expected a name")
    found = None if name in script.models else _ALIAS.fullmatch(name)
    if (found[1] if found else name) not in script.models:
        raise Refusal(404, f"no model {name[:80]!r} here", "model_not_found")
    return name, script.always_bits or (int(found[2]) if found else HIGHEST_BITS)


def _prompt(path: str, body: Mapping[str, Any]) -> tuple[str, int]:
    """Text and tokens."""
    if path == "/v1/chat/completions":
        text = _texts(body.get("messages"))
    elif path == "/v1/responses":
        text = str(body.get("instructions") or "") + _texts(body.get("input"))
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
            return "".join(f" {one}" for one in prompt), len(prompt)
        if not isinstance(prompt, str):
            raise Refusal(400, "prompt: expected one text or one list of token ids")
        text = prompt
    return text, -(-len(text) // CHARACTERS_PER_TOKEN)


def _texts(value: Any) -> str:
    """All text of messages and their parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Refusal(400, "messages or input: expected a list of messages")
    contents = [one.get("content", one.get("text")) if isinstance(one, dict) else "" for one in value]
    return "".join(_texts(content) for content in contents if content is not None)


def _scores(path: str, body: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Whether the prompt is to be repeated, and `top`."""
    asked = body.get("logprobs")
    if path == "/v1/responses" or asked is None or asked is False:
        top = None
    elif path == "/v1/chat/completions":
        top = _count("top_logprobs", body.get("top_logprobs") or 0)
    else:
        top = _count("logprobs", 1 if asked is True else asked)
    echo = path == "/v1/completions" and body.get("echo") is True
    if echo and body.get("stream"):
        raise Refusal(400, "echo: this mock has it without stream only")
    return echo, top


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Refusal(400, f"{name} {str(value)[:40]!r}: expected a whole number from 0 on", "invalid_value")
    return value
