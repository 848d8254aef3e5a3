"""One choice for each unit, least cost within a budget: exactly, as an integer linear program, and greedily."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everybit.errors import ModelError

F64 = NDArray[np.float64]
TIME_LIMIT_S = 60.0
# HiGHS takes a row as kept within 1e-6 of it (primal_feasibility_tolerance), and rows are scaled to a budget of 1.
TIGHTER = 1 - 2e-6


@dataclass(frozen=True)
class Options:
    """What one unit can be: for each choice the `cost` (lower is better) and the `price` (what the budget limits)."""

    choices: tuple[int, ...]
    cost: tuple[float, ...]
    price: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """A choice for each unit with sums of cost and price; `gap` is how far the cost may be from the least possible."""

    choices: dict[str, int]
    cost: float
    price: float
    gap: float = 0.0


def solve_ilp(options: Mapping[str, Options], budget: float) -> Solution:
    """The least sum of costs whose prices sum to at most `budget`, one choice for each unit.

    Needs:  scipy; a budget that some choice keeps
    Cost:   milliseconds for hundreds of units; after 60 s the best so far, with its gap
    Raises: ModelError (no scipy)
    Source: Yao et al., HAWQ-V3 (arXiv:2011.10680), section 3.4: bit precision as an ILP over additive sensitivities
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise ModelError(
            "scipy is not installed, which the exact solver needs: pip install 'everybit[plan]', or --method greedy"
        ) from None
    sizes = [len(one.choices) for one in options.values()]
    cost = np.concatenate([np.subtract(one.cost, min(one.cost)) for one in options.values()])
    price = np.concatenate([one.price for one in options.values()]) / budget
    # HiGHS also stops at an absolute gap of 1e-6, so costs (nats, often below 1e-3) are scaled up.
    scale = 1e6 / cost.sum() if cost.any() else 1.0
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(cost)), (rows, np.arange(len(cost)))), shape=(len(sizes), len(cost)))
    limit = 1.0
    for _ in range(2):  # once more, a hair below the budget, should rounding inside the solver have passed it
        found = milp(
            cost * scale,
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(price[None], -np.inf, limit)],
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
        if found.x is not None:
            solution = _pick(options, found.x, sizes, max(0.0, float(found.mip_gap or 0.0)))
            if solution.price <= budget:
                greedy = solve_greedy(options, budget)
                return solution if solution.cost <= greedy.cost else greedy
        limit = TIGHTER
    return solve_greedy(options, budget)  # a budget within 2e-6 of the least there is


def solve_greedy(options: Mapping[str, Options], budget: float) -> Solution:
    """From every unit's least cost down the lower convex hull of its choices, the cheapest step per price first.

    Needs: a budget that some choice keeps
    """
    at = {name: _hull(one) for name, one in options.items()}  # indices, from the least price to the least cost
    price = sum(options[name].price[hull[-1]] for name, hull in at.items())
    steps = []
    for name, hull in at.items():
        one = options[name]
        for lower, upper in itertools.pairwise(hull):
            saved = one.price[upper] - one.price[lower]
            steps.append(((one.cost[lower] - one.cost[upper]) / saved, saved, name))
    for _, saved, name in sorted(steps):  # along a hull slopes ascend, so each unit's steps come in order
        if price <= budget:
            break
        at[name].pop()
        price -= saved
    chosen = {name: hull[-1] for name, hull in at.items()}
    while _total(options, chosen, "price") > budget:  # the running difference was rounded
        name = next(name for name, hull in at.items() if len(hull) > 1)
        at[name].pop()
        chosen[name] = at[name][-1]
    return _solution(options, chosen)


def bounds(options: Mapping[str, Options]) -> tuple[float, float]:
    """The least and the greatest sum of prices that choices can have."""
    return (
        sum(min(one.price) for one in options.values()),
        sum(max(one.price) for one in options.values()),
    )


def _hull(one: Options) -> list[int]:
    """Indices of the lower convex hull of (price, cost), from the least price to the least cost, slopes ascending."""
    order = sorted(range(len(one.choices)), key=lambda i: (one.price[i], one.cost[i]))
    falling: list[int] = []
    for i in order:
        if not falling or one.cost[i] < one.cost[falling[-1]]:
            falling.append(i)
    hull: list[int] = []
    for i in falling:
        while len(hull) > 1 and _slope(one, hull[-2], hull[-1]) >= _slope(one, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(one: Options, a: int, b: int) -> float:
    return (one.cost[b] - one.cost[a]) / (one.price[b] - one.price[a])


def _pick(options: Mapping[str, Options], x: F64, sizes: Sequence[int], gap: float) -> Solution:
    parts = np.split(x, np.cumsum(sizes)[:-1])
    solution = _solution(options, {name: int(part.argmax()) for name, part in zip(options, parts, strict=True)})
    return Solution(solution.choices, solution.cost, solution.price, gap)


def _solution(options: Mapping[str, Options], index: Mapping[str, int]) -> Solution:
    choices = {name: options[name].choices[i] for name, i in index.items()}
    return Solution(choices, _total(options, index, "cost"), _total(options, index, "price"))


def _total(options: Mapping[str, Options], index: Mapping[str, int], what: str) -> float:
    return float(sum(getattr(options[name], what)[i] for name, i in index.items()))
