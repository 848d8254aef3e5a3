"""The solvers of bit plans on toys small enough to try every choice, and budgets as they are written."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.allocate.budget import Budget
from everybit.allocate.solve import Options, solve_greedy, solve_ilp
from everybit.errors import ModelError, RequestError


def brute_force(options: dict[str, Options], budget: float) -> float:
    """The least sum of costs among all choices that keep the budget."""
    best = np.inf
    for pick in itertools.product(*(range(len(one.choices)) for one in options.values())):
        price = sum(one.price[i] for one, i in zip(options.values(), pick, strict=True))
        if price <= budget:
            best = min(best, sum(one.cost[i] for one, i in zip(options.values(), pick, strict=True)))
    return best


@st.composite
def toys(draw: st.DrawFn) -> tuple[dict[str, Options], float]:
    """Up to 6 units of 1 to 4 choices; small whole numbers make ties, tiny factors the sizes of real KL."""
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-6]))
    options = {}
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        count = draw(st.integers(1, 4))
        price = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
        cost = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        options[name] = Options(tuple(range(2, 2 + count)), tuple(scale * c for c in cost), tuple(map(float, price)))
    low = sum(min(one.price) for one in options.values())
    high = sum(max(one.price) for one in options.values())
    return options, draw(st.integers(int(low), int(high)))


@given(toys())
def test_the_ilp_is_brute_force_and_greedy_is_never_better(toy: tuple[dict[str, Options], float]) -> None:
    options, budget = toy
    wanted = brute_force(options, budget)
    exact, greedy = solve_ilp(options, budget), solve_greedy(options, budget)
    assert exact.cost == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    for solution in (exact, greedy):
        assert solution.price <= budget
        assert solution.cost >= wanted * (1 - 1e-9)
        index = {name: options[name].choices.index(choice) for name, choice in solution.choices.items()}
        assert solution.price == pytest.approx(sum(options[name].price[i] for name, i in index.items()))
        assert solution.cost == pytest.approx(sum(options[name].cost[i] for name, i in index.items()))


def test_greedy_can_be_beaten() -> None:
    # Down from 20 to at most 12: greedy takes the flattest step first (b, 1 per 2), then needs a as well.
    options = {
        "a": Options((2, 4), (8.0, 0.0), (2.0, 10.0)),
        "b": Options((2, 4), (1.0, 0.0), (8.0, 10.0)),
    }
    assert solve_ilp(options, 12).cost == 8
    assert solve_greedy(options, 12).cost == 9


def test_hundreds_of_units_of_real_proportions_are_solved_within_the_budget() -> None:
    random = np.random.default_rng(3)
    options = {}
    for i in range(224):
        size, weight = random.choice([1.0, 1.0, 2.7]) * 1e6, random.lognormal()
        bits = tuple(range(2, 9))
        noise = random.uniform(0.8, 1.2, 7)
        cost = tuple(float(1e-2 * weight * 4.0**-b * n) for b, n in zip(bits, noise, strict=True))
        options[f"w{i}"] = Options(bits, cost, tuple(size * (b + 0.13) / 8 for b in bits))
    budget = 3.4 * sum(one.price[0] for one in options.values()) / 2.13
    exact, greedy = solve_ilp(options, budget), solve_greedy(options, budget)
    assert exact.price <= budget
    assert exact.price > 0.999 * budget
    assert exact.cost <= greedy.cost
    assert exact.gap < 1e-4
    tiny = {
        name: Options(one.choices, tuple(1e-6 * cost for cost in one.cost), one.price) for name, one in options.items()
    }
    assert solve_ilp(tiny, budget).cost == pytest.approx(1e-6 * exact.cost, rel=1e-4)  # no absolute gap ends it early
    assert greedy.cost > 1.0002 * exact.cost  # and a greedy answer would not pass here


def test_greedy_steps_along_the_hull() -> None:
    options = {
        "a": Options((2, 3, 4), (10.0, 9.0, 0.0), (1.0, 2.0, 3.0)),  # 3 lies above the line from 2 to 4
        "b": Options((2, 3, 4), (6.0, 2.0, 0.0), (1.0, 2.0, 3.0)),
    }
    found = {budget: solve_greedy(options, budget) for budget in (6, 5, 4, 3, 2)}
    assert [solution.cost for solution in found.values()] == [0, 2, 6, 16, 16]
    assert all(solution.choices["a"] != 3 for solution in found.values())


def test_a_budget_is_kept_within_the_solvers_tolerance() -> None:
    # HiGHS calls a row kept that is passed by less than 1e-6 of it.
    options = {name: Options((2, 4), (1.0, 0.0), (1.0, 2.0 + 1e-7)) for name in "ab"}
    for budget in (4.0, 3.0, 2.0):
        assert solve_ilp(options, budget).price <= budget
    assert solve_ilp(options, 3.1).cost == 1


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModelError, match=r"pip install 'everybit\[plan\]', or --method greedy"):
        solve_ilp({"a": Options((2,), (0.0,), (1.0,))}, 1)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("3.4bpw", "bpw", 3.4),
        ("1.2GB", "bytes", 1.2e9),
        ("900 MiB", "bytes", 900 * 2**20),
        ("5325056B", "bytes", 5325056),
        ("25ms/token", "ms", 25),
        (" 0.5ms ", "ms", 0.5),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)


@pytest.mark.parametrize(
    "text", ["", "3.4", "bpw", "-1bpw", "0bpw", "nan bpw", "1e3bpw", "3,4bpw", "1TB", "2iB", "²bpw"]
)
def test_budgets_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected a number with its unit, such as"):
        Budget.parse(text)


def test_a_budget_out_of_range_says_both_bounds_in_its_unit() -> None:
    for text, least, most, message in (
        ("2bpw", 2.139, 8.783, "below what any plan needs: expected 2.139bpw to 8.783bpw"),
        ("9bpw", 2.139, 8.783, "above what the highest precisions need: expected 2.139bpw to 8.783bpw"),
        ("1MB", 5e6, 12e6, "expected 5MB to 12MB"),
        ("1ms", 2.5, 7, "expected 2.500ms/token to 7.000ms/token"),
    ):
        with pytest.raises(RequestError, match=message):
            Budget.parse(text).require(least, most)
    Budget.parse("3bpw").require(3, 3)
