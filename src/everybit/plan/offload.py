"""Weights that do not fit: what stays in the fastest memory, and what is streamed over the link in every step.

Pin and stream: a share of each layer is pinned, the rest crosses the link while the layers before it run, so a step
takes the longer of both. An overlay's planes can be placed by significance: the top planes are pinned, and a step at b
bits streams the planes below them, up to b.
"""

from __future__ import annotations

from dataclasses import dataclass

from everybit.errors import SourceError
from everybit.plan.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes on one device: `pinned_bytes` in its main memory, `streamed_bytes` from `tier` in each step."""

    pinned_bytes: float
    streamed_bytes: float
    tier: str
    stream_s: float


def pin_and_stream(weight_bytes: float, room_bytes: float, hardware: Hardware, link: float = 1.0) -> Placement:
    """Places one device's weights; `link`: the share of the tier's bytes/s that is reached.

    Raises: SourceError where all memory tiers together are too small
    """
    main = hardware.main_memory
    pinned = min(weight_bytes, max(room_bytes, 0.0))
    left = weight_bytes - pinned
    if left == 0:
        return Placement(pinned, 0.0, main.name, 0.0)
    seconds, last, need = 0.0, main.name, left
    for tier in hardware.memory[1:]:
        part = min(need, tier.bytes)
        seconds, last, need = seconds + part / (tier.bytes_per_s * link), tier.name, need - part
        if need <= 0:
            return Placement(pinned, left, last, seconds)
    raise SourceError(
        f"card {hardware.name}: {weight_bytes / 1e9:.1f} GB of weights, {need / 1e9:.1f} GB more than all its memory "
        "holds: use fewer bits or more devices"
    )


def place_planes(
    plane_bytes: float, bits: int, room_bytes: float, hardware: Hardware, link: float = 1.0
) -> tuple[int, Placement]:
    """Pins as many of the top planes as fit, and streams the others of a step at `bits`.

    `plane_bytes`: one plane of all weights on a device. Returns how many are pinned, and the placement.
    Raises: SourceError
    """
    if plane_bytes <= 0 or bits < 1:
        raise SourceError(
            f"{bits} planes of {plane_bytes:g} bytes arrived, expected 1 or more: fix the overlay's sizes"
        )
    pinned = min(bits, int(max(room_bytes, 0.0) // plane_bytes))
    return pinned, pin_and_stream(bits * plane_bytes, pinned * plane_bytes, hardware, link)
