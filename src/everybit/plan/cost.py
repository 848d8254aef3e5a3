"""How long a step takes: a roofline of each operator on one device, launches, and what devices tell each other.

    t = max(flops / (peak * compute), bytes / (bandwidth * memory)), summed over operators

Attention is apart: prompts by pairs of tokens, decoding by the bytes of its cache. Of experts, those are read that a
batch wakes. Collectives: `everybit.plan.collectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from everybit.errors import SourceError
from everybit.plan.collectives import gather, levels, sends
from everybit.plan.efficiency import IDEAL, Efficiency
from everybit.plan.hardware import Hardware
from everybit.plan.model import distinct_experts
from everybit.plan.offload import Placement
from everybit.plan.operators import Attention, Experts, Layer, Linear, Model
from everybit.plan.step import Step

WIDTHS = (("fp4", 4), ("fp8", 8), ("int8", 8), ("bf16", 16), ("fp16", 16), ("fp32", 32))
_OUTPUT_BYTES = 2  # activations between operators


@dataclass(frozen=True, slots=True)
class Parallel:
    """`tp` neighbours share each operator, `pp` groups of them the layers, `dp` groups the requests.

    Experts are spread over all tp * dp devices of a stage; whole ones or parts of each count the same here, since
    uneven loads of experts are not counted.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise SourceError(f"{self}: expected numbers from 1: fix them")

    @property
    def wide(self) -> int:
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        return self.wide * self.pp


SINGLE = Parallel()


class Work(NamedTuple):
    """`many` equal operators of a step on one device; times are at the card's peak.

    `kind`: product (16 bits or more), narrow, weight_only, attention, cache (decoding's attention, states) or link, of
    which `compute_s` counts the steps and `memory_s` the bytes.
    `flops`: the peak that `compute_s` is of. Of products: `linear`, how many of its `weights` are read, the `width` of
    what is multiplied, and how long a byte for each weight takes (`byte_s`).
    """

    name: str
    kind: str
    many: float
    compute_s: float
    memory_s: float
    rows: float
    flops: float = 0.0
    linear: Linear | None = None
    weights: float = 0.0
    width: int = 16
    byte_s: float = 0.0


class Times(NamedTuple):
    """Where the seconds of a step go; operators count where they are bound."""

    compute_s: float
    memory_s: float
    cache_s: float
    link_s: float
    launch_s: float
    stream_s: float

    @property
    def total_s(self) -> float:
        """Streaming from slower memory overlaps with all the rest."""
        return max(sum(self[:5]), self.stream_s)

    @property
    def binding(self) -> str:
        if self.stream_s > sum(self[:5]):
            return "streaming weights from slower memory"
        names = ("arithmetic", "reading weights", "reading the cache", "communication", "launches")
        return names[max(range(5), key=lambda i: self[i])]


