"""What a fine-tune takes: memory of a device by part, the batch that fits, time, money and CO2.

Memory as in `finetune_memory`. Offload: ZeRO-Offload (Ren et al. 2021), ZeRO-Infinity (Rajbhandari et al. 2021), Fuyou
(Liao et al. 2024), Deep Optimizer States (Maurya et al. 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from everybit.errors import ModelError, SourceError
from everybit.plan.finetune_memory import (
    METHODS,
    OPTIMIZERS,
    RECOMPUTES,
    Parts,
    Recipe,
    activation_bytes,
    active_weights,
    adapter_weights,
    base_bytes,
    every,
    state_parts,
    trained_weights,
)
from everybit.plan.finetune_moe import MoeLaw, sparsity_of
from everybit.plan.operators import Model

_MOST_TOKENS = 1e15


@dataclass(frozen=True, slots=True)
class Devices:
    """`count` equal devices. `flops`: dense, of the type trained in. `mfu`: the share of it that all arithmetic, also
    what is recomputed, reaches. `network_bytes_per_s`: what a device sends to the others; None: no time is counted.
    `network_latency_s`: from one device to the next. `reserve_bytes`: of the memory, for runtime and fragments. Prices
    and watts are of one device."""

    memory_bytes: float
    flops: float
    count: int = 1
    mfu: float = 0.4
    network_bytes_per_s: float | None = None
    network_latency_s: float = 0.0
    reserve_bytes: float = 2e9
    usd_per_h: float = 0.0
    power_w: float = 0.0
    pue: float = 1.0
    gco2_per_kwh: float = 0.0


@dataclass(frozen=True, slots=True)
class FinetuneCost:
    """`why`: what does not fit, and `nearest` the recipe that does; both None when it fits. Times and money are None
    when it does not. `network_s`: of a step's collectives. `bound`: what the step waits for: compute, network, link or
    update."""

    fits: bool
    parts: Parts
    trained: int
    batch: int
    step_s: float | None = None
    network_s: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    usd: float | None = None
    kwh: float | None = None
    gco2: float | None = None
    bound: str | None = None
    why: str | None = None
    nearest: Recipe | None = None


def finetune(model: Model, recipe: Recipe, devices: Devices, tokens: float, law: MoeLaw | None = None) -> FinetuneCost:
    """Cost of training on `tokens` in all (epochs counted).

    `law`: of measured runs of this method on this card; what fits and how long the passes take are then by it, with all
    that a device holds beside the weights under activations.

    A step takes max(compute, network, link) + what of the optimizer's update is not hidden beside them: ZeRO-Infinity's
    overlap (section 6.2) with the update's share after Fuyou and Deep Optimizer States.

    Raises: SourceError for options out of range, ModelError for a model without weights to train.
    """
    _check(model, recipe, devices, tokens)
    if law and (recipe.zero or recipe.offload):
        raise SourceError("a law of measured runs is of whole states on one device: leave out ZeRO and offload")
    found = _fit(model, recipe, devices, law)
    if not found.fits:
        others = [replace(recipe, batch=None)] if law else _others(recipe, devices)
        fitted = ((one, _fit(model, one, devices, law)) for one in others)
        nearest = next((replace(one, batch=recipe.batch and its.batch) for one, its in fitted if its.fits), None)
        return replace(found, nearest=nearest)
    network_s = _network_s(model, recipe, devices, found.trained)
    step_s, bound = _step_s(model, recipe, devices, found, network_s, law)
    step_tokens = found.batch * recipe.accumulate * recipe.sequence * devices.count
    seconds = step_s * math.ceil(tokens / step_tokens)
    hours = seconds / 3600 * devices.count
    kwh = hours * devices.power_w * devices.pue / 1000
    return replace(
        found,
        step_s=step_s,
        network_s=network_s,
        tokens_per_s=step_tokens / step_s,
        seconds=seconds,
        usd=hours * devices.usd_per_h,
        kwh=kwh,
        gco2=kwh * devices.gco2_per_kwh,
        bound=bound,
    )


def _fit(model: Model, recipe: Recipe, devices: Devices, law: MoeLaw | None) -> FinetuneCost:
    parts = replace(state_parts(model, recipe, devices.count), reserve=devices.reserve_bytes)
    each = activation_bytes(model, recipe.sequence, recipe.recompute)
    if law:
        parts = Parts(parts.weights, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        each = law.sequence_bytes(recipe.sequence, sparsity_of(model))
    most = max(0, math.floor((devices.memory_bytes - parts.fixed) / each))
    batch = recipe.batch or max(1, most)
    parts = replace(parts, activations=batch * each)
    trained = trained_weights(model, recipe)
    why = None
    if recipe.offload and parts.offloaded > recipe.offload.bytes:
        room = recipe.offload.bytes / 1e9
        why = f"{recipe} offloads {parts.offloaded / 1e9:.1f} GB a device, and there is room for {room:.1f} GB"
    elif batch > most:
        named = ("weights", "gradients", "optimizer", "working", "reserve", "activations")
        listed = ", ".join(f"{name} {getattr(parts, name) / 1e9:.1f}" for name in named)
        why = f"{recipe} needs {parts.total / 1e9:.1f} GB of {devices.memory_bytes / 1e9:.1f} GB a device: {listed}"
    return FinetuneCost(fits=why is None, parts=parts, trained=trained, batch=batch, why=why)


def _others(recipe: Recipe, devices: Devices) -> Iterator[Recipe]:
    """The same and lighter methods, each with ever more recomputation and sharing, then with the batch that fits."""
    methods = METHODS[METHODS.index(recipe.method) :]
    recomputes = RECOMPUTES[RECOMPUTES.index(recipe.recompute) :]
    stages = range(recipe.zero, 4) if devices.count > 1 else [recipe.zero]
    batches = [recipe.batch, None] if recipe.batch else [None]
    for method, batch, zero, recompute in itertools.product(methods, batches, stages, recomputes):
        bits = recipe.base_bits if method == recipe.method else None
        yield replace(recipe, method=method, batch=batch, zero=zero, recompute=recompute, base_bits=bits)


def _network_s(model: Model, recipe: Recipe, devices: Devices, trained: int) -> float:
    """Of a step's collectives, rings over all devices, one of each kind for a layer.

    ZeRO, section 7: gradients are reduced; weights are gathered once updated, or in both passes of stage 3. Without
    stages it is an all-reduce, which is both.
    """
    count, rate = devices.count, devices.network_bytes_per_s
    if count == 1 or rate is None:
        return 0.0
    gathers = 2 * recipe.accumulate if recipe.zero == 3 else 1
    reductions = recipe.accumulate if recipe.zero >= 2 else 1
    gathered = _stored_bytes(model, recipe, trained) if recipe.zero == 3 else 2.0 * trained
    moved = gathers * gathered + reductions * 2.0 * trained
    hops = (gathers + reductions) * sum(layer.count for layer in model.layers)
    return (count - 1) * (moved / count / rate + hops * devices.network_latency_s)


def _stored_bytes(model: Model, recipe: Recipe, trained: int) -> float:
    return 2.0 * trained + (base_bytes(model, recipe) if recipe.method != "full" else 0.0)


def _step_s(
    model: Model, recipe: Recipe, devices: Devices, found: FinetuneCost, network_s: float, law: MoeLaw | None
) -> tuple[float, str]:
    """Seconds from one update to the next, and what they wait for."""
    if law:
        batch_s = found.batch / law.queries_per_s(found.batch, sparsity_of(model))
    else:
        batch_s = _compute_s(model, recipe, devices, found)
    times, after = {"compute": recipe.accumulate * batch_s, "network": network_s}, 0.0
    count, trained, away = devices.count, found.trained, recipe.offload
    if away:
        ours = trained / (count if recipe.zero else 1)
        carried = 2.0 * ours * recipe.accumulate  # gradients out
        if away.weights:  # into the device in both passes, and once more to recompute
            passes = 3 if recipe.recompute == "full" else 2
            stored = _stored_bytes(model, recipe, trained) / (count if recipe.zero == 3 else 1)
            carried += passes * recipe.accumulate * stored
        update = 2.0 * (4.0 + OPTIMIZERS[recipe.optimizer]) * ours / away.bytes_per_s
        update += 0.0 if away.weights else 2.0 * ours / away.link_bytes_per_s  # new weights back
        speed = min(away.link_bytes_per_s, away.bytes_per_s) if away.weights else away.link_bytes_per_s
        times["link"] = carried / speed + away.hidden * update
        after = (1 - away.hidden) * update
    longest = max(times, key=lambda name: times[name])
    return times[longest] + after, "update" if after > times[longest] else longest


def _compute_s(model: Model, recipe: Recipe, devices: Devices, found: FinetuneCost) -> float:
    """Of one batch. Forward 2 N, gradients of activations 2 N and of weights 2 N, of which frozen ones have none;
    `full` recomputation runs forward once more. Scores: 4 * heads * dim * context a token forward, not halved for
    causality (Korthikanti et al. 2022, appendix A), recomputed by `selective` too."""
    weights = active_weights(model)
    passes = 4.0 if recipe.method != "full" else 6.0
    linear = (passes + (2.0 if recipe.recompute == "full" else 0.0)) * weights
    if recipe.method != "full":
        linear += 6.0 * adapter_weights(model, recipe, token=True)
    scores = 0.0
    for layer in model.layers:
        if layer.attention:
            seen = min(recipe.sequence, layer.attention.window or recipe.sequence)
            wide = layer.attention.key_dim + layer.attention.value_dim
            scores += 2.0 * layer.count * layer.attention.heads * wide * seen
    per_token = linear + scores * (3.0 if recipe.recompute == "none" else 4.0)
    return per_token * found.batch * recipe.sequence / (devices.flops * devices.mfu)


def _check(model: Model, recipe: Recipe, devices: Devices, tokens: float) -> None:
    if not model.layers or not any(every(layer) for layer in model.layers):
        raise ModelError(f"'{model.name}' has no linear layers: there is nothing to train")
    for what, value, known in (
        ("method", recipe.method, METHODS),
        ("recompute", recipe.recompute, RECOMPUTES),
        ("optimizer", recipe.optimizer, tuple(OPTIMIZERS)),
    ):
        if value not in known:
            raise SourceError(f"{what} is '{value}': give one of {', '.join(known)}")
    if recipe.zero not in range(4):
        raise SourceError(f"zero is {recipe.zero}: give a stage from 0 to 3")
    if recipe.method != "full" and recipe.rank > model.hidden:
        raise SourceError(f"rank is {recipe.rank}: give at most {model.hidden}, the hidden size of '{model.name}'")
    if recipe.experts and (recipe.method == "full" or not any(layer.experts for layer in model.layers)):
        raise SourceError("adapters beside experts were asked: give lora or qlora, and a model that has experts")
    if recipe.method == "full" and recipe.base_bits is not None:
        raise SourceError(f"base_bits is {recipe.base_bits}: a full fine-tune has no frozen weights; leave it out")
    numbers: list[tuple[str, float | None]] = [
        ("tokens", tokens),
        ("sequence", recipe.sequence),
        ("batch", recipe.batch),
        ("accumulate", recipe.accumulate),
        ("rank", recipe.rank),
        ("base_bits", recipe.base_bits),
        ("devices", devices.count),
        ("memory_bytes", devices.memory_bytes),
        ("flops", devices.flops),
        ("mfu", devices.mfu),
        ("network_bytes_per_s", devices.network_bytes_per_s),
    ]
    if recipe.offload:
        numbers += [(name, getattr(recipe.offload, name)) for name in ("bytes", "bytes_per_s", "link_bytes_per_s")]
    for what, number in numbers:
        if number is not None and not (math.isfinite(number) and number > 0):
            raise SourceError(f"{what} is {number}: give more than 0")
    if tokens > _MOST_TOKENS:
        raise SourceError(f"tokens is {tokens:g}: give at most {_MOST_TOKENS:g}")
    if recipe.sequence > model.context:
        raise SourceError(f"sequence is {recipe.sequence}: give at most {model.context}, the context of '{model.name}'")
    if recipe.base_bits is not None and recipe.base_bits > 64:
        raise SourceError(f"base_bits is {recipe.base_bits}: give at most 64")
    for what in ("network_latency_s", "reserve_bytes", "usd_per_h", "power_w", "gco2_per_kwh"):
        if not getattr(devices, what) >= 0:
            raise SourceError(f"{what} is {getattr(devices, what)}: give 0 or more")
    if devices.mfu > 1 or (recipe.offload and not 0 <= recipe.offload.hidden <= 1):
        raise SourceError("mfu and hidden are parts of 1, such as 0.4: a larger one was given")
    if devices.pue < 1:
        raise SourceError(f"pue is {devices.pue}: it is 1 or more")
