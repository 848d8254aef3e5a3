"""Watts, joules and grams of CO2 of a device whose use is known.

    P = idle + (cap - idle) * (compute * u_compute + memory * u_memory), never above the cap

`u_compute`: achieved over dense peak FLOP/s of the card; `u_memory`: achieved over peak bytes/s. `compute` may exceed
1: dense matrix products reach the cap well before the peak of the data sheet, which is why they do not reach the peak.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from everybit.errors import SourceError, reason
from everybit.plan.efficiency import Efficiency
from everybit.plan.hardware import Hardware, Provenance

_MOST_WATTS = 5000  # of one device
_PRIOR = (1.4, 0.68, 0.25)  # compute, memory, and idle as a share of the cap, of a GPU that serves
_PRIOR_WEIGHTS = (0.5, 0.8, 2.0)  # 0.1, the scale of an error, over how far each may well be from the prior
_UNKNOWN = (1.0, 1.0, 0.25)  # either use alone draws everything
_BINS = 512  # steps of power in a sum of devices
_MANY = 500  # devices whose sum is as good as normal
_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Use:
    """How busy a device was, and what it drew."""

    u_compute: float
    u_memory: float
    watts: float


@dataclass(frozen=True, slots=True)
class Power:
    """`compute`, `memory`: shares of the range from `idle_w` to `cap_w` drawn at full use of each.

    `idle_w`: of a device that holds a model and waits. `source`: how the curve is known.
    """

    idle_w: float
    cap_w: float
    compute: float
    memory: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.idle_w < self.cap_w <= _MOST_WATTS:
            raise SourceError(
                f"power: idle {self.idle_w:g} W and cap {self.cap_w:g} W: expected 0 <= idle < cap <= {_MOST_WATTS} W"
            )

    def watts(self, u_compute: float, u_memory: float) -> float:
        return min(self.cap_w, self.idle_w + self._above_idle(u_compute, u_memory))

    def step_s(self, compute_s: float, memory_s: float, limit_w: float) -> float:
        """How long a step takes under `limit_w`, if alone its arithmetic takes `compute_s` and its reading `memory_s`.

        Both overlap. A limit slows the arithmetic alone, and memory keeps its speed (POLCA, ASPLOS 2024): reading hides
        a slower clock. The times hold under the device's own cap, so a limit above it changes nothing.

        Raises: SourceError for a limit that memory and idling alone exceed
        """
        free_s = max(compute_s, memory_s)
        if free_s <= 0:
            raise SourceError(f"power: a step of {compute_s:g} and {memory_s:g} s; expected a time above 0")
        moving = self.idle_w + self._above_idle(0, memory_s / free_s)
        if limit_w <= moving and limit_w < self.cap_w:
            raise SourceError(f"power: a limit of {limit_w:g} W is not above the {moving:.0f} W without arithmetic")
        working = self.watts(compute_s / free_s, memory_s / free_s) - moving
        clock = (limit_w - moving) / working if working > 0 else math.inf
        return max(compute_s / min(clock, 1), memory_s)

    def _above_idle(self, u_compute: float, u_memory: float) -> float:
        return (self.cap_w - self.idle_w) * (self.compute * u_compute + self.memory * u_memory)


def power_of(hardware: Hardware) -> Power:
    """The curve of a card before any calibration. Raises: SourceError where its TDP is unknown"""
    if hardware.tdp_w is None:
        raise SourceError(f"card {hardware.name}: tdp_w is unknown, so no power can be told; give it in the card")
    cap = hardware.tdp_w
    compute, memory, idle = _PRIOR if hardware.kind == "gpu" else _UNKNOWN
    source = "fitted to GEMM on H200, serving on A100 and H100" if hardware.kind == "gpu" else "assumed, not measured"
    return Power(idle * cap if hardware.idle_w is None else hardware.idle_w, cap, compute, memory, source)


@dataclass(frozen=True)
class Capped:
    """A card that is held to a limit of power: its peaks are what the limit leaves, `flops` and `bandwidth` of them.

    `power`: its curve, by the use of the lower peaks.
    """

    card: Hardware
    power: Power
    flops: float = 1.0
    bandwidth: float = 1.0


def capped(card: Hardware, cap_w: float, efficiency: Efficiency) -> Capped:
    """What the card does under `cap_w`: arithmetic slows as soon as it alone would draw more, reading when it would.

    So prompts slow long before decoding does (POLCA, ASPLOS 2024), whose arithmetic hides behind reading.

    Raises: SourceError for a limit at or below the power of a card that waits, and where speed was measured without one
    """
    curve = power_of(card)
    if not cap_w > curve.idle_w:
        raise SourceError(
            f"card {card.name}: a cap of {cap_w:g} W, but waiting alone takes {curve.idle_w:g} W: give more, such as "
            f"{(curve.idle_w + curve.cap_w) / 2:.0f}"
        )
    if cap_w >= curve.cap_w:
        return Capped(card, curve)
    if efficiency.products:
        raise SourceError(f"card {card.name}: products were measured without a cap of {cap_w:g} W: leave it out")
    range_w, left_w = curve.cap_w - curve.idle_w, cap_w - curve.idle_w
    flops = min(1.0, left_w / (curve.watts(efficiency.compute, 0) - curve.idle_w))
    bandwidth = min(1.0, left_w / (curve.watts(0, efficiency.memory) - curve.idle_w))
    main, *slower = card.memory
    slowed = replace(
        card,
        flops={dtype: rate * flops for dtype, rate in card.flops.items()},
        memory=(replace(main, bytes_per_s=main.bytes_per_s * bandwidth), *slower),
        tdp_w=cap_w,
        idle_w=curve.idle_w,
        peak_w=min(card.peak_w or cap_w, cap_w),
        provenance={"default": Provenance("paper", curve.source), **card.provenance},
    )
    scale = range_w / left_w
    power = Power(curve.idle_w, cap_w, curve.compute * flops * scale, curve.memory * bandwidth * scale, curve.source)
    return Capped(slowed, power, flops, bandwidth)


def fit_power(uses: Sequence[Use], cap_w: float, idle_w: float | None = None) -> Power:
    """Both shares, and the idle power unless it is given, by bounded robust least squares of log watts.

    A weak prior holds what the uses say nothing of, such as `compute` where all of them decode.

    Raises: SourceError for fewer than 4 uses, or watts that cannot be of one device
    """
    from scipy.optimize import least_squares  # estimates do without scipy

    if len(uses) < 4:
        raise SourceError(f"power: {len(uses)} measurements are too few to fit a curve; expected 4 or more")
    for use in uses:
        if not 0 < use.watts <= _MOST_WATTS or use.u_compute < 0 or use.u_memory < 0:
            raise SourceError(f"power: {use}: expected watts of one device (not mW) up to {_MOST_WATTS}, uses from 0")
    used = np.array([(use.u_compute, use.u_memory) for use in uses])
    logs = np.log([use.watts for use in uses])
    low, high = ((0, 0, 0.02), (4, 4, 0.5)) if idle_w is None else ((0, 0), (4, 4))
    prior = np.array(_PRIOR[: len(low)])

    def errors(x: np.ndarray) -> np.ndarray:
        idle = x[2] * cap_w if idle_w is None else idle_w
        drawn = np.minimum(cap_w, idle + (cap_w - idle) * (used @ x[:2]))
        away = (x - prior) * _PRIOR_WEIGHTS[: len(x)]
        return np.concatenate([np.log(np.maximum(drawn, 1e-3)) - logs, away])

    x = least_squares(errors, prior, bounds=(low, high), loss="soft_l1", f_scale=0.1).x
    idle = float(x[2]) * cap_w if idle_w is None else idle_w
    return Power(idle, cap_w, float(x[0]), float(x[1]), f"fitted to {len(uses)} measurements")


# --- many devices under one budget
@dataclass(frozen=True, slots=True)
class Phase:
    """A device draws `watts` for this `share` of the time."""

    watts: float
    share: float


def devices_under(budget_w: float, phases: Sequence[Phase], quantile: float = 0.99) -> int:
    """How many devices fit so that all together stay under the budget in `quantile` of the time.

    Devices change phase independently, as prompts do that arrive so; capping has to catch the rest (POLCA, ASPLOS 2024,
    puts 30 % more servers under a budget). Give the phases of the busiest hour: a common peak is not averaged away.

    Raises: SourceError for phases that are no mix, or a budget below one device
    """
    count = int(budget_w / max(sum_watts(phases, 1, quantile), 1e-9))
    if count < 1:
        raise SourceError(f"power: a budget of {budget_w:g} W holds no device, one draws up to {_most(phases):g} W")
    low, high = count, max(count, int(budget_w / _mean(phases))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum_watts(phases, middle, quantile) <= budget_w else (low, middle)
    return low


def sum_watts(phases: Sequence[Phase], count: int, quantile: float = 0.99) -> float:
    """This quantile of what `count` independent devices draw. Raises: SourceError"""
    if not phases or any(one.share < 0 or not 0 < one.watts <= _MOST_WATTS for one in phases):
        raise SourceError(f"power: phases {list(phases)}: expected watts up to {_MOST_WATTS} and shares from 0")
    if abs(sum(one.share for one in phases) - 1) > 1e-6 or count < 1 or not 0 < quantile < 1:
        raise SourceError(
            f"power: {count} devices, quantile {quantile}, phases {list(phases)}: shares must add up to 1"
        )
    if count > _MANY:
        mean = _mean(phases)
        variance = sum(one.share * (one.watts - mean) ** 2 for one in phases)
        return count * mean + NormalDist().inv_cdf(quantile) * math.sqrt(count * variance)
    step = _most(phases) / _BINS
    alone = np.zeros(_BINS + 1)
    for one in phases:
        alone[math.ceil(one.watts / step - 1e-9)] += one.share
    size = 1 << (_BINS * count).bit_length()
    together = np.fft.irfft(np.fft.rfft(alone, size) ** count, size)
    return float(np.searchsorted(np.cumsum(together), quantile)) * step


def _most(phases: Sequence[Phase]) -> float:
    return max(one.watts for one in phases)


def _mean(phases: Sequence[Phase]) -> float:
    return sum(one.watts * one.share for one in phases)


# --- energy and carbon
@dataclass(frozen=True, slots=True)
class Interval:
    value: float
    low: float
    high: float


def energy_j(spans: Iterable[tuple[float, float]]) -> float:
    """Joules of spans of (watts, seconds)."""
    return math.fsum(watts * seconds for watts, seconds in spans)


def carbon_g(joules: float, g_per_kwh: Interval, pue: float = 1.0, embodied_g: float = 0.0) -> Interval:
    """Grams of CO2e of the devices' energy, the building's overhead, and the share of making them that the user gives.

    `pue`: power of the whole building over that of its machines, from 1. Raises: SourceError
    """
    if not 1 <= pue <= 5 or not 0 <= embodied_g < math.inf or not 0 <= joules < math.inf:
        raise SourceError(
            f"carbon: {joules:g} J, PUE {pue:g}, embodied {embodied_g:g} g: expected PUE 1 to 5, no minus"
        )
    kwh = joules / _JOULES_PER_KWH * pue
    return Interval(*(kwh * one + embodied_g for one in (g_per_kwh.value, g_per_kwh.low, g_per_kwh.high)))


def read_intensities(path: str | Path) -> dict[str, Interval]:
    """The user's carbon intensities in g CO2e/kWh by region: TOML of `north = 30` or `north = [20, 45]` (low, high).

    Raises: SourceError
    """
    try:
        data = tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SourceError(f"carbon intensities {path}: cannot be read: {reason(error)}") from None
    if not data:
        raise SourceError(f"carbon intensities {path}: no region; expected lines as `north = 30` in g/kWh")
    return {region: _intensity(region, value) for region, value in data.items()}


def _intensity(region: str, value: Any) -> Interval:
    ends = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= 3000 for end in ends):
        raise SourceError(f"carbon intensity of {region}: {value!r}, expected g/kWh, 0 to 3000, or [low, high]")
    low, high = min(ends), max(ends)
    return Interval((low + high) / 2, low, high)
