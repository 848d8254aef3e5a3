"""Answers in the forms of the three APIs: their documents, and their server-sent events as bytes."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from typing import Any

from everybit.bench.mock.asks import Ask
from everybit.bench.mock.logprobs import likeliest
from everybit.bench.mock.refusals import Refusal
from everybit.bench.mock.script import Script

TOKEN = " tok"
SPLIT_TOKEN = " tök"  # has a character of two bytes to be cut in
FAILURE = Refusal(500, "the script wants an error here", "scripted_error")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Form(ABC):
    """One answer. Events are asked for in the order they are sent in."""

    def __init__(self, script: Script, ask: Ask, id: str) -> None:
        self.script, self.ask, self.id, self.created = script, ask, id, int(time.time())
        self.token = SPLIT_TOKEN if script.split_frames else TOKEN
        self.finish = "length" if ask.tokens >= ask.limit else "stop"
        self._end = "\r\n" if script.crlf else "\n"

    @abstractmethod
    def opening(self) -> bytes:
        """Events that come before tokens."""

    @abstractmethod
    def delta(self, first: int, count: int) -> bytes:
        """The event of tokens `first` to `first + count`."""

    @abstractmethod
    def failure(self) -> bytes:
        """Events of an error in the middle."""

    @abstractmethod
    def closing(self) -> bytes:
        """Events that come after tokens."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""

    def comment(self) -> bytes:
        return f": ping{self._end * 2}".encode()

    def garbage(self) -> bytes:
        """Two events that cannot be read: JSON that breaks off, and bytes that are no UTF-8."""
        end = (self._end * 2).encode()
        return b'data: {"choices": [{"text": ' + end + b"data: \xff\xfe" + end

    def event(self, data: str, name: str = "") -> bytes:
        begin = f"event: {name}{self._end}" if name else ""
        return f"{begin}data: {data}{self._end}{self._end}".encode()

    def told_bits(self, first: int, count: int) -> dict[str, Any]:
        return {"bits": self.script.bits_at(first, count)} if self.script.bits else {}

    def usage(self, given: str, made: str) -> dict[str, Any]:
        """Under the names that the API has for tokens of the prompt and of the answer."""
        if self.script.usage == "none":
            return {}
        tokens = self.ask.tokens * (2 if self.script.usage == "wrong" else 1)
        total = self.ask.prompt_tokens + tokens
        return {"usage": {given: self.ask.prompt_tokens, made: tokens, "total_tokens": total}}

    def scores(self, first: int, count: int) -> list[dict[str, float]]:
        """Of tokens of the answer."""
        ask, name = self.ask, self.script.identity
        places = range(first, first + count)
        return [likeliest(name, ask.bits, f"{ask.prompt}\n{k}", self.token, ask.top or 0) for k in places]


