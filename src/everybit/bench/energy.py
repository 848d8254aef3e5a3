"""Energy of a run, from the counters that processors (RAPL) and NVIDIA GPUs (NVML) keep, and the CO2 it stands for.

The counters count the whole machine, this bench included, and only the machine that the bench runs on. RAPL models DRAM
and package energy rather than metering the plug: fans, disks and losses of the power supply are not in it.

Source: Linux, Documentation/power/powercap/powercap.rst; NVML, nvmlDeviceGetTotalEnergyConsumption.
"""

from __future__ import annotations

import importlib
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from everybit.bench.records import SECOND
from everybit.errors import SourceError

POWERCAP = Path("/sys/class/powercap")
MOST_W = 1000  # of one RAPL domain: how fast its counter can go round, at worst
JOULES_PER_KWH = 3.6e6
Z95 = 1.96


@dataclass(frozen=True)
class Source:
    """One counter. `read` gives microjoules; it begins again at `range_uj` (None: never)."""

    name: str
    read: Callable[[], int]
    range_uj: int | None = None


@dataclass(frozen=True)
class Reading:
    """Microjoules of every source since the meter was made, at a moment of `time.perf_counter_ns`.

    `breaks`: how often until now a counter may have lost energy, because it went back or round more than once unseen.
    """

    at_ns: int
    microjoules: tuple[int, ...]
    breaks: int = 0

    @property
    def joules(self) -> float:
        return sum(self.microjoules) / 1e6


@dataclass(frozen=True)
class Power:
    """Watts of the idle machine, and the standard error of that mean."""

    watts: float
    sigma: float


@dataclass(frozen=True)
class Energy:
    """What a run used. `status` is measured, or unavailable for `reason`; then the figures are None."""

    status: str
    reason: str = ""
    sources: tuple[str, ...] = ()
    seconds: float | None = None
    joules: float | None = None
    joules_per_output_token: float | None = None
    idle_w: float | None = None
    idle_sigma_w: float | None = None
    joules_above_idle: float | None = None


@dataclass(frozen=True)
class Carbon:
    """Grams of CO2 equivalent as (value, low, high), of all energy and of that above idle."""

    intensity: str
    grams: tuple[float, float, float]
    grams_above_idle: tuple[float, float, float] | None


class Meter:
    """Adds up counters. Read it once a minute or more often: a 65 kJ counter goes round in 65 s at 1000 W.

    `reason` says why there is no source, and is empty where there is one.
    """

    def __init__(self, sources: Sequence[Source], reason: str = "") -> None:
        self.sources = tuple(sources)
        self.reason = "" if sources else reason
        self._last: list[int] | None = None
        self._total = [0] * len(sources)
        self._last_ns = self._breaks = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def read(self, now_ns: int | None = None) -> Reading | None:
        """All counters now; None where there is none, or one can no longer be read."""
        now_ns = time.perf_counter_ns() if now_ns is None else now_ns
        if not self.sources:
            return None
        try:
            values = [source.read() for source in self.sources]
        except (OSError, ValueError, RuntimeError):
            return None
        for i, source in enumerate(self.sources):
            step = 0 if self._last is None else values[i] - self._last[i]
            if source.range_uj is not None:
                step %= source.range_uj
                self._breaks += self._last is not None and (now_ns - self._last_ns) * MOST_W > source.range_uj * 1000
            elif step < 0:
                self._breaks, step = self._breaks + 1, 0
            self._total[i] += step
        self._last, self._last_ns = values, now_ns
        return Reading(now_ns, tuple(self._total), self._breaks)


def find_meter(powercap: Path = POWERCAP) -> Meter:
    """All counters of this machine that this user may read."""
    found, problems = [], []
    for sources, problem in (_rapl(powercap), _nvml()):
        found += sources
        problems.append(problem)
    return Meter(found, "; ".join(problem for problem in problems if problem))


def idle_power(readings: Sequence[Reading]) -> Power:
    """From readings of the idle machine, say one a second for ten seconds. Raises: SourceError"""
    if len(readings) < 3:
        raise SourceError(f"{len(readings)} readings of the idle machine, expected 3 or more")
    watts = [(b.joules - a.joules) * SECOND / (b.at_ns - a.at_ns) for a, b in pairwise(readings)]
    first, last = readings[0], readings[-1]
    mean = (last.joules - first.joules) * SECOND / (last.at_ns - first.at_ns)
    return Power(mean, statistics.stdev(watts) / math.sqrt(len(watts)))


