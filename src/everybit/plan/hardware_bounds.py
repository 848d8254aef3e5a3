"""Bounds of a card's figures that catch wrong units: GB for bytes, bits/s for bytes/s, sparse FLOP/s, whole nodes."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.hardware import Hardware, Price, Tier

_GIB = 2**30
# Bytes/s of one device in one direction: from the slowest to what is announced (NVLink 6: 1.8e12, PCIe 6: 121e9,
# InfiniBand XDR: 100e9).
_LINK_BYTES_PER_S = {
    **dict.fromkeys(("nvlink", "nvswitch", "xgmi"), (1e10, 2e12)),
    "ici": (1e10, 1.5e12),
    "upi": (1e10, 2e11),
    "pcie": (5e8, 1.3e11),
    "infiniband": (1e9, 1.25e11),
    "ethernet": (1e8, 1.25e11),
}
_CHIP_ETHERNET = (1e8, 1e12)  # of accelerators whose own ports join a node (Gaudi 3: 525e9)
_GPU_BYTES = (1e9, 1e13)
# Reading all of a GPU's memory takes 23 ms (GB200) to 81 ms (L4) on our cards, 13 ms on the fastest that is announced
# (Rubin: 288 GB at 22 TB/s), 0.5 s where it is the host's (GB10). Bits/s for bytes/s would be 3 to 10 ms.
_GPU_READ_S = (0.011, 2.0)
_LEAST_W = {"gpu": 30, "cpu": 1, "accelerator": 1e-3}
_MOST_USD_PER_H = {"gpu": 50, "cpu": 50, "accelerator": 1000}  # an accelerator may be a whole wafer
_MOST_TIMES_KNOWN = 5  # the dearest lists of one device; a node has 8
# Slips by what puts them right.
_BYTE_SLIPS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_RATE_SLIPS = {"bits/s": 1 / 8, "GB/s": 1e9, "MB/s": 1e6, "kB/s": 1e3, "TB/s": 1e12}
_WATT_SLIPS = {"kW": 1e3, "mW": 1e-3}


def check_bounds(card: Hardware) -> None:
    """What holds of every card, what-ifs too. Raises: SourceError"""
    where = f"card {card.name}"
    for dtype, rate in card.flops.items():
        _within(rate, 1e9, 1e17, f"{where}: flops.{dtype}", "FLOP/s, as 989e12 for 989 TFLOP/s")
    for tier in card.memory:
        _within(tier.bytes, 1e3, 1e16, f"{where}: memory.{tier.name}.bytes", "bytes, as 80e9 for 80 GB")
        _check_rate(tier.bytes_per_s, f"{where}: memory.{tier.name}.bytes_per_s")
    for link in card.links:
        _check_rate(link.bytes_per_s, f"{where}: links.{link.kind}.bytes_per_s")
        _within(link.devices, 1, 1e6, f"{where}: links.{link.kind}.devices", "how many devices it joins")
        if link.latency_s is not None:
            _within(link.latency_s, 0, 1e-3, f"{where}: links.{link.kind}.latency_s", "seconds, as 5e-6 for 5 us")
    for price in card.prices:
        most = _MOST_USD_PER_H[card.kind]
        expected = f"$ an hour of one device, 0 to {most}: is it of a whole node?"
        _within(price.usd_per_h, 0, most, f"{where}: {price.kind} price", expected)
        if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?", price.date):
            raise SourceError(f"{where}: date of a price is {price.date!r}, expected YYYY-MM-DD or YYYY-MM")
    for name in ("tdp_w", "idle_w", "peak_w"):
        if (watts := getattr(card, name)) is not None:
            least = min(1, _LEAST_W[card.kind]) if name == "idle_w" else _LEAST_W[card.kind]
            _within(watts, least, 5000, f"{where}: {name}", "watts of one device", _WATT_SLIPS)
    if card.idle_w is not None and card.tdp_w is not None and card.idle_w >= card.tdp_w:
        raise SourceError(f"{where}: idle_w {card.idle_w:g} is not below tdp_w {card.tdp_w:g}")
    if card.spot_interruptions_per_h is not None:
        expected = "interruptions of one device an hour, 0 to 1, as 0.04 for one a day: is it a percentage?"
        _within(card.spot_interruptions_per_h, 0, 1, f"{where}: spot_interruptions_per_h", expected)
    _within(card.devices_per_node, 1, 1e4, f"{where}: devices_per_node", "a count")
    _check_sparse(card)


def check_sold(card: Hardware) -> None:
    """Of cards that are read: what-ifs may go beyond what is sold. Raises: SourceError"""
    for link in card.links:
        on_chip = card.kind == "accelerator" and link.kind == "ethernet"
        low, high = _CHIP_ETHERNET if on_chip else _LINK_BYTES_PER_S[link.kind]
        what = f"card {card.name}: links.{link.kind}.bytes_per_s"
        expected = f"{low:g} to {high:g} bytes/s of one device in one direction"
        _within(link.bytes_per_s, low, high, what, expected, _RATE_SLIPS)
    if card.kind == "gpu" and card.memory:
        _check_gpu_memory(card.main_memory, f"card {card.name}: memory.{card.main_memory.name}")


def _check_gpu_memory(tier: Tier, what: str) -> None:
    low, high = _GPU_BYTES
    _within(tier.bytes, low, high, f"{what}.bytes", f"{low:g} to {high:g} bytes, as 80e9 for 80 GB", _BYTE_SLIPS)
    if tier.bytes % _GIB == 0:
        raise SourceError(
            f"{what}.bytes is {tier.bytes:g}, {tier.bytes / _GIB:g} GiB: write {tier.bytes / _GIB:g}e9 for a data "
            "sheet's GB, or what the driver finds, which is less than whole GiB"
        )
    fast, slow = _GPU_READ_S
    expected = f"bytes/s that read {tier.bytes / 1e9:g} GB in {fast:g} to {slow:g} s"
    _within(tier.bytes_per_s, tier.bytes / slow, tier.bytes / fast, f"{what}.bytes_per_s", expected, _RATE_SLIPS)


def check_own(card: Hardware) -> None:
    """Of a user's card, whose prices were listed before now. Raises: SourceError"""
    tomorrow = (datetime.date.today() + datetime.timedelta(days=1)).isoformat()  # somewhere it is
    for price in card.prices:
        if price.date > tomorrow[: len(price.date)]:
            raise SourceError(f"card {card.name}: date of a price is {price.date}, expected a day that is past")


