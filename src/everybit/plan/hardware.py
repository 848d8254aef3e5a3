"""Hardware cards: what a device computes, holds, moves, draws and costs, and how each figure is known.

A card is TOML in decimal units (bytes, bytes/s, FLOP/s, watts, seconds, US dollars an hour). FLOP/s are dense: data
sheets like to print twice that, for weights of which half are zero. Each figure has a provenance, found by its path:

    [provenance]
    default = { kind = "vendor", source = "NVIDIA H200 data sheet, 2024" }
    "memory.HBM3e.bytes_per_s" = { kind = "measured", source = "copy kernel, 2026-11-26" }

The longest matching path counts, so `flops` stands for `flops.bf16`. Memory is listed from the fastest tier that holds
weights to the slowest. What a source does not tell is left out, not guessed.
"""

from __future__ import annotations

import datetime
import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason

TRUST = ("measured", "vendor", "paper")  # from the best to the least
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")
KINDS = ("gpu", "cpu", "accelerator")
LINKS = ("nvlink", "nvswitch", "xgmi", "ici", "pcie", "infiniband", "ethernet", "upi")
PRICES = ("on-demand", "spot", "reserved")

# Seconds of one step over a link whose card tells none. NVLink: H100's, measured (its card). The others keep the ratios
# of the hops (trees of short messages) that NCCL's own cost model assumes, src/graph/tuning.cc: NVLink 0.52, PCIe 1.0,
# network 5.0 us. xgmi, ici and upi are assumed like NVLink, Ethernet like InfiniBand.
_HOPS_S = {"pcie": 1.7e-6, "infiniband": 8.4e-6, "ethernet": 8.4e-6}
_HOP_S = 0.87e-6

_CARDS = resources.files("everybit.plan") / "cards"
_GIB = 2**30
_TYPES = {"float": "a number", "int": "a whole number", "str": "a text"}


@dataclass(frozen=True, slots=True)
class Provenance:
    """`kind`: measured, vendor or paper. `source`: where the figure stands."""

    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class Tier:
    """A memory of `bytes`, read at `bytes_per_s`."""

    name: str
    bytes: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Link:
    """`bytes_per_s`: of one device, in one direction. `devices`: how many it joins. `latency_s`: None if unknown."""

    kind: str
    bytes_per_s: float
    devices: int
    latency_s: float | None = None

    @property
    def hop_s(self) -> float:
        """Of one step of a collective: the card's, or what is usual for the kind."""
        return _HOPS_S.get(self.kind, _HOP_S) if self.latency_s is None else self.latency_s


@dataclass(frozen=True, slots=True)
class Price:
    """Of one device. `date`: YYYY-MM-DD or YYYY-MM, when it was listed."""

    usd_per_h: float
    kind: str
    provider: str
    date: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """One device. `peak_w`: the highest draw seen, maybe above `tdp_w`. `region`: a name in a file of intensities.

    A value that is out of its range raises a SourceError, after `dataclasses.replace` too.
    """

    name: str
    kind: str
    flops: Mapping[str, float] = field(hash=False)
    memory: tuple[Tier, ...]
    provenance: Mapping[str, Provenance] = field(hash=False)
    links: tuple[Link, ...] = ()
    prices: tuple[Price, ...] = ()
    tdp_w: float | None = None
    idle_w: float | None = None
    peak_w: float | None = None
    devices_per_node: int = 1
    spot_interruptions_per_h: float | None = None
    region: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def plannable(self) -> bool:
        """Whether the card has the figures that a plan needs; a paper's card may lack them."""
        return bool(self.flops and self.memory)

    def flops_of(self, dtype: str) -> float:
        """Dense FLOP/s. Raises: SourceError"""
        if dtype not in self.flops:
            raise SourceError(f"card {self.name}: no FLOP/s for {dtype}, only for {_words(self.flops)}")
        return self.flops[dtype]

    @property
    def main_memory(self) -> Tier:
        """Where weights and cache lie. Raises: SourceError"""
        if not self.memory:
            raise SourceError(f"card {self.name}: no memory figures are known, so nothing can be planned on it")
        return self.memory[0]

    def price(self, kind: str = "on-demand") -> Price:
        """The lowest of the newest prices of this kind. Raises: SourceError"""
        found = [price for price in self.prices if price.kind == kind]
        if not found:
            raise SourceError(f"card {self.name}: no {kind} price is known; give one in $/h")
        newest = max(price.date for price in found)
        return min((price for price in found if price.date == newest), key=lambda price: price.usd_per_h)

    def link(self, devices: int) -> Link:
        """The fastest link that joins so many devices. Raises: SourceError"""
        found = [link for link in self.links if link.devices >= devices]
        if not found:
            raise SourceError(f"card {self.name}: no link joins {devices} devices; give one")
        return max(found, key=lambda link: link.bytes_per_s)


