"""What a deployment does under steady load: latency, throughput, dollars, joules, CO2, with intervals and reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, pstdev
from typing import NamedTuple

from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration, Fit
from everybit.plan.cost import SINGLE, Cost, Parallel, Times, Work, times
from everybit.plan.efficiency import Efficiency, prior
from everybit.plan.hardware import Hardware, Price, weakest
from everybit.plan.memory import device_weights, fit
from everybit.plan.offload import Placement, pin_and_stream
from everybit.plan.operators import Linear, Model
from everybit.plan.power import Interval, Power, carbon_g, power_of
from everybit.plan.service import Service, compile_service
from everybit.plan.speculation import Speculation
from everybit.plan.step import Step

_COVERED = 0.9  # of the truth, by every interval
_SURE = NormalDist().inv_cdf(0.5 + _COVERED / 2)
_FIRST_SPREAD = 0.5  # first tokens are mostly queueing, which a closed form hides


@dataclass(frozen=True)
class Estimate:
    """Of all devices. Rates are of output tokens; money, joules and CO2 count what reading the prompts takes, too.

    None: the card has no price or power, or no carbon intensity was given. `running`: clients that fit in memory at
    once. `binding`: what decoding, prefill and the first token are limited by, and the share of the time that it takes.
    `price`: of one device. `source`, `known`: of the efficiencies, which are calibrated, partly calibrated (the source
    says what is not), or the prior's (measured, borrowed, assumed); `card`: how its weakest figure is known.
    """

    model: str
    hardware: str
    engine: str
    parallel: Parallel
    concurrency: int
    running: float
    prompt: int
    output: int
    ttft_s: Interval
    tpot_s: Interval
    e2e_s: Interval
    tokens_per_s: Interval
    usd_per_mtok: Interval | None
    joules_per_token: Interval | None
    gco2e_per_token: Interval | None
    binding: dict[str, tuple[str, float]]
    price: Price | None
    source: str
    known: str
    card: str


def estimate(
    model: Model,
    hardware: Hardware,
    *,
    parallel: Parallel = SINGLE,
    concurrency: int = 1,
    prompt: int = 1024,
    output: int = 256,
    engine: str = "any",
    calibration: Calibration | None = None,
    price: str | float = "on-demand",
    g_per_kwh: Interval | None = None,
    pue: float = 1.0,
    power: Power | None = None,
    offload: bool = False,
    speculation: Speculation | None = None,
) -> Estimate:
    """The steady state of `concurrency` clients (see `service`).

    `price`: a kind of the card's prices, or $/h of one device. `offload`: weights that do not fit are streamed.
    Raises: SourceError for what is impossible, with the arithmetic and the nearest that is possible
    """
    known = efficiencies(model, hardware, engine, calibration, parallel)
    efficiency = known.efficiency
    placement = None
    if offload:
        placement = place(model, hardware, parallel, prompt + output, concurrency / parallel.dp, efficiency)
    service = compile_service(
        model,
        hardware,
        parallel,
        concurrency=concurrency,
        prompt=prompt,
        output=output,
        ahead=efficiency.ahead,
        pinned_bytes=placement.pinned_bytes if placement else None,
        stream_s=placement.stream_s if placement else 0.0,
    )
    gain = _gain(model, hardware, parallel, service, efficiency, speculation) if speculation else 1.0
    decode, prefill = service.steps(efficiency)
    found = service.latency(efficiency, gain)
    others = [service.latency(one, gain) for one in known.draws]
    ttft, tpot, e2e = (
        _interval(found[i], [one[i] for one in others], math.hypot(efficiency.spread, extra))
        for i, extra in enumerate((_FIRST_SPREAD, 0.0, 0.0))
    )
    tokens = _inverse(concurrency * output, e2e)
    paid = _price(hardware, price)
    joules = _joules(service, hardware, efficiency, power, gain, found.e2e_s / concurrency / output)
    each = None if joules is None else _interval(joules, [], max(efficiency.spread, 0.15))  # 0.15: of the power curve
    return Estimate(
        model=model.name,
        hardware=hardware.name,
        engine=engine,
        parallel=parallel,
        concurrency=concurrency,
        running=min(concurrency, service.running * parallel.dp),
        prompt=prompt,
        output=output,
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=e2e,
        tokens_per_s=tokens,
        usd_per_mtok=None if paid is None else _inverse(paid.usd_per_h * parallel.devices / 3600 * 1e6, tokens),
        joules_per_token=each,
        gco2e_per_token=None if each is None or g_per_kwh is None else _carbon(each, g_per_kwh, pue),
        binding={
            "decode": _binding(decode),
            "prefill": _binding(prefill),
            "first token": _longest(service.first(efficiency, gain)),
        },
        price=paid,
        source=efficiency.source,
        known=efficiency.known,
        card=weakest(hardware),
    )


def efficiencies(
    model: Model, hardware: Hardware, engine: str, calibration: Calibration | None, parallel: Parallel = SINGLE
) -> Fit:
    """What holds for a deployment: of what was never measured, the calibration is no surer than the prior.

    Raises: SourceError for a calibration of another card or engine
    """
    before = prior(hardware, engine).of(model)
    if calibration is None:
        return Fit(before, ())
    if (calibration.hardware, calibration.engine) != (hardware.name, engine):
        raise SourceError(
            f"a calibration of {calibration.hardware} x {calibration.engine} arrived for {hardware.name} x {engine}: "
            "pass the one that was measured there"
        )
    found = calibration.of(model)
    lacks = found.seen.lacks(model, hardware, parallel) if found.seen else []
    efficiency = replace(found.efficiency, known="calibrated")
    if lacks:
        spread = max(before.spread, efficiency.spread)
        source = f"{efficiency.source}; none of them of {' or '.join(lacks)}, so the spread is {spread:.2g}"
        efficiency = replace(efficiency, known="partly calibrated", spread=spread, source=source)
    return replace(found, efficiency=efficiency)


class Point(NamedTuple):
    """An operator on the roofline: FLOP a byte, and FLOP/s that the efficiencies allow it, of the step's `seconds`."""

    name: str
    intensity: float
    flops: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """`flops`, `bytes_per_s`: the card's peaks, of 16-bit numbers."""

    flops: float
    bytes_per_s: float
    decode: tuple[Point, ...]
    prefill: tuple[Point, ...]


