"""What gets one precision together: a weight, or all weights of a transformer layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from everybit.engine.plan import read_bytes
from everybit.formats import Overlay, WeightSpec

Group = Literal["weight", "layer"]
GROUPS: tuple[Group, ...] = ("weight", "layer")
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")  # up to the first number in a name: model.layers.17


@dataclass(frozen=True)
class Unit:
    """Weights that share a precision. `choices`, ascending: each member is read at its `served_bits` of one of them."""

    name: str
    members: tuple[WeightSpec, ...]
    choices: tuple[int, ...]

    def own(self, choice: int) -> dict[str, int]:
        """The precision of each member."""
        return {spec.name: spec.served_bits(choice) for spec in self.members}

    def read_bytes(self, overlay: Overlay, choice: int) -> int:
        """Planes and codebooks that the members read."""
        return sum(read_bytes(overlay, spec, spec.served_bits(choice)) for spec in self.members)


def find_units(overlay: Overlay, group: Group = "weight") -> tuple[Unit, ...]:
    """The quantized weights of an overlay in units, in its order; every weight is in one."""
    members: dict[str, list[WeightSpec]] = {}
    for name, spec in overlay.weights.items():
        layer = _LAYER.match(name) if group == "layer" else None
        members.setdefault(layer.group() if layer else name, []).append(spec)
    return tuple(Unit(name, tuple(specs), _choices(specs)) for name, specs in members.items())


def assignment(units: Sequence[Unit], choices: Mapping[str, int]) -> dict[str, int]:
    """Weight name to its precision, for a choice of each unit."""
    found: dict[str, int] = {}
    for unit in units:
        found |= unit.own(choices[unit.name])
    return found


def _choices(specs: Sequence[WeightSpec]) -> tuple[int, ...]:
    """Precisions at which the members are not all read as at the one before."""
    kept: list[int] = []
    before: list[int] = []
    for bits in sorted({own for spec in specs for own in spec.bits}):
        served = [spec.served_bits(bits) for spec in specs]
        if served != before:
            kept.append(bits)
        before = served
    return tuple(kept)
