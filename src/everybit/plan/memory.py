"""What fits on a device, how many sequences beside it, and if nothing does, why not and what would."""

from __future__ import annotations

from dataclasses import dataclass, replace

from everybit.errors import SourceError
from everybit.plan.cost import SINGLE, Cost, Parallel
from everybit.plan.hardware import Hardware
from everybit.plan.operators import Linear, Model

_RUNTIME_BYTES = 1.5e9  # context, graphs and communication buffers of a GPU process
_USABLE = 0.94  # of main memory; engines leave some for fragments (vLLM asks for 0.9 with its runtime)
_ROUNDING = 1e-6  # a room cut to size for a sequence holds it
_CHUNK = 8192  # tokens of a prefill step, as engines usually limit it


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes on one device. `sequences`: how many of `context` tokens fit on all devices; 0: `why` says the reason."""

    context: int
    capacity_bytes: float
    weight_bytes: float
    activation_bytes: float
    reserve_bytes: float
    cache_bytes: float
    sequences: int
    why: str = ""

    @property
    def room_bytes(self) -> float:
        """What is left for caches."""
        return self.capacity_bytes - self.weight_bytes - self.activation_bytes - self.reserve_bytes


def fit(
    model: Model,
    hardware: Hardware,
    parallel: Parallel = SINGLE,
    *,
    context: int | None = None,
    pinned_bytes: float | None = None,
) -> Fit:
    """How many sequences of `context` tokens (None: the model's longest) fit.

    `pinned_bytes`: the weights of a device that stay in its memory, if others are streamed.
    Raises: SourceError for a context that is not above 0
    """
    context = model.context if context is None else context
    if context < 1:
        raise SourceError(f"a context of {context} tokens arrived, expected 1 or more: fix it")
    found = Fit(
        context,
        hardware.main_memory.bytes,
        device_weights(model, parallel) if pinned_bytes is None else pinned_bytes,
        activation_bytes(model, parallel, min(context, _CHUNK)),
        hardware.main_memory.bytes * (1 - _USABLE) + (_RUNTIME_BYTES if hardware.kind == "gpu" else 0.0),
        device_cache(model, parallel, context),
        0,
    )
    # A cache that does not grow with anything (an encoder) limits nothing: a step's tokens do.
    each = found.cache_bytes or activation_bytes(model, parallel, context)
    sequences = max(0, int(found.room_bytes / each + _ROUNDING)) * parallel.dp
    if sequences:
        return replace(found, sequences=sequences)
    return replace(found, why=_why(model, hardware, parallel, found))


def device_weights(model: Model, parallel: Parallel) -> float:
    """Bytes of weights on the fullest device."""
    total = _cut(model.embedding, parallel.tp) if not (model.tied and model.head) else 0.0
    total += sum(_cut(linear, parallel.tp) * count for linear, count in model.linears) / parallel.pp
    for layer in model.layers:
        if layer.experts:
            routed = sum(one.bytes for one in layer.experts.linears) * layer.experts.count
            total += routed * layer.count / parallel.devices
    return total


def device_cache(model: Model, parallel: Parallel, context: int) -> float:
    """Bytes that one sequence keeps on each device of its group."""
    total = 0.0
    for layer in model.layers:
        if layer.attention:
            kept = context if layer.attention.window is None else min(context, layer.attention.window)
            each = layer.attention.cache_numbers * model.kv_bits / 8 / min(parallel.tp, layer.attention.kv_heads)
            total += layer.count * kept * each
        if layer.state:
            total += layer.count * layer.state.numbers * layer.state.bytes_each / parallel.tp
    return total / parallel.pp


def activation_bytes(model: Model, parallel: Parallel, tokens: int) -> float:
    """Peak of a step of `tokens`: inputs, residual and the widest operator's output, at 16 bits."""
    widest = max(
        (
            linear.out / (1 if linear.split == "none" else parallel.tp)
            for layer in model.layers
            for linear in layer.linears
        ),
        default=model.hidden,
    )
    return tokens * 2 * (3 * model.hidden + widest)


def _cut(linear: Linear, tp: int) -> float:
    return linear.bytes / (1 if linear.split == "none" else tp)


def _why(model: Model, hardware: Hardware, parallel: Parallel, found: Fit) -> str:
    gb = [
        f"{what} {value / 1e9:.1f}"
        for what, value in (
            ("weights", found.weight_bytes),
            (f"a cache of {found.context} tokens", found.cache_bytes),
            ("activations", found.activation_bytes),
            ("reserve", found.reserve_bytes),
        )
    ]
    said = f"{model.name} on {hardware.name}, {parallel.devices} devices: {' + '.join(gb)} GB > "
    said += f"{found.capacity_bytes / 1e9:.1f} GB of each device; nearest that fits: "
    return said + (", or ".join(_nearest(model, hardware, parallel, found)) or "nothing on one node")


def _nearest(model: Model, hardware: Hardware, parallel: Parallel, found: Fit) -> list[str]:
    options = []
    low, high = 0, found.context
    while high - low > 1:  # the longest context of one sequence
        middle = (low + high) // 2
        left = found.room_bytes + found.activation_bytes - activation_bytes(model, parallel, min(middle, _CHUNK))
        low, high = (middle, high) if device_cache(model, parallel, middle) <= left else (low, middle)
    if low:
        options.append(f"a context of {low} tokens")
    wider = parallel
    while wider.devices * 2 <= hardware.devices_per_node:
        wider = replace(wider, tp=wider.tp * 2)
        need = device_weights(model, wider) + device_cache(model, wider, found.context) + found.reserve_bytes
        fits = need + activation_bytes(model, wider, min(found.context, _CHUNK)) <= found.capacity_bytes
        if fits and _can_split(model, hardware, wider):
            options.append(f"tp {wider.tp}")
            break
    bits = 8 * model.weight_bytes / model.parameters
    room = found.weight_bytes + found.room_bytes - found.cache_bytes
    if room > 0 and (fewer := bits * room / found.weight_bytes) >= 1:
        options.append(f"{fewer:.1f} bits a weight instead of {bits:.1f}")
    return options


def _can_split(model: Model, hardware: Hardware, parallel: Parallel) -> bool:
    try:
        Cost(model, hardware, parallel)
    except SourceError:
        return False
    return True
