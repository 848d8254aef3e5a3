"""Runtime: what a caller can get wrong is refused before native code sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everybit.engine.generate import generate
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import ContextError, EverybitError, ModelError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "prose-10m"


def test_more_sequences_than_a_step_has_room_for() -> None:
    tokens = [5, 6, 7, 8, 9, 10, 11, 12]
    few, many = (Runtime.open(MODEL, threads=1, most_tokens=m, sequences=8, context=64) for m in (3, 8))
    np.testing.assert_allclose(few.decode(tokens), many.decode(tokens), atol=1e-4)


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    pieces, whole = (Runtime.open(MODEL, threads=1, most_tokens=m, context=64, mode="exact") for m in (7, 64))
    tokens = list(range(3, 60))
    np.testing.assert_allclose(pieces.prefill(0, tokens), whole.prefill(0, tokens), atol=1e-4)
    assert pieces.lengths == whole.lengths == [57]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda r: r.prefill(0, [1.5]), "tokens .* expected a list of at least one whole number"),
        (lambda r: r.prefill(0, ["a"]), "tokens .* expected a list"),
        (lambda r: r.prefill(0, []), "tokens .* expected a list"),
        (lambda r: r.prefill(0, [[1, 2]]), "tokens .* expected a list"),
        (lambda r: r.prefill(0, [2**70]), "tokens .* expected a list"),
        (lambda r: r.prefill(0, [-1]), "token -1 arrived"),
        (lambda r: r.prefill(0, [10**6]), "token 1000000 arrived"),
        (lambda r: r.prefill("0", [1]), "sequence '0' arrived"),
        (lambda r: r.prefill(2, [1]), "sequence 2 arrived"),
        (lambda r: r.score(0, [-1]), "token -1 arrived"),
        (lambda r: r.decode([1, 2, 3]), "3 tokens arrived"),
        (lambda r: r.prefill(0, [1] * 65), "the context is 64"),
        (lambda r: r.prefill(0, [1], bits=4), "4 bits were asked of float weights"),
        (lambda r: r.reset(0, -5), "length -5 arrived"),
        (lambda r: r.reset(0, 1.5), "length 1.5 arrived"),
        (lambda r: r.reset(9), "sequence 9 arrived"),
    ],
)
def test_wrong_calls(wrong: Callable[[Any], object], message: str) -> None:
    with pytest.raises(EverybitError, match=message):
        wrong(Runtime.open(MODEL, threads=1, sequences=2, context=64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context 0 arrived"),
        ({"context": 64.0}, "context 64.0 arrived"),
        ({"context": 513}, "513"),
        ({"threads": -1}, "-1 threads arrived"),
        ({"threads": 1000}, "1000 threads arrived"),
        ({"threads": 1.5}, "1.5 threads arrived"),
        ({"sequences": 2**62}, "sequences .* arrived"),
        ({"sequences": 2**30}, "KV blocks"),
        ({"most_tokens": 0}, "most_tokens 0 arrived"),
        ({"mode": "quick"}, "mode 'quick' arrived"),
        ({"isa": "mmx"}, "instruction set 'mmx' arrived"),
        ({"kv_dtype": "int4"}, "kv_dtype 'int4' arrived"),
        ({"pin": (4096,)}, "processor 4096"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EverybitError, match=message):
        Runtime.open(MODEL, **options)


def test_pieces_of_a_score_that_come_too_late_are_refused() -> None:
    runtime = Runtime.open(MODEL, threads=1, most_tokens=8, context=64)
    pieces = runtime.score(0, [5] * 60)
    next(pieces)
    for _ in range(40):
        runtime.decode([5])
    with pytest.raises(ContextError, match="the context is 64"):
        list(pieces)


def test_a_generation_that_lost_its_sequence_says_so() -> None:
    runtime = Runtime.open(MODEL, threads=1, context=64)
    first = generate(runtime, [5, 6, 7], Sampling(temperature=0.0), 20)
    next(first)
    next(generate(runtime, [8], Sampling(temperature=0.0), 20))
    with pytest.raises(ModelError, match="one generation at a time"):
        next(first)


def test_a_forked_child_is_told_to_open_the_model_again() -> None:
    runtime = Runtime.open(MODEL, threads=2, context=64)
    runtime.prefill(0, [1, 2])
    child = os.fork()
    if child == 0:
        try:
            runtime.decode([1])
        except ModelError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
