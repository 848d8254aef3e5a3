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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason
from everybit.plan.fleet_inputs import Bucket, Limits, ReplicaType
from everybit.plan.simulate.requests import Request
from everybit.plan.simulate.traces import read_trace

UTILISATION = 0.8
_MOST_G_PER_KWH = 3000
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
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {reason(error)}; expected TOML") from None
    where = str(path)
    _known(data, _TOP, where)
    rows = data.get("types", [])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"{where}: no [[types]], expected one or more cards, or types with rates of their own")
    told = tuple(_told(row, f"{where}, type {i + 1}") for i, row in enumerate(rows) if "rates" in row)
    offers = tuple(_offer(row, data, f"{where}, type {i + 1}") for i, row in enumerate(rows) if "rates" not in row)
    if offers and not (data.get("model") and data.get("slo")):
        raise SourceError(f"{where}: types by card need a model and an slo at the top")
    quality = _quality(data.get("quality", {}), path)
    limits = {"utilisation": UTILISATION, **_table(data, "limits", where)}
    _known(limits, [one.name for one in fields(Limits)], f"{where}, limits")
    if {"least_quality", "mean_quality"} & set(limits) and (
        missing := sorted({bits for one in offers for bits in one.bits} - set(quality))
    ):
        raise SourceError(f"{where}: a limit of quality, but [quality] lacks {', '.join(missing)}: measure and add it")
    return Spec(
        folder=path.parent,
        demand=_demand(data, path),
        types=told,
        offers=offers,
        limits=_built(Limits, limits, f"{where}, limits"),
        quality=quality,
        model=_text(data, "model", "", where),
        kv_bits=_number(data, "kv_bits", None, where),
        activation_bits=_number(data, "activation_bits", None, where),
        slo=_text(data, "slo", "", where),
        engine=_text(data, "engine", "any", where),
        calibration=tuple(_list(data.get("calibration", []))),
        cautious=_flag(data, "cautious", where),
        pue=_number(data, "pue", 1.0, where) or 1.0,
    )


def _told(row: dict[str, Any], where: str) -> ReplicaType:
    _known(row, [one.name for one in fields(ReplicaType)], where)
    if not isinstance(row["rates"], list) or not all(map(_is_number, row["rates"])):
        raise SourceError(f"{where}: rates {row['rates']!r}, expected a list of requests/s, one for each bucket")
    found: ReplicaType = _built(ReplicaType, {**row, "rates": tuple(row["rates"])}, where)
    return found


def _offer(row: dict[str, Any], data: dict[str, Any], where: str) -> Offer:
    _known(row, _OFFER, where)
    tps = _list(row.get("tp", 1))
    if "card" not in row or not all(type(tp) is int and tp >= 1 for tp in tps):
        raise SourceError(f"{where}: expected a card and tp such as 1 or [1, 2]; or a name and rates")
    price = row.get("price", "on-demand")
    if not isinstance(price, str) and not (_is_number(price) and 0 <= price <= 1000):
        raise SourceError(f"{where}: price {price!r}, expected on-demand, spot, reserved, or $/h of one device from 0")
    if price != "spot" and (given := {"interruptions_per_h", "recovery_s"} & set(row)):
        raise SourceError(f"{where}: {min(given)} with price {price!r}, expected it with spot alone: leave it out")
    bits = _list(row.get("bits", data.get("bits", "own")))
    carbon = _list(row.get("carbon", data.get("carbon", 0.0)))
    if len(carbon) not in (1, 24) or not all(_is_number(one) and 0 <= one <= _MOST_G_PER_KWH for one in carbon):
        raise SourceError(f"{where}: carbon {carbon}, expected g/kWh, 0 to {_MOST_G_PER_KWH}, or 24 of them, by hour")
    return Offer(
        str(row["card"]),
        tuple(tps),
        tuple(map(str, bits)),
        price if isinstance(price, str) else float(price),
        _number(row, "cap_w", None, where),
        _number(row, "interruptions_per_h", None, where),
        _number(row, "recovery_s", 120.0, where) or 0.0,
        tuple(map(float, carbon)),
    )


def _demand(data: dict[str, Any], path: Path) -> tuple[Bucket, ...]:
    where = str(path)
    if ("demand" in data) == ("trace" in data):
        raise SourceError(f"{where}: expected [[demand]] or [trace], one of them")
    if "trace" in data:
        return _trace(_table(data, "trace", where), path)
    names = {"prompt": "input_tokens", "output": "output_tokens", "requests_per_s": "requests_per_s"}
    found = []
    for i, row in enumerate(data["demand"]):
        if not isinstance(row, dict) or set(row) != set(names) or not all(map(_is_number, row.values())):
            raise SourceError(f"{where}, demand {i + 1}: {row}, expected prompt, output and requests_per_s as numbers")
        found.append(Bucket(**{names[key]: value for key, value in row.items()}))
    return tuple(found)


def _trace(row: dict[str, Any], path: Path) -> tuple[Bucket, ...]:
    """A bucket for each cell between the edges that has requests, of their mean lengths."""
    _known(row, ("file", "prompt", "output", "speed"), f"{path}, trace")
    requests = read_trace(path.parent / _text(row, "file", "", str(path)))
    seconds = requests[-1].at_s / (_number(row, "speed", 1.0, f"{path}, trace") or 1.0)
    if seconds <= 0:
        raise SourceError(f"{path}, trace: {len(requests)} requests within no time: a rate needs a longer trace")
    prompts, outputs = (sorted(_list(row.get(name, []))) for name in ("prompt", "output"))
    if not all(map(_is_number, prompts + outputs)):
        raise SourceError(f"{path}, trace: prompt and output are lists of tokens at which buckets end")
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


def _quality(table: Any, path: Path) -> dict[str, float]:
    if not isinstance(table, dict):
        raise SourceError(f"{path}: quality {table!r}, expected a table of numbers by width")
    if "report" not in table:
        if bad := [key for key, value in table.items() if not (_is_number(value) and 0 <= value <= 1)]:
            raise SourceError(f"{path}, quality: {bad[0]} is {table[bad[0]]!r}, expected a part of 1, as 0.91 for 91 %")
        return {str(key): float(value) for key, value in table.items()}
    report = path.parent / str(table["report"])
    try:
        rows = json.loads(report.read_text("utf-8"))["rows"]
        found = {str(row["bits"]): float(row["top1"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{report}: {reason(error)}; expected what everybit eval --reference --json prints") from None
    return {**found, **{f"everybit{bits}": value for bits, value in found.items()}}


# --- values
def _known(data: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    names = list(names)
    if unknown := sorted(set(data) - set(names)):
        raise SourceError(f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(names)}")


def _table(data: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise SourceError(f"{where}: {name} is {found!r}, expected a table: [{name}]")
    return found


def _built(cls: type, data: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**data)
    except TypeError as error:
        raise SourceError(f"{where}: {reason(error)}") from None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(data: Mapping[str, Any], name: str, default: str, where: str) -> str:
    value = data.get(name, default)
    if not isinstance(value, str):
        raise SourceError(f"{where}: {name} is {value!r}, expected a text")
    return value


def _flag(data: Mapping[str, Any], name: str, where: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise SourceError(f"{where}: {name} is {value!r}, expected true or false")
    return value


def _number(data: Mapping[str, Any], name: str, default: float | None, where: str) -> float | None:
    value = data.get(name, default)
    if value is not None and not (_is_number(value) and value >= 0):
        raise SourceError(f"{where}: {name} is {value!r}, expected a number from 0")
    return value  # type: ignore[no-any-return]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
