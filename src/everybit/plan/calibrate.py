"""Efficiencies from measurements: bounded least squares of log times with priors, and bootstrap draws for intervals."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, NamedTuple

import numpy as np

from everybit.errors import SourceError, reason
from everybit.plan.cost import Cost, Parallel, Work
from everybit.plan.efficiency import BOUNDS, Efficiency, Products, is_routed, read_weight_only
from everybit.plan.hardware import Hardware
from everybit.plan.operators import Model
from everybit.plan.service import Latency, Service, compile_service
from everybit.plan.step import Step

_FORMAT, _VERSION = "everybit-plan-calibration", 3
_NAMES = tuple(BOUNDS)
# How far a fit may well be from its prior, as a standard deviation of the log.
_FREE = {"memory": 0.15, "compute": 0.3, "overlap": 0.3, "attention": 0.4, "cache": 0.3, "sequence_s": 0.4, "link": 0.5}
_FREE_OTHERS = 0.7
# Scale of an error of each measure; first tokens are mostly queueing, and light loads are noise.
_SCALES = {"ttft_s": 0.4, "tpot_s": 0.08, "e2e_s": 0.08}
_CLOSE = 0.2  # scales of measures that tell the spread
_PRIOR_RUNS = 4
_SURE = NormalDist().inv_cdf(0.95)
_KINDS = {
    "product": "16 bits or more",
    "narrow": "fewer than 16 bits",
    "weight_only": "weights below what is multiplied",
}


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
class Seen:
    """What the runs of a fit had: kinds of products (see `Work`), and splits as (tp, pp)."""

    kinds: tuple[str, ...]
    splits: tuple[tuple[int, int], ...]

    def lacks(self, model: Model, hardware: Hardware, parallel: Parallel) -> list[str]:
        kinds = _kinds(Cost(model, hardware).works(Step(decodes=(1,)))) - set(self.kinds)
        found = [f"products of {_KINDS[one]}" for one in sorted(kinds)]
        if (parallel.tp, parallel.pp) not in self.splits:
            found.append(f"tp {parallel.tp}" + (f" pp {parallel.pp}" if parallel.pp > 1 else ""))
        return found


@dataclass(frozen=True)
class Fit:
    """`draws`: efficiencies of resampled measurements, for intervals. `seen`: None where all was measured."""

    efficiency: Efficiency
    draws: tuple[Efficiency, ...]
    seen: Seen | None = None


@dataclass(frozen=True)
class Calibration:
    """`efficiency`, `draws`: the fit of models without experts, of those with experts where no other was measured.

    `routed`: the fit of models with experts, where both were measured. `versions`: of the engine, as measured.
    """

    hardware: str
    engine: str
    versions: tuple[str, ...]
    efficiency: Efficiency
    draws: tuple[Efficiency, ...]
    samples: int
    routed: Fit | None = None
    seen: Seen | None = None

    def of(self, model: Model) -> Fit:
        """What holds for a model."""
        found = self.routed if self.routed and is_routed(model) else Fit(self.efficiency, self.draws, self.seen)
        return replace(found, efficiency=found.efficiency.of(model))

    def save(self, path: str | Path) -> None:
        """Raises: SourceError where the file cannot be written"""
        document = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        partial = Path(f"{path}.partial")
        try:
            partial.write_text(json.dumps(document, indent=1), "utf-8")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise SourceError(f"calibration {path}: cannot be written: {reason(error)}") from None


def read_calibration(path: str | Path) -> Calibration:
    """Raises: SourceError for a file that `Calibration.save` has not written"""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if found.pop("format") != _FORMAT or found.pop("version") != _VERSION:
            raise ValueError("another format or version")
        return Calibration(
            **{
                **found,
                "versions": tuple(found["versions"]),
                "efficiency": _read_efficiency(found["efficiency"]),
                "draws": tuple(map(_read_efficiency, found["draws"])),
                "routed": None if found["routed"] is None else _read_fit(**found["routed"]),
                "seen": _read_seen(found["seen"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"calibration {path}: {type(error).__name__}: {reason(error)}; expected a file of everybit plan calibrate"
        ) from None


def calibrate(samples: Sequence[Sample], prior: Efficiency, *, draws: int = 20, seed: int = 0) -> Calibration:
    """Fits one hardware and engine; what the samples say nothing of stays at the prior.

    Models with experts are fitted apart from those without: one fit of both misses either by more, and its one spread
    holds for neither. Raises: SourceError for no samples, mixed ones, or times that are not above 0
    """
    _check(samples)
    versions, randomly = tuple(sorted({one.version for one in samples})), random.Random(seed)
    families = [(routed, [one for one in samples if is_routed(one.model) == routed]) for routed in (False, True)]
    first, *rest = (_fit_family(own, prior, routed, draws, randomly) for routed, own in families if own)
    return Calibration(
        samples[0].hardware.name,
        samples[0].engine,
        versions,
        first.efficiency,
        first.draws,
        len(samples),
        rest[0] if rest else None,
        first.seen,
    )


class Judged(NamedTuple):
    """Of times per token and to the end. `inside`: the share in the 90 % interval, which is a `factor` either way."""

    median_error: float
    inside: float
    factor: float


def judge(samples: Sequence[Sample], efficiency: Efficiency) -> Judged | None:
    """How well efficiencies tell measured runs of one family; None where these have first tokens only."""
    logs = []
    for one in samples:
        predicted = one.predict(efficiency)
        for name, scale in _SCALES.items():
            if scale < _CLOSE and (value := getattr(one, name)) is not None:
                logs.append(abs(math.log(getattr(predicted, name) / value)))
    if not logs:
        return None
    ratio = _SURE * efficiency.spread
    return Judged(math.expm1(median(logs)), sum(one < ratio for one in logs) / len(logs), math.exp(ratio))


def _fit_family(samples: Sequence[Sample], prior: Efficiency, routed: bool, draws: int, randomly: random.Random) -> Fit:
    """Never further from its own runs than the prior is."""
    cases = [_Case(one, prior.ahead) for one in samples]
    fitted = _fit(cases, prior)
    if _square(cases, fitted) > _square(cases, prior):
        fitted = prior  # the robust fit may leave outliers further away than they were
    count = sum(scale < _CLOSE for _, scale in _errors(cases, fitted))
    # Of few errors, which a fit makes small by itself, the prior's counts for some more.
    before = prior.routed_spread if routed else prior.spread
    spread = math.sqrt((_square(cases, fitted) + _PRIOR_RUNS * before**2) / (count + _PRIOR_RUNS))
    others = max(prior.routed_spread, spread)  # what the fit is for the other family, nobody knows
    told: dict[str, Any] = {
        "spread": others if routed else spread,
        "routed_spread": spread if routed else others,
        "source": f"calibrated on {len(samples)} runs of {samples[0].hardware.name} x {samples[0].engine}, "
        f"models with{'' if routed else 'out'} experts",
    }
    again = (_fit(randomly.choices(cases, k=len(cases)), prior, fitted) for _ in range(draws))
    kinds = {kind for case in cases for kind in _kinds(case.service.decode)}
    splits = {(one.parallel.tp, one.parallel.pp) for one in samples}
    seen = Seen(tuple(sorted(kinds)), tuple(sorted(splits)))
    return Fit(replace(fitted, **told), tuple(replace(one, **told) for one in again), seen)


def _kinds(works: Sequence[Work]) -> set[str]:
    """Of the products whose width differs: heads and routers stay wide."""
    return {one.kind for one in works if one.linear and one.name not in ("head", "router")}


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


def _square(cases: Sequence[_Case], efficiency: Efficiency) -> float:
    """The sum of squared log errors of the measures that tell the spread."""
    return sum((error * scale) ** 2 for error, scale in _errors(cases, efficiency) if scale < _CLOSE)


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


def _read_fit(efficiency: Any, draws: Any, seen: Any) -> Fit:
    return Fit(_read_efficiency(efficiency), tuple(map(_read_efficiency, draws)), _read_seen(seen))


def _read_seen(found: Any) -> Seen | None:
    return None if found is None else Seen(**{name: _tuples(one) for name, one in found.items()})


def _read_efficiency(found: dict[str, Any]) -> Efficiency:
    known = {one.name for one in fields(Efficiency)}
    if set(found) != known:
        raise ValueError(f"efficiency with {', '.join(sorted(set(found) ^ known))} too many or missing")
    for name, (low, high) in BOUNDS.items():
        if not low * 0.999 <= found[name] <= high * 1.001:
            raise ValueError(f"{name} {found[name]} outside {low} to {high}")
    for name in ("spread", "routed_spread"):
        if not 0 <= found[name] <= 5:
            raise ValueError(f"{name} {found[name]} outside 0 to 5")
    products = None if found["products"] is None else Products(**_tuples(found["products"]))
    return Efficiency(**{**found, "weight_only": read_weight_only(found["weight_only"]), "products": products})


def _tuples(found: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    if isinstance(found, dict):
        return {name: _tuples(one) for name, one in found.items()}
    return tuple(map(_tuples, found)) if isinstance(found, list) else found
