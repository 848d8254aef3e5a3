"""What an answer said and when, read from its timed pieces after it has ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from everybit.bench.http import Exchange
from everybit.bench.records import Record
from everybit.bench.sse import events
from everybit.bench.tokens import attribute

Tokenize = Callable[[str], list[int]]  # a text -> where each of its tokens ends, in characters
_KINDS = {401: "key", 403: "key", 404: "missing", 429: "busy", 503: "unavailable"}


@dataclass
class Pieces:
    """The pieces that carried text or tokens: time, text, tokens where the server says how many, bits of each."""

    times_ns: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    counts: list[int | None] = field(default_factory=list)
    bits: list[int | str] = field(default_factory=list)
    finish: str = ""
    usage: dict[str, Any] | None = None
    error: str | None = None
    malformed: int = 0
    ended: bool = False  # the server said that this is all

    def add(self, now: int, text: str, count: int | None, bits: list[int | str]) -> None:
        if not isinstance(text, str):
            raise TypeError
        if text or count:
            self.times_ns.append(now)
            self.texts.append(text)
            self.counts.append(count)
            self.bits += bits


def read_answer(record: Record, exchange: Exchange, api: str, tokenize: Tokenize | None, begin_ns: int) -> None:
    """Fills `record` from `exchange`; `begin_ns` is the run's start on the exchange's clock."""
    record.sent_ns = exchange.begin_ns - begin_ns
    record.connected_ns = exchange.connected_ns - begin_ns if exchange.connected_ns else None
    record.head_ns = exchange.head_ns - begin_ns if exchange.head_ns else None
    record.end_ns = exchange.end_ns - begin_ns
    record.status, record.error, record.detail = exchange.status, exchange.error, clean(exchange.detail)
    if exchange.status and exchange.status != 200:
        record.error = record.error or _KINDS.get(exchange.status) or _family(exchange.status)
        _refusal(record, exchange)
        return
    if not exchange.status:
        return
    found = Pieces()
    record.streamed = exchange.headers.get("content-type", "").lower().startswith("text/event-stream")
    if record.streamed:
        _stream(found, exchange, api)
    else:
        _whole(found, exchange, api)
    record.bits, record.text, record.finish = found.bits, "".join(found.texts), found.finish
    record.malformed = found.malformed
    _usage(record, found.usage)
    tokens, record.source, record.counted = attribute(
        found.texts, found.counts, record.usage_output, tokenize, record.finish
    )
    carried = [(now - begin_ns, count) for now, count in zip(found.times_ns, tokens, strict=True) if count]
    record.times_ns, record.tokens = [now for now, _ in carried], [count for _, count in carried]
    if record.error in ("cut", "timeout", "endless") and found.ended and exchange.pieces:
        record.error = record.detail = ""  # it had said everything, and then did not let go of the connection
        record.end_ns = exchange.pieces[-1][0] - begin_ns
    if found.error is not None:
        record.error, record.detail = "frame", clean(found.error)
    elif not record.error and not record.times_ns:
        record.error = "malformed" if found.malformed else "empty"
    elif not record.error and record.streamed and not found.ended:
        record.error = "malformed" if found.malformed else "cut"
        record.detail = "the stream ended without [DONE] or a finish_reason"


def clean(text: str) -> str:
    """On one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text[:1000].split()))[:300]


def _family(status: int) -> str:
    if status < 300:
        return "empty"  # 204 and its like have no answer
    return "redirect" if status < 400 else "refused" if status < 500 else "server"


def _refusal(record: Record, exchange: Exchange) -> None:
    try:
        document = json.loads(exchange.body)
        problem = document.get("error", document)
        said = str(problem.get("message", problem)) if isinstance(problem, dict) else str(problem)
        code = str(problem.get("code", "")) if isinstance(problem, dict) else ""
    except (ValueError, AttributeError, RecursionError):
        said, code = exchange.body[:200].decode("utf-8", "replace"), ""
    if record.error == "refused" and ("context" in code or "context" in said.lower()):
        record.error = "context"
    if record.error == "redirect":
        said = f"to {exchange.headers.get('location', 'nowhere')}"
    record.detail = clean(f"{exchange.status}: {said}")
    try:
        record.retry_after_s = float(exchange.headers["retry-after"])
    except (KeyError, ValueError):
        record.retry_after_s = None


