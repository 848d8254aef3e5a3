"""A service as TOML: what is asked, which replicas could serve it, and what must be kept.

    model = "meta-llama/Llama-3.1-8B"       # a name, or a folder beside this file
    bits = ["everybit3", "everybit8"]       # widths, a replica type each
    slo = "ttft=1s,tpot=50ms,share=0.95"    # means for the plan; its share for a simulation
    engine = "everybit"                     # also: calibration = ["h100.json"], cautious = true, pue
    carbon = 400                            # g CO2e/kWh, or a list of 24, by hour of the day; also of a type

    [[demand]]                              # or [trace] file, prompt = [edges], output = [edges], speed
    prompt = 1000
    output = 200
    requests_per_s = 3.0

    [[types]]                               # tp and bits: one or a list
    card = "h100-sxm"
    tp = [1, 2]
    price = "on-demand"                     # spot, reserved, or $/h of one device

    [limits]                                # of fleet_inputs.Limits; utilisation is 0.8 if not given
    quotas = { "H100 SXM" = 4 }

    [quality]                               # by width, parts of 1; or report = "report.json" of everybit eval
    everybit3 = 0.91

A type may be told by figures of its own instead: name, hardware, usd_per_h, rates (requests/s for each bucket), and the
other fields of fleet_inputs.ReplicaType.
"""

from __future__ import annotations

import json
import tomllib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason
from everybit.formats.tensors import show
from everybit.plan.fields import shown
from everybit.plan.fleet_inputs import Bucket, Limits, ReplicaType
from everybit.plan.hardware import PRICES
from everybit.plan.simulate.requests import Request
from everybit.plan.simulate.traces import read_trace

UTILISATION = 0.8
_MOST_G_PER_KWH = 3000
_MOST = 1e9  # beyond it a figure is a mistake
_MOST_TP = 1024
_MOST_SPARES = 1000
_TOP = ("model", "bits", "kv_bits", "activation_bits", "slo", "engine", "calibration", "cautious", "carbon", "pue",
        "demand", "trace", "types", "limits", "quality")  # fmt: skip
_OFFER = ("card", "tp", "bits", "price", "cap_w", "interruptions_per_h", "recovery_s", "carbon")


@dataclass(frozen=True)
class Offer:
    """A card of which replicas can be had. `price`: a kind, or $/h of one device. `carbon`: g/kWh where it stands, by
    hour, or one for all."""

    card: str
    tp: tuple[int, ...]
    bits: tuple[str, ...]
    price: str | float
    cap_w: float | None
    interruptions_per_h: float | None
    recovery_s: float
    carbon: tuple[float, ...]

    @property
    def g_per_kwh(self) -> float:
        return sum(self.carbon) / len(self.carbon)

    @property
    def cleanest(self) -> list[int]:
        """The six hours with the least CO2; none where it is not told by hour."""
        hours = sorted(range(len(self.carbon)), key=lambda hour: self.carbon[hour])
        return sorted(hours[:6]) if len(set(self.carbon)) > 1 else []


@dataclass(frozen=True)
class Spec:
    """`types`: told by their own figures; `offers`: to be estimated. `quality`: by width."""

    folder: Path
    demand: tuple[Bucket, ...]
    types: tuple[ReplicaType, ...]
    offers: tuple[Offer, ...]
    limits: Limits
    quality: Mapping[str, float]
    model: str = ""
    kv_bits: float | None = None
    activation_bits: float | None = None
    slo: str = ""
    engine: str = "any"
    calibration: tuple[str, ...] = ()
    cautious: bool = False
    pue: float = 1.0


def read_spec(path: Path) -> Spec:
    """Raises: SourceError"""
    where = str(path) if str(path).isprintable() else show(str(path))
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:  # also bytes that are no text, and endless numbers
        raise SourceError(f"{where}: cannot be read: {reason(error)}; expected TOML") from None
    top = _Table(data, where, _TOP)
    rows = top.tables("types")
    if not rows:
        raise SourceError(f"{where}: no [[types]], expected one or more cards, or types with rates of their own")
    told = tuple(_told(row, f"{where}, type {i + 1}") for i, row in enumerate(rows) if "rates" in row)
    offers = tuple(_offer(row, top, f"{where}, type {i + 1}") for i, row in enumerate(rows) if "rates" not in row)
    if offers and not (top.text("model", "") and top.text("slo", "")):
        raise SourceError(f"{where}: types by card need a model and an slo at the top")
    pue = top.number("pue", 1.0, least=1, most=5)
    if "pue" in data and not any(one.g_per_kwh for one in offers):
        raise SourceError(f"{where}: pue without carbon of a card, expected both: add carbon or leave pue out")
    widths = {bits for one in offers for bits in one.bits}
    quality = _quality(top, widths, path)
    limits = _limits(top)
    floors = (limits.least_quality, limits.mean_quality)
    if floors != (None, None) and (missing := sorted(widths - set(quality))):
        raise SourceError(f"{where}: a limit of quality, but [quality] lacks {', '.join(missing)}: measure and add it")
    return Spec(
        folder=path.parent,
        demand=_demand(top, path),
        types=told,
        offers=offers,
        limits=limits,
        quality=quality,
        model=top.text("model", ""),
        kv_bits=top.optional("kv_bits"),
        activation_bits=top.optional("activation_bits"),
        slo=top.text("slo", ""),
        engine=top.text("engine", "any"),
        calibration=top.texts("calibration", ()),
        cautious=top.flag("cautious"),
        pue=pue,
    )


