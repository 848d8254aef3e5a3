"""Many requests on a real model: every one gets the tokens that it gets alone, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everybit
from everybit.batching.batcher import Batcher
from everybit.batching.scheduler import Request
from everybit.engine.generate import generate
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import FormatError, ModelError, PrecisionError, RequestError

BITS = (2, 3, 4, 6, 8)
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "overlay"
    everybit.quantize(tiny_llama, out, bits=BITS, solver="tree", calibration="none")
    return out


@pytest.fixture
def runtime(overlay: Path) -> Iterator[Runtime]:
    with Runtime.open(overlay, threads=2, sequences=4, context=96, mode="exact") as opened:
        yield opened


def prompt(i: int, length: int) -> tuple[int, ...]:
    return tuple((7 * i + 3 * k) % 250 + 2 for k in range(length))


def drain(batcher: Batcher) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = {}
    while batcher.counts().running or batcher.counts().waiting:
        for event in batcher.step():
            found.setdefault(event.id, []).extend([] if event.token is None else [event.token])
        batcher.check()
    return found


def alone(runtime: Runtime, tokens: tuple[int, ...], bits: int, sampling: Sampling, more: int) -> list[int]:
    return list(generate(runtime, tokens, sampling, more, bits))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_batched_chunked_and_cached_are_as_alone_at_every_precision(runtime: Runtime, sampling: Sampling) -> None:
    cases = [(f"{bits}.{i}", prompt(i, 5 + 17 * i), bits) for bits in BITS for i in range(3)]
    want = {id: alone(runtime, tokens, bits, sampling, 9) for id, tokens, bits in cases}
    batcher = Batcher(runtime, budget=24, most=8)
    for round in range(2):  # the second finds beginnings cached
        for id, tokens, bits in cases:
            batcher.submit(Request(id, tokens, 9, bits), sampling)
        assert drain(batcher) == want
        cached = batcher.counts().tokens_cached
        assert (cached > 0) == (round == 1)


def test_put_back_and_computed_again(overlay: Path) -> None:
    with Runtime.open(overlay, threads=2, sequences=1, context=96) as small:
        cases = [(i, prompt(i, 20), BITS[i]) for i in range(4)]
        want = {id: alone(small, tokens, bits, DRAWN, 40) for id, tokens, bits in cases}
        batcher = Batcher(small)
        for id, tokens, bits in cases:
            batcher.submit(Request(id, tokens, 40, bits), DRAWN)
        assert drain(batcher) == want
        assert batcher.counts().preempted > 0


def test_a_change_of_precision_is_in_force_in_the_next_step(runtime: Runtime) -> None:
    batcher = Batcher(runtime)
    batcher.submit(Request(0, prompt(0, 8), 6, 8), GREEDY)
    bits = []
    while events := batcher.step():
        bits += [event.bits for event in events]
        if len(bits) == 3:
            batcher.set_bits(0, 3)
    assert bits == [8, 8, 8, 3, 3, 3]


def test_stop_tokens_end_a_text_and_are_not_part_of_it(runtime: Runtime) -> None:
    tokens = alone(runtime, prompt(0, 8), 4, GREEDY, 12)
    stop = next(t for t in tokens[1:] if t != tokens[0])
    batcher = Batcher(runtime)
    batcher.submit(Request(0, prompt(0, 8), 12, 4), GREEDY, stop_ids={stop})
    events = [event for _ in range(12) for event in batcher.step()]
    assert [event.token for event in events[:-1]] == tokens[: tokens.index(stop)]
    assert (events[-1].token, events[-1].reason) == (None, "stop")
    assert batcher.counts().running == 0


def test_refusals_leave_nothing_behind(runtime: Runtime) -> None:
    batcher = Batcher(runtime)
    with pytest.raises(PrecisionError):
        batcher.submit(Request(0, prompt(0, 8), 4, 5), GREEDY)
    with pytest.raises(RequestError, match="the context is 96"):
        batcher.submit(Request(0, prompt(0, 90), 40, 4), GREEDY)
    for tokens in ((-5, 3), (3, 10**6), (3, 2**40)):
        with pytest.raises(ModelError, match=r"the model knows 0 to|expected a list"):
            batcher.submit(Request(0, tokens, 4, 4), GREEDY)
    assert batcher.counts().waiting == 0
    assert not batcher.set_bits(0, 4)
    batcher.submit(Request(0, prompt(0, 8), 4, 4), GREEDY)
    assert len(drain(batcher)[0]) == 4


def test_a_step_that_fails_can_be_run_again(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two precisions the second fails: nothing is drawn for the first."""
    cases = [(bits, prompt(bits, 8), bits) for bits in (3, 4)]
    want = {id: alone(runtime, tokens, bits, DRAWN, 6) for id, tokens, bits in cases}
    batcher = Batcher(runtime)
    for id, tokens, bits in cases:
        batcher.submit(Request(id, tokens, 6, bits), DRAWN)
    run, found, failures = runtime.native.run, {3: [], 4: []}, 0

    def fails(step: Any, bits: int) -> Any:
        nonlocal failures
        if bits == 4 and failures < 3:
            failures += 1
            raise FormatError("a file that shrank")
        return run(step, bits)

    monkeypatch.setattr(runtime.native, "run", fails)
    while batcher.counts().running or batcher.counts().waiting:
        try:
            for event in batcher.step():
                found[event.id].append(event.token)
        except FormatError:
            batcher.check()
    assert failures == 3
    assert found == want


def test_no_token_to_choose_ends_one_request_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, run = Batcher(runtime), runtime.native.run
    want = alone(runtime, prompt(3, 8), 3, GREEDY, 4)
    for bits in (3, 4):
        batcher.submit(Request(bits, prompt(bits, 8), 4, bits), GREEDY)
    monkeypatch.setattr(runtime.native, "run", lambda step, bits: run(step, bits) * (np.nan if bits == 4 else 1))
    first = batcher.step()
    assert [(event.id, event.reason) for event in first] == [(3, ""), (4, "error")]
    assert "holds a number that is not finite" in first[1].problem
    assert [first[0].token, *drain(batcher)[3]] == want
    batcher.check()
