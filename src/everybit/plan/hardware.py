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
import math
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
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
    return hardware


def _build(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a table of TOML. Raises: SourceError for a key that is unknown or missing, or of another type"""
    known = {one.name: one for one in fields(cls)}
    if not isinstance(data, dict):
        raise SourceError(f"{where}: {data!r} is not a table with {_words(known)}")
    if unknown := sorted(set(data) - set(known)):
        raise SourceError(f"{where}: unknown {_words(unknown)}; expected some of {_words(known)}")
    if missing := [name for name, one in known.items() if one.default is MISSING and name not in data]:
        raise SourceError(f"{where}: {_words(missing)} is missing")
    for name, value in data.items():
        expected = str(known[name].type).removesuffix(" | None")
        fits = {"float": _is_number(value), "int": type(value) is int, "str": isinstance(value, str)}
        if not fits.get(expected, isinstance(value, dict | tuple)):
            raise SourceError(f"{where}: {name} is {value!r}, expected {_TYPES.get(expected, 'a table')}")
    return cls(**data)


# --- bounds that catch wrong units
def _check(card: Hardware) -> None:
    """Raises: SourceError"""
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
            _within(link.latency_s, 0, 0.1, f"{where}: links.{link.kind}.latency_s", "seconds, as 5e-6 for 5 us")
    for what, names in (("memory", [tier.name for tier in card.memory]), ("links", [link.kind for link in card.links])):
        if len(set(names)) < len(names):
            raise SourceError(f"{where}: {what} has one name twice in {_words(names)}")
    for price in card.prices:
        _one_of(price.kind, PRICES, f"{where}: price")
        _within(price.usd_per_h, 0, 1000, f"{where}: {price.kind} price", "$ an hour of one device, 0 to 1000")
        if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?", price.date):
            raise SourceError(f"{where}: date of a price is {price.date!r}, expected YYYY-MM-DD or YYYY-MM")
    for name in ("tdp_w", "idle_w", "peak_w"):
        if (watts := getattr(card, name)) is not None:
            _within(watts, 1e-3, 5000, f"{where}: {name}", "watts of one device, not mW")
    if card.idle_w is not None and card.tdp_w is not None and card.idle_w >= card.tdp_w:
        raise SourceError(f"{where}: idle_w {card.idle_w:g} is not below tdp_w {card.tdp_w:g}")
    if card.spot_interruptions_per_h is not None:
        _within(card.spot_interruptions_per_h, 0, 10, f"{where}: spot_interruptions_per_h", "interruptions an hour")
    _within(card.devices_per_node, 1, 1e4, f"{where}: devices_per_node", "a count")
    _check_sparse(card)
    _check_provenance(card)


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


def _within(value: float, low: float, high: float, what: str, expected: str) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise SourceError(f"{what} is {value!r}, expected {expected}")


def _one_of(value: str, known: Collection[str], what: str) -> None:
    if value not in known:
        raise SourceError(f"{what} {value!r}: expected one of {_words(known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