def priced(hardware: Hardware, usd_per_h: float, kind: str = "on-demand") -> Hardware:
    """The card with the user's own price in place of all of this kind. Raises: SourceError"""
    today = datetime.date.today().isoformat()
    rest = tuple(price for price in hardware.prices if price.kind != kind)
    return replace(hardware, prices=(*rest, Price(usd_per_h, kind, "user", today, "given by the user")))


def trust(hardware: Hardware, figure: str) -> Provenance:
    """How a figure is known: `flops.bf16`, `memory.HBM3.bytes`, `links.pcie.latency_s`, `tdp_w`. Raises: SourceError"""
    if figure not in figures(hardware):
        raise SourceError(f"card {hardware.name}: no figure {figure!r}, only {_words(figures(hardware))}")
    path = figure
    while path not in hardware.provenance:
        path = path.rpartition(".")[0] or "default"
    return hardware.provenance[path]


def weakest(hardware: Hardware, *parts: str) -> str:
    """The least trusted kind among the figures below `parts` (default: flops and memory).

    What ranks devices prints it where it is not `measured`: an unmeasured one never silently outranks a measured one.

    Raises: SourceError
    """
    parts = parts or ("flops", "memory")
    found = [one for one in figures(hardware) if any(one == part or one.startswith(f"{part}.") for part in parts)]
    if not found:
        raise SourceError(f"card {hardware.name}: no figure of {_words(parts)}, only {_words(figures(hardware))}")
    return max((trust(hardware, one).kind for one in found), key=TRUST.index)


def figures(hardware: Hardware) -> tuple[str, ...]:
    """The path of each figure of a card that has a provenance (prices carry their own source)."""
    plain = ("tdp_w", "idle_w", "peak_w", "spot_interruptions_per_h")
    return (
        *(f"flops.{dtype}" for dtype in hardware.flops),
        *(f"memory.{tier.name}.{key}" for tier in hardware.memory for key in ("bytes", "bytes_per_s")),
        *(f"links.{link.kind}.bytes_per_s" for link in hardware.links),
        *(f"links.{link.kind}.latency_s" for link in hardware.links if link.latency_s is not None),
        *(name for name in plain if getattr(hardware, name) is not None),
    )


def cards() -> list[str]:
    """Names of the cards that come with everybit."""
    return sorted(one.name.removesuffix(".toml") for one in _CARDS.iterdir() if one.name.endswith(".toml"))


def read_hardware(name_or_path: str | Path) -> Hardware:
    """A card of ours by its name, or a TOML file of the user's. Raises: SourceError"""
    text = str(name_or_path)
    if text.endswith(".toml"):
        try:
            content = Path(text).read_bytes()
        except OSError as error:
            raise SourceError(f"card {text}: cannot be read: {reason(error)}") from None
        hardware = _parse(content, text)
        for known in map(read_hardware, cards()):
            _check_twice(hardware, known)
        return hardware
    name = text.strip().lower().replace(" ", "-").replace("_", "-")
    if name not in cards():
        near = difflib.get_close_matches(name, cards(), 3, 0.4) or cards()
        raise SourceError(f"no card {text!r}: expected one of ours ({', '.join(near)}) or a path that ends in .toml")
    return _parse((_CARDS / f"{name}.toml").read_bytes(), name)


# --- TOML
_NESTED: dict[str, type] = {"memory": Tier, "links": Link, "prices": Price}


def _parse(content: bytes, origin: str) -> Hardware:
    where = f"card {origin}"
    try:
        data = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise SourceError(f"{where}: not TOML: {reason(error)}") from None
    for key, cls in _NESTED.items():
        rows = data.get(key, [])
        if not isinstance(rows, list):
            raise SourceError(f"{where}: {key} is not a list: write [[{key}]]")
        data[key] = tuple(_build(cls, row, f"{where}, {key} {place + 1}") for place, row in enumerate(rows))
    sources = data.get("provenance", {})
    if isinstance(sources, dict):
        data["provenance"] = {
            key: _build(Provenance, one, f"{where}, provenance {key}") for key, one in sources.items()
        }
    data.setdefault("flops", {})
    hardware: Hardware = _build(Hardware, data, where)
    _check_links(hardware)
    return hardware


