"""The generation loop in front of a stand-in runtime: where it ends, what it times, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from everybit.engine.generate import generate
from everybit.engine.sampling import Sampling
from everybit.errors import ContextError, PrecisionError, RequestError

GREEDY = Sampling(temperature=0)


class Clock:
    """Every look at it takes a second, or what was set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class StandIn:
    """A model that counts: the next token is one more than the last. Remembers what it was asked."""

    bits: tuple[int, ...] = (2, 4)
    context = 16
    checkpoint = SimpleNamespace(folder="folder")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.lengths = [0]
        self.native = SimpleNamespace(prepare=lambda bits: self.asked.append(("prepare", bits)))

    def reset(self) -> None:
        self.asked.append("reset")
        self.lengths[0] = 0

    def _logits(self, token: int) -> Any:
        logits = np.zeros(32, np.float32)
        logits[token + 1] = 1
        return logits

    def prefill(self, sequence: int, tokens: list[int], bits: int) -> Any:
        self.asked.append(("prefill", list(tokens), bits))
        self.lengths[0] += len(tokens)
        return self._logits(tokens[-1])

    def decode(self, tokens: list[int], bits: int) -> Any:
        self.asked.append(("decode", list(tokens), bits))
        self.lengths[0] += 1
        return self._logits(tokens[0])[None]


def run(runtime: Any, *arguments: Any, **options: Any) -> Any:
    return generate(runtime, *arguments, **options, clock=Clock())


def test_the_steps_and_their_seconds() -> None:
    runtime = StandIn()
    generation = run(runtime, [3, 5], GREEDY, 3, bits=2)
    assert runtime.asked == ["reset", ("prepare", 2)]
    assert list(generation) == generation.tokens == [6, 7, 8]
    assert runtime.asked[2:] == [("prefill", [3, 5], 2), ("decode", [6], 2), ("decode", [7], 2)]
    assert (generation.reason, generation.decode_steps) == ("length", 2)
    assert (generation.prepare_s, generation.prefill_s, generation.decode_s) == (1, 1, 2)
    assert generation.tokens_per_s == 1


def test_the_time_a_reader_takes_is_not_counted() -> None:
    clock = Clock()
    generation = generate(StandIn(), [1], GREEDY, 4, clock=clock)  # type: ignore[arg-type]
    for _ in generation:
        clock.now += 100
    assert (generation.prefill_s, generation.decode_s, generation.bits) == (1, 3, 4)


def test_a_stop_token_ends_it_and_is_not_among_the_tokens() -> None:
    generation = run(StandIn(), [1], GREEDY, 10, stop_ids={4, 9})
    assert list(generation) == [2, 3]
    assert (generation.reason, generation.decode_steps) == ("stop", 2)
    assert list(generation) == []
    first = run(StandIn(), [3], GREEDY, 10, stop_ids=[4])
    assert (list(first), first.reason, first.tokens_per_s) == ([], "stop", 0.0)


def test_the_context_ends_it() -> None:
    generation = run(StandIn(), list(range(13)), GREEDY, 10)
    assert (list(generation), generation.reason) == ([13, 14, 15], "context")


def test_penalties_see_the_prompt() -> None:
    sampling = Sampling(temperature=0, repetition_penalty=100)
    assert list(run(StandIn(), [5, 4], sampling, 1)) == [5]  # 1 / 100 is still above 0
    sampling = Sampling(temperature=0, presence_penalty=2)
    assert list(run(StandIn(), [5, 4], sampling, 2)) == [5, 6]


def test_refusals() -> None:
    for count in (0, 16, 17):
        with pytest.raises(ContextError, match=f"the prompt has {count} tokens, expected 1 to 15"):
            run(StandIn(), [1] * count, GREEDY, 1)
    with pytest.raises(RequestError, match="max_tokens 0: expected 1 or more"):
        run(StandIn(), [1], GREEDY, 0)
    with pytest.raises(PrecisionError, match="bits 3 asked, the overlay has 2, 4"):
        run(StandIn(), [1], GREEDY, 1, bits=3)
    runtime = StandIn()
    runtime.bits = ()
    assert run(runtime, [1], GREEDY, 1).bits == 0
    with pytest.raises(PrecisionError, match="4 bits were asked of folder, a float model with one precision"):
        run(runtime, [1], GREEDY, 1, bits=4)