def _told(data: dict[str, Any], where: str) -> ReplicaType:
    row = _Table(data, where, [one.name for one in fields(ReplicaType)])
    if missing := [one.name for one in fields(ReplicaType) if one.default is MISSING and one.name not in data]:
        raise SourceError(f"{where}: {' and '.join(missing)} missing, expected with rates of its own: add")
    return ReplicaType(
        name=row.text("name"),
        hardware=row.text("hardware"),
        usd_per_h=row.number("usd_per_h"),
        rates=row.numbers("rates"),
        devices=row.whole("devices", 1, least=1),
        power_w=row.number("power_w", 0.0),
        peak_w=row.number("peak_w", 0.0),
        capped_w=row.optional("capped_w"),
        gco2_per_h=row.number("gco2_per_h", 0.0),
        quality=row.number("quality", 1.0, least=-_MOST),
        spot=row.flag("spot"),
        interruptions_per_h=row.number("interruptions_per_h", 0.0),
        recovery_s=row.number("recovery_s", 0.0),
        base_w=row.optional("base_w"),
    )


def _limits(top: _Table) -> Limits:
    row = _Table(top.data.get("limits", {}), f"{top.where}, limits", [one.name for one in fields(Limits)])
    quotas = row.data.get("quotas", {})
    of_quotas = _Table(quotas, f"{row.where}, quotas", list(quotas) if isinstance(quotas, dict) else [])
    return Limits(
        utilisation=row.number("utilisation", UTILISATION, most=1),
        quotas={kind: of_quotas.whole(kind) for kind in of_quotas.data},
        on_demand_share=row.optional("on_demand_share", most=1),
        spot_losses=row.whole("spot_losses", 1, most=_MOST_SPARES),
        power_w=row.optional("power_w"),
        oversubscribed=row.flag("oversubscribed"),
        gco2_per_h=row.optional("gco2_per_h"),
        least_quality=row.optional("least_quality", least=-_MOST),
        mean_quality=row.optional("mean_quality", least=-_MOST),
        co2_usd_per_t=row.number("co2_usd_per_t", 0.0),
    )


def _offer(data: dict[str, Any], top: _Table, where: str) -> Offer:
    row = _Table(data, where, _OFFER)
    if "card" not in data:
        raise SourceError(f"{where}: expected a card and tp such as 1 or [1, 2]; or a name and rates")
    price = data.get("price", "on-demand")
    if price not in PRICES and not (_is_number(price) and 0 <= price <= 1000):
        raise SourceError(f"{where}: price {show(price)}, expected {', '.join(PRICES)}, or $/h of one device from 0")
    if price != "spot" and (given := {"interruptions_per_h", "recovery_s"} & set(data)):
        raise SourceError(f"{where}: {min(given)} with price {price!r}, expected it with spot alone: leave it out")
    placed = row if "carbon" in data else top
    carbon = placed.numbers("carbon", (0.0,), most=_MOST_G_PER_KWH)
    if len(carbon) not in (1, 24):
        raise SourceError(f"{placed.where}: carbon is a list of {len(carbon)}, expected g/kWh, or 24 of them, by hour")
    return Offer(
        row.text("card"),
        row.wholes("tp", (1,), least=1, most=_MOST_TP),
        (row if "bits" in data else top).texts("bits", ("own",), numbers=True),
        price if isinstance(price, str) else float(price),
        row.optional("cap_w"),
        row.optional("interruptions_per_h"),
        row.number("recovery_s", 120.0),
        carbon,
    )


def _demand(top: _Table, path: Path) -> tuple[Bucket, ...]:
    if ("demand" in top.data) == ("trace" in top.data):
        raise SourceError(f"{top.where}: expected [[demand]] or [trace], one of them")
    if "trace" in top.data:
        return _trace(_Table(top.data["trace"], f"{top.where}, trace", ("file", "prompt", "output", "speed")), path)
    rows = (
        _Table(row, f"{top.where}, demand {i + 1}", ("prompt", "output", "requests_per_s"))
        for i, row in enumerate(top.tables("demand"))
    )
    return tuple(
        Bucket(row.whole("prompt", least=1), row.whole("output", least=1), row.number("requests_per_s")) for row in rows
    )