class Cost:
    """The step times of a model on a card: implements `StepTime`.

    `by_bits`: the models of an overlay's precisions, for steps at `bits`. `placements`: what a step at these bits
    (None: that names none) streams.
    Raises: SourceError for a split that the model or the card cannot have
    """

    def __init__(
        self,
        model: Model,
        hardware: Hardware,
        parallel: Parallel = SINGLE,
        efficiency: Efficiency = IDEAL,
        *,
        by_bits: Mapping[int, Model] | None = None,
        placements: Mapping[int | None, Placement] | None = None,
    ) -> None:
        self.model, self.hardware, self.parallel, self.efficiency = model, hardware, parallel, efficiency
        self._by_bits = by_bits or {}
        self.layers = sum(layer.count for layer in model.layers)
        self._bandwidth = hardware.main_memory.bytes_per_s
        self._placements = placements or {}
        spread = any(layer.experts for layer in model.layers) and parallel.dp > 1
        self._group = levels(hardware, parallel.tp)
        self._all = levels(hardware, parallel.wide if spread else 1)
        self._sends = sends(hardware, parallel.wide if spread else parallel.tp, parallel.pp)
        self._peaks: dict[tuple[float, float], tuple[float, int]] = {}
        if parallel.pp > self.layers:
            raise SourceError(f"{parallel.pp} pipeline stages for {self.layers} layers: expected at most one a layer")
        heads = max((layer.attention.heads for layer in model.layers if layer.attention), default=parallel.tp)
        if heads % parallel.tp:
            raise SourceError(f"tp {parallel.tp} does not divide {heads} attention heads: pass a divisor")

    def seconds(self, step: Step, bits: int | None = None) -> float:
        """From the start of a step to its tokens, through all stages. Raises: SourceError for bits that are unknown"""
        return self.times(step, bits).total_s

    def times(self, step: Step, bits: int | None = None) -> Times:
        works, placement = self.works(step, bits=bits), self._placements.get(bits)
        stream_s = placement.stream_s if placement and works else 0.0
        return times(works, self.efficiency, self.layers, len(step.decodes) + len(step.chunks), stream_s)

    def works(self, step: Step, *, sampled: int | None = None, bits: int | None = None) -> list[Work]:
        """The operators of a step; `sampled` rows pass the head (None: one of each sequence)."""
        model, parallel, rows = self._at(bits), self.parallel, step.tokens
        if rows == 0:
            return []
        sequences = len(step.decodes) + len(step.chunks)
        found: list[Work] = []
        for layer in model.layers:
            found += [self._linear(model, linear, rows, layer.count) for linear in layer.linears]
            if layer.attention:
                found += self._attention(model, layer, layer.attention, step)
            if layer.state:
                moved = 2 * sequences * layer.state.numbers * layer.state.bytes_each / parallel.tp
                found.append(Work("state", "cache", layer.count, 0.0, moved / self._bandwidth, rows))
            if layer.experts:
                found += self._experts(model, layer.experts, rows, layer.count)
            found += self._collectives(model, layer, rows)
        if model.head:
            found.append(self._linear(model, model.head, sampled or sequences, 1))
        sent = rows * model.hidden * _OUTPUT_BYTES
        found += [Work("send", "link", many, one.hop_s, sent / one.bytes_per_s, rows) for many, one in self._sends]
        return found

    def _at(self, bits: int | None) -> Model:
        if bits is None or not self._by_bits:
            return self.model
        if bits not in self._by_bits:
            raise SourceError(f"a step at {bits} bits arrived, expected one of {sorted(self._by_bits)}: fix the policy")
        return self._by_bits[bits]

    def peak(self, stored: float, multiplied: float) -> tuple[float, int]:
        """FLOP/s and width of the narrowest numbers of the card that hold a weight and what it is multiplied with."""
        key = stored, multiplied
        if key not in self._peaks:
            least = max(multiplied, 4 if stored < 6 else 8 if stored < 12 else 16)
            fits = [(name, width) for name, width in WIDTHS if width >= least and name in self.hardware.flops]
            if not fits:
                raise SourceError(
                    f"card {self.hardware.name}: multiplies {', '.join(self.hardware.flops)} only, but the model needs "
                    f"{least:g} bits (attention always 16): add FLOP/s that wide to the card, or pass another"
                )
            name, width = fits[0]
            self._peaks[key] = self.hardware.flops[name], width
        return self._peaks[key]

    def _linear(self, model: Model, linear: Linear, rows: float, count: float) -> Work:
        share = 1 if linear.split == "none" else self.parallel.tp
        return self._product(model, linear, rows, count, linear.weights * rows / share, linear.bytes / share, share)

    def _product(
        self,
        model: Model,
        linear: Linear,
        rows: float,
        count: float,
        products: float,
        weight_bytes: float,
        share: float,
    ) -> Work:
        flops, width = self.peak(linear.bits, model.activation_bits)
        moved = weight_bytes + rows * (linear.into * width / 8 + linear.out * _OUTPUT_BYTES) / share
        kind = "weight_only" if linear.bits < width else "narrow" if width < 16 else "product"
        compute_s, memory_s, read = 2 * products / flops, moved / self._bandwidth, weight_bytes / linear.bits * 8
        return Work(
            linear.name, kind, count, compute_s, memory_s, rows, flops, linear, read, width, read / self._bandwidth
        )

    def _experts(self, model: Model, experts: Experts, rows: float, count: float) -> list[Work]:
        """All data-parallel groups send their tokens to the experts of all devices."""
        parallel = self.parallel
        pairs = rows * parallel.dp * experts.chosen
        awake = distinct_experts(experts.count, experts.chosen, rows * parallel.dp)
        each = pairs / awake
        found = []
        for linear in experts.linears:
            read = linear.bytes * awake / parallel.wide
            work = self._product(
                model, linear, pairs, count, linear.weights * pairs / parallel.wide, read, parallel.wide
            )
            found.append(work._replace(rows=each))
        return found

    def _attention(self, model: Model, layer: Layer, attention: Attention, step: Step) -> list[Work]:
        tp, flops = self.parallel.tp, self.peak(16, 16)[0]
        window = attention.window
        cached = attention.cache_numbers * model.kv_bits / 8 / min(tp, attention.kv_heads)
        dims = attention.key_dim + attention.value_dim
        found: list[Work] = []
        if step.decodes:
            seen = sum(step.decodes) if window is None else sum(min(past, window) for past in step.decodes)
            compute = 2 * attention.heads / tp * dims * seen / flops
            found.append(
                Work("decode", "cache", layer.count, compute, seen * cached / self._bandwidth, len(step.decodes), flops)
            )
        if step.chunks:
            # MLA's cache is expanded again for prompts: keys and values of a head are then smaller than the latent.
            expand = next((one for one in layer.linears if one.name == "kv_b"), None)
            if expand:
                dims = expand.out // attention.heads + attention.key_dim - attention.value_dim
            pairs = reads = 0.0
            for new, past in step.chunks:
                back = new if window is None else min(new, window)
                pairs += new * (min(past, window or past) + (back + 1) / 2)
                reads += back + min(past, window or past)
            if window is not None:
                pairs = min(pairs, window * sum(new for new, _ in step.chunks))
            compute = 2 * attention.heads / tp * dims * pairs / flops
            found.append(
                Work("prefill", "attention", layer.count, compute, reads * cached / self._bandwidth, step.tokens, flops)
            )
        return found

    def _collectives(self, model: Model, layer: Layer, rows: float) -> list[Work]:
        """One all-reduce after each mixer and each feed; experts under data parallelism gather and scatter over all."""
        found, spread = [], bool(layer.experts and self._all)
        row_bytes = rows * model.hidden * _OUTPUT_BYTES
        if self._group:
            ends = sum(linear.split == "row" for linear in layer.linears if not linear.name.startswith("shared_"))
            steps_s, bytes_s = gather(self._group, row_bytes)
            many = layer.count * (ends + (bool(layer.experts) and not spread))
            found.append(Work("all_reduce", "link", many, 2 * steps_s, 2 * bytes_s, rows))
        if spread:
            found.append(
                Work("all_to_all", "link", 2 * layer.count, *gather(self._all, row_bytes * self.parallel.dp), rows)
            )
        return found


