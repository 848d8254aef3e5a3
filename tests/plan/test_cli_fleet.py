"""`everybit plan fleet` of cards: caps, prices, queues, carbon by hour, and figures in wrong units."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from everybit.cli.main import main
from everybit.cli.plan.fleet_spec import read_spec
from everybit.errors import SourceError
from everybit.plan.candidates import Candidate, Terms, candidate
from everybit.plan.efficiency import prior
from everybit.plan.estimate import estimate
from everybit.plan.fleet import Fleet, plan_fleet
from everybit.plan.fleet_checks import _waiting, queued, simulated
from everybit.plan.fleet_inputs import Bucket, Limits
from everybit.plan.hardware import read_hardware
from everybit.plan.model import read_model
from everybit.plan.power import capped, power_of
from everybit.plan.simulate.metrics import Slo

MODEL = read_model("meta-llama/Llama-3.1-8B", weight_bits="everybit4")
A10G = read_hardware("a10g")
DEMAND, SLO = [Bucket(500, 100, 2.0)], Slo(1.0, 0.04, share=0.95)
SERVICE = """
model = "meta-llama/Llama-3.1-8B"
bits = "everybit4"
slo = "ttft=1s,tpot=40ms,share=0.95"
engine = "everybit"

[[demand]]
prompt = 500
output = 100
requests_per_s = 2

[[types]]
card = "a10g"
"""


def made(terms: Terms | None = None) -> Candidate:
    return candidate(MODEL, A10G, DEMAND, SLO, bits="everybit4", engine="everybit", terms=terms)


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: str, *options: str, code: int = 0) -> str:
    (tmp_path / "spec.toml").write_text(spec)
    assert main(["plan", "fleet", str(tmp_path / "spec.toml"), "--brief", *options], ("plan",)) == code
    out, err = capsys.readouterr()
    return err if code else out


# --- caps
def test_a_cap_slows_prompts_first() -> None:
    efficiency = prior(A10G, "everybit")

    def times(cap_w: float) -> tuple[float, float]:
        held = capped(A10G, cap_w, efficiency)
        one = estimate(MODEL, held.card, concurrency=1, prompt=2000, output=100, engine="everybit", power=held.power)
        return one.ttft_s.value, one.tpot_s.value

    (first, gap), (first_240, gap_240), (first_120, gap_120) = (times(watts) for watts in (300, 240, 120))
    assert first_240 > 1.25 * first
    assert gap_240 < 1.03 * gap
    assert first_120 > first_240
    assert gap_120 > 1.5 * gap


def test_a_cap_above_all_that_is_drawn_changes_nothing() -> None:
    held = capped(A10G, 300, prior(A10G))
    assert (held.card, held.power) == (A10G, power_of(A10G))


def test_a_type_serves_and_draws_what_its_cap_allows() -> None:
    free, held = made().type, made(Terms(cap_w=200)).type
    assert 0 < held.rates[0] < free.rates[0]
    assert (held.base_w or 0) < held.power_w <= held.peak_w == 200 < free.peak_w
    assert held.name == "1 x A10G, everybit4, 200 W"
    with pytest.raises(SourceError, match="a cap of 75 W, but waiting alone takes 75 W"):
        made(Terms(cap_w=75))
    with pytest.raises(SourceError, match=r"keeps the SLO ttft=1s,tpot=40ms,share=0\.95 for no bucket"):
        made(Terms(cap_w=80))


# --- queues
def test_waiting_is_erlang_s_c() -> None:
    assert _waiting(1, 0.3) == pytest.approx(0.3)
    assert _waiting(2, 0.5) == pytest.approx(1 / 3)
    assert _waiting(10, 0.8) == pytest.approx(0.4092, abs=1e-4)  # of tables: 8 erlang, 10 servers
    assert _waiting(0, 0.5) == 1
    # Halfin and Whitt (1981): of many places, by how many roots of them are free; here one
    limit = 1 / (1 + math.sqrt(2 * math.pi) * math.exp(0.5) * NormalDist().cdf(1))
    assert _waiting(10**8, 1 - 1e-4) == pytest.approx(limit, rel=1e-3)


def test_a_fleet_leaves_room_for_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the formula lets through holds in simulation."""
    monkeypatch.setattr("everybit.plan.fleet_checks.REQUESTS", 150)
    one = made()
    demand = [replace(DEMAND[0], requests_per_s=0.95 * one.type.rates[0])]
    assert plan_fleet(demand, [one.type]).counts == {one.type.name: 1}
    judge = queued([one], demand, SLO)
    fleet = plan_fleet(demand, [one.type], verify=judge)
    assert judge(fleet) >= 1
    assert fleet.counts == {one.type.name: 2}
    assert simulated([one], demand, SLO, engine="everybit")(fleet) >= 1


