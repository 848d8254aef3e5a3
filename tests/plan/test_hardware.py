"""Cards, the bounds that catch wrong units, and power against measured watts."""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from everybit.errors import SourceError
from everybit.plan.hardware import Hardware, cards, figures, priced, read_hardware, trust, weakest
from everybit.plan.power import (
    Interval,
    Phase,
    Power,
    Use,
    carbon_g,
    devices_under,
    energy_j,
    fit_power,
    power_of,
    read_intensities,
    sum_watts,
)
from everybit.plan.probe import write_card

CARD = """
name = "Mine"
kind = "gpu"
tdp_w = 700
[flops]
fp32 = 66.9e12
bf16 = 989.4e12
fp8 = 1978.9e12
[[memory]]
name = "HBM"
bytes = 80e9
bytes_per_s = 3.35e12
[[links]]
kind = "nvlink"
bytes_per_s = 450e9
devices = 8
[[prices]]
usd_per_h = 2.5
kind = "on-demand"
provider = "X"
date = "2026-11-01"
source = "list"
[provenance]
default = { kind = "vendor", source = "sheet" }
"memory.HBM.bytes_per_s" = { kind = "measured", source = "probe" }
"""


def read(folder: Path, text: str) -> Hardware:
    path = folder / "mine.toml"
    path.write_text(text)
    return read_hardware(path)


# --- cards
def test_every_card_reads_and_each_figure_has_a_provenance() -> None:
    read_all = [read_hardware(name) for name in cards()]
    assert len(read_all) >= 30
    assert len({card.name for card in read_all}) == len(read_all)
    for card in read_all:
        assert all(trust(card, figure).source for figure in figures(card))
    assert {card.name for card in read_all if not card.plannable} == {
        "FlightLLM on Versal VHK158",
        "SpiNNaker2 chip",
        "VGA convolution accelerator",
    }


def test_figures_are_dense_decimal_and_of_one_device() -> None:
    h100 = read_hardware("H100 SXM")
    assert h100.flops_of("bf16") == 989.4e12
    assert h100.main_memory.bytes_per_s == 3.35e12
    assert h100.link(8).bytes_per_s == 450e9
    assert h100.link(16).kind == "infiniband"
    assert [tier.name for tier in h100.memory] == ["HBM3", "host"]
    with pytest.raises(SourceError, match="no FLOP/s for int4, only for fp32"):
        h100.flops_of("int4")
    with pytest.raises(SourceError, match="no link joins 16 devices"):
        read_hardware("a10g").link(16)
    with pytest.raises(SourceError, match="no memory figures"):
        _ = read_hardware("vga").main_memory


def test_the_price_is_the_lowest_of_the_newest() -> None:
    h100 = read_hardware("h100-sxm")
    assert h100.price().usd_per_h == 2.29
    assert h100.price("spot").usd_per_h == 0.80
    mine = priced(h100, 3.1)
    assert (mine.price().usd_per_h, mine.price("spot").usd_per_h) == (3.1, 0.80)
    newer = replace(h100.prices[1], date="2026-12")
    assert replace(h100, prices=(*h100.prices, newer)).price().usd_per_h == 2.95
    with pytest.raises(SourceError, match="no spot price is known"):
        read_hardware("l4").price("spot")
    melange = 3 * read_hardware("a10g").price().usd_per_h + read_hardware("a100-80-sxm").price().usd_per_h
    assert melange == pytest.approx(6.70)


def test_trust_is_the_longest_path_and_the_weakest_counts(tmp_path: Path) -> None:
    card = read(tmp_path, CARD)
    assert trust(card, "memory.HBM.bytes_per_s").kind == "measured"
    assert trust(card, "memory.HBM.bytes").source == "sheet"
    assert weakest(card, "memory.HBM.bytes_per_s") == "measured"
    assert weakest(card) == "vendor"
    assert weakest(read_hardware("xeon-vm-2")) == "measured"
    assert weakest(read_hardware("sn40l")) == "paper"
    with pytest.raises(SourceError, match=r"no figure .flops\.int8."):
        trust(card, "flops.int8")


