"""`everybit plan fleet` of cards: caps, prices, queues, carbon by hour, and figures in wrong units."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everybit.cli.main import main
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
        ("[quality]\neverybit4 = 91", "everybit4 is 91, expected a part of 1, as 0.91 for 91 %"),
        ("[limits]\noversubscribed = true", "no replica type has one"),
    ],
)
def test_wrong_units_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, added: str, said: str) -> None:
    assert said in run(capsys, tmp_path, SERVICE + added + "\n", code=2).splitlines()[-1]
