"""The rules of pacing that the batcher and the planner's simulation share."""

from __future__ import annotations

from collections.abc import Hashable

from everybit.batching.fluidity import Pace, Target
from everybit.batching.pacing import LEAST_CHUNK, choose_rung, step_budget
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Part

TARGET = Target(first_ns=1000, gap_ns=100)


def known() -> Costs:
    """A step at b bits takes b * (10 + tokens) ns."""
    costs = Costs()
    for bits in (4, 8):
        for tokens in (40, 40, 20, 60):  # the first does not count
            costs.note(bits, tokens, bits * (10 + tokens))
    return costs


def part(id: Hashable, tokens: int, bits: Hashable) -> Part:
    return Part(id, (1,) * tokens, 0, (), bits, True)


def test_the_budget_is_what_the_tightest_stream_leaves() -> None:
    early, late = Pace(TARGET, 0), Pace(TARGET, 0)
    late.due_ns = 100
    assert step_budget([], 0, 8, known()) is None
    assert step_budget([early], 0, 4, known()) == 1000 / 4 - 10
    assert step_budget([early, late], 0, 4, known()) == 2 + LEAST_CHUNK  # 100 ns are 15 tokens
    assert step_budget([early], 5000, 4, known()) == 1 + LEAST_CHUNK
    assert step_budget([early], 0, 4, Costs()) == 1 + (1 << 20)


def test_the_rung_is_the_one_that_leaves_nobody_late() -> None:
    ladder, costs, any_of = Ladder((4, 8), dwell=1, margin=1.0), known(), Auto(2, 8)
    autos: dict[Hashable, Auto] = {"runs": any_of, "waits": any_of}
    parts = [part("runs", 10, 8)]  # 160 ns at 8 bits, 80 at 4
    assert not choose_rung(ladder, costs, parts, {}, {}, 0)
    assert not choose_rung(ladder, costs, parts, autos, {"runs": 200, "waits": 200}, 0)
    assert not choose_rung(ladder, costs, parts, autos, {"runs": 200, "waits": 50}, 0)  # late at any rung: not counted
    assert choose_rung(ladder, costs, parts, autos, {"runs": 200, "waits": 100}, 0)
    assert ladder.bits == 4
    assert choose_rung(ladder, costs, parts, autos, {"runs": 200}, 0)
    assert ladder.bits == 8
    both = [*parts, part("fixed", 10, 4)]  # a second pass, of 80 ns
    assert choose_rung(ladder, costs, both, autos, {"runs": 200}, 0)
    assert ladder.bits == 4


def test_bounds_of_a_request_hold_whatever_the_rung() -> None:
    ladder, costs = Ladder((4, 8), dwell=1, margin=1.0), known()
    parts = [part("low", 10, 4), part("high", 10, 8)]
    autos: dict[Hashable, Auto] = {"low": Auto(4, 4), "high": Auto(8, 8)}
    choose_rung(ladder, costs, parts, autos, {"low": 1, "high": 1}, 0)
    assert [ladder.within(one) for one in autos.values()] == [4, 8]
    plan = [part("plan", 10, "plan.json")]  # nobody knows how long that takes, so nothing is late
    choose_rung(ladder, costs, plan, {"high": Auto(4, 8)}, {"high": 1}, 0)
    assert ladder.bits == 8
