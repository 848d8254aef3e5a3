"""POST /v1/chat/completions: a conversation goes on, in text or in calls of tools."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from everybit.engine.sampling import Choice
from everybit.errors import RequestError
from everybit.server.asking import Asking, compiling, reading, response_format
from everybit.server.fields import ChatMessage, ChatRequest, content_text, stops
from everybit.server.generation import Generation, Piece
from everybit.server.grammar import Grammar
from everybit.server.metrics import Metrics
from everybit.server.served import Served
from everybit.server.stream import DONE, EventStream, collect, frame
from everybit.server.tools import (
    CallArguments,
    CallStart,
    Delta,
    Text,
    Tool,
    ToolFormat,
    ToolParser,
    choose,
    parse_tools,
    plain_arguments,
)


@dataclass
class Tools:
    """What a request says of tools, and how its model writes calls. `grammar` None: no call may come."""

    given: list[dict[str, Any]] = field(default_factory=list)
    format: ToolFormat | None = None
    allowed: Sequence[Tool] = ()
    grammar: Grammar | None = None

    def parser(self, seed: int) -> ToolParser | None:
        return self.format.parser(self.allowed, random.Random(seed)) if self.format and self.grammar else None


def read_tools(served: Served, given: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool) -> Tools:
    """Compiles a grammar, which takes a while. Raises: RequestError"""
    if not given:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice", "asks for a call, and there are no tools")
        return Tools()
    tools = [dict(tool) for tool in given]
    format = served.tool_format
    mode, allowed = choose(choice, parse_tools(tools))
    if mode == "none":
        return Tools(tools, format)
    return Tools(tools, format, allowed, served.grammars.tools(format.grammar(allowed, mode, parallel)))


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As templates want them: contents as text, developers as the system. Raises: RequestError"""
    found = []
    for place, message in enumerate(messages):
        if unknown := list(message.model_extra or ()):
            raise RequestError(f"messages[{place}].{unknown[0][:40]}", "is unknown: this server takes text and calls")
        plain = message.model_dump(exclude_none=True)
        if message.content is None and message.role not in ("assistant",):
            raise RequestError(f"messages[{place}].content", "is missing, expected text")
        plain["content"] = content_text(message.content, f"messages[{place}].content")
        plain["role"] = "system" if message.role == "developer" else message.role
        found.append(plain)
    return plain_arguments(found)


def render(served: Served, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
    """The prompt of a conversation. Raises: RequestError, ContextError"""
    if served.template is None:
        raise RequestError("model", f"{served.name} has no chat template: use /v1/completions")
    text = served.template.render(messages, tools or None)
    served.require_room(len(text))
    return served.tokenizer.encode(text, add_special_tokens=False)


async def chat(asking: Asking, fields: ChatRequest, metrics: Metrics) -> Response:
    """Raises: what problem_of knows"""
    served = asking.served
    messages = read_messages(fields.messages)
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise RequestError("max_tokens", "is max_completion_tokens' old name: give one of them")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise RequestError("top_logprobs", "goes with logprobs only")
    given = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()]
    size = sum(len(message["content"]) for message in messages)
    prompt = await reading(size, render, served, messages, given if fields.tool_choice != "none" else None)
    if given or fields.response_format or fields.constrained:
        tools, grammar = await compiling(_grammars, asking, fields, given)
    else:  # nothing to compile, so no waiting behind those who have
        tools, grammar = _grammars(asking, fields, given)
    ask = asking.ask(
        [prompt],
        n=fields.n or 1,
        max_tokens=fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens,
        stops=stops(fields.stop),
        grammar=grammar,
        shown=tools.format.tags if tools.format and tools.grammar else (),
        top=(fields.top_logprobs or 0) if fields.logprobs else -1,
    )
    generation = Generation(asking.live, ask, Generation.new_id("chatcmpl"), asking.key.name)
    choices = [Message(served, i, tools.parser(ask.sampling.seed + i), bool(fields.logprobs)) for i in range(ask.n)]
    kind = "chat.completion.chunk" if fields.stream else "chat.completion"
    head = {
        "id": generation.id,
        "object": kind,
        "created": asking.created,
        "model": fields.model,
        "system_fingerprint": served.system_fingerprint(ask.bits),
    }

    def note() -> None:
        asking.note(generation, metrics)

    if not fields.stream:

        def document() -> dict[str, Any]:
            return {**head, "choices": [choice.whole() for choice in choices], "usage": generation.usage.document()}

        receive = asking.request.receive
        return await collect(generation, receive, lambda p: choices[p.index].take(p), asking.headers, document, note)

    usage: dict[str, Any] = {"usage": None} if fields.stream_options and fields.stream_options.include_usage else {}

    def frames(pieces: list[Piece]) -> bytes:
        chunks = []
        for piece in pieces:
            for place, choice in enumerate(choices[piece.index].take(piece)):
                bits = piece.bits if place == 0 else []
                chunks.append(frame({**head, "choices": [choice], "bits": bits, **usage}))
        return b"".join(chunks)

    def last() -> bytes:
        return (frame({**head, "choices": [], "usage": generation.usage.document()}) if usage else b"") + DONE

    return EventStream(generation, frames, last, asking.headers, note)


