"""From the fields that all requests for text share to an `Ask`."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from everybit.batching.fluidity import Target
from everybit.errors import ContextError, RequestError
from everybit.server.fields import MOST_CHOICES, MOST_STOPS, Common
from everybit.server.generation import Ask, Generation, Live
from everybit.server.grammar import Grammar
from everybit.server.keys import Key
from everybit.server.metrics import Metrics
from everybit.server.served import Served, find

IGNORED = "x-everybit-ignored"
_LONG = 16 << 10  # characters or tokens that are read beside the event loop, where others are served meanwhile
_COMPILERS = ThreadPoolExecutor(4, "everybit-grammar")  # of their own: nothing else waits behind a grammar
T = TypeVar("T")
_UNSAID = re.compile(r"[^ -+.-~-]")  # in a header: all but printable ASCII without a comma
_TTFT, _TPOT = "x-slo-ttft-ms", "x-slo-tpot-ms"


async def reading(size: int, read: Callable[..., T], *given: Any) -> T:
    """What `read` returns of `given`, in a thread where it is long."""
    return await asyncio.to_thread(read, *given) if size > _LONG else read(*given)


async def compiling(compile: Callable[..., T], *given: Any) -> T:
    """What `compile` returns, in a thread: others are served while a grammar is tried."""
    return await asyncio.get_running_loop().run_in_executor(_COMPILERS, compile, *given)


class Asking:
    """One HTTP request on its way to a generation: the model it names, its key, the headers of its answer."""

    def __init__(self, request: Request, fields: Common, models: dict[str, Served], live: Live, strict: bool) -> None:
        self.request, self.fields, self.live = request, fields, live
        self.served, self._in_name = find(models, fields.model)
        self.key: Key = request.state.key
        self.headers: dict[str, str] = {}
        self.created = int(time.time())
        unknown = fields.unknown()
        if unknown and strict:
            raise RequestError(unknown[0], "is unknown, and this server takes known fields only (--strict)")
        if unknown:
            self.headers[IGNORED] = ",".join(_UNSAID.sub("?", name[:40]) for name in unknown[:16])
        if fields.stream_options is not None and not fields.stream:
            raise RequestError("stream_options", "goes with stream only")
        line = request.state.line
        line["model"] = self.served.name
        for name in ("user", "metadata"):
            if (value := getattr(fields, name, None)) is not None:
                line[name] = value

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        max_tokens: int | None,
        stops: Sequence[str] = (),
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
        top: int = -1,
        scores: bool = False,
    ) -> Ask:
        """Raises: RequestError, PrecisionError, ContextError"""
        fields, served = self.fields, self.served
        if not prompts:
            raise RequestError("prompt", "is empty, expected at least one")
        if len(prompts) * n > MOST_CHOICES:
            raise RequestError("n", f"makes {len(prompts)} x {n} sequences, expected 1 to {MOST_CHOICES}")
        context = served.runtime.context
        for tokens in prompts:
            if not tokens:
                raise RequestError("prompt", "is empty, expected at least one token: this model needs a beginning")
            if len(tokens) >= context:
                raise ContextError(
                    f"a prompt of {len(tokens)} tokens arrived, {context} is the context with what follows: shorten it"
                )
        if max_tokens is not None and max_tokens < 1:
            raise RequestError("max_tokens", f"{max_tokens}: expected 1 or more")
        if fields.precision is not None and self._in_name is not None and str(fields.precision) != str(self._in_name):
            raise RequestError("precision", f"is {fields.precision} and the model's name says {self._in_name}")
        asked = self._in_name if fields.precision is None else fields.precision
        stop_ids = set(fields.stop_token_ids or ())
        if len(stop_ids) > MOST_STOPS or any(not 0 <= token < served.runtime.vocabulary for token in stop_ids):
            raise RequestError("stop_token_ids", f"expected up to {MOST_STOPS} ids below {served.runtime.vocabulary}")
        if not fields.ignore_eos:
            stop_ids |= served.tokenizer.eos_ids
        elif grammar is not None:
            raise RequestError("ignore_eos", "cannot go with a grammar, which ends")
        return Ask(
            served,
            [tuple(tokens) for tokens in prompts],
            n,
            max_tokens,
            served.precision(asked, fields.precision_floor, fields.precision_ceiling),
            fields.sampling(),
            stops,
            stop_ids,
            grammar,
            shown,
            top,
            scores,
            tenant=(self.key.name, fields.cache_salt),
            priority=self.key.priority,
            target=self._target(),
        )

    def grammar(self, of_format: Grammar | None) -> Grammar | None:
        """Of `regex`, `grammar` or what the caller found in other fields. Raises: RequestError where two are given"""
        found = {"response_format or tools": of_format}
        if self.fields.regex is not None:
            found["regex"] = self.served.grammars.regex(self.fields.regex)
        if self.fields.grammar is not None:
            found["grammar"] = self.served.grammars.lark(self.fields.grammar)
        given = [name for name, grammar in found.items() if grammar is not None]
        if len(given) > 1:
            raise RequestError(given[1], f"cannot go with {given[0]}: give one of them")
        return found[given[0]] if given else None

    def _target(self) -> Target | None:
        """The pace that headers ask for; the rest from the server's own."""
        own = self.served.batcher.target
        values = {}
        for name, default in ((_TTFT, own.first_ns), (_TPOT, own.gap_ns)):
            text = self.request.headers.get(name)
            if text is None:
                values[name] = default
                continue
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not 1 <= number <= 3_600_000:
                raise RequestError(name, f"{text[:20]!r}: expected milliseconds, 1 to 3600000")
            values[name] = int(number * 1e6)
        target = Target(values[_TTFT], values[_TPOT])
        return None if target == own else target

    def note(self, generation: Generation, metrics: Metrics) -> None:
        """What the log and the metrics get when it has ended."""
        usage, line = generation.usage, self.request.state.line
        line["prompt_tokens"], line["completion_tokens"] = usage.prompt_tokens, usage.completion_tokens
        line["tokens_by_bits"] = usage.tokens_by_bits
        if generation.first_s is not None:
            line["ttft_s"] = round(generation.first_s, 6)
        metrics.ended(self.served.name, generation)


def response_format(served: Served, given: Mapping[str, Any] | None, parameter: str) -> Grammar | None:
    """The grammar of OpenAI's response_format. Raises: RequestError"""
    if given is None:
        return None
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return served.grammars.json_object()
        case "json_schema":
            described = given.get("json_schema", given)
            schema = described.get("schema") if isinstance(described, Mapping) else None
            if not isinstance(schema, Mapping):
                raise RequestError(parameter, "has no schema, expected an object that is a JSON schema")
            return served.grammars.json_schema(schema)
    kind = str(given.get("type"))[:40]
    raise RequestError(parameter, f"has the type {kind!r}: expected text, json_object or json_schema")