def test_a_name_that_is_not_there_names_the_near_ones() -> None:
    with pytest.raises(SourceError, match=r"no card .h100.: expected one of ours .*h100-sxm"):
        read_hardware("h100")
    with pytest.raises(SourceError, match="cannot be read"):
        read_hardware("absent.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tdp_w = 700", "tdp_w = 700000", "tdp_w is 700000, expected watts of one device; mW[?] then write 700"),
        ("tdp_w = 700", "tdp_w = 0.7", "tdp_w is 0.7, expected watts of one device; kW[?] then write 700"),
        ("tdp_w = 700", "tdp_w = 5600", "tdp_w is 5600, expected watts of one device"),
        ("tdp_w = 700", "tdp_w = 0x" + "f" * 6000, "tdp_w is a number of thousands of digits, expected a number"),
        ("tdp_w = 700", "tdp_w = " + "9" * 6000, "not TOML"),
        ("tdp_w = 700", "spot_interruptions_per_h = 5", "is 5, expected interruptions .* is it a percentage[?]"),
        ('name = "Mine"', 'name = "Mi\\nne"', r"name is 'Mi.*nne', expected a text that can be printed"),
        ('name = "HBM"', 'name = "H\\u001b[31m"', "name is 'H.*', expected a text that can be printed"),
        ('provider = "X"', 'provider = "X\\u001b[31m"', "provider is 'X.*', expected a text that can be printed"),
        ('"sheet"', '"sheet\\u202e"', "source is 'sheet.*', expected a text that can be printed"),
        ("tdp_w = 700", '"\\u001b[31m" = 700', "unknown '.x1b.31m'; expected some of name"),
        ("default = {", '"\\u001b" = 1\ndefault = {', "provenance '.x1b': 1 is not a table"),
        ("tdp_w = 700", "tdp_w = 700\nidle_w = 800", "idle_w 800 is not below tdp_w 700"),
        ("tdp_w = 700", "tdp = 700", "unknown tdp; expected some of name, kind"),
        ("tdp_w = 700", 'tdp_w = "700 W"', "tdp_w is '700 W', expected a number"),
        ("tdp_w = 700", "tdp_w = nan", "tdp_w is nan, expected a number"),
        ('kind = "gpu"', 'kind = "npu"', "kind 'npu': expected one of gpu, cpu, accelerator"),
        ("bf16 = 989.4e12", "bf16 = 989.4", r"flops.bf16 is 989.4, expected FLOP/s, as 989e12"),
        ("bf16 = 989.4e12", "bf16 = 1979e12", "fp8 is 1x bf16, .* FLOP/s of bf16 look sparse"),
        ("fp8 = 1978.9e12", "fp8 = 3958e12", "fp8 is 4x bf16, .* FLOP/s of fp8 look sparse"),
        ("fp8 = 1978.9e12", "tf32 = 989e12", "bf16 is 1x tf32, .* FLOP/s of tf32 look sparse"),
        ("bf16 = 989.4e12\nfp8 = 1978.9e12", "bf16 = 1979e12", "bf16 .* is twice the 9.894e.14 of .*sparse"),
        ("fp8 =", "fp9 =", "flops 'fp9': expected one of fp32"),
        ("bytes = 80e9", "bytes = 80", "memory.HBM.bytes is 80, expected bytes, as 80e9"),
        ("bytes = 80e9", "bytes = 80e6", "memory.HBM.bytes is 80000000.0, expected .* kB[?] then write 8e.10"),
        ("bytes = 80e9", "bytes = 85899345920", "memory.HBM.bytes is 8.58993e.10, 80 GiB: write 80e9"),
        ("= 3.35e12", "= 26.8e12", "HBM.bytes_per_s is .*, expected .* 0.011 to 2 s; bits/s[?] then write 3.35e.12"),
        ("= 3.35e12", "= 3350e6", "HBM.bytes_per_s is .*, expected .* kB/s[?] then write 3.35e.12"),
        ("bytes_per_s = 3.35e12", "bytes_per_s = 3350", "bytes_per_s is 3350, expected bytes/s"),
        ("bytes_per_s = 3.35e12", "bytes_per_s = 3.35e15", "bytes_per_s is 3350000000000000.0, expected bytes/s"),
        ("bytes_per_s = 3.35e12", f"bytes_per_s = {3350 * 2**30}", "3350 GiB/s: vendors mean 3350e9 by GB/s"),
        ("bytes_per_s = 3.35e12", "", "memory 1: bytes_per_s is missing"),
        ("devices = 8", "devices = 8\nlatency_s = 5", "latency_s is 5, expected seconds, as 5e-6"),
        (
            "= 450e9",
            "= 3600e9",
            "expected 1e.10 to 2e.12 bytes/s of one device in one dir.*; bits/s[?] then write 4.5e.11",
        ),
        ("= 450e9", "= 450e7", "links.nvlink.bytes_per_s is 4500000000.0, expected 1e.10 to 2e.12 bytes/s"),
        ("devices = 8", "devices = 0", "devices is 0"),
        ("devices = 8", "devices = 8.5", "devices is 8.5, expected a whole number"),
        ("usd_per_h = 2.5", "usd_per_h = -2.5", "on-demand price is -2.5"),
        (
            "usd_per_h = 2.5",
            "usd_per_h = 229",
            "price is 229, expected [$] an hour of one device, 0 to 50: .*whole node",
        ),
        ('"2026-11-01"', '"November"', "date of a price is 'November'"),
        ('"2026-11-01"', '"2999-11"', "date of a price is 2999-11, expected a day that is past"),
        ('default = { kind = "vendor"', 'default = { kind = "rumour"', "provenance default 'rumour'"),
        ("default =", "tdp_w =", "flops.fp32 has no provenance"),
        ('"memory.HBM.bytes_per_s"', '"memory.DDR"', "provenance of 'memory.DDR', which is no figure"),
        ("[[links]]", "[links]", r"links is not a list: write \[\[links\]\]"),
        ("[flops]", "[flops", "not TOML"),
    ],
)
def test_a_wrong_card_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CARD
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path, CARD.replace(old, new, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "link", "bytes_per_s", "fits"),
    [
        ("gpu", "infiniband", "400e9", False),
        ("gpu", "infiniband", "50e9", True),
        ("gpu", "pcie", "512e9", False),
        ("gpu", "ethernet", "525e9", False),
        ("accelerator", "ethernet", "525e9", True),
        ("accelerator", "ici", "4800e9", False),
        ("cpu", "upi", "384e9", False),
    ],
)
def test_links_of_each_kind_have_bounds(tmp_path: Path, kind: str, link: str, bytes_per_s: str, fits: bool) -> None:
    text = CARD.replace('"gpu"', f'"{kind}"').replace('"nvlink"', f'"{link}"').replace("450e9", bytes_per_s)
    if fits:
        assert read(tmp_path, text).link(8).bytes_per_s == float(bytes_per_s)
        return
    with pytest.raises(SourceError, match=r"bits/s\? then write"):
        read(tmp_path, text)


