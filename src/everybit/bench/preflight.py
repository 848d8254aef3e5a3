"""A look at the endpoint before the run: is it there, which models has it, does it stream, how long are its tokens.

What can only be a mistake (nobody listens, the key is refused, there is no such model) ends the bench here, in one
line. A server that is merely busy does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from everybit.bench.answers import read_answer
from everybit.bench.asks import Asking
from everybit.bench.endpoint import PATHS, Endpoint
from everybit.bench.http import Client, Exchange, Limits
from everybit.bench.records import ERRORS, Record, Session, Turn
from everybit.errors import SourceError

_LONGEST_NAME = 300
_FATAL = ("connect", "tls", "resolve", "key", "missing", "redirect", "http", "refused")


@dataclass(frozen=True)
class Known:
    """What is known of an endpoint. `chars_per_token` of prompts, and `extra_tokens` that its template adds to each."""

    endpoint: Endpoint
    asking: Asking
    models: tuple[str, ...] = ()
    server: str = ""
    streams: bool = True
    usage: bool = True
    chars_per_token: float | None = None
    extra_tokens: float = 0.0
    notes: tuple[str, ...] = field(default=())


def look(
    endpoint: Endpoint, asking: Asking, limits: Limits, text: Callable[[int], str], otherwise: str | None = None
) -> Known:
    """`text(tokens)` makes a prompt; an empty model in `asking` means the first that the server names.

    `otherwise`: the interface to speak where the one in `asking` is refused. Raises: SourceError
    """
    try:
        return asyncio.run(_look(endpoint.resolved(), asking, limits, text, otherwise))
    except SourceError as error:
        raise SourceError(endpoint.masked(str(error))) from None


async def _look(
    endpoint: Endpoint, asking: Asking, limits: Limits, text: Callable[[int], str], otherwise: str | None
) -> Known:
    client = Client(endpoint, limits)
    reaper = asyncio.create_task(client.keep_reaping())
    try:
        exchange = await client.send("GET", "/models")
        if exchange.error:
            raise SourceError(f"{endpoint.url}: {ERRORS[exchange.error]}{_said(exchange.detail)}")
        models = _models(exchange)
        if not asking.model:
            if exchange.status in (401, 403):
                raise SourceError(f"{endpoint.url}: {exchange.status}, the key was refused; give --key-env NAME")
            if not models:
                raise SourceError(f"{endpoint.url}/models: {exchange.status}, and no model's name; give --model NAME")
            asking = replace(asking, model=models[0])
        known = Known(endpoint, asking, models, exchange.headers.get("server", ""))
        try:
            return await _calibrate(client, known, text)
        except SourceError:
            if otherwise is None:
                raise
            other = replace(known, asking=replace(asking, api=otherwise))
            with contextlib.suppress(SourceError):
                return await _calibrate(client, other, text)
            raise
    finally:
        reaper.cancel()
        client.close()


def _said(detail: str) -> str:
    return f" ({detail})" if detail else ""


def _models(exchange: Exchange) -> tuple[str, ...]:
    try:
        names = [str(one["id"]) for one in json.loads(exchange.body)["data"]] if exchange.status == 200 else []
        return tuple(name for name in names if name.isprintable() and len(name) <= _LONGEST_NAME)
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()


async def _calibrate(client: Client, known: Known, text: Callable[[int], str]) -> Known:
    """Two prompts of different lengths: the difference of their tokens is text, the rest what the server adds."""
    sizes: list[tuple[int, int]] = []
    for tokens in (16, 128):
        prompt = text(tokens)
        record = await _ask(client, known.asking, prompt)
        if record.error in ("refused", "server") and known.asking.usage and known.asking.stream:
            plain = replace(known.asking, usage=False)  # perhaps it does not know stream_options
            again = await _ask(client, plain, prompt)
            if not again.error:
                said = known.endpoint.masked(record.detail)
                note = f"the server refuses stream_options ({said}): token counts are by pieces"
                known, record = replace(known, asking=plain, notes=(*known.notes, note)), again
        if record.error in _FATAL:
            hint = f"; it has {', '.join(known.models[:8])}" if record.error == "missing" and known.models else ""
            raise SourceError(f"{known.endpoint.url}: {ERRORS[record.error]}{_said(record.detail)}{hint}")
        if record.error:
            said = known.endpoint.masked(record.detail)
            note = f"a first request failed, {ERRORS[record.error]} ({said}): prompt lengths are estimates"
            return replace(known, notes=(*known.notes, note))
        if record.usage_prompt:
            sizes.append((len(prompt), record.usage_prompt))
        if known.asking.stream and not record.streamed:
            known = replace(known, streams=False)
    if not known.streams:
        note = "the server does not stream, though asked to: only whole answers can be timed"
        known = replace(known, notes=(*known.notes, note))
    if len(sizes) == 2 and sizes[1][1] <= sizes[0][1]:
        note = (
            f"usage says {sizes[0][1]} and {sizes[1][1]} tokens of prompts of 16 and 128: prompt lengths are estimates"
        )
        return replace(known, notes=(*known.notes, note))
    if len(sizes) < 2:
        note = "the server gives no usage: prompt lengths are estimates, output tokens are counted by pieces"
        return replace(known, usage=False, notes=(*known.notes, note))
    (chars, tokens), (more_chars, more_tokens) = sizes
    chars_per_token = (more_chars - chars) / (more_tokens - tokens)
    extra = max(0.0, tokens - chars / chars_per_token)
    return replace(known, chars_per_token=chars_per_token, extra_tokens=extra)


async def _ask(client: Client, asking: Asking, prompt: str) -> Record:
    session = Session(0, 0, ())
    turn = Turn(prompt, 2)
    exchange = await client.send("POST", PATHS[asking.api], asking.body(session, turn), most_events=512)
    record = Record(0, 0, 0, 0, intended_ns=0)
    read_answer(record, exchange, asking.api, None, exchange.begin_ns)
    return record
