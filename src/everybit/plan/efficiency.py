"""What a real engine reaches of a card's peak figures: a few numbers with a meaning, bounds and sources."""

from __future__ import annotations

import functools
import math
import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from everybit.errors import SourceError
from everybit.plan.hardware import Hardware, cards, read_hardware
from everybit.plan.operators import Model

# Unbounded fits look good and fail on the next model: no share exceeds the peak.
BOUNDS: dict[str, tuple[float, float]] = {
    "compute": (0.05, 1.0),
    "memory": (0.1, 1.0),
    "attention": (0.05, 1.0),
    "cache": (0.1, 1.0),
    "layer_s": (1e-7, 1e-3),
    "step_s": (1e-6, 0.1),
    "sequence_s": (1e-8, 1e-3),
    "link": (0.02, 1.0),
    "link_s": (1e-7, 1e-3),
    "overlap": (0.2, 3.0),
    "queue": (1e-3, 1.0),
    "first_s": (1e-4, 2.0),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a kernel takes to read and unpack a weight, in bytes of a plain product's reading.

    `share`: of the plain product's bandwidth; `least`, `most`: what unpacking takes, of however few or many bits (None:
    as reading does).
    """

    share: float = 1.0
    least: float = 0.0
    most: float | None = None

    def bytes_each(self, bits: float) -> float:
        each = max(self.least, bits / 8 / self.share)
        return each if self.most is None else max(bits / 8, min(self.most, each))

    def scaled(self, ratio: float) -> Reading:
        """Where unpacking takes `ratio` of the time, against reading."""
        most = None if self.most is None else self.most * ratio
        return Reading(min(1.0, self.share / ratio), self.least * ratio, most)


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """Products with weights of fewer bits than are multiplied, against plain ones.

    `many`: of kernels for many rows; `few`: of matrix-vector kernels, which take as long up to `few_rows` rows and in
    proportion to them beyond; the faster one is taken. `compute`: share of peak over the plain product's. `extra_s`:
    more time for each product.
    """

    many: Reading = Reading()
    few: Reading = Reading()
    few_rows: int = 2
    compute: float = 1.0
    extra_s: float = 0.0

    def of(self, bits: float, width: int, rows: float) -> tuple[float, float, float]:
        """Bytes of reading a weight, share of arithmetic, more seconds. `width`: of what is multiplied.

        Kernels were measured up to half of it: beyond, all goes in straight lines to the plain product.
        """
        plain = max(0.0, 2 * bits / width - 1)
        known = min(bits, width / 2)
        each = min(self.many.bytes_each(known), self.few.bytes_each(known) * max(1.0, rows / self.few_rows))
        return (
            each + plain * (width / 8 - each),
            self.compute + plain * (1 - self.compute),
            self.extra_s * (1 - plain),
        )


@dataclass(frozen=True, slots=True)
class Products:
    """Measured products of an engine whose kernels follow no roofline (`everybit plan probe`).

    `weight_s[bits][rows][width]`: seconds for each weight, at ascending `bits`, `rows` of the input and `widths` (how
    many inputs a weight has). `launch_s`: of a product; `number_s`: for each number that goes in or comes out (norms,
    activations).
    """

    bits: tuple[int, ...]
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    weight_s: tuple[tuple[tuple[float, ...], ...], ...]
    launch_s: float
    number_s: float

    def seconds(self, stored: float, rows: float, width: int, weights: float, numbers: float) -> float:
        """Of one product with `weights` weights of `stored` bits, of which less than one is for scales."""
        table = self.weight_s[max(0, bisect_right(self.bits, stored) - 1)]
        # Each output has a cost of its own, so the time of a weight is even in 1 / width; beyond the ends it stays.
        i, share = _between([-1 / one for one in self.widths], -1 / width)
        share = min(1.0, max(0.0, share))
        j, beyond = _between(self.rows, max(rows, self.rows[0]))
        low, high = (line[i] + share * (line[i + 1] - line[i]) for line in table[j : j + 2])
        return self.launch_s + weights * (low + beyond * (high - low)) + numbers * self.number_s


def _between(points: Sequence[float], x: float) -> tuple[int, float]:
    """The piece of `points` that holds x or is next to it, and where in it x is."""
    i = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
    return i, (x - points[i]) / (points[i + 1] - points[i])


@dataclass(frozen=True, slots=True)
class Efficiency:
    """`compute`, `memory`, `link`: shares of peak that products, reading and all-reduces reach. `narrow`: products of
    numbers below 16 bits, of the share of wider ones.

    `attention`, `cache`: its arithmetic and its reading, of what products reach. Launches: `layer_s` of a layer,
    `step_s` of a step, `sequence_s` of a sequence in a step, `link_s` of a collective. `overlap`: how much of the
    others' prompts a decoded token waits for; `queue`: how much of them a prompt waits for; `first_s`: of a request
    before its prompt can run (HTTP, tokenizing). `ahead`: of an output's cache, the share that a running request holds.
    `spread`, `routed_spread`: standard deviation of the log of a time predicted with these, for models without and with
    experts. `known`: measured (this engine on this very card), borrowed (from other engines or cards of its group) or
    assumed. `products`: where they are, linears take what these say.
    """

    compute: float = 1.0
    narrow: float = 1.0
    memory: float = 1.0
    attention: float = 1.0
    cache: float = 1.0
    layer_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    link: float = 1.0
    link_s: float = 0.0
    overlap: float = 1.0
    queue: float = 0.0
    first_s: float = 0.0
    ahead: float = 0.5
    weight_only: WeightOnly = WeightOnly()
    products: Products | None = None
    spread: float = 0.0
    routed_spread: float = 0.0
    known: str = "assumed"
    source: str = "peak figures of the card"

    def of(self, model: Model) -> Efficiency:
        """With the spread that holds for the model; the source says where that is wider."""
        if not is_routed(model):
            return self
        wider = f"; experts widen the spread of logs from {self.spread:.2g} to {self.routed_spread:.2g}"
        source = self.source + (wider if self.routed_spread > self.spread else "")
        return replace(self, spread=self.routed_spread, source=source)


IDEAL = Efficiency()


def is_routed(model: Model) -> bool:
    """Whether it has experts: fits of dense models miss such by far more."""
    return any(layer.experts for layer in model.layers)


def prior(hardware: Hardware, engine: str = "any") -> Efficiency:
    """What is assumed of a card before any measurement. Raises: SourceError for an engine without a prior"""
    shipped, group = _priors(), group_of(hardware)
    engines = shipped["engines"]
    if engine not in engines:
        raise SourceError(f"engine {engine!r} has no prior, expected one of {', '.join(engines)}: pass any")
    values: dict[str, Any] = {
        **shipped["groups"][group],
        **engines[engine],
        **shipped["both"].get(group, {}).get(engine, {}),
    }
    mine, related = values.pop("measured_on"), values.pop("related", None)
    values["weight_only"] = _unpacking_on(
        hardware, read_weight_only(values["weight_only"]), values.pop("unpacks_as", "")
    )
    values["source"] = f"prior of {group} x {engine}: {values['source']}"
    values["known"] = "assumed"
    if related is not None:
        more, why = _borrowed(hardware, engine, mine, related)
        values["known"] = "borrowed" if why else "measured"
        if why:
            values |= {name: math.hypot(values[name], *more) for name in ("spread", "routed_spread")}
            values["source"] += f"; {' and '.join(why)}, so the spread is {values['spread']:.2g}"
    return replace(IDEAL, **values)


def _borrowed(hardware: Hardware, engine: str, mine: list[str], related: list[str]) -> tuple[list[float], list[str]]:
    """Errors that others' numbers add, and why. `mine`: cards that the engine was measured on."""
    shipped, own = _priors(), _is_shipped(hardware)
    errors = shipped["borrowed"]
    by_any = own and hardware.name in shipped["engines"]["any"]["measured_on"]
    more, why = [], []
    if not by_any:
        more.append(errors["related" if own and hardware.name in related else "others"])
        why.append(f"{hardware.name} {'itself was not measured' if own else 'as given is no shipped card'}")
    if hardware.name not in mine if by_any else not mine:
        more.append(errors["engines"])
        why.append(f"no server of {engine} was measured" + (f" on {hardware.name}" if mine else ""))
    return more, why