@pytest.mark.parametrize("name", [name for name in cards() if read_hardware(name).kind == "gpu"])
def test_bits_for_bytes_of_a_memory_are_told(tmp_path: Path, name: str) -> None:
    card = read_hardware(name)
    fast = replace(card.main_memory, bytes_per_s=8 * card.main_memory.bytes_per_s)
    write_card(replace(card, memory=(fast, *card.memory[1:])), tmp_path / "card.toml")
    with pytest.raises(SourceError, match=f"bits/s. then write {card.main_memory.bytes_per_s:g}".replace("+", ".")):
        read_hardware(tmp_path / "card.toml")


def test_gpus_to_come_and_those_in_the_host_s_memory_are_read(tmp_path: Path) -> None:
    for size, rate in (("288e9", "22e12"), ("128e9", "273e9"), ("10e9", "760e9")):  # Rubin, GB10, RTX 3080
        text = CARD.replace("bytes = 80e9", f"bytes = {size}").replace("3.35e12", rate)
        assert read(tmp_path, text).main_memory.bytes_per_s == float(rate)


def test_a_price_of_a_whole_node_is_told_where_that_of_a_device_is_known(tmp_path: Path) -> None:
    text = CARD.replace('"Mine"', '"H100 SXM"').replace("usd_per_h = 2.5", "usd_per_h = 18.32")
    with pytest.raises(
        SourceError, match=r"on-demand price is 18.32, .* 2.95 at most; of a node of 8. then write 2.29"
    ):
        read(tmp_path, text)
    assert read(tmp_path, text.replace("18.32", "12.29")).price().usd_per_h == 12.29
    assert read(tmp_path, text.replace('"H100 SXM"', '"Mine"')).price().usd_per_h == 18.32