def times(works: Sequence[Work], e: Efficiency, layers: int, sequences: float, stream_s: float = 0.0) -> Times:
    """The seconds of works under an efficiency. The inner loop of every fit: no objects, no numpy."""
    compute = memory = cache = link = 0.0
    launch = e.step_s + layers * e.layer_s + sequences * e.sequence_s if works else 0.0
    for _, kind, many, compute_s, memory_s, rows, _, linear, weights, width, byte_s in works:
        if kind == "link":
            link += many * (e.link_s + compute_s + memory_s / e.link)
            continue
        if linear and e.products:
            numbers = rows * (linear.into + linear.out) * weights / linear.weights
            took = many * e.products.seconds(linear.bits, rows, linear.into, weights, numbers)
            compute, memory = (compute + took, memory) if compute_s > memory_s else (compute, memory + took)
            continue
        a, b = compute_s / e.compute, memory_s / e.memory
        if linear and kind == "weight_only":
            each, share, extra_s = e.weight_only.of(linear.bits, width, rows)
            a, b = a / share, b + byte_s * (each - linear.bits / 8) / e.memory
            launch += many * extra_s
        if width < 16:
            a /= e.narrow
        if not linear:
            a, b = a / e.attention, b / e.cache
            if kind == "cache" and b >= a:
                cache += many * b
                continue
        if a > b:
            compute += many * a
        else:
            memory += many * b
    return Times(compute, memory, cache, link, launch, stream_s)
