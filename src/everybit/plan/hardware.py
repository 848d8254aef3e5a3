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
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason
from everybit.plan.fields import shown
from everybit.plan.hardware_bounds import check_bounds, check_known, check_own, check_sold, is_number, said, words

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
            raise SourceError(f"card {self.name}: no FLOP/s for {dtype}, only for {words(self.flops)}")
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
        raise SourceError(f"card {hardware.name}: no figure {figure!r}, only {words(figures(hardware))}")
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
        raise SourceError(f"card {hardware.name}: no figure of {words(parts)}, only {words(figures(hardware))}")
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
        check_own(hardware)
        for known in map(read_hardware, cards()):
            check_known(hardware, known)
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
            key: _build(Provenance, one, f"{where}, provenance {key!r}") for key, one in sources.items()
        }
    data.setdefault("flops", {})
    hardware: Hardware = _build(Hardware, data, where)
    check_sold(hardware)
    return hardware


def _build(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a table of TOML. Raises: SourceError for a key that is unknown or missing, or of another type"""
    known = {one.name: one for one in fields(cls)}
    if not isinstance(data, dict):
        raise SourceError(f"{where}: {said(data)} is not a table with {words(known)}")
    if unknown := sorted(set(data) - set(known)):
        raise SourceError(f"{where}: unknown {words(map(shown, unknown))}; expected some of {words(known)}")
    if missing := [name for name, one in known.items() if one.default is MISSING and name not in data]:
        raise SourceError(f"{where}: {words(missing)} is missing")
    for name, value in data.items():
        expected = str(known[name].type).removesuffix(" | None")
        fits = {"float": is_number(value), "int": type(value) is int, "str": isinstance(value, str)}
        if not fits.get(expected, isinstance(value, dict | tuple)):
            raise SourceError(f"{where}: {name} is {said(value)}, expected {_TYPES.get(expected, 'a table')}")
        # Control characters would command the terminal that shows the card; a note may have several lines.
        if isinstance(value, str) and not (value.replace("\n", "") if name == "note" else value).isprintable():
            raise SourceError(f"{where}: {name} is {said(value)}, expected a text that can be printed")
    return cls(**data)


# --- what the dataclasses themselves cannot say
def _check(card: Hardware) -> None:
    """Raises: SourceError"""
    if not card.name.isprintable() or not card.name:
        raise SourceError(f"card {card.name!r}: expected a name that can be printed")
    where = f"card {card.name}"
    _one_of(card.kind, KINDS, f"{where}: kind")
    for dtype in card.flops:
        _one_of(dtype, DTYPES, f"{where}: flops")
    for link in card.links:
        _one_of(link.kind, LINKS, f"{where}: links")
    for price in card.prices:
        _one_of(price.kind, PRICES, f"{where}: price")
    for what, names in (("memory", [tier.name for tier in card.memory]), ("links", [link.kind for link in card.links])):
        if len(set(names)) < len(names):
            raise SourceError(f"{where}: {what} has one name twice in {words(names)}")
    check_bounds(card)
    _check_provenance(card)


def _check_provenance(card: Hardware) -> None:
    known = figures(card)
    for path, one in card.provenance.items():
        if path != "default" and not any(figure == path or figure.startswith(f"{path}.") for figure in known):
            raise SourceError(f"card {card.name}: provenance of {path!r}, which is no figure: {words(known)}")
        _one_of(one.kind, TRUST, f"card {card.name}: provenance {path}")
    for figure in known:
        if not any(figure == path or figure.startswith(f"{path}.") or path == "default" for path in card.provenance):
            raise SourceError(f"card {card.name}: {figure} has no provenance; add one or a default")


def _one_of(value: str, known: Collection[str], what: str) -> None:
    if value not in known:
        raise SourceError(f"{what} {value!r}: expected one of {words(known)}")