def _trace(row: _Table, path: Path) -> tuple[Bucket, ...]:
    """A bucket for each cell between the edges that has requests, of their mean lengths."""
    requests = read_trace(path.parent / row.text("file"))
    seconds = requests[-1].at_s / row.number("speed", 1.0, least=1e-6)
    if seconds <= 0:
        raise SourceError(f"{row.where}: {len(requests)} requests within no time: a rate needs a longer trace")
    prompts, outputs = (sorted(row.numbers(name, ())) for name in ("prompt", "output"))
    cells: defaultdict[tuple[int, int], list[Request]] = defaultdict(list)
    for one in requests:
        cells[bisect_right(prompts, one.prompt_tokens), bisect_right(outputs, one.output_tokens)].append(one)
    return tuple(
        Bucket(
            round(sum(one.prompt_tokens for one in cell) / len(cell)),
            round(sum(one.output_tokens for one in cell) / len(cell)),
            len(cell) / seconds,
        )
        for _, cell in sorted(cells.items())
    )


def _quality(top: _Table, widths: set[str], path: Path) -> dict[str, float]:
    data = top.data.get("quality", {})
    where = f"{top.where}, quality"
    if not isinstance(data, dict) or "report" not in data:
        row = _Table(data, where, sorted(widths))
        return {bits: row.number(bits, most=1) for bits in row.data}
    report = path.parent / _Table(data, where, ("report",)).text("report")
    try:
        rows = json.loads(report.read_text("utf-8"))["rows"]
        found = {str(row["bits"]): float(row["top1"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(f"{report}: {reason(error)}; expected what everybit eval --reference --json prints") from None
    if bad := [value for value in found.values() if not 0 <= value <= 1]:
        raise SourceError(f"{report}: a top1 of {bad[0]}, expected a part of 1")
    return {**found, **{f"everybit{bits}": value for bits, value in found.items()}}


class _Table:
    """A table of the spec, read by type and range; a name without a default must be there.

    Raises: SourceError from every reader, and for what is no table or has keys beyond `names`
    """

    def __init__(self, data: Any, where: str, names: Sequence[str]) -> None:
        if not isinstance(data, dict):
            raise SourceError(f"{where}: {show(data)} arrived, expected a table")
        if unknown := sorted(set(data) - set(names)):
            told = ", ".join(names) or "nothing"
            raise SourceError(f"{where}: unknown {', '.join(map(shown, unknown))}; expected some of {told}")
        self.data, self.where = data, where

    def tables(self, name: str) -> list[dict[str, Any]]:
        rows = self.data.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._wrong(name, rows, f"tables: [[{name}]]")
        return rows

    def text(self, name: str, default: str | None = None) -> str:
        return self._text(name, self._value(name, default))

    def texts(self, name: str, default: tuple[str, ...], numbers: bool = False) -> tuple[str, ...]:
        """One or a list. `numbers`: may stand for their text."""
        found = self._list(name, default)
        return tuple(self._text(name, str(one) if numbers and _is_number(one) else one) for one in found)

    def flag(self, name: str) -> bool:
        value = self.data.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0, most: float = _MOST) -> float:
        return self._number(name, self._value(name, default), least, most)

    def optional(self, name: str, least: float = 0, most: float = _MOST) -> float | None:
        return self.number(name, None, least, most) if name in self.data else None

    def numbers(
        self, name: str, default: tuple[float, ...] | None = None, least: float = 0, most: float = _MOST
    ) -> tuple[float, ...]:
        """One or a list."""
        return tuple(self._number(name, one, least, most) for one in self._list(name, default))

    def whole(self, name: str, default: int | None = None, least: int = 0, most: float = _MOST) -> int:
        return self._whole(name, self._value(name, default), least, most)

    def wholes(self, name: str, default: tuple[int, ...], least: int, most: float) -> tuple[int, ...]:
        """One or a list."""
        return tuple(self._whole(name, one, least, most) for one in self._list(name, default))

    def _value(self, name: str, default: Any) -> Any:
        if name not in self.data and default is None:
            raise SourceError(f"{self.where}: {name} is missing: add it")
        return self.data.get(name, default)

    def _list(self, name: str, default: tuple[Any, ...] | None) -> Sequence[Any]:
        value = self._value(name, default)
        if value == [] and default != ():
            raise self._wrong(name, value, "one or more; or leave it out")
        return value if isinstance(value, list | tuple) else [value]

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise self._wrong(name, value, "a text that can be printed")
        return value

    def _number(self, name: str, value: Any, least: float, most: float) -> float:
        if not _is_number(value) or not least <= value <= most:
            part = (least, most) == (0, 1)
            told = "a part of 1, as 0.91 for 91 %" if part else f"a number from {least:g} to {most:g}"
            raise self._wrong(name, value, told)
        return float(value)

    def _whole(self, name: str, value: Any, least: int, most: float) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most:.0f}")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> SourceError:
        return SourceError(f"{self.where}: {shown(name)} is {show(value)}, expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
