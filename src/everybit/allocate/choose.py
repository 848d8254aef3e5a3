"""From an overlay and a budget to a plan: measure, solve, compare."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everybit import __version__
from everybit.allocate import latency, texts
from everybit.allocate.budget import Budget, price_bytes, price_ms
from everybit.allocate.divergence import Divergence
from everybit.allocate.sensitivities import Store, measure, settings_of
from everybit.allocate.solve import Options, Solution, solve_greedy, solve_ilp
from everybit.allocate.units import Group, Unit, assignment, find_units
from everybit.engine.plan import Plan, identity
from everybit.engine.runtime import Runtime
from everybit.errors import ModelError, SourceError
from everybit.tokenizer import Tokenizer

Method = Literal["ilp", "greedy"]
METHODS: tuple[Method, ...] = ("ilp", "greedy")
CONTEXT = 512  # tokens of a window, where the model has as many
MAX_TOKENS = 4096


@dataclass(frozen=True)
class Allocation:
    """A plan and how it came about."""

    plan: Plan
    units: tuple[Unit, ...]
    solutions: dict[Method, Solution]  # without "ilp" where it was not asked for and scipy is not installed
    predicted_ms: float | None = None  # a token, where the budget is one of time
    measured_ms: float | None = None


def allocate(
    folder: str | os.PathLike[str],
    budget: str | Budget,
    *,
    text: str | os.PathLike[str] | None = None,
    group: Group = "weight",
    method: Method = "ilp",
    max_tokens: int = MAX_TOKENS,
    mode: str = "default",
    threads: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Allocation:
    """The precisions of least summed cost within a budget.

    A cost is the KL to the overlay's own highest precisions, on `text` (None: text the model writes itself), when one
    unit alone is lowered. Costs are taken to add up, which they do only roughly: `predicted_kl` is the sum, and what a
    plan is worth is measured on the plan.

    Cost:    a pass of `max_tokens` tokens for each unit and precision, kept in `cache` (default: beside the overlay);
             tables of every precision in memory
    Raises:  RequestError (budget), SourceError (text), ModelError, FormatError, OutputError
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    with Runtime.open(folder, threads=threads, mode=mode) as runtime:
        overlay = runtime.checkpoint.overlay
        if overlay is None:
            raise SourceError(f"{folder} holds float weights, expected an overlay: run everybit quantize on it first")
        name, units = identity(overlay), find_units(overlay, group)
        share = latency.shares(runtime, units)
        table: dict[int, float] = {}
        if budget.kind == "ms":
            table = dict(zip(overlay.bits, latency.measure_ms(runtime, overlay.bits), strict=True))
            prices = price_ms(units, share, table)
        else:
            prices = price_bytes(overlay, units, budget.kind)
        prices.require(budget)

        context = min(CONTEXT, runtime.context)
        source = {"text": texts.digest(text)} if text is not None else {"self": 0}
        settings = settings_of(overlay, name, **source, group=group, max_tokens=max_tokens, context=context, mode=mode)

        def divergence(reference: Plan) -> Divergence:
            tokenizer = Tokenizer.open(Path(folder))
            if text is None:
                windows = texts.from_model(runtime, tokenizer, context, max_tokens)
            else:
                windows = texts.from_file(text, tokenizer, context, max_tokens)
            return Divergence(runtime, windows, reference)

        store = Store.open(Path(cache) if cache is not None else beside(folder, "sensitivities.json"), settings)
        costs = measure(name, units, divergence, store, progress)
        options = {
            unit: Options(tuple(of), tuple(costs[unit][choice] for choice in of), tuple(of.values()))
            for unit, of in prices.of.items()
        }
        solutions = _solve(options, prices.limit(budget), method)
        chosen = solutions[method]
        made = {"everybit_version": __version__, "method": method, "settings": settings, "gap": chosen.gap}
        plan = Plan.of(
            overlay,
            assignment(units, chosen.choices),
            budget=budget.text,
            predicted_kl=chosen.cost,
            provenance=made,
        )
        if budget.kind != "ms":
            return Allocation(plan, units, solutions)
        (measured,) = latency.measure_ms(runtime, [plan])
        predicted = latency.predict_ms(units, chosen.choices, share, table)
        return Allocation(plan, units, solutions, predicted, measured)


def beside(folder: str | os.PathLike[str], ending: str) -> Path:
    """`OVERLAY.ending`, next to the overlay's folder."""
    home = Path(os.path.abspath(Path(folder).expanduser()))
    return home.with_name(f"{home.name}.{ending}")


def _solve(options: dict[str, Options], limit: float, method: Method) -> dict[Method, Solution]:
    found: dict[Method, Solution] = {"greedy": solve_greedy(options, limit)}
    try:
        found["ilp"] = solve_ilp(options, limit)
    except ModelError:  # no scipy
        if method == "ilp":
            raise
    return found
