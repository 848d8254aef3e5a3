"""POST /v1/completions: a text goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from everybit.engine.sampling import Choice
from everybit.errors import RequestError
from everybit.server.asking import Asking, compiling, reading
from everybit.server.fields import MOST_CHOICES, CompletionRequest, Prompt, stops
from everybit.server.generation import Generation, Piece
from everybit.server.metrics import Metrics
from everybit.server.served import Served
from everybit.server.stream import DONE, EventStream, collect, frame


async def complete(asking: Asking, fields: CompletionRequest, metrics: Metrics) -> Response:
    """Raises: what problem_of knows"""
    served, n = asking.served, fields.n or 1
    size = sum(1 if isinstance(one, int) else len(one) for one in fields.prompt)
    prompts, texts = await reading(size, read_prompts, served, fields.prompt)
    scores = bool(fields.echo) and fields.logprobs is not None
    # With echo, max_tokens 0 asks for the prompt alone: one token is drawn, and dropped.
    alone = bool(fields.echo) and fields.max_tokens == 0
    ask = asking.ask(
        prompts,
        n=n,
        max_tokens=1 if alone else fields.max_tokens,
        stops=stops(fields.stop),
        grammar=await compiling(asking.grammar, None) if fields.constrained else None,
        top=-1 if fields.logprobs is None else fields.logprobs,
        scores=scores,
    )
    ends: Collection[int] = ()
    if scores and fields.max_tokens == 1 and ask.grammar is None:
        # Who scores a text asks for one token after it, and drops the last place of the lists: it has to be there,
        # also where it is the end of the text.
        ask, ends = replace(ask, stop_ids=()), ask.stop_ids
    generation = Generation(asking.live, ask, Generation.new_id("cmpl"), asking.key.name)
    scored: list[list[Choice]] = [[] for _ in prompts]
    choices = []
    for i in range(len(prompts) * n):
        echo = texts[i // n] if fields.echo else None
        choices.append(_Choice(served, i, prompts[i // n], echo, fields.logprobs, alone, scored[i // n], ends))
    head = {
        "id": generation.id,
        "object": "text_completion",
        "created": asking.created,
        "model": fields.model,
        "system_fingerprint": served.system_fingerprint(ask.bits),
    }

    def usage_document() -> dict[str, Any]:
        if alone:
            generation.usage.completion_tokens, generation.usage.tokens_by_bits = 0, {}
        return generation.usage.document()

    def note() -> None:
        usage_document()
        asking.note(generation, metrics)

    if not fields.stream:

        def document() -> dict[str, Any]:
            return {**head, "choices": [choice.whole() for choice in choices], "usage": usage_document()}

        receive = asking.request.receive
        return await collect(generation, receive, lambda p: choices[p.index].take(p), asking.headers, document, note)

    usage = bool(fields.stream_options and fields.stream_options.include_usage)

    def frames(pieces: list[Piece]) -> bytes:
        found = []
        for piece in pieces:
            choice = choices[piece.index].take(piece)
            found.append(frame({**head, "choices": [choice], "bits": piece.bits, **({"usage": None} if usage else {})}))
        return b"".join(found)

    def last() -> bytes:
        tail = frame({**head, "choices": [], "usage": usage_document()}) if usage else b""
        return tail + DONE

    return EventStream(generation, frames, last, asking.headers, note)


def read_prompts(served: Served, prompt: Prompt) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of every prompt. Raises: RequestError, ContextError"""
    many: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    if len(many) > MOST_CHOICES:
        raise RequestError("prompt", f"is {len(many)} prompts, expected at most {MOST_CHOICES}")
    ids: list[list[int]] = []
    for one in many:
        if isinstance(one, str):
            served.require_room(len(one))
            ids.append(_encode(served, one))
        else:
            served.require_room(len(one))
            ids.append(served.tokens(one, "prompt"))
    texts = [one if isinstance(one, str) else served.tokenizer.decode(one) for one in many]
    return ids, texts


def _encode(served: Served, text: str) -> list[int]:
    """With the tokenizer's own beginning, once: a text may bring it, as templates and lm-eval write it."""
    ids = served.tokenizer.encode(text)
    twice = len(ids) > 1 and ids[0] == ids[1] and served.tokenizer.encode("")[:1] == ids[:1]
    return ids[1:] if twice else ids


class _Choice:
    """One choice of the answer as it grows. `echo`: the prompt's text, where it comes first.

    `scored`: log-probabilities of the prompt, which its choices share; `ends`: tokens that end the text but are listed.
    """

    def __init__(
        self,
        served: Served,
        index: int,
        prompt: Sequence[int],
        echo: str | None,
        logprobs: int | None,
        alone: bool,
        scored: list[Choice],
        ends: Collection[int],
    ) -> None:
        self._served, self._index, self._prompt, self._echo = served, index, prompt, echo
        self._logprobs, self._alone, self._scored, self._ends = logprobs, alone, scored, ends
        self._offset = 0
        self._stream = served.tokenizer.stream([] if echo is not None else prompt[-8:])
        self._text: list[str] = []
        self._lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._finish: str | None = None

    def take(self, piece: Piece) -> dict[str, Any]:
        """The part of the answer that `piece` is, which is remembered as well."""
        text, lists = "", {name: list[Any]() for name in self._lists}
        if self._echo is not None:
            text, echo, self._echo = self._echo, self._echo, None
            self._scored += piece.prompt  # of the first choice, which comes before the others
            if self._logprobs is not None:
                self._list(lists, self._prompt, [None, *self._scored])
            self._offset, self._stream = len(echo), self._served.tokenizer.stream(self._prompt[-8:])
        finish = piece.finish
        if not self._alone:
            if piece.choices and piece.choices[-1].token in self._ends:
                finish = "stop"
            else:
                text += piece.text
            if self._logprobs is not None:
                self._list(lists, [choice.token for choice in piece.choices], piece.choices)
        for name, values in lists.items():
            self._lists[name] += values
        self._text.append(text)
        self._finish = "length" if self._alone and finish else finish
        return self._document(text, lists)

    def whole(self) -> dict[str, Any]:
        return self._document("".join(self._text), self._lists)

    def _document(self, text: str, lists: dict[str, list[Any]]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else lists
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}

    def _list(self, lists: dict[str, list[Any]], tokens: Sequence[int], choices: Sequence[Choice | None]) -> None:
        for token, choice in zip(tokens, choices, strict=True):
            text = self._served.token_text(token)
            lists["tokens"].append(text)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._stream.add(token))
            lists["token_logprobs"].append(choice.logprob if choice else None)
            likeliest: dict[str, float] = {}  # of tokens that look the same, the likelier
            for one, logprob in (*choice.likeliest, (token, choice.logprob)) if choice else ():
                likeliest.setdefault(self._served.token_text(one), logprob)
            lists["top_logprobs"].append(likeliest if choice else None)
