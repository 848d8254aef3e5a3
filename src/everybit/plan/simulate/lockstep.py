"""Steps of data-parallel groups whose experts are spread over all of them, which therefore run in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everybit.plan.cost import Cost
from everybit.plan.step import Step


class Lockstep:
    """A JointTime: the slowest group's own layers, then the experts, which see the tokens of all groups.

    A Cost takes all groups to do the same, so the experts' time is its own less that of the model without experts, at
    the mean tokens of a group. `stream_s`: a step takes at least that (offloading); `pace` multiplies all.
    """

    def __init__(self, cost: Cost, stream_s: float = 0.0, pace: float = 1.0) -> None:
        layers = tuple(replace(layer, experts=None) for layer in cost.model.layers)
        bare = replace(cost.model, layers=layers)
        self._all, self._own = cost, Cost(bare, cost.hardware, cost.parallel, cost.efficiency)
        self._stream_s, self._pace = stream_s, pace
        self._experts = {0: 0.0}  # seconds by tokens of each group

    def seconds(self, step: Step, bits: int | None = None) -> float:
        return self.seconds_together([step])

    def seconds_together(self, steps: Sequence[Step], bits: int | None = None) -> float:
        """`steps`: of each group, of those that have one."""
        mean = sum(step.tokens for step in steps) / self._all.parallel.dp
        low, share = int(mean), mean % 1
        experts_s = (1 - share) * self._experts_s(low) + (share * self._experts_s(low + 1) if share else 0.0)
        return self._pace * max(max(self._own.seconds(step) for step in steps) + experts_s, self._stream_s)

    def _experts_s(self, rows: int) -> float:
        if rows not in self._experts:
            step = Step(decodes=(0,) * rows)
            self._experts[rows] = self._all.seconds(step) - self._own.seconds(step)
        return self._experts[rows]