class Choices(Form):
    """What completions and chats have in common. An event without log-probabilities is encoded once."""

    kind = chunk_kind = "text_completion"

    def __init__(self, script: Script, ask: Ask, id: str) -> None:
        super().__init__(script, ask, id)
        self._known: dict[tuple[int, ...], bytes] = {}

    @abstractmethod
    def part(self, first: int, count: int) -> dict[str, Any]:
        """What of a choice tokens are."""

    def opening(self) -> bytes:
        return b""

    def delta(self, first: int, count: int) -> bytes:
        key = (count, *self.script.bits_at(first, count))
        found = self._known.get(key)
        if found is None:
            found = self._chunk([self.choice(self.part(first, count))], **self.told_bits(first, count))
            if self.ask.top is None:
                self._known[key] = found
        return found

    def failure(self) -> bytes:
        return self.event(_encode(FAILURE.document())) + self._done()

    def closing(self) -> bytes:
        out = self._chunk([self.choice(self.part(0, 0), self.finish)])
        usage = self.usage("prompt_tokens", "completion_tokens") if self.ask.usage else {}
        return out + (self._chunk([], **usage) if usage else b"") + self._done()

    def whole(self) -> dict[str, Any]:
        choice = self.choice(self.whole_part(), self.finish)
        bits = self.told_bits(0, self.ask.tokens)
        return {
            **self._head(self.kind),
            "choices": [choice],
            **self.usage("prompt_tokens", "completion_tokens"),
            **bits,
        }

    @abstractmethod
    def whole_part(self) -> dict[str, Any]:
        """What of a choice the whole answer is."""

    def choice(self, part: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "logprobs": None, **part, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return self.event(_encode({**self._head(self.chunk_kind), "choices": choices, **more}))

    def _done(self) -> bytes:
        return self.event("[DONE]") if self.script.done else b""


class Completion(Choices):
    """/v1/completions"""

    def part(self, first: int, count: int) -> dict[str, Any]:
        listed = self._listed([], first, count) if self.ask.top is not None else None
        return {"text": self.token * count, "logprobs": listed}

    def whole_part(self) -> dict[str, Any]:
        words = self.ask.words if self.ask.echo else []
        listed = self._listed(words, 0, self.ask.tokens) if self.ask.top is not None else None
        return {"text": "".join(words) + self.token * self.ask.tokens, "logprobs": listed}

    def _listed(self, words: list[str], first: int, count: int) -> dict[str, list[Any]]:
        """Of the prompt's words, of which nothing precedes the first, and of tokens of the answer."""
        ask, tokens = self.ask, [*words, *[self.token] * count]
        tops: list[dict[str, float] | None] = [
            likeliest(self.script.identity, ask.bits, str(place), word, ask.top or 0) if place else None
            for place, word in enumerate(words)
        ]
        tops += self.scores(first, count)
        offsets = [0 if words else len(self.token) * first]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": [top[token] if top else None for token, top in zip(tokens, tops, strict=True)],
            "top_logprobs": tops,
            "text_offset": offsets[: len(tokens)],
        }


class Chat(Choices):
    """/v1/chat/completions"""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        return self._chunk([self.choice({"delta": {"role": "assistant", "content": ""}})])

    def part(self, first: int, count: int) -> dict[str, Any]:
        return {"delta": {"content": self.token * count} if count else {}, **self._listed(first, count)}

    def whole_part(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.token * self.ask.tokens}
        return {"message": message, **self._listed(0, self.ask.tokens)}

    def _listed(self, first: int, count: int) -> dict[str, Any]:
        if self.ask.top is None:
            return {}

        def one(token: str, logprob: float) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

        content = [
            {
                **one(self.token, top[self.token]),
                "top_logprobs": [one(*pair) for pair in list(top.items())[: self.ask.top]],
            }
            for top in self.scores(first, count)
        ]
        return {"logprobs": {"content": content, "refusal": None}}


class Response(Form):
    """/v1/responses. Its events are numbered, so each is encoded when it is sent."""

    def __init__(self, script: Script, ask: Ask, id: str) -> None:
        super().__init__(script, ask, id)
        self._number = 0
        self._item = f"msg_{id}"
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}

    def opening(self) -> bytes:
        begun = self._document("in_progress", [])
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
            + self._event("response.content_part.added", **self._place, part=_part(""))
        )

    def delta(self, first: int, count: int) -> bytes:
        text, bits = self.token * count, self.told_bits(first, count)
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[], **bits)

    def failure(self) -> bytes:
        error = {"code": FAILURE.code, "message": FAILURE.message}
        return self._event("response.failed", response={**self._document("failed", []), "error": error})

    def closing(self) -> bytes:
        text, item = self.token * self.ask.tokens, self._message(self._status)
        out = self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        out += self._event("response.content_part.done", **self._place, part=_part(text))
        out += self._event("response.output_item.done", output_index=0, item=item)
        return out + (self._event(f"response.{self._status}", response=self.whole()) if self.script.done else b"")

    def whole(self) -> dict[str, Any]:
        usage = self.usage("input_tokens", "output_tokens")
        more = {**usage, **self.told_bits(0, self.ask.tokens)}
        if self._status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        return {**self._document(self._status, [self._message(self._status)]), **more}

    @property
    def _status(self) -> str:
        return "incomplete" if self.finish == "length" else "completed"

    def _message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(self.token * self.ask.tokens)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    def _document(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None}
        return {**head, "model": self.ask.model, "output": output, "usage": None}

    def _event(self, kind: str, /, **data: Any) -> bytes:
        self._number += 1
        return self.event(_encode({"type": kind, "sequence_number": self._number - 1, **data}), kind)


FORMS: dict[str, type[Form]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/v1/responses": Response,
}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
