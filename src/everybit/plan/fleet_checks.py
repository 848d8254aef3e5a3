"""Whether a fleet keeps its SLO when requests come at random: by a formula, and by simulation.

Both are functions of a fleet for `plan_fleet(verify=...)`: the least share of requests that is served in time over the
share that is asked for, so that 1 or more is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from scipy.special import gammaln, pdtr, xlogy

from everybit.batching.fluidity import Target
from everybit.errors import SourceError
from everybit.plan.candidates import Candidate
from everybit.plan.deployment import Deployment
from everybit.plan.fleet import Fleet
from everybit.plan.fleet_inputs import Bucket
from everybit.plan.simulate.metrics import Slo, measure
from everybit.plan.simulate.requests import draw
from everybit.plan.simulate.run import simulate

REQUESTS = 400  # simulated of each type
_WARMUP = 0.2  # of them, while the deployment fills
_REPLICAS = 4  # simulated of each type, with their part of the demand: more would not fill, and fewer queue more


def queued(
    found: Sequence[Candidate], demand: Sequence[Bucket], slo: Slo, *, spot_losses: int = 1
) -> Callable[[Fleet], float]:
    """By M/M/c (Erlang C): the places of a type are the clients that keep the SLO's means at once, over its replicas.

    In time is who finds a place. That is cautious: fewer clients are served faster, and of many a request is as slow
    as all of its tokens. Simulated (8B, 95 %), one replica of 13 and 16 places held loads of 0.6 and 0.8 where 0.58 and
    0.61 are allowed here, four replicas 0.9 where 0.77 and 0.79 are. Neither fluidity nor types with rates of their own
    are judged.
    """
    by_name = {one.type.name: one for one in found}
    asked = min(slo.share, 1 - 1 / REQUESTS)  # a queue is never empty for sure

    def judge(fleet: Fleet) -> float:
        kept = [1.0]
        for name, load in fleet.loads.items():
            if (one := by_name.get(name)) and load > 0:
                busy = [a / b if b else 0.0 for a, b in zip(_rates(fleet, demand, name), one.type.rates, strict=True)]
                clients = sum(a * b for a, b in zip(busy, one.clients, strict=True)) / sum(busy)
                places = int(_working(fleet, one, spot_losses) * clients)
                kept.append((1 - _waiting(places, load)) / asked)
        return min(kept)

    return judge


def _waiting(places: int, load: float) -> float:
    """The share that finds all places taken; `load`: of a place. Erlang B is a Poisson variable's chance of `places`
    over that of no more, so millions of places take no loop."""
    if load >= 1:
        return 1.0
    mean = places * load
    blocked = math.exp(xlogy(places, mean) - mean - gammaln(places + 1)) / float(pdtr(places, mean))
    return blocked / (1 - load * (1 - blocked))


def simulated(
    found: Sequence[Candidate], demand: Sequence[Bucket], slo: Slo, *, engine: str = "any", spot_losses: int = 1
) -> Callable[[Fleet], float]:
    """By simulating each type under its part of the demand. `engine`: everybit's scheduler, else one as vLLM's.

    Judging raises: SourceError for a type that is none of `found`
    """
    by_name = {one.type.name: one for one in found}
    target = Target(round(1e9 * (slo.first_s or 1.0)), round(1e9 * (slo.gap_s or 0.1)))
    scheduler = "everybit" if engine == "everybit" else "vllm"

    def share(fleet: Fleet, one: Candidate) -> float:
        rates = _rates(fleet, demand, one.type.name)
        lengths = list(_lengths(demand, rates))
        if not lengths:  # it is there for others' spares
            return slo.share
        deployment = Deployment({0: one.model}, one.card, one.split, one.efficiency, scheduler)
        working = _working(fleet, one, spot_losses)
        replicas = min(working, _REPLICAS)
        requests = draw(sum(rates) * replicas / working, REQUESTS, lengths)
        context = max(prompt + output for prompt, output in lengths)
        pool = deployment.pool(replicas, context, target, "shortest-queue")
        begin_s = requests[round(_WARMUP * REQUESTS)].at_s
        return float(measure(simulate(requests, pool), target, slo, begin_s=begin_s)["goodput"]["share"])

    def judge(fleet: Fleet) -> float:
        if unknown := [name for name in fleet.counts if name not in by_name]:
            raise SourceError(f"'{unknown[0]}' has rates of its own, so it cannot be simulated: leave it out")
        return min(share(fleet, by_name[name]) for name in fleet.counts) / slo.share

    return judge


def _working(fleet: Fleet, one: Candidate, spot_losses: int) -> int:
    return fleet.counts[one.type.name] - (spot_losses if one.type.spot else 0)


def _rates(fleet: Fleet, demand: Sequence[Bucket], name: str) -> list[float]:
    """Requests/s of each bucket that a type serves."""
    return [row.get(name, 0.0) * bucket.requests_per_s for row, bucket in zip(fleet.split, demand, strict=True)]


def _lengths(demand: Sequence[Bucket], rates: list[float]) -> Iterator[tuple[int, int]]:
    """A hundred pairs or a few more, each bucket as often as its requests are."""
    for rate, bucket in zip(rates, demand, strict=True):
        if rate > 0:
            yield from [(bucket.input_tokens, bucket.output_tokens)] * max(1, round(100 * rate / sum(rates)))
