"""What plans answer: the functions of `everybit.plan` behind fields that were checked."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from everybit.batching.fluidity import Target
from everybit.errors import SourceError
from everybit.plan.cost import Parallel
from everybit.plan.efficiency import prior
from everybit.plan.estimate import Estimate, estimate, roofline
from everybit.plan.explain import explain
from everybit.plan.hardware import Hardware, cards, read_hardware, weakest
from everybit.plan.model import models, read_model
from everybit.plan.operators import Model
from everybit.plan.simulate.metrics import Slo, measure
from everybit.plan.simulate.requests import Outcome, Request, draw
from everybit.plan.simulate.run import simulate
from everybit.plan.step import Step, StepTime
from everybit.plan.widths import check_multiplied, read_at
from everybit.server.planning import Deadline, blame
from everybit.server.planning_fields import (
    MOST_REQUESTS,
    MOST_TOKENS,
    MOST_TYPES,
    Common,
    EstimateFields,
    FleetFields,
    SimulateFields,
    Width,
)
from everybit.server.problems import Problem

_MOST_LAYERS, _MOST_LISTED, _MOST_PATTERNS = 256, 1024, 64  # of a config.json
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PROGRAM_S = 3.0  # of the solver, for each of a dozen programs: mostly it takes some hundredths
_LENGTHS = 64  # pairs that lengths are drawn from


# --- routes
def estimate_all(body: EstimateFields, deadline: Deadline) -> dict[str, Any]:
    """Raises: Problem"""
    found, hardware = _models(body, body.bits), _cards(body.cards, body.prices)
    slo = _slo(body)
    rows: list[dict[str, Any]] = []
    impossible = []
    load: dict[str, Any] = {"concurrency": body.users, "prompt": body.prompt, "engine": body.engine}
    load["parallel"] = Parallel(body.tp)
    first, gap = (slo.first_s, slo.gap_s) if slo else (None, None)
    for name, card in hardware.items():
        for bits, model in found.items():
            deadline.check()
            options = {**load, "output": body.output, "price": body.prices.get(name, "on-demand")}
            try:
                check_multiplied(bits, model, card)
                one = estimate(model, card, **options)
                why = explain(model, card, most_ttft_s=first, most_tpot_s=gap, **options)
                roof = _roofline(model, card, **load)
            except SourceError as error:
                impossible.append({"card": name, "bits": bits, "why": str(error)})
                continue
            rows.append(
                {
                    **asdict(one),
                    "card": name,
                    "known": one.card,
                    "bits": bits,
                    "weight_bits": _weight_bits(model),
                    "keeps_slo": _keeps(one, slo),
                    "why": why,
                    "roofline": roof,
                }
            )
    for row, best in zip(rows, _pareto(rows), strict=True):
        row["pareto"] = best
    return {"model": _about(found), "estimates": rows, "impossible": impossible}


def solve_fleet(body: FleetFields, deadline: Deadline) -> dict[str, Any]:
    """Raises: Problem"""
    from everybit.plan.candidates import Terms, candidate, type_name
    from everybit.plan.fleet import finest, plan_fleet
    from everybit.plan.fleet_checks import queued
    from everybit.plan.fleet_inputs import Bucket, Limits

    found, hardware, slo = _models(body, body.bits), _cards(body.cards, {**body.prices, **body.quotas}), _slo(body)
    _unique("tp", body.tp)
    if slo is None:
        raise _problem("slo", "is missing: a fleet is planned for the limits that it must keep")
    if (count := len(hardware) * len(found) * len(body.tp)) > MOST_TYPES:
        raise _problem("cards", f"x bits x tp are {count} replica types: expected at most {MOST_TYPES}")
    if body.quality is not None and (missing := [bits for bits in found if bits not in body.quality]):
        raise _problem("quality", f"has no number for {missing[0]}: give one for each width, or none at all")
    demand = [Bucket(one.prompt, one.output, one.requests_per_s) for one in body.demand]
    kept, impossible = [], {}
    for name, card in hardware.items():
        terms = Terms(body.prices.get(name, "on-demand"))
        for tp in body.tp:
            for bits, model in found.items():
                deadline.check()
                try:
                    one = candidate(
                        model,
                        card,
                        demand,
                        slo,
                        bits=bits,
                        tp=tp,
                        terms=terms,
                        engine=body.engine,
                        quality=_weight_bits(model) if body.quality is None else body.quality[bits],
                        needs_power=body.power_w is not None,
                    )
                except SourceError as error:
                    impossible[type_name(card, tp, bits, terms)] = str(error)
                else:
                    kept.append(one)
    types = [one.type for one in kept]
    if not types:
        name, why = next(iter(impossible.items()))
        raise Problem(400, f"none of {len(impossible)} replica types is possible; {name}: {why}", code="impossible")
    limits = Limits(
        utilisation=body.utilisation,
        quotas={hardware[name].name: most for name, most in body.quotas.items()},
        power_w=body.power_w,
        least_quality=body.least_quality,
    )
    limits = finest(demand, types, limits, limit_s=min(_PROGRAM_S, deadline.left_s))
    deadline.check()
    limit_s = min(_PROGRAM_S, deadline.left_s)
    fleet = plan_fleet(demand, types, limits, verify=queued(kept, demand, slo), explain=True, limit_s=limit_s)
    return {
        "model": _about(found),
        "fleet": asdict(fleet),
        "demand": [{"name": one.name, **asdict(one)} for one in demand],
        "types": [asdict(one) for one in types],
        "impossible": impossible,
        "prices": {one.type.name: "given" if one.price is None else asdict(one.price) for one in kept},
        "rests_on": {one.type.name: {"efficiencies": one.efficiency.source, "card": one.known} for one in kept},
        "quality": "bits a weight" if body.quality is None else "given",
        "simulated": False,
    }


def run_simulation(body: SimulateFields, deadline: Deadline) -> dict[str, Any]:
    """Raises: Problem"""
    from everybit.plan.deployment import Deployment

    rungs, slo = _rungs(_models(body, body.bits)), _slo(body)
    card = _cards([body.card], {})[body.card]
    requests = _requests(body)
    target = Target(round(1e9 * ((slo and slo.first_s) or 1.0)), round(1e9 * ((slo and slo.gap_s) or 0.1)))
    efficiency = prior(card, body.engine)
    with blame("scheduler"):
        deployment = Deployment(rungs, card, Parallel(body.tp), efficiency, body.scheduler)
    context = max(one.prompt_tokens + one.output_tokens for one in requests)
    if context > deployment.model.context:
        said = f"and output make requests of up to {context} tokens, the model's context is {deployment.model.context}"
        raise _problem("prompt", said)
    with blame("card"):
        pool = deployment.pool(body.replicas, context, target, "shortest-queue")
    for replica in pool.replicas:
        replica.time = _Watched(replica.time, deadline)
    done = simulate(requests, pool)
    found = measure(done, target, slo)
    usd = body.usd_per_h
    if usd is None and any(one.kind == "on-demand" for one in card.prices):
        usd = card.price().usd_per_h
    return {
        "model": deployment.model.name,
        "hardware": card.name,
        "metrics": found,
        "bill": _bill(found, usd, body.tp * body.replicas),
        "timeline": [_life(one) for one in done.outcomes],
        "rests_on": {"efficiencies": efficiency.source, "card": weakest(card)},
    }


# --- fields
class _Watched(NamedTuple):
    time: StepTime
    deadline: Deadline

    def seconds(self, step: Step, bits: int | None = None) -> float:
        self.deadline.check()
        return self.time.seconds(step, bits)


def _problem(param: str, said: str) -> Problem:
    return Problem(400, f"{param} {said}", param=param, code="invalid_value")


def _unique(param: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise _problem(param, "names something twice: give each once")


def _models(body: Common, widths: Sequence[Width]) -> dict[Width, Model]:
    """By width. A name is one of the offline set, never a path of this machine."""
    _unique("bits", widths)
    if (body.model is None) == (body.config is None):
        raise _problem("model", "or config: expected one of them")
    if body.model is not None and body.model not in models():
        raise _problem("model", f"{body.model[:80]!r} is not of the offline set: see /plan/choices, or send a config")
    if body.config is not None:
        _check_config(body.config)
    source: Any = body.model or body.config
    with blame("config" if body.model is None else "model"):
        own = read_model(source)
    with blame("bits"):
        return {bits: own if bits == "own" else read_at(source, bits) for bits in widths}


def _check_config(config: Mapping[str, Any]) -> None:
    """That it is of a size that models have: while one is read, each module of each layer meets each pattern."""
    for part in (config, *(one for one in config.values() if isinstance(one, dict))):
        for key, value in part.items():
            if isinstance(value, list) and len(value) > _MOST_LISTED:
                raise _problem("config", f"has {len(value)} entries in {key[:40]!r}: expected {_MOST_LISTED} at most")
            if key in _DEPTHS and isinstance(value, int) and value > _MOST_LAYERS:
                raise _problem("config", f"has {key} {value}: expected {_MOST_LAYERS} layers at most")
        texts = list(_texts(part.get("quantization_config")))
        wild = [len(re.findall(r"[*+?{]", one)) for one in texts]
        if len(texts) > _MOST_LISTED or len(wild) - wild.count(0) > _MOST_PATTERNS or max(wild, default=0) > 2:
            said = f"names too many modules: expected {_MOST_LISTED}, {_MOST_PATTERNS} of them with up to 2 wildcards"
            raise _problem("config", f"has a quantization_config that {said}")


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _cards(names: Sequence[str], about: Mapping[str, object]) -> dict[str, Hardware]:
    """`about`: what else names cards, which must be among them."""
    _unique("cards", names)
    known = cards()
    for name in (*names, *about):
        if name not in known or name not in names:
            raise _problem("cards", f"{name[:64]!r}: expected names of /plan/choices, the same in prices and quotas")
    return {name: read_hardware(name) for name in names}


def _slo(body: Common) -> Slo | None:
    if body.slo is None:
        return None
    first, gap = (None if ms is None else ms / 1e3 for ms in (body.slo.ttft_ms, body.slo.tpot_ms))
    if first is None and gap is None:
        raise _problem("slo", "is empty: expected ttft_ms, tpot_ms or both")
    return Slo(first, gap)


def _rungs(found: Mapping[Width, Model]) -> dict[int, Model]:
    """By bits; what is no precision of everybit's is 0, alone."""
    rungs = {int(bits[-1]) if bits.startswith("everybit") else 0: model for bits, model in found.items()}
    if len(rungs) < len(found) or (len(rungs) > 1 and 0 in rungs):
        raise _problem("bits", "of a simulation are one width, or several of everybit's to choose among")
    return rungs


