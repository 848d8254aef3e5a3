"""Percentiles, and how far a figure may be trusted: bootstrap intervals and Wilson's for shares."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, pstdev

from everybit.errors import SourceError

Statistic = Callable[[Sequence[float]], float]  # must not depend on the order of its values
_FEW = 100  # a p99 of fewer is hardly more than the maximum


@dataclass(frozen=True)
class Interval:
    low: float
    value: float
    high: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of ascending values, interpolated linearly (type 7). Raises: SourceError"""
    if not ordered:
        raise SourceError("a percentile of no values")
    if not 0 <= q <= 100:
        raise SourceError(f"percentile {q}: expected 0 to 100")
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if place == below or low == high:  # infinite neighbours have no difference
        return float(low)
    return low + (high - low) * (place - below)


def summary(values: Sequence[float], unit: float = 1) -> dict[str, float | int | bool]:
    """Of values in units of `unit`; `std` divides by n; `few`: too few values for their p99. Raises: SourceError"""
    if not values:
        raise SourceError("a summary of no values")
    ordered, n = sorted(values), len(values)
    mean = math.fsum(ordered) / n
    result: dict[str, float | int | bool] = {"n": n, "mean": mean / unit}
    result["std"] = math.sqrt(math.fsum([(value - mean) ** 2 for value in ordered]) / n) / unit
    result["min"] = ordered[0] / unit
    for q in (50, 90, 95, 99):
        result[f"p{q}"] = percentile(ordered, q) / unit
    return {**result, "max": ordered[-1] / unit, "few": n < _FEW}


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """A share and its score interval (Wilson, 1927). Raises: SourceError"""
    if not 0 <= successes <= total or not total:
        raise SourceError(f"{successes} of {total}: expected a share of one or more")
    share, z = successes / total, _normal(confidence)
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # Rounding must not push the ends past the share itself.
    return Interval(min(share, max(0.0, middle - half)), share, max(share, min(1.0, middle + half)))


def bootstrap_interval(
    values: Sequence[float], statistic: Statistic, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """`statistic` of independent values, computed anew for each resample: thousands of values, not millions.

    Expanded percentiles (Hesterberg, 2015): plain ones are too narrow for few values. Raises: SourceError
    """
    _check(len(values), 3, "values", resamples)
    ordered, source = sorted(values), random.Random(seed)
    draws = sorted(statistic(source.choices(ordered, k=len(ordered))) for _ in range(resamples))
    tail = 100 * NormalDist().cdf(-_widened(len(ordered), confidence))
    return Interval(percentile(draws, tail), statistic(ordered), percentile(draws, 100 - tail))


def ratio_interval(
    blocks_a: Sequence[Sequence[float]],
    blocks_b: Sequence[Sequence[float]],
    statistic: Statistic,
    *,
    paired: bool = True,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """statistic of A / statistic of B, each over all its blocks.

    Requests of one round wait in the same queues: whole rounds (blocks) are resampled, not requests. `paired`: block i
    of A and of B are of one round and are drawn together. Raises: SourceError
    """

    def log_ratio(a: float, b: float) -> float:
        if a <= 0 or b <= 0:
            raise SourceError(f"the ratio of {a:g} to {b:g}: expected more than 0 of each; compare by difference")
        return math.log(a / b)

    found = _compare(blocks_a, blocks_b, statistic, log_ratio, paired, confidence, resamples, seed)
    return Interval(math.exp(found.low), math.exp(found.value), math.exp(found.high))


def difference_interval(
    blocks_a: Sequence[Sequence[float]],
    blocks_b: Sequence[Sequence[float]],
    statistic: Statistic,
    *,
    paired: bool = True,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """statistic of A - statistic of B, as `ratio_interval`: for shares and indices, which can be zero."""
    return _compare(blocks_a, blocks_b, statistic, lambda a, b: a - b, paired, confidence, resamples, seed)


def _compare(
    blocks_a: Sequence[Sequence[float]],
    blocks_b: Sequence[Sequence[float]],
    statistic: Statistic,
    combine: Callable[[float, float], float],
    paired: bool,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """A t interval about the bootstrap's standard error (Hesterberg, 2015).

    Percentiles of the resamples cannot leave the range of the blocks: of four rounds they held the truth in 85 % of
    trials instead of 95.
    """
    few = min(len(blocks_a), len(blocks_b))
    _check(few, 3, "blocks", resamples)
    if paired and len(blocks_a) != len(blocks_b):
        raise SourceError(f"{len(blocks_a)} blocks of A and {len(blocks_b)} of B: expected pairs")
    if not all(len(block) for block in (*blocks_a, *blocks_b)):
        raise SourceError("a block without values")
    # Sorted blocks, one after another, sort again in little time: most statistics sort.
    a, b = [sorted(block) for block in blocks_a], [sorted(block) for block in blocks_b]
    source = random.Random(seed)
    draws = []
    for _ in range(resamples):
        chosen = source.choices(range(len(a)), k=len(a))
        other = chosen if paired else source.choices(range(len(b)), k=len(b))
        draws.append(combine(statistic(_joined(a, chosen)), statistic(_joined(b, other))))
    value = combine(statistic(_joined(a, range(len(a)))), statistic(_joined(b, range(len(b)))))
    half = _widened(few, confidence) * pstdev(draws)
    return Interval(value - half, value, value + half)


def _joined(blocks: Sequence[Sequence[float]], chosen: Sequence[int]) -> list[float]:
    return [value for place in chosen for value in blocks[place]]


def _check(count: int, least: int, what: str, resamples: int) -> None:
    if count < least:
        raise SourceError(f"{count} {what}: an interval needs {least} or more")
    if resamples < 100:
        raise SourceError(f"{resamples} resamples: expected 100 or more")


def _widened(n: int, confidence: float) -> float:
    """Standard errors to either side that a bootstrap from n values needs.

    The t quantile of n - 1 degrees, by its expansion about the normal one, and n / (n - 1) for the variance.
    """
    z, v = _normal(confidence), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t * math.sqrt(n / v)


def _normal(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise SourceError(f"confidence {confidence}: expected more than 0 and less than 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