def _usage(record: Record, usage: dict[str, Any] | None) -> None:
    if usage is None:
        return
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    record.usage_prompt = _whole_number(usage.get("prompt_tokens", usage.get("input_tokens")))
    record.usage_output = _whole_number(usage.get("completion_tokens", usage.get("output_tokens")))
    record.usage_cached = _whole_number(details.get("cached_tokens")) if isinstance(details, dict) else None


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


def _stream(found: Pieces, exchange: Exchange, api: str) -> None:
    take = _take_response if api == "responses" else _take_choice
    for now, name, data in events(exchange.pieces):
        if data == b"[DONE]":
            found.ended = True
            continue
        try:
            document = json.loads(data)
            if not isinstance(document, dict):
                raise TypeError
            if (problem := document.get("error")) or name == "error" or document.get("type") == "error":
                said = problem if problem is not None else document
                found.error = str(said.get("message", said)) if isinstance(said, dict) else str(said)
                return
            take(found, now, document)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
            found.malformed += 1


def _usage_of(document: dict[str, Any]) -> dict[str, Any] | None:
    usage = document.get("usage")
    return usage if isinstance(usage, dict) else None


def _bits(document: dict[str, Any]) -> list[int | str]:
    given = document.get("bits")
    if not isinstance(given, list):
        return []
    return [b if isinstance(b, int) else clean(b)[:40] for b in given if isinstance(b, int | str)]


def _take_choice(found: Pieces, now: int, document: dict[str, Any]) -> None:
    """A chunk of completions or of chat."""
    found.usage = _usage_of(document) or found.usage
    for choice in document.get("choices") or []:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            text = (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "")
            for call in delta.get("tool_calls") or []:
                made = call.get("function") or {}
                text += (made.get("name") or "") + (made.get("arguments") or "")
        else:
            text = choice.get("text") or ""
        bits = _bits(document)
        found.add(now, text, len(bits) or _logprobs(choice), bits)
        if choice.get("finish_reason"):
            found.finish, found.ended = str(choice["finish_reason"]), True


def _logprobs(choice: dict[str, Any]) -> int | None:
    """Tokens of a piece, where their log-probabilities were asked for."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        listed = logprobs.get("tokens") or logprobs.get("content")
        return len(listed) if isinstance(listed, list) else None
    return None


def _take_response(found: Pieces, now: int, document: dict[str, Any]) -> None:
    """An event of a response."""
    kind = document.get("type", "")
    if kind.endswith(".delta"):
        bits = _bits(document)
        found.add(now, str(document.get("delta") or ""), len(bits) or None, bits)
    elif kind in ("response.completed", "response.incomplete", "response.failed"):
        response = document["response"]
        found.ended, found.finish = True, "stop" if kind == "response.completed" else "length"
        found.usage = _usage_of(response)
        if kind == "response.failed":
            problem = response.get("error") or {}
            found.error = str(problem.get("message", problem))


def _whole(found: Pieces, exchange: Exchange, api: str) -> None:
    """An answer in one piece, as servers give that do not stream."""
    now = exchange.pieces[-1][0] if exchange.pieces else exchange.end_ns
    try:
        document = json.loads(exchange.body)
        if document.get("error"):
            found.error = str(document["error"])
            return
        found.usage = _usage_of(document)
        if api == "responses":
            texts = [part.get("text") or "" for item in document["output"] for part in item.get("content") or []]
            finish = "stop" if document.get("status") == "completed" else "length"
        else:
            choice = document["choices"][0]
            message = choice.get("message") or {}
            texts, finish = [choice.get("text") or message.get("content") or ""], choice.get("finish_reason") or ""
        found.add(now, "".join(texts), None, [])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        found.malformed = 1
        return
    found.finish, found.ended = str(finish), True
