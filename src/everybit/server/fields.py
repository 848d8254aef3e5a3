"""What requests may hold. A field is honoured or refused, never ignored: fields of OpenAI's or vLLM's that are not
honoured are listed with the reason, fields that nobody knows are named in a response header (or refused: --strict).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from everybit.engine.sampling import Sampling
from everybit.errors import RequestError

MOST_CHOICES = 128  # sequences of one request
MOST_STOPS, MOST_STOP_LENGTH = 16, 1024
MOST_BIASES = 1024
MOST_LOGPROBS = 20
_TEXT_ONLY = "this server reads and writes text"
_NO_STORE = "nothing is stored: send the whole conversation"
# Known fields that are not honoured, each with why.
UNSUPPORTED: dict[str, str] = {
    "audio": _TEXT_ONLY,
    "background": _NO_STORE,
    "best_of": "ask for n and choose among them",
    "conversation": _NO_STORE,
    "chat_template": "templates come from the model only",
    "chat_template_kwargs": "templates come from the model only",
    "documents": "put them into the messages",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use regex",
    "include": "there is nothing to include",
    "length_penalty": "beams are not searched",
    "min_tokens": "use logit_bias against the end of text",
    "moderation": "nothing is moderated",
    "prediction": "drafts come from the model itself",
    "previous_response_id": _NO_STORE,
    "priority": "it belongs to the API key, and is set by the operator",
    "prompt": "prompts are not stored: send messages",
    "prompt_cache_key": "beginnings are cached by themselves; cache_salt keeps them apart",
    "prompt_cache_retention": "the cache keeps what there is room for",
    "prompt_logprobs": "use echo and logprobs with /v1/completions",
    "reasoning": "the model's template decides whether it thinks",
    "reasoning_effort": "the model's template decides whether it thinks",
    "suffix": "the model writes what follows a text, not what lies between two",
    "truncation": "texts are not cut: send what fits",
    "use_beam_search": "beams are not searched",
    "verbosity": "say it in the messages",
    "web_search_options": "the server does not search",
}
# Values that ask for what is done anyway.
_HARMLESS: dict[str, Sequence[Any]] = {
    "best_of": (None, 1),
    "background": (None, False),
    "modalities": (None, ["text"]),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "truncation": (None, "disabled"),
    "include": (None, []),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "priority": (None, 0),
    "use_beam_search": (None, False),
}
_REFUSED_VALUES = {
    "modalities": _TEXT_ONLY,
    "service_tier": "there is one tier",
    "store": _NO_STORE,
}


class Fields(BaseModel):
    """A JSON object, checked without guessing: "5" is not a number."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Closed(Fields):
    """All of whose fields are known."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Closed):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


# A list stops at what is wrong first: four megabytes of errors take seconds and gigabytes.
_First = Field(fail_fast=True)
Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Ints = Annotated[list[Int], _First]
Texts = Annotated[list[str], _First]
Objects = Annotated[list[dict[str, Any]], _First]
Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], _First]


class Common(Fields):
    """What every request for text may ask for.

    `precision`: bits, the name of a plan, or "auto" from `precision_floor` to `precision_ceiling`.
    """

    model: str = Field(max_length=256)
    temperature: Temperature | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Int | None = Field(None, ge=0, lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Annotated[dict[str, float], _First] | None = Field(None, max_length=MOST_BIASES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ints | None = Field(None, max_length=MOST_STOPS)
    precision: Int | str | None = None
    precision_floor: Int | None = None
    precision_ceiling: Int | None = None
    cache_salt: str | None = Field(None, max_length=256)
    user: str | None = Field(None, max_length=256)
    regex: str | None = Field(None, max_length=16384)
    grammar: str | None = Field(None, max_length=16384)

    @property
    def constrained(self) -> bool:
        return self.regex is not None or self.grammar is not None

    def unknown(self) -> list[str]:
        """Fields that nobody knows. Raises: RequestError for known ones that are not honoured"""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS and value in _HARMLESS[name]:
                continue
            if why := _REFUSED_VALUES.get(name) or UNSUPPORTED.get(name):
                if value is not None:
                    raise RequestError(name, f"is not supported: {why}")
            else:
                unknown.append(name)
        return unknown

    def sampling(self) -> Sampling:
        """Raises: RequestError"""
        asked = {
            name: value
            for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        if 0 < temperature < 0.01:  # some clients write 0 so; a draw at 0.01 takes the likeliest as well
            temperature = 0.01
        if asked.get("top_k") == -1:  # vLLM's way to say off
            asked["top_k"] = 0
        seed = int.from_bytes(os.urandom(7), "little") if self.seed is None else self.seed
        return Sampling(temperature=temperature, seed=seed, logit_bias=self._biases(), **asked)

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and -100 <= bias <= 100):
                raise RequestError("logit_bias", f"{token[:20]!r}: {bias}: expected token ids, and -100 to 100")
            biases.append((int(token), bias))
        return tuple(biases)


Stop = str | Texts | None
Prompt = str | Texts | Ints | Annotated[list[Ints], _First]


class CompletionRequest(Common):
    """POST /v1/completions"""

    prompt: Prompt
    max_tokens: Int | None = 16
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stop: Stop = None


class Function(Closed):
    name: str = Field(max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: Function


class ChatMessage(Fields):
    """`content`: text, or parts of text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Objects | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], _First] = Field(min_length=1, max_length=4096)
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stop: Stop = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[Tool], _First] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = Field(None, max_length=16)


class ResponsesRequest(Common):
    """POST /v1/responses"""

    input: str | Objects
    instructions: str | None = None
    max_output_tokens: Int | None = None
    text: dict[str, Any] | None = None
    tools: Objects | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    metadata: Metadata | None = Field(None, max_length=16)


class TokenizeRequest(Closed):
    """POST /tokenize: of a text, or of a conversation as the model's template writes it.

    `model` may be left out where there is one.
    """

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], _First] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool = True


class DetokenizeRequest(Closed):
    """POST /detokenize"""

    model: str | None = Field(None, max_length=256)
    tokens: Ints = Field(max_length=1 << 20)


class EmbeddingsRequest(Fields):
    """POST /v1/embeddings"""

    model: str = Field(max_length=256)
    input: Prompt


class SwitchRequest(Closed):
    """POST /v1/requests/{id}/precision. `recompute`: what the request has read and written so far, too."""

    precision: Int | str
    recompute: bool = False


def stops(stop: Stop) -> list[str]:
    """Raises: RequestError"""
    found = [stop] if isinstance(stop, str) else list(stop or [])
    if len(found) > MOST_STOPS or not all(0 < len(one) <= MOST_STOP_LENGTH for one in found):
        raise RequestError("stop", f"expected up to {MOST_STOPS} texts of 1 to {MOST_STOP_LENGTH} characters")
    return found


def content_text(content: str | Sequence[Mapping[str, Any]] | None, where: str) -> str:
    """The text of a message's content. Raises: RequestError for images, sound and files"""
    if content is None or isinstance(content, str):
        return content or ""
    pieces = []
    for part in content:
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RequestError(where, f"has a part of type {json.dumps(part.get('type'))[:40]}: {_TEXT_ONLY}")
        pieces.append(part["text"])
    return "".join(pieces)
