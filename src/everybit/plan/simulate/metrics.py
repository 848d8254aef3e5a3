"""What a simulation says, under the names, units and definitions of `everybit bench`.

Sums go over all requests that arrived within the window; refused ones count as errors, as smooth 0 and as outside the
SLO. Figures of the deployment itself (`replicas`) are of the whole run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from everybit.batching.fluidity import Pace, Target
from everybit.errors import SourceError
from everybit.plan.simulate.replica import Replica
from everybit.plan.simulate.requests import Outcome
from everybit.plan.simulate.run import Simulated

Document = dict[str, Any]
SMOOTH = 0.9  # the least index of a stream that felt smooth (Etalon, Agrawal et al. 2024)
_FEW = 100  # a p99 of fewer is hardly more than the maximum
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Slo:
    """What `share` of the requests must keep; None: not asked for. Raises: SourceError

    `first_s`, `end_s`: first and last token from the arrival. `gap_s`: mean time of a token after the first.
    """

    first_s: float | None = None
    gap_s: float | None = None
    end_s: float | None = None
    fluidity: float | None = None
    share: float = 0.99

    def __post_init__(self) -> None:
        asked = [one for one in (self.first_s, self.gap_s, self.end_s, self.fluidity) if one is not None]
        if not asked or not all(0 < one < math.inf for one in asked) or not 0 < self.share <= 1:
            raise SourceError(f"{self}: expected one part or more, each above 0, and a share above 0 and at most 1")


def measure(
    done: Simulated, target: Target, slo: Slo | None = None, *, begin_s: float = 0.0, end_s: float = math.inf
) -> Document:
    """Of requests that arrived from `begin_s` to before `end_s`; `target`: when tokens are due. Raises: SourceError"""
    end_s = min(end_s, math.nextafter(done.ends_s, math.inf))
    if not 0 <= begin_s < end_s:
        raise SourceError(
            f"a window from {begin_s} to {end_s} s of a run of {done.ends_s:.3f} s: expected a part of it"
        )
    scored = [one for one in done.outcomes if begin_s <= one.at_s < end_s]
    complete = [one for one in scored if not one.refused]
    if not complete:
        why = next((one.refused for one in scored), "none arrived")
        raise SourceError(f"nothing to measure: {len(scored)} requests arrived in the window, none complete ({why})")
    indices = {one.request.id: fluidity(one, target) for one in scored}
    seconds = end_s - begin_s
    times = [at for one in done.outcomes for at in one.times_s if begin_s <= at < end_s]
    prompts = sum(
        one.request.prompt_tokens for one in done.outcomes if one.times_s and begin_s <= one.times_s[0] < end_s
    )
    ended = sum(1 for one in done.outcomes if one.times_s and begin_s <= one.times_s[-1] < end_s)
    return {
        "requests": {
            "all": len(done.outcomes),
            "scored": len(scored),
            "complete": len(complete),
            "failed": len(scored) - len(complete),
        },
        "latency": _latency(complete, len(scored) - len(complete)),
        "throughput": {
            "seconds": seconds,
            "output_tokens_per_s": len(times) / seconds,
            "prompt_tokens_per_s": prompts / seconds,
            "requests_per_s": ended / seconds,
        },
        "goodput": _goodput(scored, indices, slo, seconds) if slo else None,
        "fluidity": _fluidity(list(indices.values())),
        "precision": _precision(complete),
        "cached_share": sum(one.cached_tokens for one in complete) / sum(one.request.prompt_tokens for one in complete),
        "replicas": {one.name: _replica(one, done.ends_s) for one in done.replicas},
    }


def table(done: Simulated, target: Target) -> list[Document]:
    """A row for each request."""
    return [
        {
            "id": one.request.id,
            "replica": one.replica,
            "arrival_s": one.at_s,
            "prompt_tokens": one.request.prompt_tokens,
            "output_tokens": one.request.output_tokens,
            "cached_tokens": one.cached_tokens,
            "queue_ms": None if one.begin_s is None else 1e3 * (one.begin_s - one.at_s),
            "ttft_ms": 1e3 * one.ttft_s if one.complete else None,
            "tpot_ms": 1e3 * tpot if one.complete and (tpot := one.tpot_s) is not None else None,
            "e2e_ms": 1e3 * one.e2e_s if one.complete else None,
            "fluidity": fluidity(one, target),
            "refused": one.refused,
        }
        for one in done.outcomes
    ]


def fluidity(outcome: Outcome, target: Target) -> float:
    """The fluidity index of a stream; 0 for one that was refused."""
    if outcome.refused:
        return 0.0
    pace = Pace(target, round(outcome.at_s * _NS))
    for at in outcome.times_s:
        pace.token(round(at * _NS))
    return pace.fluidity


def summary(values: Sequence[float], missing: int = 0) -> Document | None:
    """Percentiles are linear between ranks; `few`: too few values for their p99. None of no values."""
    if not values:
        return None
    found = np.asarray(values)
    ranks = {f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 95, 99)}
    ends = {"min": float(found.min()), **ranks, "max": float(found.max())}
    few = len(values) < _FEW
    return {
        "n": len(values),
        "mean": float(found.mean()),
        "std": float(found.std()),
        **ends,
        "few": few,
        "missing": missing,
    }


def _latency(complete: Sequence[Outcome], failed: int) -> Document:
    def block(value: Callable[[Outcome], float | None], unit: float = 1e3) -> Document | None:
        found = [unit * one for outcome in complete if (one := value(outcome)) is not None]
        return summary(found, len(complete) - len(found) + failed)

    gaps = [1e3 * (b - a) for one in complete for a, b in pairwise(one.times_s)]
    single = sum(1 for one in complete if len(one.times_s) < 2)
    gap = summary(gaps, single + failed)
    if gap is not None:
        gap["curve"] = [float(one) for one in np.percentile(gaps, range(101))]
    return {
        "ttft_ms": block(lambda one: one.ttft_s),
        "e2e_ms": block(lambda one: one.e2e_s),
        "normalised_ms": block(lambda one: one.e2e_s / len(one.times_s)),
        "tpot_ms": block(lambda one: one.tpot_s),
        "gap_ms": gap,
        "gap_variation": block(_variation, 1),
        "queue_ms": block(lambda one: None if one.begin_s is None else one.begin_s - one.at_s),
    }


def _variation(outcome: Outcome) -> float | None:
    """Standard deviation over mean of the waits between tokens, of streams with three or more."""
    gaps = np.diff(outcome.times_s)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.any() else None


def _goodput(scored: Sequence[Outcome], indices: dict[int, float], slo: Slo, seconds: float) -> Document:
    parts: dict[str, list[bool]] = {}
    if (first := slo.first_s) is not None:
        parts["ttft"] = [not one.refused and one.ttft_s <= first for one in scored]
    if (gap := slo.gap_s) is not None:
        parts["tpot"] = [not one.refused and (one.tpot_s or 0.0) <= gap for one in scored]
    if (end := slo.end_s) is not None:
        parts["e2e"] = [not one.refused and one.e2e_s <= end for one in scored]
    if (least := slo.fluidity) is not None:
        parts["fluidity"] = [indices[one.request.id] >= least for one in scored]
    kept = sum(map(all, zip(*parts.values(), strict=True)))
    return {
        "kept": kept,
        "of": len(scored),
        "share": kept / len(scored),
        "met": kept / len(scored) >= slo.share,
        "requests_per_s": kept / seconds,
        "parts": {name: sum(one) / len(one) for name, one in parts.items()},
    }


def _fluidity(indices: Sequence[float]) -> Document:
    found = {f"p{q}": float(np.percentile(indices, q)) for q in (1, 10, 50)}
    smooth = sum(one >= SMOOTH for one in indices) / len(indices)
    return {"n": len(indices), "mean": sum(indices) / len(indices), **found, "smooth_share": smooth}


def _precision(complete: Sequence[Outcome]) -> Document | None:
    """Tokens by precision, where replicas have more than one."""
    totals = Counter(bits for one in complete for bits in one.bits if bits is not None)
    if not totals:
        return None
    return {
        "tokens": {str(bits): totals[bits] for bits in sorted(totals)},
        "mean_bits": sum(bits * tokens for bits, tokens in totals.items()) / totals.total(),
        "requests_with_switch": sum(len(set(one.bits)) > 1 for one in complete),
    }


def _replica(replica: Replica, ends_s: float) -> Document:
    """Means are over its busy time. Joules are None where nobody said what it draws."""
    ran, busy_s = replica.ran, sum(one.took_s for one in replica.ran)
    kv, waiting, running = (
        sum(getattr(one, name) * one.took_s for one in ran) / busy_s if ran else 0.0
        for name in ("blocks_used", "waiting", "running")
    )
    joules = sum(one.joules for one in ran) + replica.idle_w * (ends_s - busy_s)
    return {
        "steps": len(ran),
        "utilisation": busy_s / ends_s,
        "kv_blocks": replica.blocks,
        "kv_used_mean": kv,
        "kv_used_max": max((one.blocks_used for one in ran), default=0.0),
        "waiting_mean": waiting,
        "waiting_max": max((one.waiting for one in ran), default=0),
        "running_mean": running,
        "preemptions": replica.preempted,
        "joules": joules if replica.watts is not None else None,
    }
