"""Efficiencies from measurements: bounded least squares of log times with priors, and bootstrap draws for intervals."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from everybit.errors import SourceError, reason
from everybit.plan.cost import Parallel
from everybit.plan.efficiency import BOUNDS, Efficiency, Products, WeightOnly
from everybit.plan.hardware import Hardware
from everybit.plan.operators import Model
from everybit.plan.service import Latency, Service, compile_service

_FORMAT = "everybit-plan-calibration"
_NAMES = tuple(BOUNDS)
# How far a fit may well be from its prior, as a standard deviation of the log.
_FREE = {"memory": 0.15, "compute": 0.3, "overlap": 0.3, "attention": 0.4, "cache": 0.3, "sequence_s": 0.4, "link": 0.5}
_FREE_OTHERS = 0.7
# Scale of an error of each measure; first tokens are mostly queueing, and light loads are noise.
_SCALES = {"ttft_s": 0.4, "tpot_s": 0.08, "e2e_s": 0.08}
_PRIOR_RUNS = 4


@dataclass(frozen=True)
class Sample:
    """One measured run. `closed`: clients that each send the next request at once; else one batch of `concurrency`."""

    model: Model
    hardware: Hardware
    parallel: Parallel
    concurrency: int
    prompt: int
    output: int
    engine: str
    version: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    closed: bool = True
    source: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What an efficiency holds for."""
        return self.hardware.name, self.engine, self.version

    def service(self, ahead: float) -> Service:
        return compile_service(
            self.model,
            self.hardware,
            self.parallel,
            concurrency=self.concurrency,
            prompt=self.prompt,
            output=self.output,
            ahead=ahead,
        )

    def predict(self, efficiency: Efficiency) -> Latency:
        return _latency(self.service(efficiency.ahead), self.closed, efficiency)


@dataclass(frozen=True)
class Calibration:
    """`draws`: efficiencies of resampled measurements, for intervals. `versions`: of the engine, as measured."""

    hardware: str
    engine: str
    versions: tuple[str, ...]
    efficiency: Efficiency
    draws: tuple[Efficiency, ...]
    samples: int

    def save(self, path: str | Path) -> None:
        """Raises: SourceError where the file cannot be written"""
        try:
            Path(path).write_text(json.dumps({"format": _FORMAT, "version": 1, **asdict(self)}, indent=1), "utf-8")
        except OSError as error:
            raise SourceError(f"calibration {path}: cannot be written: {reason(error)}") from None