def roofline(
    model: Model,
    hardware: Hardware,
    *,
    parallel: Parallel = SINGLE,
    concurrency: int = 1,
    prompt: int = 1024,
    engine: str = "any",
    calibration: Calibration | None = None,
) -> Roofline:
    """Where the operators of a decoding step and of one prompt lie. Raises: SourceError"""
    efficiency = efficiencies(model, hardware, engine, calibration, parallel).efficiency
    cost = Cost(model, hardware, parallel, efficiency)
    flops, bandwidth = cost.peak(16, 16)[0], hardware.main_memory.bytes_per_s
    steps = (Step(decodes=(prompt,) * concurrency), Step(chunks=((prompt, 0),)))
    decode, prefill = (tuple(_points(cost.works(step), efficiency, bandwidth)) for step in steps)
    return Roofline(flops, bandwidth, decode, prefill)


# --- parts
def place(
    model: Model,
    hardware: Hardware,
    parallel: Parallel,
    context: int,
    sequences: float,
    efficiency: Efficiency,
    rung: Model | None = None,
) -> Placement | None:
    """Pins what the caches of a group's `sequences` leave free; they get at most half of the room, unless one needs
    more. None: all weights fit beside a cache. `rung`: whose weights a step reads (None: the model's).

    Raises: SourceError
    """
    if fit(model, hardware, parallel, context=context).sequences:
        return None
    bare = fit(model, hardware, parallel, context=context, pinned_bytes=0.0)
    caches = min(bare.cache_bytes * max(1.0, sequences), max(bare.cache_bytes, bare.room_bytes / 2))
    weights = device_weights(rung or model, parallel)
    return pin_and_stream(weights, bare.room_bytes - caches, hardware, efficiency.memory)