def test_small_accelerators_may_draw_less_than_a_gpu(tmp_path: Path) -> None:
    text = CARD.replace("tdp_w = 700", "tdp_w = 0.7").replace('"gpu"', '"accelerator"')
    assert read(tmp_path, text).tdp_w == 0.7


def test_a_replaced_value_is_checked_too() -> None:
    with pytest.raises(SourceError, match="price is -1"):
        priced(read_hardware("l4"), -1)


# --- power
POWER = Power(100, 700, 1.3, 0.75, "test")


def test_power_grows_with_use_and_stops_at_the_cap() -> None:
    assert POWER.watts(0, 0) == 100
    assert POWER.watts(0, 0.8) == pytest.approx(460)
    assert POWER.watts(0.9, 0.5) == 700


def test_a_limit_slows_arithmetic_alone() -> None:
    assert POWER.step_s(1.0, 0.2, 700) == 1.0
    assert POWER.step_s(1.0, 0.2, 445) == pytest.approx(2.0)  # 190 W without arithmetic, 510 of 510 W with: half is 255
    assert POWER.step_s(0.1, 1.0, 590) == 1.0  # decoding hides the slower clock
    with pytest.raises(SourceError, match="limit of 500 W is not above the 550 W"):
        POWER.step_s(0.1, 1.0, 500)


def test_devices_under_a_budget_against_the_exact_binomial() -> None:
    phases = [Phase(700, 0.25), Phase(300, 0.75)]
    for count, quantile in itertools.product((1, 2, 3), (0.5, 0.9, 0.99)):
        sums = sorted(
            (sum(one.watts for one in each), _product(one.share for one in each))
            for each in itertools.product(phases, repeat=count)
        )
        below = list(itertools.accumulate(share for _, share in sums))
        exact = next(watts for (watts, _), share in zip(sums, below, strict=True) if share >= quantile - 1e-12)
        assert sum_watts(phases, count, quantile) == pytest.approx(exact, rel=0.003)
    assert devices_under(5600, phases) == 10  # 8 by the name plate; 7 of 10 at 700 W are too many: 0.35 % of the time
    fits = devices_under(700_000, phases)
    assert sum_watts(phases, fits) <= 700_000 < sum_watts(phases, fits + 1)
    assert 1.6 < fits / 1000 < 700 / 400
    assert sum_watts(phases, 500) == pytest.approx(sum_watts(phases, 501), rel=0.005)
    assert devices_under(5600, [Phase(700, 1.0)]) == 8
    with pytest.raises(SourceError, match="holds no device"):
        devices_under(600, phases)
    with pytest.raises(SourceError, match="must add up to 1"):
        devices_under(5600, [Phase(700, 0.5)])


def _product(values) -> float:
    found = 1.0
    for value in values:
        found *= value
    return found


def test_energy_and_carbon() -> None:
    joules = energy_j([(700, 3600), (100, 7200)])
    assert joules == pytest.approx(0.9 * 3.6e6)
    found = carbon_g(joules, Interval(400, 300, 500), pue=1.2, embodied_g=10)
    assert (found.value, found.low, found.high) == pytest.approx((442, 334, 550))
    with pytest.raises(SourceError, match="PUE"):
        carbon_g(joules, Interval(400, 300, 500), pue=0.9)


def test_intensities_come_from_the_user(tmp_path: Path) -> None:
    path = tmp_path / "carbon.toml"
    path.write_text("north = 30\neast = [300, 460]\n")
    assert read_intensities(path) == {"north": Interval(30, 30, 30), "east": Interval(380, 300, 460)}
    for text in ("north = -1", "north = 'low'", "north = [1, 2, 3]", ""):
        path.write_text(text)
        with pytest.raises(SourceError, match="carbon intensit"):
            read_intensities(path)


def test_a_fit_finds_the_curve_that_made_the_rows() -> None:
    uses = [Use(c / 10, m / 10, POWER.watts(c / 10, m / 10)) for c in range(5) for m in range(0, 9, 2)]
    found = fit_power(uses, 700, idle_w=100)
    assert (found.compute, found.memory) == pytest.approx((1.3, 0.75), abs=0.02)
    assert fit_power(uses, 700).idle_w == pytest.approx(100, abs=12)
    with pytest.raises(SourceError, match="too few"):
        fit_power(uses[:3], 700)
    with pytest.raises(SourceError, match="not mW"):
        fit_power([*uses, Use(0.1, 0.5, 345_000)], 700)