def _build(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a table of TOML. Raises: SourceError for a key that is unknown or missing, or of another type"""
    known = {one.name: one for one in fields(cls)}
    if not isinstance(data, dict):
        raise SourceError(f"{where}: {_said(data)} is not a table with {_words(known)}")
    if unknown := sorted(set(data) - set(known)):
        raise SourceError(f"{where}: unknown {_words(unknown)}; expected some of {_words(known)}")
    if missing := [name for name, one in known.items() if one.default is MISSING and name not in data]:
        raise SourceError(f"{where}: {_words(missing)} is missing")
    for name, value in data.items():
        expected = str(known[name].type).removesuffix(" | None")
        fits = {"float": _is_number(value), "int": type(value) is int, "str": isinstance(value, str)}
        if not fits.get(expected, isinstance(value, dict | tuple)):
            raise SourceError(f"{where}: {name} is {_said(value)}, expected {_TYPES.get(expected, 'a table')}")
    return cls(**data)


# --- bounds that catch wrong units
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
_LEAST_W = {"gpu": 30, "cpu": 1, "accelerator": 1e-3}
_MOST_USD_PER_H = {"gpu": 50, "cpu": 50, "accelerator": 1000}  # an accelerator may be a whole wafer
# Slips by what puts them right.
_RATE_SLIPS = {"bits/s": 1 / 8, "GB/s": 1e9, "MB/s": 1e6, "TB/s": 1e12}
_WATT_SLIPS = {"kW": 1e3, "mW": 1e-3}


def _check(card: Hardware) -> None:
    """Raises: SourceError"""
    if not card.name.isprintable() or not card.name:
        raise SourceError(f"card {card.name!r}: expected a name that can be printed")
    where = f"card {card.name}"
    _one_of(card.kind, KINDS, f"{where}: kind")
    for dtype, rate in card.flops.items():
        _one_of(dtype, DTYPES, f"{where}: flops")
        _within(rate, 1e9, 1e17, f"{where}: flops.{dtype}", "FLOP/s, as 989e12 for 989 TFLOP/s")
    for tier in card.memory:
        _within(tier.bytes, 1e3, 1e16, f"{where}: memory.{tier.name}.bytes", "bytes, as 80e9 for 80 GB")
        _check_rate(tier.bytes_per_s, f"{where}: memory.{tier.name}.bytes_per_s")
    for link in card.links:
        _one_of(link.kind, LINKS, f"{where}: links")
        _check_rate(link.bytes_per_s, f"{where}: links.{link.kind}.bytes_per_s")
        _within(link.devices, 1, 1e6, f"{where}: links.{link.kind}.devices", "how many devices it joins")
        if link.latency_s is not None:
            _within(link.latency_s, 0, 1e-3, f"{where}: links.{link.kind}.latency_s", "seconds, as 5e-6 for 5 us")
    for what, names in (("memory", [tier.name for tier in card.memory]), ("links", [link.kind for link in card.links])):
        if len(set(names)) < len(names):
            raise SourceError(f"{where}: {what} has one name twice in {_words(names)}")
    for price in card.prices:
        _one_of(price.kind, PRICES, f"{where}: price")
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
    _check_provenance(card)


def _check_links(card: Hardware) -> None:
    """Of cards that are read: what-ifs may go beyond what is sold. Raises: SourceError"""
    for link in card.links:
        on_chip = card.kind == "accelerator" and link.kind == "ethernet"
        low, high = _CHIP_ETHERNET if on_chip else _LINK_BYTES_PER_S[link.kind]
        what = f"card {card.name}: links.{link.kind}.bytes_per_s"
        expected = f"{low:g} to {high:g} bytes/s of one device in one direction"
        _within(link.bytes_per_s, low, high, what, expected, _RATE_SLIPS)


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


def _check_provenance(card: Hardware) -> None:
    known = figures(card)
    for path, one in card.provenance.items():
        _one_of(one.kind, TRUST, f"card {card.name}: provenance {path}")
        if path != "default" and not any(figure == path or figure.startswith(f"{path}.") for figure in known):
            raise SourceError(f"card {card.name}: provenance of {path!r}, which is no figure: {_words(known)}")
    for figure in known:
        if not any(figure == path or figure.startswith(f"{path}.") or path == "default" for path in card.provenance):
            raise SourceError(f"card {card.name}: {figure} has no provenance; add one or a default")


def _within(
    value: float, low: float, high: float, what: str, expected: str, slips: Mapping[str, float] | None = None
) -> None:
    """`slips`: units that may have been meant, by what they are multiplied with. Raises: SourceError"""
    if _is_number(value) and low <= value <= high:
        return
    meant = [
        (unit, value * by) for unit, by in (slips or {}).items() if _is_number(value) and low <= value * by <= high
    ]
    hint = f"; {meant[0][0]}? then write {meant[0][1]:g}" if meant else ""
    raise SourceError(f"{what} is {_said(value)}, expected {expected}{hint}")


def _one_of(value: str, known: Collection[str], what: str) -> None:
    if value not in known:
        raise SourceError(f"{what} {value!r}: expected one of {_words(known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _said(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python's limit of digits
        return "a number of thousands of digits"


def _words(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