def _unpacking_on(hardware: Hardware, low: WeightOnly, card: str) -> WeightOnly:
    """Of kernels measured on `card`: the lanes that unpack are those of FP32, whatever the memory feeds them."""
    if not card or "fp32" not in hardware.flops:
        return low
    there, here = (one.main_memory.bytes_per_s / one.flops["fp32"] for one in (_cards()[card], hardware))
    ratio = here / there
    return replace(low, many=low.many.scaled(ratio), few=low.few.scaled(ratio))


def _is_shipped(hardware: Hardware) -> bool:
    """Whether it is the card that is shipped under its name, and not one of other speed."""
    known = _cards().get(hardware.name)
    return known is not None and (known.flops, known.memory, known.links) == (
        hardware.flops,
        hardware.memory,
        hardware.links,
    )


def read_weight_only(found: Mapping[str, Any]) -> WeightOnly:
    """Raises: TypeError, ValueError for what `WeightOnly` is not"""
    readings = {name: Reading(**found.get(name, {})) for name in ("many", "few")}
    made = WeightOnly(**{**found, **readings})
    numbers = [made.few_rows, made.compute, *(one.share for one in readings.values())]
    if not all(0 < value < math.inf for value in numbers) or not 0 <= made.extra_s < 1:
        raise ValueError(f"weight_only {found}: expected numbers above 0")
    return made


def group_of(hardware: Hardware) -> str:
    """GPUs by the narrowest floats that they multiply, which tells their generation; cpu or accelerator otherwise."""
    if hardware.kind != "gpu":
        return hardware.kind
    return "gpu-fp4" if "fp4" in hardware.flops else "gpu-fp8" if "fp8" in hardware.flops else "gpu-16bit"


@functools.cache
def _cards() -> dict[str, Hardware]:
    return {card.name: card for card in map(read_hardware, cards())}


@functools.cache
def _priors() -> dict[str, Any]:
    return tomllib.loads((files("everybit.plan") / "priors.toml").read_text("utf-8"))