def energy(
    meter: Meter,
    start: Reading | None,
    end: Reading | None,
    *,
    local: bool,
    output_tokens: int,
    idle: Power | None = None,
) -> Energy:
    """Between two readings of `meter`. `local`: the endpoint runs on this machine."""
    reason = ""
    if not local:
        reason = "the endpoint is on another machine"
    elif not meter.sources:
        reason = meter.reason
    elif start is None or end is None:
        reason = "a counter could not be read"
    elif end.at_ns <= start.at_ns:
        reason = "no time between the readings"
    elif end.breaks != start.breaks:
        reason = "a counter went back, or was not read for so long that it may have gone round more than once"
    if reason or start is None or end is None:
        return Energy("unavailable", reason)
    joules, seconds = end.joules - start.joules, (end.at_ns - start.at_ns) / SECOND
    return Energy(
        "measured",
        sources=meter.names,
        seconds=seconds,
        joules=joules,
        joules_per_output_token=joules / output_tokens if output_tokens else None,
        idle_w=idle.watts if idle else None,
        idle_sigma_w=idle.sigma if idle else None,
        joules_above_idle=joules - idle.watts * seconds if idle else None,
    )


def carbon(used: Energy, intensity: str) -> Carbon | None:
    """CO2 of `used` at an intensity in g CO2e/kWh: `400`, `400+-50` or `350-450`. None where energy is unavailable.

    The interval holds the ends of the intensity and, above idle, 1.96 standard errors of the idle power.

    Raises: SourceError
    """
    middle, low, high = parse_intensity(intensity)
    if used.joules is None:
        return None

    def grams(joules: float, spread: float) -> tuple[float, float, float]:
        ends = [(joules + sign * spread) * end / JOULES_PER_KWH for sign in (-1, 1) for end in (low, high)]
        return joules * middle / JOULES_PER_KWH, min(ends), max(ends)

    above = None
    if used.joules_above_idle is not None:
        above = grams(used.joules_above_idle, Z95 * (used.idle_sigma_w or 0) * (used.seconds or 0))
    return Carbon(intensity, grams(used.joules, 0), above)


def parse_intensity(text: str) -> tuple[float, float, float]:
    """Middle, low and high end in g CO2e/kWh. Raises: SourceError"""
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"\s*{number}\s*(?:(\+-|\+/-|±|-)\s*{number}\s*)?", text, re.ASCII)
    if found:
        first, sign, second = float(found[1]), found[2], float(found[3] or 0)
        low, high = (first, second) if sign == "-" else (first - second, first + second)
        if 0 <= low <= high:
            return (low + high) / 2, low, high
    raise SourceError(f"carbon intensity {text!r}: expected g CO2e/kWh as 400, 400+-50 or 350-450")


def _rapl(powercap: Path) -> tuple[list[Source], str]:
    """Packages, and the DRAM zones beside them. Cores lie inside a package, and psys holds the packages."""
    found, hidden = [], False
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith("package") and name != "dram":
                continue
            counter, span = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
            _number(counter)
        except PermissionError:
            hidden = True
        except (OSError, ValueError):
            continue
        else:
            found.append(Source(f"RAPL {name} ({zone.name})", partial(_number, counter), span))
    if hidden:
        return [], "RAPL is readable by root only"  # a part of the packages would pass for the whole
    return found, "" if found else "no RAPL counter"


def _number(path: Path) -> int:
    return int(path.read_text())


def _nvml() -> tuple[list[Source], str]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "pynvml is not installed"
    found = []
    try:
        nvml.nvmlInit()
        for i in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(i)

            def read(handle: object = handle) -> int:
                try:
                    return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1000  # mJ
                except nvml.NVMLError as error:
                    raise OSError(str(error)) from None

            read()
            found.append(Source(f"NVML GPU {i}", read))
    except (nvml.NVMLError, OSError) as error:
        return [], f"NVML: {error}"
    return found, ""