def _gain(
    model: Model,
    hardware: Hardware,
    parallel: Parallel,
    service: Service,
    efficiency: Efficiency,
    speculation: Speculation,
) -> float:
    """The draft reads fewer planes of the same weights; verification multiplies all drafts with all planes."""
    batch, rows = max(1, round(service.batch)), speculation.drafts + 1
    step = Step(decodes=(service.prompt + service.output // 2,) * batch)
    verify = Step(chunks=tuple((rows, past) for past in step.decodes))
    draft = Cost(with_bits(model, speculation.draft_bits), hardware, parallel, efficiency)
    full = Cost(model, hardware, parallel, efficiency)
    plain_s, verify_s = (
        times(works, efficiency, full.layers, batch, service.stream_s).total_s
        for works in (full.works(step), full.works(verify, sampled=rows * batch))
    )
    return speculation.gain(draft.seconds(step) / plain_s, verify_s / plain_s)


def with_bits(model: Model, bits: float) -> Model:
    """The model with at most `bits` stored for each weight of its layers; routers, head and embedding stay."""

    def cut(linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
        return tuple(one if one.name == "router" else replace(one, bits=min(one.bits, bits)) for one in linears)

    layers = tuple(
        replace(
            layer,
            linears=cut(layer.linears),
            experts=replace(layer.experts, linears=cut(layer.experts.linears)) if layer.experts else None,
        )
        for layer in model.layers
    )
    return replace(model, layers=layers)


def _interval(value: float, draws: Sequence[float], spread: float) -> Interval:
    """Log-normal: the draws' spread and what the model itself misses are independent."""
    logs = [math.log(one) for one in draws]
    ratio = math.exp(_SURE * math.hypot(pstdev(logs) if logs else 0.0, spread))
    return Interval(value, value / ratio, value * ratio)


def _inverse(numerator: float, one: Interval) -> Interval:
    return Interval(numerator / one.value, numerator / one.high, numerator / one.low)


def _price(hardware: Hardware, price: str | float) -> Price | None:
    """Of one device; None where the card lists none of its kind."""
    if isinstance(price, str):
        return hardware.price(price) if any(one.kind == price for one in hardware.prices) else None
    if not 0 <= price <= 1000:
        raise SourceError(f"a price of {price!r} $/h arrived, expected that of one device, 0 to 1000: fix it")
    return Price(float(price), "given", "the user", "", "given by the user")


def _joules(
    service: Service, hardware: Hardware, efficiency: Efficiency, power: Power | None, gain: float, token_s: float
) -> float | None:
    """Of one output token, on all devices: its share of a decoding step and of its prompt, and their waiting.

    `token_s`: from one token to the next. Devices that do not work in it (groups without a client, stages without a
    batch, all while a lone request is tokenized) idle.
    """
    if power is None and hardware.tdp_w is None:
        return None
    curve, parallel = power or power_of(hardware), service.parallel
    joules = busy_s = 0.0
    shares = (1 / gain / service.batch, 1 / service.output)
    for works, one, share in zip((service.decode, service.prefill), service.steps(efficiency), shares, strict=True):
        compute_s = sum(work.many * work.compute_s for work in works if work.kind != "link")
        memory_s = sum(work.many * work.memory_s for work in works if work.kind != "link")
        device_s = one.total_s * share * parallel.tp  # a stage works on one of `pp` batches at a time
        joules += device_s * curve.watts(compute_s / one.total_s, memory_s / one.total_s)
        busy_s += device_s
    return joules + curve.idle_w * max(0.0, parallel.devices * token_s - busy_s)


def _carbon(joules: Interval, g_per_kwh: Interval, pue: float) -> Interval:
    value, low, high = (carbon_g(one, g_per_kwh, pue) for one in (joules.value, joules.low, joules.high))
    return Interval(value.value, low.low, high.high)


def _binding(one: Times) -> tuple[str, float]:
    parts = one.stream_s if one.stream_s == one.total_s else max(one[:5])
    return one.binding, parts / one.total_s


def _longest(parts: dict[str, float]) -> tuple[str, float]:
    name = max(parts, key=lambda name: parts[name])
    return name, parts[name] / sum(parts.values())


def _points(works: Sequence[Work], efficiency: Efficiency, bandwidth: float) -> Iterator[Point]:
    for work in works:
        if work.kind == "link" or not work.memory_s:  # an encoder's attention reads no cache
            continue
        one = times([work], replace(efficiency, step_s=0, layer_s=0, sequence_s=0), 0, 0)
        flops, moved = work.compute_s * work.flops, work.memory_s * bandwidth
        yield Point(work.name, flops / moved, work.many * flops / one.total_s, one.total_s, one.binding)