def test_pooled_replicas_may_be_busier() -> None:
    one = made()
    demand = [replace(DEMAND[0], requests_per_s=20 * one.type.rates[0])]
    fleet = plan_fleet(demand, [one.type], Limits(utilisation=0.9), verify=queued([one], demand, SLO))
    assert fleet.utilisation == 0.9


def test_a_large_fleet_is_simulated_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everybit.plan.fleet_checks.REQUESTS", 50)
    one = made()
    small, large = ([replace(DEMAND[0], requests_per_s=n * one.type.rates[0])] for n in (2, 40_000))
    kept = [
        simulated([one], demand, SLO, engine="everybit")(plan_fleet(demand, [one.type], Limits(utilisation=0.5)))
        for demand in (small, large)
    ]
    assert kept[0] == pytest.approx(kept[1])


def test_only_cards_are_simulated() -> None:
    told = replace(made().type, name="told")
    fleet: Fleet = plan_fleet(DEMAND, [told])
    with pytest.raises(SourceError, match="'told' has rates of its own"):
        simulated([], DEMAND, SLO)(fleet)


# --- power under load
def test_power_of_a_light_load_is_not_that_of_a_full_one() -> None:
    one = made().type
    assert power_of(A10G).idle_w < (one.base_w or 0) < one.power_w


# --- the command
def test_the_answer_names_price_cap_queue_and_hours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    carbon = [500.0] * 9 + [200.0] * 6 + [500.0] * 9
    spec = SERVICE + f"cap_w = 200\ncarbon = {carbon}\n"
    text = run(capsys, tmp_path, spec)
    name = "1 x A10G, everybit4, 200 W"
    assert f"price of {name}: 1.01 $/h of a device, on-demand, AWS and others, as the paper lists them, 2024-04" in text
    assert re.search(rf"cap of {name}: rates are those under it, arithmetic at 5\d%, reading at 9\d%|100%", text)
    assert "cleanest hours of a10g: 9, 10, 11, 12, 13, 14 (from 200, on average 425 g/kWh)" in text
    assert "queues by a formula (M/M/c) keep the SLO; not simulated (--verify)" in text
    found: dict[str, Any] = json.loads(run(capsys, tmp_path, spec, "--json"))
    price = found["prices"][name]
    assert (price["usd_per_h"], price["kind"], price["date"]) == (1.01, "on-demand", "2024-04")
    assert found["held_by"] == "queues (M/M/c)"
    assert 0.5 < found["caps"][name]["flops"] < 0.6
    assert found["cleanest_hours"] == {"a10g": [9, 10, 11, 12, 13, 14]}
    assert found["fleet"]["gco2_per_h"] == pytest.approx(found["fleet"]["power_w"] / 1e3 * 425)


