"""What a fleet is planned from: demand in buckets, replica types that could serve it, and limits to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from everybit.errors import SourceError
from everybit.formats.tensors import show

_QUOTA = "quota "  # names the quota of one hardware kind: "quota h100"
_MOST_INTERRUPTIONS = 10  # an hour, as of cards
_MOST_REPLICAS = 1_000_000  # of more the solver's tolerances are whole replicas
_SLOWEST = 1e-9  # of a demand: the part that a replica must be able to serve


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of one class of lengths: `input_tokens` and `output_tokens` are its typical ones."""

    input_tokens: int
    output_tokens: int
    requests_per_s: float

    @property
    def name(self) -> str:
        return f"{self.input_tokens} in, {self.output_tokens} out"


@dataclass(frozen=True, slots=True)
class ReplicaType:
    """One way to run the model: `name` stands for hardware x parallelism x bits. Everything is of a whole replica.

    `rates`: for each bucket, the most requests/s that one replica serves of that bucket alone while it keeps the SLO;
    0 where it cannot. Mixed traffic is assumed to take the sum of its shares of time.
    `power_w`, `base_w`: expected at those rates, and as the load goes to 0; in between it grows evenly, and so do
    `gco2_per_h`, which are those at `power_w` (None: the load changes neither). `peak_w`: the most that it can draw.
    `capped_w`: what it is held to while the budget of power is short (None: nothing, its peak counts).
    `interruptions_per_h`, `recovery_s`: how often the provider takes a spot replica, and how long until one is back.
    """

    name: str
    hardware: str
    usd_per_h: float
    rates: tuple[float, ...]
    devices: int = 1
    power_w: float = 0.0
    peak_w: float = 0.0
    capped_w: float | None = None
    gco2_per_h: float = 0.0
    quality: float = 1.0
    spot: bool = False
    interruptions_per_h: float = 0.0
    recovery_s: float = 0.0
    base_w: float | None = None

    @property
    def base_share(self) -> float:
        """The part of its power that it draws without load."""
        return 1.0 if self.base_w is None or not self.power_w else self.base_w / self.power_w


@dataclass(frozen=True)
class Limits:
    """What a fleet must keep; None or empty: no such limit.

    `utilisation`: the part of a replica's rate that traffic may take. `quotas`: devices by hardware kind.
    `on_demand_share`: least part of all requests that runs on types that are not spot.
    `spot_losses` k: of each spot type in use, the load fits what is left when any k replicas are gone (N + k). It says
    nothing of more than k at once, and providers often take a whole pool back together: `on_demand_share` is the answer
    to that.
    `power_w`: budget of the whole fleet; every replica's peak must fit, or, with `oversubscribed`, the expected draw of
    all under their load and what they draw when all are capped (POLCA, Patel et al. 2023). Replicas that are held to
    `capped_w` are slower than their rates, so oversubscription keeps the SLO only as long as that is rare.
    `least_quality`: types below are not used. `mean_quality`: over requests.
    `co2_usd_per_t`: what a tonne adds to the bill that is minimised.
    """

    utilisation: float = 1.0
    quotas: Mapping[str, int] = field(default_factory=dict)
    on_demand_share: float | None = None
    spot_losses: int = 1
    power_w: float | None = None
    oversubscribed: bool = False
    gco2_per_h: float | None = None
    least_quality: float | None = None
    mean_quality: float | None = None
    co2_usd_per_t: float = 0.0

    @property
    def names(self) -> list[str]:
        """The limits that are set, as `value` and `changed` take them; utilisation is not one of them."""
        plain = ("on_demand_share", "power_w", "gco2_per_h", "least_quality", "mean_quality")
        return [f"{_QUOTA}{kind}" for kind in self.quotas] + [n for n in plain if getattr(self, n) is not None]

    def value(self, name: str) -> float:
        found: float = self.quotas[name[len(_QUOTA) :]] if name.startswith(_QUOTA) else getattr(self, name)
        return found

    def changed(self, name: str, value: float | None) -> Limits:
        """These limits with another value of one; None takes it away."""
        if not name.startswith(_QUOTA):
            change: dict[str, Any] = {name: value}
            return replace(self, **change)
        kind = name[len(_QUOTA) :]
        quotas = {key: most for key, most in self.quotas.items() if key != kind}
        return replace(self, quotas=quotas if value is None else {**quotas, kind: int(value)})

    def relaxed(self, name: str, by: float = 0.1) -> float:
        """The value that is looser by a tenth; of a quota at least one device more, of utilisation at most 1."""
        value = self.value(name)
        if name.startswith(_QUOTA):
            return math.ceil(value * (1 + by)) if value else 1
        if name == "utilisation":
            return min(1.0, value * (1 + by))
        return value * (1 + by) if name in ("power_w", "gco2_per_h") else value - abs(value) * by