# --- against measurements: fit on a fifth, report the rest (medians of five draws)
def test_power_of_gemm_on_h200(shared_data: Path) -> None:
    card = read_hardware("h200-sxm")
    uses = []
    for row in _rows(shared_data / "planner" / "ops" / "gemm_power_h200_sxm_vllm0.22.0.csv"):
        m, n, k, seconds = int(row["m"]), int(row["n"]), int(row["k"]), float(row["latency_ms"]) / 1e3
        if seconds > 2e-4:  # the meter averages over the gaps between shorter kernels
            flops, moved = 2 * m * n * k, 2 * (n * k + m * k + m * n)
            uses.append(_use(card, flops / seconds, moved / seconds, float(row["power"])))
    prior, calibrated = _errors(uses, card)
    assert prior < 0.03
    assert calibrated < 0.03
    assert power_of(card).watts(0.7, 0.1) == pytest.approx(691, rel=0.02)  # m >= 1024
    assert power_of(card).watts(0.004, 0.82) == pytest.approx(376, rel=0.30)  # m = 1, a kernel without tensor cores


@pytest.mark.parametrize(
    ("device", "name", "from_prior", "from_fit"),
    [("Nvidia A100 GPU", "a100-40-sxm", 0.12, 0.20), ("Nvidia H100 GPU", "h100-sxm", 0.06, 0.06)],
)
def test_power_of_serving(shared_data: Path, device: str, name: str, from_prior: float, from_fit: float) -> None:
    card, uses = read_hardware(name), []
    models = {"meta-llama/Llama-2-7b-hf": (6.74e9, 524288), "meta-llama/Meta-Llama-3-8B": (8.03e9, 131072)}
    for row in _rows(shared_data / "planner" / "llm_inference_bench_power.csv"):
        if row["Hardware"] == device:
            (weights, cache), batch, length = models[row["Model"]], int(row["Batch Size"]), 1024
            flops = 2 * weights * batch * 2 * length
            moved = length * (2 * weights + batch * cache * 1.5 * length)
            seconds = float(row["Latency"])
            uses.append(_use(card, flops / seconds, moved / seconds, float(row["avg_power"]) / 1e3))
    prior, calibrated = _errors(uses, card)
    assert prior < from_prior
    assert calibrated < from_fit


def test_power_of_llama_2_70b_on_a_dgx(shared_data: Path) -> None:
    card, uses = read_hardware("a100-80-sxm"), {}
    for row in _rows(shared_data / "planner" / "splitwise_llama2_70b.csv"):
        share = float(row["average_power"])
        if row["hardware"] != "a100-80gb" or share < 0.2:  # not measured, or a run that was mostly idle
            continue
        devices, batch = int(row["tensor_parallel"]), int(row["batch_size"])
        read_tokens, written = int(row["prompt_size"]), int(row["token_size"])
        seconds = (float(row["prompt_time"]) + float(row["token_time"]) * (written - 1)) / 1e3
        flops = 2 * 69e9 * batch * (read_tokens + written) / devices
        moved = written * 138e9 / devices
        uses[devices, batch, read_tokens] = _use(card, flops / seconds, moved / seconds, share * 400)
    prior, calibrated = _errors(list(uses.values()), card)
    assert prior < 0.25
    assert calibrated < 0.06


def _use(card: Hardware, flops_per_s: float, bytes_per_s: float, watts: float) -> Use:
    return Use(flops_per_s / card.flops_of("bf16"), bytes_per_s / card.main_memory.bytes_per_s, watts)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _errors(uses: list[Use], card: Hardware) -> tuple[float, float]:
    """Median relative error of the prior, and of fits to a fifth on the rest."""
    prior = power_of(card)
    assert len(uses) > 10
    found = []
    for seed in range(5):
        drawn = random.Random(seed).sample(uses, len(uses))
        part = max(4, len(uses) // 5)
        found.append(_error(fit_power(drawn[:part], prior.cap_w), drawn[part:]))
    return _error(prior, uses), _middle(found)


def _error(power: Power, uses: list[Use]) -> float:
    return _middle([abs(power.watts(use.u_compute, use.u_memory) / use.watts - 1) for use in uses])


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
