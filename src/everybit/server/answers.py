"""What answers hold, for /openapi.json alone: the answers themselves are made where they are sent."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from everybit.server.edge import OPEN


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Problem(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ProblemAnswer(Answer):
    """An error, in OpenAI's form."""

    error: Problem


class Usage(Answer):
    """`tokens_by_bits`: how many tokens were computed at each precision."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    tokens_by_bits: dict[str, int]


class CompletionLogprobs(Answer):
    """A place for each token. The first token of a prompt has no log-probability: nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(Answer):
    """`arguments`: JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswerMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ResponsesUsage(Answer):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int
    tokens_by_bits: dict[str, int]


class OutputItem(Answer):
    """A message with `content`, or a function_call with `call_id`, `name` and `arguments`."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponsesAnswer(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage


class AboutModel(Answer):
    """`alias_of`: the model that runs at the precision of this name."""

    bits: list[int]
    plans: list[str]
    context: int
    chat: bool
    alias_of: str | None


class ModelAnswer(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    everybit: AboutModel


class ModelsAnswer(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]


class SwitchAnswer(Answer):
    """`sequences`: how many choices went on at the precision."""

    id: str
    precision: int | str
    sequences: int


class TokensAnswer(Answer):
    tokens: list[int]
    count: int
    max_model_len: int


class TextAnswer(Answer):
    prompt: str


class TokenizerAnswer(Answer):
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


_EVENT = {
    "description": "Each event: `data` is JSON as OpenAI's, or [DONE] at the end",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_PROBLEMS = {
    400: "the request is wrong",
    401: "no valid API key",
    403: "asked for under another name",
    404: "no such model, request or path",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    422: "not used: 400 says what is wrong",
    429: "the queue is full, or the key has enough running",
    500: "the model failed",
    503: "not ready, or shutting down",
    504: "took too long",
}


def described(answer: type[Answer] | None = None, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a path."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ProblemAnswer, "description": f"{why[0].upper()}{why[1:]}"}
        for status, why in _PROBLEMS.items()
    }
    if answer is not None:
        found[200] = {"model": answer, "description": "The answer; with `stream`, as server-sent events"}
        if streams:
            found[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
        else:
            found[200]["description"] = "The answer"
    return found


def describe_keys(app: FastAPI, needed: bool) -> None:
    """Says in the description of `app`, whose paths are all there, which of them take an API key. Mutates: app"""
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        if path not in OPEN:
            for operation in operations.values():
                operation["security"] = [{"key": []}] if needed else [{}, {"key": []}]