def check(demand: Sequence[Bucket], types: Sequence[ReplicaType], limits: Limits) -> None:
    """Raises: SourceError at the first thing that makes no sense."""
    if not demand or not types:
        raise SourceError(f"a fleet needs demand and replica types: got {len(demand)} buckets and {len(types)} types")
    for bucket in demand:
        if bucket.input_tokens < 0 or bucket.output_tokens < 0:
            raise SourceError(f"the bucket '{bucket.name}' has a negative length: lengths are 0 or more tokens")
        if not (math.isfinite(bucket.requests_per_s) and bucket.requests_per_s > 0):
            raise SourceError(
                f"the bucket '{bucket.name}' has {bucket.requests_per_s} requests/s: give more than 0, or leave it out"
            )
    names = [one.name for one in types]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"two replica types are called {show(double)}: names must differ")
    if limits.oversubscribed and all(one.capped_w is None for one in types):
        raise SourceError("oversubscribed counts capped_w instead of peaks, but no replica type has one: leave it out")
    for one in types:
        _check_type(one, len(demand))
    _check_limits(limits)
    _check_sizes(demand, types, limits)


def _check_sizes(demand: Sequence[Bucket], types: Sequence[ReplicaType], limits: Limits) -> None:
    least = 0.0
    for place, bucket in enumerate(demand):
        rates = {one.name: one.rates[place] for one in types if one.rates[place]}
        if slow := [name for name, rate in rates.items() if rate < _SLOWEST * bucket.requests_per_s]:
            raise SourceError(
                f"'{slow[0]}' serves {rates[slow[0]]:g} of {bucket.requests_per_s:g} requests/s of '{bucket.name}', "
                f"less than a part of {_SLOWEST:g}: give a rate of 0 where it cannot serve"
            )
        least += bucket.requests_per_s / max(rates.values(), default=math.inf)
    if least > _MOST_REPLICAS * limits.utilisation:
        raise SourceError(
            f"the demand takes {least / limits.utilisation:.3g} replicas or more, expected at most {_MOST_REPLICAS:,}: "
            "plan a part of it"
        )


def _check_type(one: ReplicaType, buckets: int) -> None:
    if bad := [text for text in (one.name, one.hardware) if not (text and text.isprintable())]:
        raise SourceError(
            f"a replica type with the name or hardware {show(bad[0])}: expected a text that can be printed"
        )
    if len(one.rates) != buckets:
        raise SourceError(f"'{one.name}' has {len(one.rates)} rates for {buckets} buckets: give one a bucket")
    if one.devices < 1:
        raise SourceError(f"'{one.name}' has {one.devices} devices: give at least 1")
    if not math.isfinite(one.quality):
        raise SourceError(f"'{one.name}' has a quality of {one.quality}: give a number")
    watts = ("power_w", "base_w", "peak_w", "capped_w")
    for what in ("usd_per_h", *watts, "gco2_per_h", "interruptions_per_h", "recovery_s"):
        value = getattr(one, what)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SourceError(f"'{one.name}' has {what} = {value}: give 0 or more")
    if not all(math.isfinite(rate) and rate >= 0 for rate in one.rates):
        raise SourceError(f"'{one.name}' has a rate below 0 or not finite: give requests/s, 0 where it cannot serve")
    if one.interruptions_per_h > _MOST_INTERRUPTIONS:
        raise SourceError(
            f"'{one.name}' is taken {one.interruptions_per_h:g} times an hour: give {_MOST_INTERRUPTIONS} at most"
        )
    if one.base_w is not None and one.base_w > one.power_w:
        raise SourceError(
            f"'{one.name}' draws {one.base_w} W without load, {one.power_w} W with: give no more than that"
        )
    if one.peak_w < one.power_w or (one.capped_w is not None and one.capped_w > one.peak_w):
        raise SourceError(
            f"'{one.name}' draws {one.power_w} W, {one.capped_w} W capped: neither may pass {one.peak_w} W, its peak"
        )


def _check_limits(limits: Limits) -> None:
    if not 0 < limits.utilisation <= 1:
        raise SourceError(f"utilisation is {limits.utilisation}: give a part of 1, such as 0.8")
    if limits.on_demand_share is not None and not 0 <= limits.on_demand_share <= 1:
        raise SourceError(f"on_demand_share is {limits.on_demand_share}: give a part of 1, such as 0.5")
    for what in ("spot_losses", "power_w", "gco2_per_h", "co2_usd_per_t"):
        value = getattr(limits, what)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SourceError(f"{what} is {value}: give 0 or more")
    for kind, most in limits.quotas.items():
        if most < 0:
            raise SourceError(f"the quota of {show(kind)} is {most}: give 0 devices or more")
    for what in ("least_quality", "mean_quality"):
        value = getattr(limits, what)
        if value is not None and not math.isfinite(value):
            raise SourceError(f"{what} is {value}: give a number")
