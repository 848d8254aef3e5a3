"""POST /v1/responses: the same conversations in OpenAI's newer form; nothing is stored, so every request is whole."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from everybit.errors import RequestError
from everybit.server.asking import Asking, compiling, reading, response_format
from everybit.server.chat import Message, Tools, read_messages, read_tools, render
from everybit.server.fields import ChatMessage, ResponsesRequest
from everybit.server.generation import Generation, Piece
from everybit.server.grammar import Grammar
from everybit.server.metrics import Metrics
from everybit.server.problems import Problem
from everybit.server.stream import EventStream, collect, frame


async def respond(asking: Asking, fields: ResponsesRequest, metrics: Metrics) -> Response:
    """Raises: what problem_of knows"""
    served = asking.served
    messages = read_messages(_messages(fields))
    if fields.tools or fields.text or fields.constrained:
        tools, grammar, given = await compiling(_grammars, asking, fields)
    else:
        tools, grammar, given = _grammars(asking, fields)
    size = sum(len(message["content"]) for message in messages)
    prompt = await reading(size, render, served, messages, given if fields.tool_choice != "none" else None)
    ask = asking.ask(
        [prompt],
        max_tokens=fields.max_output_tokens,
        grammar=grammar,
        shown=tools.format.tags if tools.format and tools.grammar else (),
    )
    id = Generation.new_id("resp").replace("-", "_")
    generation = Generation(asking.live, ask, id, asking.key.name)
    answer = _Answer(generation, fields, Message(served, 0, tools.parser(ask.sampling.seed), False), asking.created)

    def note() -> None:
        asking.note(generation, metrics)

    if not fields.stream:
        receive = asking.request.receive
        return await collect(generation, receive, answer.take, asking.headers, answer.document, note)
    return EventStream(generation, answer.frames, answer.last, asking.headers, note, answer.failed)


def _grammars(asking: Asking, fields: ResponsesRequest) -> tuple[Tools, Grammar | None, list[dict[str, Any]]]:
    given = [_tool(tool, place) for place, tool in enumerate(fields.tools or ())]
    choice: Any = fields.tool_choice
    if isinstance(choice, Mapping) and "function" not in choice:
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    tools = read_tools(asking.served, given, choice, fields.parallel_tool_calls is not False)
    text = dict(fields.text or {})
    format = text.pop("format", None)
    if text.pop("verbosity", None) is not None or text:
        raise RequestError("text", "has more than format, which is all that is supported")
    if not isinstance(format, Mapping | None):
        raise RequestError("text.format", "is not an object")
    found = response_format(asking.served, format, "text.format")
    if found is not None and tools.grammar is not None:
        raise RequestError("text.format", "cannot go with tools that may be called: set tool_choice to none")
    return tools, asking.grammar(found or tools.grammar), given


def _tool(tool: Mapping[str, Any], place: int) -> dict[str, Any]:
    """In the form of /v1/chat/completions."""
    if tool.get("type") != "function":
        raise RequestError(f"tools[{place}]", 'is not of "type": "function", the only one there is')
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _messages(fields: ResponsesRequest) -> list[ChatMessage]:
    """Raises: RequestError"""
    found: list[dict[str, Any]] = []
    if fields.instructions:
        found.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        found.append({"role": "user", "content": fields.input})
        return [ChatMessage.model_validate(message) for message in found]
    for place, item in enumerate(fields.input):
        match item.get("type", "message"):
            case "message":
                found.append({"role": item.get("role"), "content": item.get("content")})
            case "function_call":
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                entry = {"id": item.get("call_id"), "type": "function", "function": call}
                if found and found[-1].get("tool_calls"):
                    found[-1]["tool_calls"].append(entry)
                else:
                    found.append({"role": "assistant", "tool_calls": [entry]})
            case "function_call_output":
                found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            case other:
                raise RequestError(f"input[{place}]", f"has the type {str(other)[:40]!r}: expected messages and calls")
    try:
        return [ChatMessage.model_validate(message) for message in found]
    except ValidationError as error:
        raise RequestError("input", f"holds no message: {error.errors()[0]['msg']}") from None


class _Answer:
    """The response as it grows: items, each a text or a call. An item is complete when the next begins."""

    def __init__(self, generation: Generation, fields: ResponsesRequest, message: Message, created: int) -> None:
        self._generation, self._fields, self._message, self._created = generation, fields, message, created
        self._number = 0  # of the next event
        self._begun = False
        self._items: list[_Item] = []

    def take(self, piece: Piece) -> bytes:
        """The events of what is new, which is remembered as well."""
        return b"".join(self._delta(choice["delta"], piece.bits) for choice in self._message.take(piece))

    def document(self, status: str | None = None, problem: Problem | None = None) -> dict[str, Any]:
        fields, cut = self._fields, self._message.finish == "length"
        if status is None:
            status = "incomplete" if cut else "completed"
            self._close()
        usage = self._generation.usage
        done = status in ("completed", "incomplete")
        return {
            "id": self._generation.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": {"code": "server_error", "message": problem.message} if problem else None,
            "incomplete_details": {"reason": "max_output_tokens"} if done and cut else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "model": fields.model,
            "output": [item.document() for item in self._items] if done else [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if fields.temperature is None else fields.temperature,
            "top_p": 1.0 if fields.top_p is None else fields.top_p,
            "text": fields.text or {"format": {"type": "text"}},
            "tool_choice": fields.tool_choice or "auto",
            "tools": fields.tools or [],
            "truncation": "disabled",
            "metadata": fields.metadata or {},
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "tokens_by_bits": usage.tokens_by_bits,
            }
            if done
            else None,
        }

    # ---- events

    def frames(self, pieces: list[Piece]) -> bytes:
        out = b""
        if not self._begun:
            self._begun = True
            out += self._event("response.created", response=self.document("in_progress"))
            out += self._event("response.in_progress", response=self.document("in_progress"))
        return out + b"".join(self.take(piece) for piece in pieces)

    def last(self) -> bytes:
        out = self._close()
        whole = self.document()
        return out + self._event(f"response.{whole['status']}", response=whole)

    def failed(self, problem: Problem) -> bytes:
        return self._event("response.failed", response=self.document("failed", problem))

    def _delta(self, delta: Mapping[str, Any], bits: Sequence[int | str]) -> bytes:
        out = b""
        if delta.get("content"):
            if not self._items or self._items[-1].call is not None:
                out += self._open(None)
            out += self._more(delta["content"], logprobs=[], bits=bits)
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                out += self._open(call)
            if call["function"]["arguments"]:
                out += self._more(call["function"]["arguments"])
        return out

    def _open(self, call: Mapping[str, Any] | None) -> bytes:
        out = self._end() if self._items else b""
        item = _Item(call)
        self._items.append(item)
        out += self._event("response.output_item.added", output_index=len(self._items) - 1, item=item.document())
        if call is None:
            out += self._event("response.content_part.added", **self._place(), part=_text_part(""))
        return out

    def _more(self, text: str, **more: Any) -> bytes:
        item = self._items[-1]
        item.pieces.append(text)
        kind = "output_text" if item.call is None else "function_call_arguments"
        return self._event(f"response.{kind}.delta", **self._place(), delta=text, **more)

    def _end(self, status: str = "completed") -> bytes:
        """Of the last item."""
        item = self._items[-1]
        item.status, text = status, "".join(item.pieces)
        if item.call is None:
            out = self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            out += self._event("response.content_part.done", **self._place(), part=_text_part(text))
        else:
            name = item.call["function"]["name"]
            out = self._event("response.function_call_arguments.done", **self._place(), name=name, arguments=text)
        return out + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item.document())

    def _close(self) -> bytes:
        """All that was written is there; an answer without anything is an empty text."""
        out = b"" if self._items else self._open(None)
        if self._items[-1].status == "in_progress":
            out += self._end("incomplete" if self._message.finish == "length" else "completed")
        return out

    def _place(self) -> dict[str, Any]:
        item, index = self._items[-1], len(self._items) - 1
        return {"item_id": item.id, "output_index": index, **({"content_index": 0} if item.call is None else {})}

    def _event(self, kind: str, /, **data: Any) -> bytes:
        self._number += 1
        return frame({"type": kind, "sequence_number": self._number - 1, **data}, event=kind)


class _Item:
    """A text (`call` None), or a call as its first delta has it."""

    def __init__(self, call: Mapping[str, Any] | None) -> None:
        self.call, self.status = call, "in_progress"
        self.id = f"{'msg' if call is None else 'fc'}_{uuid.uuid4().hex}"
        self.pieces: list[str] = []

    def document(self) -> dict[str, Any]:
        done = self.status != "in_progress"
        if self.call is None:
            content = [_text_part("".join(self.pieces))] if done else []
            return {"id": self.id, "type": "message", "status": self.status, "role": "assistant", "content": content}
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self.call["id"],
            "name": self.call["function"]["name"],
            "arguments": "".join(self.pieces) if done else "",
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