def _requests(body: SimulateFields) -> list[Request]:
    count = round(body.rate * body.seconds)
    if not 1 <= count <= MOST_REQUESTS:
        raise _problem("rate", f"x seconds are {count} requests: expected 1 to {MOST_REQUESTS}")
    if (tokens := count * (body.prompt + body.output)) > MOST_TOKENS:
        raise _problem("prompt", f"and output of all requests are {tokens:,} tokens: expected {MOST_TOKENS:,} at most")
    randomly = random.Random(body.seed)
    sizes = [(max(1, mean // 2), mean + mean // 2) for mean in (body.prompt, body.output)]
    lengths = [(randomly.randint(*sizes[0]), randomly.randint(*sizes[1])) for _ in range(_LENGTHS)]
    return draw(body.rate, count, lengths, seed=body.seed)


# --- answers
def _roofline(model: Model, card: Hardware, **load: Any) -> dict[str, Any]:
    found = roofline(model, card, **load)
    points = [{"phase": phase, **one._asdict()} for phase in ("decode", "prefill") for one in getattr(found, phase)]
    return {"flops": found.flops, "bytes_per_s": found.bytes_per_s, "points": points}


def _about(found: Mapping[Width, Model]) -> dict[str, Any]:
    model = next(iter(found.values()))
    return {
        "name": model.name,
        "parameters": model.parameters,
        "context": model.context,
        "weight_bytes": {bits: one.weight_bytes for bits, one in found.items()},
        "unknown": list(model.unknown),
    }


def _weight_bits(model: Model) -> float:
    return 8 * model.weight_bytes / model.parameters


def _keeps(one: Estimate, slo: Slo | None) -> bool | None:
    """Whether the means do."""
    if slo is None:
        return None
    pairs = ((one.ttft_s.value, slo.first_s), (one.tpot_s.value, slo.gap_s))
    return all(most is None or value <= most for value, most in pairs)


def _pareto(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether no other with a price has as many bits, as low a bill and as short a TPOT, and one of them better."""

    def point(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
        usd = row["usd_per_mtok"]
        return None if usd is None else (-row["weight_bits"], usd["value"], row["tpot_s"]["value"])

    points = [point(row) for row in rows]
    others = [one for one in points if one is not None]
    return [
        mine is not None
        and not any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in others)
        for mine in points
    ]


def _bill(found: Mapping[str, Any], usd: float | None, devices: int) -> dict[str, float | None]:
    tokens_per_s = found["throughput"]["output_tokens_per_s"]
    joules = [one["joules"] for one in found["replicas"].values()]
    watts = None if None in joules else sum(joules) / found["throughput"]["seconds"]
    return {
        "usd_per_h": None if usd is None else usd * devices,
        "usd_per_mtok": None if usd is None else usd * devices / 3600 / tokens_per_s * 1e6,
        "watts": watts,
        "joules_per_token": None if watts is None else watts / tokens_per_s,
    }


def _life(one: Outcome) -> dict[str, Any]:
    told = [bits for bits in one.bits if bits]
    return {
        "at_s": one.at_s,
        "begin_s": one.begin_s,
        "first_s": one.times_s[0] if one.times_s else None,
        "end_s": one.times_s[-1] if one.times_s else None,
        "prompt_tokens": one.request.prompt_tokens,
        "output_tokens": one.request.output_tokens,
        "bits": sum(told) / len(told) if told else None,
        "replica": one.replica,
        "refused": one.refused,
    }
