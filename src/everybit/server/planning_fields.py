"""What requests for plans may hold: every number bounded, every list short."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from everybit.server.fields import Closed

MOST_REQUESTS, MOST_TOKENS = 500, 2_000_000  # of a simulation
MOST_TYPES = 32  # of a fleet

Width = Literal[
    "own", "everybit2", "everybit3", "everybit4", "everybit5", "everybit6", "everybit7", "everybit8",
    "bf16", "fp8", "int8", "int4", "nf4", "mxfp4", "nvfp4",
]  # fmt: skip
Card = Annotated[str, Field(max_length=64)]
Cards = Annotated[list[Card], Field(min_length=1, max_length=8, fail_fast=True)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=8, fail_fast=True)]
Devices = Annotated[int, Field(ge=1, le=64)]
Prompt = Annotated[int, Field(ge=1, le=1_000_000)]
Output = Annotated[int, Field(ge=1, le=100_000)]
Usd = Annotated[float, Field(ge=0, le=1000)]
Ms = Annotated[float, Field(ge=0.01, le=10_000_000)]


def _own() -> list[Width]:
    return ["own"]


class Promise(Closed):
    """Of means in an estimate and a fleet, of each request in a simulation; one limit or both."""

    ttft_ms: Ms | None = None
    tpot_ms: Ms | None = None


class Common(Closed):
    """`model`: a name of the offline set; or `config`: the content of a config.json."""

    model: str | None = Field(None, max_length=128)
    config: dict[str, Any] | None = None
    engine: Literal["any", "everybit", "vllm", "sglang", "trtllm"] = "any"
    slo: Promise | None = None


class EstimateFields(Common):
    """POST /plan/estimate. `prices`: $/h of one device by card, in place of the listed ones."""

    cards: Cards
    bits: Widths = Field(default_factory=_own)
    tp: Devices = 1
    users: int = Field(8, ge=1, le=4096)
    prompt: Prompt = 1024
    output: Output = 256
    prices: Annotated[dict[Card, Usd], Field(max_length=8)] = Field(default_factory=dict)


class Demand(Closed):
    prompt: Prompt
    output: Output
    requests_per_s: float = Field(ge=0.001, le=100_000)


class FleetFields(Common):
    """POST /plan/fleet. `quotas`: devices by card. `quality`: by width, higher is better; without it bits a weight."""

    cards: Cards
    bits: Widths = Field(default_factory=_own)
    tp: Annotated[list[Devices], Field(min_length=1, max_length=4, fail_fast=True)] = Field(default_factory=lambda: [1])
    demand: Annotated[list[Demand], Field(min_length=1, max_length=8, fail_fast=True)]
    prices: Annotated[dict[Card, Usd], Field(max_length=8)] = Field(default_factory=dict)
    quotas: Annotated[dict[Card, Annotated[int, Field(ge=0, le=100_000)]], Field(max_length=8)] = Field(
        default_factory=dict
    )
    utilisation: float = Field(0.8, ge=0.05, le=1)
    power_w: float | None = Field(None, ge=1, le=1e9)
    quality: Annotated[dict[Width, Annotated[float, Field(ge=-1e6, le=1e6)]], Field(max_length=16)] | None = None
    least_quality: float | None = Field(None, ge=-1e6, le=1e6)


class SimulateFields(Common):
    """POST /plan/simulate. Several `bits`, all of everybit's: its ladder chooses among them while it runs.

    Requests arrive at random; their lengths are drawn from half to one and a half of `prompt` and `output`.
    """

    card: Card
    bits: Widths = Field(default_factory=_own)
    scheduler: Literal["everybit", "vllm"] = "everybit"
    tp: Devices = 1
    replicas: int = Field(1, ge=1, le=8)
    rate: float = Field(ge=0.01, le=1000)
    seconds: float = Field(ge=1, le=3600)
    prompt: Prompt = 1024
    output: Output = 256
    usd_per_h: Usd | None = None
    seed: int = Field(0, ge=0, lt=2**32)