def check_known(card: Hardware, known: Hardware) -> None:
    """Of a user's card against one of ours. Raises: SourceError"""
    _check_twice(card, known)
    if card.name == known.name:
        for price in card.prices:
            _check_price(card, price, known)


def _check_price(card: Hardware, price: Price, known: Hardware) -> None:
    listed = max((one.usd_per_h for one in known.prices if one.kind == price.kind), default=None)
    if listed and price.usd_per_h > _MOST_TIMES_KNOWN * listed:
        raise SourceError(
            f"card {card.name}: {price.kind} price is {price.usd_per_h:g}, expected $ an hour of one device, which was "
            f"{listed:g} at most; of a node of {known.devices_per_node}? then write "
            f"{price.usd_per_h / known.devices_per_node:.3g}"
        )


def _check_rate(rate: float, what: str) -> None:
    _within(rate, 1e6, 1e14, what, "bytes/s, as 3.35e12 for 3.35 TB/s")
    if rate % _GIB == 0:
        raise SourceError(
            f"{what} is {rate:g}, {rate / _GIB:g} GiB/s: vendors mean {rate / _GIB:g}e9 by GB/s; write that"
        )


def _check_sparse(card: Hardware) -> None:
    """Half the bits are twice the dense FLOP/s of a GPU (Blackwell Ultra: fp4 is 3x fp8); sparsity doubles again."""
    if card.kind != "gpu":
        return
    for few, many, high in (("bf16", "tf32", 2.5), ("fp8", "bf16", 2.5), ("fp4", "fp8", 3.3)):
        if few not in card.flops or many not in card.flops:
            continue
        ratio = card.flops[few] / card.flops[many]
        if not 1.5 <= ratio <= high:
            raise SourceError(
                f"card {card.name}: {few} is {ratio:.2g}x {many}, expected 1.5 to {high:g}x: the FLOP/s of "
                f"{few if ratio > high else many} look sparse; give the dense ones (half)"
            )


def _check_twice(card: Hardware, known: Hardware) -> None:
    """Raises: SourceError where a user's card is `known` with FLOP/s twice as high: same fp32 or same memory."""
    same = [card.flops.get("fp32", 0) / known.flops["fp32"]] if "fp32" in known.flops else []
    if card.plannable and known.plannable:
        same.append(card.main_memory.bytes_per_s / known.main_memory.bytes_per_s)
    if card.kind != "gpu" or known.kind != "gpu" or not any(0.98 < ratio < 1.02 for ratio in same):
        return
    for dtype in sorted(set(card.flops) & set(known.flops) - {"fp32"}):
        if 1.96 < card.flops[dtype] / known.flops[dtype] < 2.04:
            raise SourceError(
                f"card {card.name}: {dtype} {card.flops[dtype]:.4g} FLOP/s is twice the {known.flops[dtype]:.4g} of "
                f"{known.name}: it looks sparse, give the dense figure"
            )


def _within(
    value: float, low: float, high: float, what: str, expected: str, slips: Mapping[str, float] | None = None
) -> None:
    """`slips`: units that may have been meant, by what they are multiplied with. Raises: SourceError"""
    if is_number(value) and low <= value <= high:
        return
    meant = [(unit, value * by) for unit, by in (slips or {}).items() if is_number(value) and low <= value * by <= high]
    hint = f"; {meant[0][0]}? then write {meant[0][1]:g}" if meant else ""
    raise SourceError(f"{what} is {said(value)}, expected {expected}{hint}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def said(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python's limit of digits
        return "a number of thousands of digits"


def words(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