def test_a_given_price_stands_beside_the_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(capsys, tmp_path, SERVICE + "price = 2.5\n")
    assert "2.5 $/h of a device, given; listed: on-demand 1.01 (2024-04)" in text


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('price = "reserved"', "no reserved price is known, it lists on-demand; reserved ones are agreed"),
        ("price = 101", "a price of 101 $/h, more than 20 times the 1.01 that are listed"),
        ('price = "spot"', "no spot price is known"),
        ("cap_w = 60", "a cap of 60 W, but waiting alone takes 75 W"),
        ("interruptions_per_h = 1", "interruptions_per_h with price 'on-demand', expected it with spot alone"),
        ("carbon = [1, 2]", "or 24 of them, by hour"),
        ("carbon = 9000", "0 to 3000"),
        ("tp = []", "tp is [], expected one or more; or leave it out"),
        ("tp = 1.5", "tp is 1.5, expected a whole number from 1 to 1024"),
        ("bits = []", "bits is [], expected one or more; or leave it out"),
        ('bits = "4,8"', "bits 4,8: 2 widths in one text, expected a list of texts"),
        ("[quality]\neverybit9 = 0.9", "quality: unknown everybit9; expected some of everybit4"),
        ("[limits]\nquotas = 3", "limits, quotas: 3 arrived, expected a table"),
        ('[limits]\nquotas = { A10G = "2" }', "A10G is '2', expected a whole number"),
        ("[limits]\nquotas = { A10G = 2.5 }", "A10G is 2.5, expected a whole number"),
        ("[limits]\nutilisation = true", "utilisation is True, expected a part of 1"),
        ("[limits]\nspot_losses = 1.5", "spot_losses is 1.5, expected a whole number from 0 to 1000"),
        ("[quality]\neverybit4 = 91", "everybit4 is 91, expected a part of 1, as 0.91 for 91 %"),
        ("[limits]\noversubscribed = true", "no replica type has one"),
    ],
)
def test_wrong_units_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, added: str, said: str) -> None:
    assert said in run(capsys, tmp_path, SERVICE + added + "\n", code=2).splitlines()[-1]


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ("pue = 0\ncarbon = 1", "pue is 0, expected a number from 1 to 5"),
        ("pue = 100\ncarbon = 1", "pue is 100, expected a number from 1 to 5"),
        ("pue = 1.5", "pue without carbon of a card"),
        ("calibration = 3", "calibration is 3, expected a text"),
        ('"\\u001b[31m" = 1', r"unknown '\x1b[31m'"),
    ],
)
def test_wrong_tops_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, top: str, said: str) -> None:
    assert said in run(capsys, tmp_path, top + SERVICE, code=2).splitlines()[-1]


TOLD = """kv_bits = 8
activation_bits = 8
slo = ""
engine = "any"
calibration = []
cautious = true
[[demand]]
prompt = 100
output = 100
requests_per_s = 1
[[types]]
name = "a"
hardware = "A"
usd_per_h = 1
rates = [2]
devices = 1
power_w = 2
peak_w = 3
capped_w = 1
base_w = 1
gco2_per_h = 1
quality = 1
spot = true
interruptions_per_h = 0.1
recovery_s = 100
[limits]
utilisation = 1
quotas = { A = 9 }
on_demand_share = 0
spot_losses = 1
power_w = 99
oversubscribed = true
gco2_per_h = 99
least_quality = 0
mean_quality = 0
co2_usd_per_t = 1
"""
HOSTILE = ["0", "-1", "0.5", "1e300", "1e-300", "inf", "nan", "true", '"x"', '"\\u001b\\n"', "[]", "[[1]]", "{}"]
HOSTILE += ['{ A = "x" }', "2020-01-01", "9" * 400, "[[[["]


def test_any_value_is_taken_or_told(tmp_path: Path) -> None:
    """No field with any value brings down the reader or the planner."""
    path, messages = tmp_path / "spec.toml", []

    def planned(text: str) -> bool:
        path.write_text(text)
        try:
            spec = read_spec(path)
            plan_fleet(spec.demand, spec.types, spec.limits)
        except SourceError as error:
            messages.append(str(error))
            return False
        return True

    assert planned(TOLD)
    lines = [line for line in TOLD.splitlines() if "=" in line]
    taken = [planned(TOLD.replace(line, f"{line.split()[0]} = {value}")) for line in lines for value in HOSTILE]
    assert 0.05 < sum(taken) / len(taken) < 0.3
    assert all(message.isprintable() for message in messages)


# --- what the answer does not cover
def test_the_formula_says_nothing_of_fluidity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = SERVICE.replace("share", "fluidity=0.9,share")
    text = run(capsys, tmp_path, spec)
    assert "keep the SLO, fluidity apart; not simulated" in text
    assert "warning: fluidity 0.9 of the SLO is not judged by the formula" in text
    assert json.loads(run(capsys, tmp_path, SERVICE, "--json"))["warnings"] == []


def test_spot_that_is_mostly_gone_is_a_warning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = SERVICE.replace("a10g", "h100-sxm") + 'price = "spot"\ninterruptions_per_h = 10\nrecovery_s = 1713\n'
    assert "spares are gone 68.28% of the time, expected at most 5.00%" in run(capsys, tmp_path, spec)
