"""Calibration through the simulator: the parameters of a StepTime with which requests take as long as real ones did.

Bounded least squares of log errors with priors, by a simplex (Nelder and Mead, 1965): simulated times have jumps, which
lead those astray that follow slopes. Requests that are fitted run among all others, of which only the arrivals and
lengths are known, never the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from everybit.errors import SourceError
from everybit.plan.simulate.requests import Outcome
from everybit.plan.simulate.traces import Timing
from everybit.plan.step import Step

_RUNS = 30  # for each parameter, at most


@dataclass(frozen=True, slots=True)
class Parameter:
    """`spread`: by which factor it may well differ from `prior`."""

    name: str
    low: float
    prior: float
    high: float
    spread: float = 1.5


@dataclass(frozen=True)
class Linear:
    """A StepTime of five numbers, in seconds: of a step, of a token, of a token in the cache that a decode reads and of
    a pair of tokens of a prompt. `least_s`: what the weights take to read, whatever the tokens.
    """

    step_s: float
    least_s: float
    token_s: float
    read_s: float
    pair_s: float

    def seconds(self, step: Step, bits: int | None = None) -> float:
        read = sum(step.decodes)
        pairs = sum(new * (past + new / 2) for new, past in step.chunks)
        return self.step_s + max(self.least_s, self.token_s * step.tokens) + self.read_s * read + self.pair_s * pairs


@dataclass(frozen=True)
class Fitted:
    values: dict[str, float]
    at_bound: tuple[str, ...]
    runs: int


def fit(
    parameters: Sequence[Parameter],
    run: Callable[[dict[str, float]], Sequence[Outcome]],
    truth: dict[int, Timing],
    *,
    clock: Literal["client", "engine"] = "client",
    error: float = 0.02,
) -> Fitted:
    """`run` simulates with the parameters' values; `truth`: timings of the requests that are fitted, by id.

    `clock`: whose times those are: from the sending, or from when an engine looked (vLLM's own statistics).
    `error`: the log error of a request that the model cannot help. Raises: SourceError
    """
    if not truth:
        raise SourceError("no timings to fit: expected one request or more")
    for one in parameters:
        if not (0 < one.low <= one.prior <= one.high and one.low < one.high and one.spread > 1):
            raise SourceError(f"{one}: expected 0 < low <= prior <= high and a spread above 1")
    prior = np.log([one.prior for one in parameters])
    spread = np.log([one.spread for one in parameters])
    bounds = [(math.log(one.low), math.log(one.high)) for one in parameters]

    def named(point: np.ndarray) -> dict[str, float]:
        return {one.name: math.exp(value) for one, value in zip(parameters, point, strict=True)}

    def loss(point: np.ndarray) -> float:
        errors = _errors(run(named(point)), truth, clock)
        return float(np.mean(errors**2) / error**2 + np.sum(((point - prior) / spread) ** 2))

    corners = np.vstack([prior, prior + np.diag(spread / 2)])
    options = {"initial_simplex": corners, "xatol": 0.005, "fatol": 1e-3, "maxfev": _RUNS * len(parameters)}
    found = minimize(loss, prior, method="Nelder-Mead", bounds=bounds, options=options)
    ends = [min(value - low, high - value) for value, (low, high) in zip(found.x, bounds, strict=True)]
    at_bound = tuple(one.name for one, room in zip(parameters, ends, strict=True) if room < 0.01)
    return Fitted(named(found.x), at_bound, found.nfev)


def _errors(outcomes: Sequence[Outcome], truth: dict[int, Timing], clock: str) -> np.ndarray:
    """Of equal ranks, not of equal requests: whose turn it is in a queue jumps with the smallest change."""
    fitted = [one for one in outcomes if one.request.id in truth]
    if len(fitted) < len(truth):
        raise SourceError(f"{len(truth)} timings, {len(fitted)} of whose requests were simulated: expected all of them")
    for one in fitted:
        if not one.complete:
            raise SourceError(f"request {one.request.id} was refused, though it was served: {one.refused}")
    errors = []
    prefix = "engine_" if clock == "engine" else ""
    for name, own in (("ttft_s", prefix + "ttft_s"), ("tpot_s", "tpot_s"), ("e2e_s", prefix + "e2e_s")):
        pairs = [(getattr(one, own), getattr(truth[one.request.id], name)) for one in fitted]
        simulated, real = zip(*[pair for pair in pairs if None not in pair], strict=True)
        errors.append(np.log(np.sort(simulated)) - np.log(np.sort(real)))
    return np.concatenate(errors)
