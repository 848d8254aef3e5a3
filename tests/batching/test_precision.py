"""`auto`: the arithmetic of deadlines, the ladder, and a burst on a model whose speed is known, in virtual time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.batching.batcher import Batcher
from everybit.batching.fluidity import Pace, Target
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Request
from everybit.engine.sampling import Sampling
from everybit.errors import PrecisionError, RequestError

MS = 1_000_000


def misses(times_ms: list[float], first: int = 300, gap: int = 30) -> Pace:
    pace = Pace(Target(first * MS, gap * MS), 0)
    for time in times_ms:
        pace.token(int(time * MS))
    return pace


def test_a_stall_late_in_an_early_stream_is_forgiven_and_an_early_one_is_not() -> None:
    """The example of ../shared/research/serving.md: 100 tokens at 20 ms, one stall of 900 ms."""

    def stalled(at: int) -> Pace:
        return misses([300 + 20 * i + (880 if i >= at else 0) for i in range(100)])

    assert stalled(90).fluidity == 1
    early = stalled(10)  # 90 ms in hand: 780 ms too late are 27 deadlines; the other 99 tokens are in time
    assert (early.hits, early.misses) == (99, 27)
    assert misses([]).fluidity == 0


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60), st.integers(1, 99), st.integers(1, 99))
def test_a_looser_target_is_never_missed_more(gaps: list[int], gap: int, more: int) -> None:
    times = list(np.cumsum(gaps))
    assert misses(times, 100, gap + more).misses <= misses(times, 100, gap).misses
    assert misses(times, 100 + more, gap).misses <= misses(times, 100, gap).misses


def test_costs_find_the_line_of_each_precision() -> None:
    costs = Costs()
    costs.note(8, 1, 10**9)  # the first step of a precision reads its planes from a disk
    costs.note(4, 1, 10**9)
    assert costs.predict(8, 10) == 0
    for tokens in (1, 4, 1, 9, 2, 30):
        costs.note(8, tokens, 1000 + 50 * tokens)
        costs.note(4, tokens, 500 + 20 * tokens)
    assert costs.predict(8, 12) == pytest.approx(1600, rel=0.05)
    assert costs.predict(4, 12) == pytest.approx(740, rel=0.05)
    assert costs.predict(3, 12) == costs.predict(4, 12) * 3 / 4  # not tried: its share of the nearest
    before = costs.predict(4, 12)
    costs.note(4, 12, 10**9)
    assert costs.predict(4, 12) < 2 * before  # one surprise
    for _ in range(300):
        costs.note(4, 12, 700)
    assert costs.predict(8, 12) == pytest.approx(1400)  # what was known of 8 bits is out of date
    steady = Costs()
    for _ in range(50):
        steady.note(4, 7, 900)  # one point makes no line
    assert steady.predict(4, 7) == pytest.approx(900)


def test_the_ladder_goes_down_at_once_and_up_after_a_while() -> None:
    ladder, any_of = Ladder((3, 4, 8), dwell=3, margin=1.25), Auto(2, 8)
    assert ladder.step(100, 101, 101, any_of) == 4
    assert ladder.step(100, 101, 200, any_of) == 3
    assert ladder.step(-5, 101, 200, any_of) == 3
    assert [ladder.step(100, 50, 80, any_of) for _ in range(3)] == [3, 3, 4]
    assert [ladder.step(100, 50, 81, any_of) for _ in range(9)] == [4] * 9  # 81 * 1.25 is too much
    steps = [(100, 50, 80)] * 2 + [(100, 50, 90)] + [(100, 50, 80)] * 3
    assert [ladder.step(*s, any_of) for s in steps] == [4, 4, 4, 4, 4, 8]
    assert ladder.step(100, 50, 81, Auto(2, 4)) == 4
    assert ladder.step(100, 101, 101, Auto(4, 8)) == 4


def test_bounds_of_a_request() -> None:
    ladder = Ladder((3, 4, 6, 8))
    assert [ladder.within(Auto(*a)) for a in ((2, 8), (3, 5), (5, 7), (8, 8))] == [8, 4, 6, 8]
    for _ in range(9):
        ladder.step(0, 1, 1, Auto(2, 8))
    assert [ladder.within(Auto(*a)) for a in ((2, 8), (4, 5), (5, 7), (8, 8))] == [3, 4, 6, 8]
    for bounds in (Auto(5, 5), Auto(8, 3)):
        with pytest.raises(PrecisionError, match=f"auto from {bounds.floor} to {bounds.ceiling} bits arrived, the ov"):
            ladder.within(bounds)
    for wrong in (lambda: Ladder(()), lambda: Ladder((3,), dwell=0), lambda: Ladder((3,), margin=0.5)):
        with pytest.raises(PrecisionError):
            wrong()
    with pytest.raises(RequestError):
        Target(0, 1)


class Model:
    """A step takes bits * (1 ms + 0.15 ms for each token). Its next token is always 1."""

    def __init__(self) -> None:
        self.now, self.used = 0, {}
        self.bits, self.context, self.sequences = (3, 4, 6, 8), 128, 64
        self.native = SimpleNamespace(prepare=lambda bits: None, run=self.run, most_tokens=512)
        self.check_tokens = lambda tokens: None
        self.cold_ns = 0  # more for the first step of a precision

    def run(self, step: Any, bits: int) -> Any:
        tokens = len(step.tokens)
        self.now += int(bits * (1 + 0.15 * tokens) * MS) + (0 if bits in self.used else self.cold_ns)
        self.used[bits] = self.used.get(bits, 0) + tokens
        logits = np.zeros((len(step.rows), 4), np.float32)
        logits[:, 1] = 9
        return logits


@pytest.mark.parametrize("gap_ms", [40, 2000])
def test_a_long_prompt_stalls_nobody(gap_ms: int) -> None:
    """60 tokens of prompt take 80 ms of 8 bits: in one step where a reader has the time, else in smaller ones."""
    model = Model()
    batcher = Batcher(model, budget=64, clock=lambda: model.now, speculate=False, target=Target(200 * MS, gap_ms * MS))  # type: ignore[arg-type]
    for id, more in (("before", 60), ("reads", 100)):  # the first shows what steps take
        batcher.submit(Request(id, tuple(range(1, 41 if id == "before" else 3)), more, 8), Sampling(temperature=0))
        while len(batcher.step()) == 0 or (batcher.pace("before").hits < 5 and id == "before"):
            pass
    for _ in range(3):
        batcher.step()
    model.now = batcher.pace("reads").due_ns - gap_ms * MS  # no time in hand
    batcher.submit(Request("comes", tuple(range(60, 0, -1)), 2, 8), Sampling(temperature=0))
    longest = 0
    for _ in range(4):
        before = model.now
        batcher.step()
        longest = max(longest, model.now - before)
    assert (longest < 60 * MS) == (gap_ms == 40)


def burst(bits: Any, speculate: bool = False) -> tuple[int, Model, list[int]]:
    """20 s at twice what 8 bits can do, then 20 s at a tenth of it: 30 tokens in, 50 out, due every 20 ms."""
    model, target = Model(), Target(300 * MS, 20 * MS)
    batcher = Batcher(model, budget=64, most=64, target=target, clock=lambda: model.now, speculate=speculate)  # type: ignore[arg-type]
    arrivals = [i * 1000 * MS // 14 for i in range(14 * 20)] + [20_000 * MS + i * 1500 * MS for i in range(14)]
    paces, missed, last = {}, 0, []
    while arrivals or paces:
        if not paces and arrivals[0] > model.now:
            model.now = arrivals[0]
        while arrivals and arrivals[0] <= model.now:
            id = arrivals.pop(0)
            batcher.submit(Request(id, tuple(range(1, 31)), 50, bits), Sampling(temperature=0))
            paces[id] = batcher.pace(id)
        for event in batcher.step():
            if model.now > 38_000 * MS:
                last.append(event.bits)
            if event.reason:
                missed += paces.pop(event.id).misses
    return missed, model, last


def test_a_burst_lowers_the_precision_instead_of_missing_deadlines() -> None:
    fixed, model, _ = burst(8)
    assert set(model.used) == {8}
    auto, model, last = burst(Auto(3, 8))
    assert fixed > 1000
    assert auto <= fixed / 100
    assert min(model.used) < 8
    assert set(last) == {8}  # and it came back
    bounded, model, _ = burst(Auto(6, 8))
    assert set(model.used) <= {6, 8}
    assert auto <= bounded < fixed


def serve(
    model: Model, requests: dict[Any, Any], first_ms: int, gap_ms: int, steps: int
) -> tuple[list[tuple[Any, int]], dict[Any, int]]:
    """Closed loop: a request that has ended comes again. Which precision each token had, and deadlines missed."""
    target = Target(first_ms * MS, gap_ms * MS)
    batcher = Batcher(model, budget=64, most=4, target=target, clock=lambda: model.now, speculate=False)  # type: ignore[arg-type]
    paces: dict[Any, list[Pace]] = {id: [] for id in requests}

    def submit(id: Any) -> None:
        batcher.submit(Request(id, (1, 2, 3), 50, requests[id], priority=int(id == "never")), Sampling(temperature=0))
        paces[id].append(batcher.pace(id))

    for id in requests:
        submit(id)
    found = []
    for _ in range(steps):
        for event in batcher.step():
            found.append((event.id, event.bits))
            if event.reason:
                submit(event.id)
    return found, {id: sum(pace.misses for pace in of) for id, of in paces.items()}


def test_a_cold_start_does_not_close_a_precision_for_ever() -> None:
    model = Model()
    model.cold_ns = 5000 * MS
    found, _ = serve(model, {0: Auto(3, 8)}, 300, 30, 800)
    assert {bits for _, bits in found[-100:]} == {8}


def test_a_request_that_is_never_admitted_does_not_pin_the_others_down() -> None:
    found, _ = serve(Model(), {**dict.fromkeys(range(4), Auto(3, 8)), "never": Auto(3, 8)}, 300, 30, 1500)
    assert {bits for _, bits in found[-2000:]} == {8}
    assert "never" not in {id for id, _ in found}


def test_passes_at_other_precisions_count() -> None:
    """At 8 bits beside one at 6 two passes take 16 ms, where a token is due every 13; at 6 one takes 7.8 ms."""
    found, misses = serve(Model(), {"six": 6, "auto": Auto(3, 8)}, 26, 13, 1000)
    assert misses["auto"] < 30
    assert {8, 6} <= {bits for id, bits in found if id == "auto"}


def test_auto_is_not_for_float_weights() -> None:
    model = Model()
    model.bits = ()  # type: ignore[assignment]
    model.checkpoint = SimpleNamespace(folder="folder")  # type: ignore[attr-defined]
    batcher = Batcher(model, clock=lambda: model.now)  # type: ignore[arg-type]
    for bits in (Auto(3, 8), 7):
        with pytest.raises(PrecisionError):
            batcher.submit(Request(0, (1, 2), 3, bits), Sampling(temperature=0))
    assert batcher.counts().waiting == 0
