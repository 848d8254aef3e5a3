"""A workload: all sessions of a run, made as they are taken, the same whichever worker takes them.

A session is drawn from the seed and its number alone, so every worker makes its share by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count as count_up
from random import Random
from typing import Any

from everybit.bench.load.arrivals import Arrivals, Users
from everybit.bench.load.lengths import Distribution, Lengths, parse_length, parse_seconds
from everybit.bench.load.texts import Prompt, Texts
from everybit.bench.load.traces import Trace, TraceRequest
from everybit.bench.records import SECOND, Session, Turn
from everybit.errors import SourceError

ONE = parse_length("1")
NO_PAUSE = parse_seconds("0")


@dataclass(frozen=True)
class Prefixes:
    """Texts that stand before all turns of a session, as system prompts and documents do.

    Each session has one of `count`, the same in every run with these `texts`, or with None one of its own.
    Raises: SourceError
    """

    texts: Texts
    tokens: Distribution
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise SourceError(f"{self.count} prefixes: expected 1 or more")

    def take(self, random: Random) -> tuple[str, int]:
        """Text and tokens."""
        name = f"prefix {random.getrandbits(64) if self.count is None else random.randrange(self.count)}"
        tokens = self.tokens.draw(Random(f"{self.texts.seed} tokens of {name}"))
        return self.texts.text(name, tokens), tokens

    def describe(self) -> dict[str, Any]:
        return {"count": self.count, "tokens": self.tokens.text}


@dataclass(frozen=True)
class Drawn:
    """Turns of drawn lengths and texts, whatever their place. A prompt's length is without what stands before it."""

    texts: Texts
    lengths: Lengths

    def turn(self, random: Random, session: int, index: int) -> Turn:
        prompt, output = self.lengths.draw(random)
        return Turn(self.texts.text(f"turn {random.getrandbits(64)}", prompt), output, prompt_tokens=prompt)

    def describe(self) -> dict[str, Any]:
        return self.lengths.describe()


@dataclass(frozen=True)
class Written:
    """Turns of an own file, one line a session; begun anew after the last line.

    `output`: tokens of an answer where a line does not tell. Raises: SourceError
    """

    prompts: tuple[Prompt, ...]
    output: Distribution | None = None

    def __post_init__(self) -> None:
        silent = sum(one.output_tokens is None for one in self.prompts)
        if silent and self.output is None:
            raise SourceError(f"{silent} prompts without output_tokens; expected a length of outputs for them")

    def line(self, session: int) -> Prompt:
        return self.prompts[session % len(self.prompts)]

    def turn(self, random: Random, session: int, index: int) -> Turn:
        line = self.line(session)
        if line.output_tokens is not None:
            return Turn(line.texts[index], line.output_tokens)
        assert self.output is not None
        return Turn(line.texts[index], self.output.draw(random))

    def describe(self) -> dict[str, Any]:
        return {"prompts": len(self.prompts), "output": self.output and self.output.text}


Source = Drawn | Written


@dataclass(frozen=True)
class Talk:
    """Sessions of turns. `turns` of each: a distribution, as many as the source's line has (None), or a `Share`."""

    source: Source
    turns: Distribution | Share | None
    seed: int
    think: Distribution = NO_PAUSE
    prefixes: Prefixes | None = None
    history: bool = False

    def length(self, number: int) -> int | None:
        """How many turns; None: without end."""
        if isinstance(self.turns, Share):
            return self.turns.of(number)
        if self.turns is not None:
            return self.turns.draw(Random(f"{self.seed} turns {number}"))
        assert isinstance(self.source, Written)
        return len(self.source.line(number).texts)

    def session(self, number: int, at_ns: int) -> Session:
        random = Random(f"{self.seed} session {number}")
        prefix, before = self.prefixes.take(random) if self.prefixes else ("", 0)
        return Session(number, at_ns, self._turns(random, number, before), self.history, prefix)

    def _turns(self, random: Random, number: int, before: int) -> Iterator[Turn]:
        length = self.length(number)
        users = self.turns.users if isinstance(self.turns, Share) else 0
        for index in count_up() if length is None else range(length):
            place = (number + index * users, 0) if users else (number, index)
            turn = self.source.turn(random, *place)
            own, told = turn.prompt_tokens, self.history and index > 0  # then answers of unknown length stand before it
            yield replace(
                turn,
                think_ns=self.think.draw(random) if index else 0,
                prompt_tokens=None if own is None or told else before + own,
            )

    def describe(self) -> dict[str, Any]:
        return {
            **self.source.describe(),
            "turns": self.turns.text if isinstance(self.turns, Distribution) else None,
            "think_s": self.think.text,
            "prefixes": self.prefixes and self.prefixes.describe(),
            "history": self.history,
        }


@dataclass(frozen=True)
class Share:
    """Of `total` requests (None: without end) each of `users` sends as many, the first ones one more."""

    users: int
    total: int | None

    def of(self, user: int) -> int | None:
        return None if self.total is None else self.total // self.users + (user < self.total % self.users)


@dataclass(frozen=True)
class Replay:
    """Requests of a trace, each a session at its time. `names`: whose text a prompt without blocks begins with."""

    requests: tuple[TraceRequest, ...]
    names: tuple[int, ...]
    block_tokens: float
    texts: Texts
    format: str

    def session(self, number: int, at_ns: int) -> Session:
        one = self.requests[number]
        text = self._join(one) if one.blocks else self.texts.text(f"request {self.names[number]}", one.prompt_tokens)
        return Session(number, at_ns, (Turn(text, one.output_tokens, prompt_tokens=one.prompt_tokens),))

    def _join(self, one: TraceRequest) -> str:
        edges = [min(round(at * self.block_tokens), one.prompt_tokens) for at in range(len(one.blocks))]
        edges.append(one.prompt_tokens)
        return " ".join(
            self.texts.text(f"block {block}", end - begin)
            for block, begin, end in zip(one.blocks, edges, edges[1:], strict=False)
            if begin < end
        )

    def describe(self) -> dict[str, Any]:
        return {"trace": self.format}


