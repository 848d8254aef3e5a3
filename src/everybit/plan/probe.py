"""Measurements of a machine as a hardware card, and of our engine on it as a calibration.

Our kernels follow no roofline (planes are unpacked by tables, with other code for few and for many rows), so products
are kept as measured: by bits, rows and width. The rest is five numbers: what a step, a layer, a product and a number
of an activation take, and the rates of attention.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from everybit.errors import SourceError, reason
from everybit.plan.calibrate import Calibration
from everybit.plan.efficiency import BOUNDS, Products, prior
from everybit.plan.hardware import Hardware, Provenance, Tier

ENGINE = "everybit"
# Of the log of a step's time, as an interval for nine of ten takes it: of 112 predicted cells (56 with one thread, 56
# with two, benchmarks/results/2026-11-26-plan-cpu*.jsonl) 101 are within exp(1.645 * 0.07) of what was measured.
_SPREAD = 0.07


@dataclass(frozen=True)
class Measurements:
    """What a probe found. `bytes_per_s`: read bandwidth by threads. `fp32_flops`: of a float GEMM, `threads` threads.

    `weight_s`: seconds of a weight by (bits, rows, width), every combination; 16 bits are plain halves. `step_s`: of an
    empty step; `layer_s`: of a layer without its products; `launch_s`: of a product; `number_s`: of a number that goes
    into or comes out of a product. `attention_flops`, `cache_bytes_per_s`: of prompts and of decoding.
    """

    processor: str
    date: str
    version: str
    threads: int
    memory_bytes: float
    bytes_per_s: Mapping[int, float]
    fp32_flops: float
    weight_s: Mapping[tuple[int, int, int], float]
    step_s: float
    layer_s: float
    launch_s: float
    number_s: float
    attention_flops: float
    cache_bytes_per_s: float

    def __post_init__(self) -> None:
        """Raises: SourceError for times or rates that are not above 0, or products that are missing"""
        plain = [value for one in fields(self) if isinstance(value := getattr(self, one.name), float)]
        for value in (*plain, *self.weight_s.values(), *self.bytes_per_s.values()):
            if not 0 < value < math.inf:
                raise SourceError(f"a measured {value} arrived, expected a number above 0: probe a quieter machine")
        axes = [sorted({key[axis] for key in self.weight_s}) for axis in range(3)]
        if min(map(len, axes)) < 2 or math.prod(map(len, axes)) != len(self.weight_s):
            raise SourceError(
                f"{len(self.weight_s)} products by bits, rows, width {axes} arrived, expected every combination of two "
                "or more each: probe again"
            )
        if self.threads not in self.bytes_per_s:
            raise SourceError(f"no bandwidth of {self.threads} threads, only of {list(self.bytes_per_s)}: probe again")


def card_of(found: Measurements) -> Hardware:
    """The machine as the engine sees it with these threads."""
    rates = ", ".join(f"{threads}: {rate / 1e9:.1f}" for threads, rate in sorted(found.bytes_per_s.items()))
    on = f"everybit plan probe, {found.date}, {found.processor}"
    return Hardware(
        name=f"{found.processor}, {found.threads} threads",
        kind="cpu",
        flops={"fp32": found.fp32_flops},
        memory=(Tier("DRAM", found.memory_bytes, found.bytes_per_s[found.threads]),),
        provenance={
            "default": Provenance("measured", on),
            "flops.fp32": Provenance("measured", f"{on}: float GEMM, {found.threads} threads"),
            "memory.DRAM.bytes_per_s": Provenance("measured", f"{on}: streaming read, GB/s by threads {rates}"),
        },
    )


def calibration_of(found: Measurements) -> Calibration:
    """Efficiencies of our engine on `card_of(found)`; what a probe cannot see (queueing) stays at the prior."""
    card = card_of(found)
    bits, rows, widths = (tuple(sorted({key[axis] for key in found.weight_s})) for axis in range(3))
    products = Products(
        bits=bits,
        rows=rows,
        widths=widths,
        weight_s=tuple(tuple(tuple(found.weight_s[b, m, k] for k in widths) for m in rows) for b in bits),
        launch_s=found.launch_s,
        number_s=found.number_s,
    )
    values = {
        "compute": 1.0,  # products are measured; shares of attention and cache are then of the peak
        "memory": 1.0,
        "attention": found.attention_flops / card.flops_of("fp32"),
        "cache": found.cache_bytes_per_s / card.main_memory.bytes_per_s,
        "step_s": found.step_s,
        "layer_s": found.layer_s,
        "sequence_s": 0.0,  # in what numbers and the head take
    }
    bounded: dict[str, Any] = {name: min(max(one, BOUNDS[name][0]), BOUNDS[name][1]) for name, one in values.items()}
    source = f"everybit plan probe, {found.date}, {found.processor}: {len(found.weight_s)} products"
    efficiency = replace(prior(card, ENGINE), **bounded, products=products, spread=_SPREAD, source=source)
    return Calibration(card.name, ENGINE, (found.version,), efficiency, (), len(found.weight_s))


def write_card(card: Hardware, path: str | Path) -> None:
    """A TOML file that `read_hardware` reads. Raises: SourceError where the file cannot be written"""
    partial = f"{path}.partial"
    try:
        Path(partial).write_text(_toml(card), "utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise SourceError(f"card {path}: cannot be written: {reason(error)}") from None


def _toml(card: Hardware) -> str:
    """What is at its default is left out."""
    plain, tables, lists = [], [], []
    for name, value in asdict(card).items():
        if value in (None, "", ()) or (name, value) == ("devices_per_node", 1):
            continue
        if isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{_key(key)} = {_text(one)}" for key, one in value.items())]
        elif isinstance(value, tuple):
            for row in value:
                lists += ["", f"[[{name}]]"]
                lists += [f"{key} = {_text(one)}" for key, one in row.items() if one is not None]
        else:
            plain.append(f"{name} = {_text(value)}")
    return "\n".join([*plain, *tables, *lists, ""])


def _key(name: str) -> str:
    return f'"{name}"' if "." in name else name


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_text(one)}" for key, one in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # a text of JSON is one of TOML, and so are its numbers