def _grammars(asking: Asking, fields: ChatRequest, given: list[dict[str, Any]]) -> tuple[Tools, Grammar | None]:
    parallel = fields.parallel_tool_calls is not False
    tools = read_tools(asking.served, given, fields.tool_choice, parallel)
    found = response_format(asking.served, fields.response_format, "response_format")
    if found is not None and tools.grammar is not None:
        raise RequestError("response_format", "cannot go with tools that may be called: set tool_choice to none")
    return tools, asking.grammar(found or tools.grammar)


class Message:
    """One choice of the answer as it grows."""

    def __init__(self, served: Served, index: int, parser: ToolParser | None, logprobs: bool) -> None:
        self._served, self._index, self._parser, self._logprobs = served, index, parser, logprobs
        self.text: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self._scores: list[dict[str, Any]] = []
        self._begun = False
        self.finish: str | None = None

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that `piece` makes; its parts are remembered as well."""
        deltas: list[Delta] = [Text(piece.text)] if piece.text else []
        if self._parser is not None:
            deltas = self._parser.feed(piece.text) + (self._parser.finish() if piece.finish else [])
        scores = [_score(self._served, choice) for choice in piece.choices]
        self._scores += scores
        parts: list[dict[str, Any]] = []
        for delta in deltas:
            self._remember(delta)
            if isinstance(delta, Text) and parts and set(parts[-1]) == {"content"}:
                parts[-1]["content"] += delta.text
            else:
                parts.append(_part(delta))
        if not parts:
            parts = [{}]
        if not self._begun:
            self._begun = True
            parts[0] = {"role": "assistant", "content": "", **parts[0]}
        out = []
        for place, part in enumerate(parts):
            logprobs = {"content": scores if place == 0 else [], "refusal": None} if self._logprobs else None
            out.append({"index": self._index, "delta": part, "logprobs": logprobs, "finish_reason": None})
        if piece.finish:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish
            if parts == [{}]:
                out[0]["finish_reason"] = self.finish
            else:
                out.append({"index": self._index, "delta": {}, "logprobs": None, "finish_reason": self.finish})
        return out

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.text), "refusal": None}
        if self.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = self.calls
        logprobs = {"content": self._scores, "refusal": None} if self._logprobs else None
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}

    def _remember(self, delta: Delta) -> None:
        match delta:
            case Text():
                self.text.append(delta.text)
            case CallStart():
                function = {"name": delta.name, "arguments": ""}
                self.calls.append({"id": delta.id, "type": "function", "function": function})
            case CallArguments():
                self.calls[delta.index]["function"]["arguments"] += delta.text


def _part(delta: Delta) -> dict[str, Any]:
    match delta:
        case Text():
            return {"content": delta.text}
        case CallStart():
            function = {"name": delta.name, "arguments": ""}
            return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
        case CallArguments():
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


def _score(served: Served, choice: Choice) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text = served.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    return {**one(choice.token, choice.logprob), "top_logprobs": [one(t, p) for t, p in choice.likeliest]}
