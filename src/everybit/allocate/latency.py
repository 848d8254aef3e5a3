"""How long a token takes on this machine at each precision, and what that says of a plan.

Source: latency as a sum over layers of measured table entries, as in ProxylessNAS (Cai, Zhu and Han, arXiv:1812.00332),
section 3.3.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from everybit.allocate.units import Unit
from everybit.engine.ops import Experts
from everybit.engine.plan import Precision
from everybit.engine.runtime import Runtime

PROMPT_TOKENS = 16  # short: attention grows with the text and not with the precision
ROUNDS = 9
ROUND_S = 0.04  # of one precision in one round


def measure_ms(
    runtime: Runtime, precisions: Sequence[Precision], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds of one decode step at each precision: medians over rounds in which all take turns.

    Needs:   a context of 2 tokens or more
    Cost:    about 0.4 s a precision, or 36 steps where these are slower; tables of precisions not used before
    Mutates: sequence 0 of the runtime
    """
    prompt = min(PROMPT_TOKENS, runtime.context - 1)
    runtime.reset(0)
    runtime.prefill(0, [0] * prompt, precisions[0])

    def step(precision: Precision) -> float:
        runtime.reset(0, prompt)
        start = clock()
        runtime.decode([0], precision)
        return clock() - start

    steps = []
    for precision in precisions:
        step(precision)  # builds tables
        steps.append(min(64, max(3, math.ceil(ROUND_S / max(step(precision), 1e-6)))))
    taken: list[list[float]] = [[] for _ in precisions]
    for _ in range(ROUNDS):
        for precision, count, times in zip(precisions, steps, taken, strict=True):
            step(precision)  # the caches hold another precision's planes
            times.extend(step(precision) for _ in range(count))
    return [1000 * statistics.median(times) for times in taken]


def shares(runtime: Runtime, units: Sequence[Unit]) -> dict[str, float]:
    """What part of a token's weights each unit is, of those that have a choice; routed experts count as often as used.

    Shapes: sums to 1 where any unit has a choice
    """
    used = {
        name: op.top_k for op in runtime.native.program.ops if isinstance(op, Experts) for name in (op.gate_up, op.down)
    }
    read = {
        unit.name: sum(
            spec.parameters * (min(1.0, used[spec.name] / spec.shape[0]) if spec.name in used else 1.0)
            for spec in unit.members
        )
        for unit in units
        if len(unit.choices) > 1
    }
    return {name: float(count / np.sum(list(read.values()))) for name, count in read.items()}


def deployment(unit: Unit, choice: int, precisions: Sequence[int]) -> int | None:
    """A precision of the whole model at which the unit is read as at `choice`; None where there is none to measure."""
    wanted = unit.own(choice)
    return next((bits for bits in precisions if unit.own(bits) == wanted), None)


def predict_ms(
    units: Sequence[Unit], choices: Mapping[str, int], share: Mapping[str, float], table: Mapping[int, float]
) -> float | None:
    """Milliseconds per token of a plan: each unit's share of the time at the precision it is read at.

    Times of whole models hold what does not depend on the precision, so the shares hand it on whole.
    None where a unit is read at a precision that no uniform deployment has.
    """
    total = 0.0
    for unit in units:
        if unit.name in share:
            bits = deployment(unit, choices[unit.name], tuple(table))
            if bits is None:
                return None
            total += share[unit.name] * table[bits]
    return total if share else next(iter(table.values()))