def read_calibration(path: str | Path) -> Calibration:
    """Raises: SourceError for a file that `Calibration.save` has not written"""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if found.pop("format") != _FORMAT or found.pop("version") != 1:
            raise ValueError("another format or version")
        return Calibration(
            **{
                **found,
                "versions": tuple(found["versions"]),
                "efficiency": _read_efficiency(found["efficiency"]),
                "draws": tuple(map(_read_efficiency, found["draws"])),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"calibration {path}: {type(error).__name__}: {reason(error)}; expected a file of everybit plan calibrate"
        ) from None


def calibrate(samples: Sequence[Sample], prior: Efficiency, *, draws: int = 20, seed: int = 0) -> Calibration:
    """Fits one hardware and engine; what the samples say nothing of stays at the prior.

    Raises: SourceError for no samples, mixed ones, or times that are not above 0
    """
    _check(samples)
    cases = [_Case(one, prior.ahead) for one in samples]
    fitted = _fit(cases, prior)
    errors = [error * scale for error, scale in _errors(cases, fitted) if scale < 0.2]
    spread = _spread(errors, prior.spread)
    versions = tuple(sorted({one.version for one in samples}))
    source = f"calibrated on {len(samples)} runs of {samples[0].hardware.name} x {samples[0].engine}"
    fitted = replace(fitted, spread=spread, source=source)
    randomly = random.Random(seed)
    again = tuple(
        replace(_fit(randomly.choices(cases, k=len(cases)), prior, fitted), spread=spread, source=source)
        for _ in range(draws)
    )
    return Calibration(samples[0].hardware.name, samples[0].engine, versions, fitted, again, len(samples))


def _spread(errors: Sequence[float], prior: float) -> float:
    """Of few errors, which a fit makes small by itself, the prior's counts for `_PRIOR_RUNS` more."""
    return math.sqrt((sum(e * e for e in errors) + _PRIOR_RUNS * prior**2) / (len(errors) + _PRIOR_RUNS))


class _Case:
    """A sample whose operators are listed once, and its measured times with the scales of their errors."""

    def __init__(self, sample: Sample, ahead: float) -> None:
        self.service, self.closed = sample.service(ahead), sample.closed
        measured = [(i, getattr(sample, name), _SCALES[name]) for i, name in enumerate(_SCALES)]
        self.measured = [(i, math.log(value), scale) for i, value, scale in measured if value is not None]


def _latency(service: Service, closed: bool, efficiency: Efficiency) -> Latency:
    return service.latency(efficiency) if closed else service.batch_latency(efficiency)


def _errors(cases: Sequence[_Case], efficiency: Efficiency) -> list[tuple[float, float]]:
    """Log errors over their scales, and the scales."""
    found = []
    for case in cases:
        predicted = _latency(case.service, case.closed, efficiency)
        found += [((math.log(predicted[i]) - value) / scale, scale) for i, value, scale in case.measured]
    return found


def _fit(cases: Sequence[_Case], prior: Efficiency, start: Efficiency | None = None) -> Efficiency:
    from scipy.optimize import least_squares  # estimates do without scipy

    low, high = (np.log([BOUNDS[name][side] for name in _NAMES]) for side in (0, 1))
    free = np.array([_FREE.get(name, _FREE_OTHERS) for name in _NAMES])
    center = _logs(prior)

    def residuals(x: np.ndarray) -> np.ndarray:
        errors = [error for error, _ in _errors(cases, _at(prior, x))]
        return np.concatenate([errors, (x - center) / free])

    begin = np.clip(_logs(start or prior), low + 1e-6, high - 1e-6)
    return _at(prior, least_squares(residuals, begin, bounds=(low, high), loss="soft_l1", max_nfev=60).x)


def _logs(efficiency: Efficiency) -> np.ndarray:
    return np.log([max(getattr(efficiency, name), BOUNDS[name][0]) for name in _NAMES])


def _at(prior: Efficiency, x: np.ndarray) -> Efficiency:
    values: dict[str, Any] = dict(zip(_NAMES, map(math.exp, x), strict=True))
    return replace(prior, **values)


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise SourceError(
            "calibration: no samples arrived, expected measured runs of one hardware and engine: add some"
        )
    if len(mixed := {one.key[:2] for one in samples}) > 1:
        raise SourceError(
            f"calibration: samples of {sorted(mixed)} arrived, expected one hardware and engine: split them"
        )
    for one in samples:
        measured = [value for value in (one.ttft_s, one.tpot_s, one.e2e_s) if value is not None]
        if not measured or not all(0 < value < math.inf for value in measured):
            raise SourceError(
                f"calibration: times {measured} of {one.source or one.key}, expected seconds above 0: drop it"
            )


def _read_efficiency(found: dict[str, Any]) -> Efficiency:
    known = {one.name for one in fields(Efficiency)}
    if set(found) != known:
        raise ValueError(f"efficiency with {', '.join(sorted(set(found) ^ known))} too many or missing")
    for name, (low, high) in BOUNDS.items():
        if not low * 0.999 <= found[name] <= high * 1.001:
            raise ValueError(f"{name} {found[name]} outside {low} to {high}")
    products = None if found["products"] is None else Products(**_tuples(found["products"]))
    return Efficiency(**{**found, "weight_only": WeightOnly(**found["weight_only"]), "products": products})


def _tuples(found: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    if isinstance(found, dict):
        return {name: _tuples(one) for name, one in found.items()}
    return tuple(map(_tuples, found)) if isinstance(found, list) else found
