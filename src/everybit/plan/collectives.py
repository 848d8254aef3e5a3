"""What devices tell each other, and over which links of their card.

    t = link_s + steps * hop_s + bytes / (bandwidth * link)

`link_s` (software) and `link` (what is reached of a bandwidth) are the engine's, in `Efficiency`; the rest is here. A
group is cut into levels: as many devices as the fastest link joins, then such groups over the next one. Each gathers in
log2(parts) steps, and beyond it goes only the share that is left to each device. An all-reduce is that twice: reduced
and scattered from the inside out, gathered from the outside in. With equal links both sums are those of one level, so
crossing nodes is never faster than staying inside.

Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005 (recursive
halving and doubling). NCCL's rings take N - 1 steps; measured servers, which have kernels of their own for short
messages, grow as the logarithm does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from everybit.plan.hardware import Hardware, Link


class Level(NamedTuple):
    """So many equal parts of a group, over one link; a mean where they are not equal."""

    parts: float
    link: Link


class Moved(NamedTuple):
    """Seconds of one collective's steps, and of its bytes at the full bandwidths."""

    steps_s: float
    bytes_s: float


def levels(hardware: Hardware, devices: int) -> list[Level]:
    """From the inside out; none for one device. Raises: SourceError where no link joins so many"""
    if devices == 1:
        return []
    hardware.link(devices)
    found, joined = [], 1.0
    for link in _fastest_first(hardware):
        whole = devices / math.ceil(devices / link.devices)
        if whole > joined:
            found.append(Level(whole / joined, link))
            joined = whole
    return found


def gather(over: list[Level], total_bytes: float) -> Moved:
    """Each device gets the parts of all others, of `total_bytes` together; a reduce-scatter takes as long."""
    steps_s = bytes_s = 0.0
    for parts, link in over:
        steps_s += math.log2(parts) * link.hop_s
        bytes_s += (1 - 1 / parts) * total_bytes / link.bytes_per_s
        total_bytes /= parts
    return Moved(steps_s, bytes_s)


def sends(hardware: Hardware, stage: int, stages: int) -> list[tuple[int, Link]]:
    """How many of the sends from one pipeline stage of so many devices to the next cross each link.

    Neighbours share the fastest link that joins whole stages. Raises: SourceError where no link joins all
    """
    if stages > 1:
        hardware.link(stage * stages)
    found, left = [], stages - 1
    for link in _fastest_first(hardware):
        beyond = math.ceil(stages / max(1, link.devices // stage)) - 1
        if beyond < left:
            found.append((left - beyond, link))
            left = beyond
    return found


def _fastest_first(hardware: Hardware) -> list[Link]:
    """A slower link's hop is no shorter than a faster one's: what crosses it goes over both."""
    found, hop_s = [], 0.0
    for link in sorted(hardware.links, key=lambda one: -one.bytes_per_s):
        hop_s = max(hop_s, link.hop_s)
        found.append(replace(link, latency_s=hop_s))
    return found