@dataclass(frozen=True)
class Workload:
    """`count`: requests, None where only time ends them. `duration_ns`: until no more are sent, None where unknown."""

    kind: str
    seed: int
    starts: Arrivals | Users | tuple[int, ...]
    talk: Talk | Replay
    count: int | None
    duration_ns: int | None
    notes: tuple[str, ...] = ()

    def sessions(self, worker: int = 0, workers: int = 1) -> Iterator[Session]:
        """Every `workers`-th session, in order of time. The turns of each can be taken once."""
        for number, at_ns in enumerate(self.starts):
            if number % workers == worker:
                yield self.talk.session(number, at_ns)

    def describe(self) -> dict[str, Any]:
        """For the result document."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "count": self.count,
            "duration_s": None if self.duration_ns is None else self.duration_ns / SECOND,
            "starts": None if isinstance(self.starts, tuple) else self.starts.describe(),
            **self.talk.describe(),
            "notes": list(self.notes),
        }


def open_loop(arrivals: Arrivals, source: Source, *, seed: int = 0, prefixes: Prefixes | None = None) -> Workload:
    """Requests that come whatever the server does. Raises: SourceError"""
    _expect_single(source)
    return _timed("open loop", arrivals, Talk(source, ONE, seed, prefixes=prefixes))


def closed_loop(
    users: Users,
    source: Source,
    *,
    duration_s: float | None = None,
    count: int | None = None,
    think: Distribution = NO_PAUSE,
    seed: int = 0,
    prefixes: Prefixes | None = None,
) -> Workload:
    """Users who each ask anew, without history, after the answer and a pause; ended by time or by `count` of all.

    Raises: SourceError
    """
    if duration_s is None and count is None:
        raise SourceError("a closed loop without an end: give a duration or a count")
    if duration_s is not None and not (duration_s > 0 and math.isfinite(duration_s)):
        raise SourceError(f"duration {duration_s} s: expected a finite number above 0")
    if count is not None and count < users.count:
        raise SourceError(f"{count} requests of {users.count} users: expected one of each user or more")
    _expect_single(source)
    talk = Talk(source, Share(users.count, count), seed, think, prefixes)
    duration_ns = None if duration_s is None else round(duration_s * SECOND)
    return Workload("closed loop", seed, users, talk, count, duration_ns, _repeats(source, count))


def conversations(
    starts: Arrivals | Users,
    source: Source,
    *,
    turns: Distribution | None = None,
    think: Distribution = NO_PAUSE,
    seed: int = 0,
    prefixes: Prefixes | None = None,
) -> Workload:
    """Sessions of several turns with history; with `Users`, each has one. An own file's lines say their turns.

    Raises: SourceError
    """
    if isinstance(source, Drawn) and turns is None:
        raise SourceError("conversations without a number of turns; expected one")
    if isinstance(source, Written) and turns is not None:
        raise SourceError(f"turns {turns.text!r}: an own file's lines say theirs; leave it out")
    return _timed("conversations", starts, Talk(source, turns, seed, think, prefixes, history=True))


def replay(trace: Trace, texts: Texts) -> Workload:
    """A trace at its times. Equal blocks are equal text; a conversation's prompts begin with those before them."""
    requests = tuple(trace.requests)
    talk = Replay(requests, _names(requests), trace.block_tokens, texts, trace.format)
    starts = tuple(one.at_ns for one in requests)
    return Workload("replay", texts.seed, starts, talk, len(requests), starts[-1], tuple(trace.notes))


def _names(requests: tuple[TraceRequest, ...]) -> tuple[int, ...]:
    """The first request of the conversation that each goes on with: that holds the prompt and answer before it."""
    names: list[int] = []
    latest: dict[int, int] = {}
    for number, one in enumerate(requests):
        name = number
        if one.session is not None:
            last = latest.get(one.session)
            if last is not None and one.prompt_tokens >= requests[last].prompt_tokens + requests[last].output_tokens:
                name = names[last]
            latest[one.session] = number
        names.append(name)
    return tuple(names)


def _timed(kind: str, starts: Arrivals | Users, talk: Talk) -> Workload:
    times = list(starts)
    if not times:
        raise SourceError("no arrival falls into the duration; expected a longer one or a higher rate")
    duration_ns = (starts.duration_ns or times[-1]) if isinstance(starts, Arrivals) else None
    count = sum(talk.length(number) or 0 for number in range(len(times)))
    return Workload(kind, talk.seed, starts, talk, count, duration_ns, _repeats(talk.source, len(times)))


def _expect_single(source: Source) -> None:
    if isinstance(source, Written) and any(len(one.texts) > 1 for one in source.prompts):
        raise SourceError(
            "prompts with several messages are conversations; expected one message each, or conversations"
        )


def _repeats(source: Source, wanted: int | None) -> tuple[str, ...]:
    if isinstance(source, Drawn) or (wanted is not None and wanted <= len(source.prompts)):
        return ()
    return (f"the file's {len(source.prompts)} prompts are sent more than once: a prefix cache may know them",)
