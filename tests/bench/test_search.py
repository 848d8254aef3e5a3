"""The search against queues whose capacity is known: D/D/c exactly, M/D/c from a long simulation."""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import replace
from functools import cache

import pytest

from everybit.bench.search import Capacity, Limits, Probe, curve, find_capacity
from everybit.bench.statistics import wilson
from everybit.errors import SourceError

SERVICE_S = 0.1


def simulate(rate, seed, servers, slo_s, total, poisson) -> Probe:
    """First come, first served, by `servers` that take SERVICE_S each."""
    draw, free, now, kept = random.Random(seed), [0.0] * servers, 0.0, 0
    for _ in range(total):
        now += draw.expovariate(rate) if poisson else 1 / rate
        done = max(now, heapq.heappop(free)) + SERVICE_S
        heapq.heappush(free, done)
        kept += done - now <= slo_s
    return Probe(rate, kept, total, total / max(free))


@cache
def truth(servers, slo_s) -> float:
    low, high = 0.0, servers / SERVICE_S
    for _ in range(10):
        middle = (low + high) / 2
        run = simulate(middle, 1, servers, slo_s, 100_000, True)
        low, high = (middle, high) if run.kept >= 0.99 * run.total else (low, middle)
    return low


def search(probe, hint, limits=None, seed=0) -> Capacity:
    async def ask(rate, seed):
        return probe(rate, seed)

    return asyncio.run(find_capacity(ask, hint, limits, seed))


def rates(found: Capacity) -> int:
    return len({probe.rate for probe in found.probes})


@pytest.mark.parametrize("off", [1 / 20, 1 / 3, 1, 3, 20])
@pytest.mark.parametrize("servers", [1, 4])
def test_known_limit_of_a_regular_queue(servers, off):
    limit = servers / SERVICE_S
    found = search(lambda rate, seed: simulate(rate, seed, servers, 0.3, 2000, False), limit * off)
    assert found.verdict == "found"
    assert found.rate == pytest.approx(limit, rel=0.05)
    assert found.bracket[0] <= limit <= found.bracket[1]
    assert rates(found) <= 10


@pytest.mark.parametrize("off", [1 / 20, 20])
@pytest.mark.parametrize(("servers", "slo_s"), [(1, 0.3), (4, 0.2)])
def test_known_limit_of_a_poisson_queue(servers, slo_s, off):
    limit = truth(servers, slo_s)
    found = search(lambda rate, seed: simulate(rate, seed, servers, slo_s, 3000, True), limit * off)
    assert found.verdict == "found"
    assert found.rate == pytest.approx(limit, rel=0.05)
    assert rates(found) <= 10
    assert found.confidence > 0.5


def step(limit, total=1000):
    return lambda rate, seed: Probe(rate, total if rate <= limit else 0, total, min(rate, limit))


def test_nothing_fails():
    found = search(step(1e9), 1.0, Limits(most_rate=50))
    assert (found.verdict, found.rate, found.bracket) == ("at least", 50, (50, None))
    assert "the most allowed" in found.reason


def test_nothing_passes():
    found = search(step(0.0), 8.0, Limits(least_rate=1))
    assert (found.verdict, found.rate, found.bracket) == ("none", None, (None, 1))
    assert found.reason.startswith("even 1 requests/s")


def test_a_lagging_client_ends_the_search():
    found = search(lambda rate, seed: replace(step(100)(rate, seed), valid=rate < 30), 2.0)
    assert (found.verdict, found.rate) == ("at least", 8)
    assert "client" in found.reason
    first = search(lambda rate, seed: Probe(rate, 0, 10, rate, valid=False), 2.0)
    assert (first.verdict, first.rate, first.confidence, len(first.probes)) == ("unsure", None, None, 1)


def test_too_few_probes_leave_a_wide_bracket():
    found = search(step(100), 3.0, Limits(most_probes=4))
    assert (found.verdict, found.reason) == ("unsure", "4 rates were tried")
    assert found.bracket == (48, 192)


def test_an_unclear_rate_is_run_again_with_other_seeds():
    seeds = []

    def probe(rate, seed):
        seeds.append(seed)
        return Probe(rate, 99 if rate <= 10 else 98, 100, rate)  # at the share asked for, and a little under

    found = search(probe, 10.0, Limits(most_runs=3, most_probes=2), seed=7)
    assert seeds == [7, 8, 9, 10, 11, 12]
    assert found.rate == 10
    assert found.confidence == 0.5


def test_curve_pools_runs_and_leaves_out_invalid_ones():
    points = curve([Probe(2, 8, 10, 1.8), Probe(1, 10, 10, 1), Probe(2, 4, 10, 1.6), Probe(3, 9, 9, 3, valid=False)])
    assert [(point.rate, point.runs, point.share.value) for point in points] == [(1, 1, 1.0), (2, 2, 0.6)]
    assert points[1].goodput == pytest.approx(1.7 * 0.6)
    assert points[1].share == wilson(12, 20)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Limits(share=1),
        lambda: Limits(tolerance=0),
        lambda: Limits(most_runs=0),
        lambda: search(step(1), 0.0),
        lambda: search(step(1), float("nan")),
        lambda: search(step(1), 1.0, Limits(least_rate=2)),
        lambda: search(lambda rate, seed: Probe(rate, 0, 0, 0), 1.0),
    ],
)
def test_bad_input(bad):
    with pytest.raises(SourceError):
        bad()
