"""`everybit plan`: every command's text and JSON, options that must not be ignored, and bad input in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.cli.main import main

MODEL = "meta-llama/Llama-3.1-8B"
LOAD = ("--users", "20", "--prompt", "128-384", "--output", "100-300", "--requests", "60")
MELANGE = """
[[demand]]
prompt = 100
output = 100
requests_per_s = 15

[[demand]]
prompt = 2000
output = 500
requests_per_s = 5

[[types]]
name = "a10g"
hardware = "a10g"
usd_per_h = 1.01
rates = [5, 1.25]

[[types]]
name = "a100"
hardware = "a100"
usd_per_h = 3.67
rates = [20, 10]

[limits]
utilisation = 1
"""
SERVICE = """
model = "meta-llama/Llama-3.1-8B"
bits = ["everybit3", "everybit8"]
slo = "ttft=1s,tpot=40ms,share=0.9"
engine = "everybit"
carbon = 400

[[demand]]
prompt = 500
output = 100
requests_per_s = 2

[[types]]
card = "a10g"
"""

Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*args: object) -> str:
        code = main(["plan", *map(str, args)], ("plan",))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Call:
    """The one line on stderr, and nothing on stdout."""

    def run(*args: object) -> str:
        code = main(["plan", *map(str, args)], ("plan",))
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert code == 2
        assert not out
        assert all(line.startswith("plan: ") for line in err.splitlines()[:-1])
        return last.removeprefix("everybit: error: ")

    return run


def ask(call: Call, *args: object) -> Any:
    return json.loads(call(*args, "--json"))


# --- model, hardware, memory
def test_model_tells_operators_and_unknown_fields(call: Call, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128, "frobnicate": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = call("model", tmp_path)
    assert "not used of the config: frobnicate" in text
    assert re.search(r"^2 x +qkv +192 x 64", text, re.M)
    (document,) = ask(call, "model", tmp_path).values()
    assert document["parameters"] == 2 * (192 * 64 + 64 * 64 + 256 * 64 + 64 * 128) + 2 * 6400
    assert document["unknown"] == ["frobnicate"]


def test_model_without_a_name_lists_the_names(call: Call, fail: Call) -> None:
    assert MODEL in call("model").splitlines()
    assert MODEL in ask(call, "model")
    assert "without MODEL" in fail("model", "--bits", "4")


@pytest.mark.parametrize("command", ["model", "estimate"])
def test_names_that_the_terminal_cannot_show(tmp_path: Path, command: str) -> None:
    folder = tmp_path / "m\u00f6del"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 2048, "\u00fcb": 3}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    code = "import sys; from everybit.cli.main import main; sys.exit(main())"
    args = [sys.executable, "-c", code, "plan", command, str(folder), *(() if command == "model" else ("--on", "l4"))]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(args, env=plain, capture_output=True, check=False)
    assert (done.returncode, b"m\\xf6del" in done.stdout + done.stderr) == (0, True), done.stderr


def test_unknown_fields_are_told_by_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128, "frobnicate": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "memory", str(tmp_path), "--on", "l4"], ("plan",)) == 0
    assert "frobnicate" in capsys.readouterr().err


def test_widths_are_a_row_each(call: Call) -> None:
    found = ask(call, "model", MODEL, "--bits", "everybit3-5,fp8,6.5", "--kv-bits", "8")
    assert list(found) == ["everybit3", "everybit4", "everybit5", "fp8", "6.5 bits"]
    sizes = [one["weight_bytes"] for one in found.values()]
    assert sizes[:3] == sorted(sizes[:3])
    assert {one["cache_bytes_per_token"] for one in found.values()} == {65536}


def test_hardware_lists_and_shows_sources(call: Call) -> None:
    assert re.search(r"^h100-sxm +gpu +989 bf16", call("hardware"), re.M)
    text = call("hardware", "h100-sxm")
    assert "NVIDIA H100 data sheet" in text
    assert "2026-11" in text
    assert ask(call, "hardware", "h100-sxm")["provenance"]["flops.bf16"]["kind"] == "vendor"


def test_memory_says_what_fits_beside_what_does_not(call: Call) -> None:
    args = ("memory", MODEL, "--on", "l4", "--bits", "everybit8,32", "--context", 8192)
    rows = ask(call, *args)
    assert rows[0]["sequences"] > 1
    assert rows[1]["sequences"] == 0
    assert "nearest that fits" in call(*args)


# --- estimate, roofline, explain
def test_estimate_has_intervals_money_energy_and_sources(call: Call) -> None:
    args = ("estimate", MODEL, "--on", "h100-sxm", "--on", "b200", "--bits", "everybit4,16", "--users", 20)
    found = ask(call, *args, "--carbon", "350-450", "--price", "2")
    assert [(one["hardware"], one["bits"]) for one in found["estimates"]] == [
        (card, bits) for card in ("H100 SXM", "B200") for bits in ("everybit4", "16 bits")
    ]
    for one in found["estimates"]:
        assert one["tpot_s"]["low"] < one["tpot_s"]["value"] < one["tpot_s"]["high"]
        assert one["usd_per_mtok"]["value"] == pytest.approx(2e6 / 3600 / one["tokens_per_s"]["value"])
        grams = one["joules_per_token"]["value"] / 3.6e6 * 400
        assert one["gco2e_per_token"]["value"] == pytest.approx(grams)
        assert "prior" in one["source"]
    text = call(*args)
    assert "rounded from aiconfigurator" in text
    assert "vendor" in text


def test_what_is_borrowed_is_marked_in_every_row(call: Call) -> None:
    text = call("estimate", MODEL, "--on", "h100-sxm", "--on", "mi300x")
    assert re.search(r"^H100 SXM .* measured +vendor$", text, re.M)
    assert re.search(r"^MI300X .* borrowed +vendor$", text, re.M)
    assert "MI300X itself was not measured" in text


def test_prices_stand_with_their_source_and_date_or_with_what_there_is(call: Call) -> None:
    args = ("estimate", MODEL, "--on", "h100-sxm", "--on", "l40s")
    text = call(*args)
    assert "price of H100 SXM: 2.29 $/h on-demand, a public catalogue, lowest listing, 2026-11" in text
    assert "price of L40S: no on-demand one is known, nor another: give $/h" in text
    assert "no reserved one is known, only on-demand (2.29 $/h, 2026-11), spot" in call(*args, "--price", "reserved")
    assert "price: 3 $/h of one device, as given" in call(*args, "--price", 3)
    found = ask(call, *args)
    assert found["estimates"][0]["price"]["date"] == "2026-11"
    assert found["estimates"][1]["price"] is None
    assert len(found["prices"]) == 2


def test_fp8_means_weights_and_activations(call: Call, fail: Call) -> None:
    args = ("estimate", MODEL, "--on", "h100-sxm", "--users", 8, "--prompt", 4096)
    eight, fp8, w8a8, w4a16 = ask(call, *args, "--bits", "8,fp8,w8a8,w4a16", "--kv-bits", "fp8")["estimates"]
    assert [(one["weight_bits"], one["activation_bits"], one["kv_bits"]) for one in (eight, fp8, w8a8, w4a16)] == [
        (8, 16, 8),
        (8, 8, 8),
        (8, 8, 8),
        (4.125, 16, 8),
    ]
    assert fp8["ttft_s"]["value"] == w8a8["ttft_s"]["value"] < 0.8 * eight["ttft_s"]["value"]
    (alone,) = ask(call, *args, "--bits", "fp8", "--activation-bits", 16, "--kv-bits", "fp8")["estimates"]
    assert alone["tpot_s"] == eight["tpot_s"]
    text = call(*args, "--bits", "16", "--activation-bits", "fp8")
    assert "16 bits: 16-bit weights x 8-bit activations, 16-bit cache" in text
    assert "differ, give one" in fail(*args, "--bits", "w8a8", "--activation-bits", 16)
    for command in ("estimate", "roofline", "explain"):
        said = fail(command, MODEL, "--on", "a10g", "--bits", "fp8")
        assert said == "card A10G multiplies no fp8: pass w8a16 (weights alone), or w8a8 for its int8"


def test_estimate_keeps_what_fits_and_says_why_the_rest_does_not(call: Call) -> None:
    text = call("estimate", "meta-llama/Llama-3.1-70B", "--on", "l4", "--on", "mi325x")
    assert re.search(r"^L4, 16 bits \(own\): .*weights 141", text, re.M)
    assert re.search(r"^MI325X +16 bits", text, re.M)


def test_estimate_takes_offload_speculation_pue_and_splits(call: Call) -> None:
    base = ("estimate", MODEL, "--on", "l4", "--bits", 16, "--carbon", 400)
    plain = ask(call, *base)["estimates"][0]
    drafts = ("--drafts", 3, "--acceptance", 0.9, "--draft-bits", 4)
    assert ask(call, *base, *drafts)["estimates"][0]["tpot_s"]["value"] < plain["tpot_s"]["value"]
    assert ask(call, *base, "--tp", 2)["estimates"][0]["parallel"]["tp"] == 2
    more = ask(call, *base, "--pue", 1.5)["estimates"][0]["gco2e_per_token"]["value"]
    assert more == pytest.approx(1.5 * plain["gco2e_per_token"]["value"])
    big = ("estimate", "meta-llama/Llama-3.1-70B", "--on", "h100-sxm", "--offload")
    assert "streaming" in ask(call, *big)["estimates"][0]["binding"]["decode"][0]


def test_roofline_draws_each_operator(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "r.svg"
    found = ask(call, "roofline", MODEL, "--on", "h100-sxm", "--users", 8, "--svg", file)
    titles = [one.text or "" for one in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(found["decode"]) + len(found["prefill"])
    assert any("decode: qkv" in title and "reading weights" in title for title in titles)
    assert "ridge at 295 FLOP a byte" in call("roofline", MODEL, "--on", "h100-sxm")


def test_explain_names_what_binds_and_a_better_one(call: Call) -> None:
    args = ("explain", MODEL, "--on", "a10g", "--users", 20, "--slo", "ttft=1s,tpot=50ms")
    text = call(*args)
    assert "decode: 7" in text
    assert re.search(r"^TTFT \d+\.\d ms keeps the limit of 1000\.0 ms, with \d+% of it free$", text, re.M)
    assert "TPOT 62.9 ms misses the limit of 50.0 ms" in text
    assert "the limits are kept up to 11 clients" in text
    assert "better: 4.5 bits a weight: " in text
    assert "AWS and others, as the paper lists them, 2024-04" in text
    assert "better: on H100 SXM: " in call(*args, "--on", "h100-sxm", "--price", 1)
    found = ask(call, *args)
    assert found["estimate"]["concurrency"] == 20
    assert found["lines"] == text.splitlines()


def test_explain_leaves_out_cards_that_cannot(call: Call) -> None:
    text = call("explain", MODEL, "--on", "h100-sxm", "--on", "a100-80-sxm", "--on", "l40s", "--bits", "fp8")
    assert "left out: card A100 80 GB SXM multiplies no fp8" in text
    assert "price of L40S" in text


def test_nothing_costs_nothing(call: Call) -> None:
    assert "price: 0 $/h" in call("estimate", MODEL, "--on", "h100-sxm", "--price", "-0")


def test_an_slo_that_http_alone_breaks_says_so(fail: Call) -> None:
    assert "mostly HTTP and tokenizing" in fail("explain", MODEL, "--on", "h100-sxm", "--slo", "ttft=20ms")


def test_an_impossible_slo_names_the_limit_and_one_that_works(call: Call, fail: Call) -> None:
    line = fail("explain", MODEL, "--on", "a10g", "--users", 20, "--slo", "ttft=1s,tpot=1ms")
    assert "SLO impossible on A10G" in line
    assert re.search(r"tpot [\d.]+ ms > 1 ms, mostly \w+", line)
    nearest = line.rpartition("--slo ")[2]
    assert nearest.startswith("ttft=1000ms,tpot=")
    call("explain", MODEL, "--on", "a10g", "--users", 20, "--slo", nearest)


# --- simulate
def test_simulate_chooses_precision_only_where_several_are_given(call: Call) -> None:
    base = ("simulate", MODEL, "--on", "a10g", *LOAD, "--slo", "ttft=1s,fluidity=0.9", "--deadlines", "1s,20ms")
    fixed = ask(call, *base, "--bits", "everybit8")["expected"]
    free = ask(call, *base, "--bits", "everybit3-8")["expected"]
    assert fixed["precision"]["mean_bits"] == 8
    assert 3 <= free["precision"]["mean_bits"] < 8
    assert ask(call, *base, "--bits", "int8")["expected"]["precision"] is None
    assert free["goodput"]["share"] > fixed["goodput"]["share"]
    assert free["bill"]["usd_per_h"] == pytest.approx(1.01)


def test_simulate_bounds_bill_and_files(call: Call, tmp_path: Path) -> None:
    records, chrome = tmp_path / "records.jsonl", tmp_path / "chrome.json"
    args = ("simulate", MODEL, "--on", "h100-sxm", "--engine", "vllm", "--rate", 4, "--requests", 40)
    args = (*args, "--output", 32, "--replicas", 2)
    found = ask(call, *args, "--bounds", "--carbon", 400, "--records", records, "--chrome", chrome)
    fast, expected, slow = (found[name]["latency"]["tpot_ms"]["p50"] for name in ("fast", "expected", "slow"))
    assert fast < expected < slow
    bill = found["expected"]["bill"]
    assert bill["usd_per_h"] == pytest.approx(2 * 2.29)
    assert bill["gco2e_per_h"] == pytest.approx(bill["watts"] / 1e3 * 400)
    assert bill["joules_per_token"] > 0
    assert len(records.read_text().splitlines()) == 41
    assert json.loads(chrome.read_text())["traceEvents"]
    assert ask(call, "simulate", MODEL, "--on", "h100-sxm", "--trace", records)["expected"]["requests"]["all"] == 40


def test_simulate_splits_phases(call: Call) -> None:
    args = ("simulate", MODEL, "--on", "h100-sxm", "--engine", "vllm", "--rate", 2, "--requests", 20)
    slow = ask(call, *args, "--decode-replicas", 1, "--link-gbps", 0.1)["expected"]
    fast = ask(call, *args, "--decode-replicas", 1)["expected"]
    assert set(fast["replicas"]) == {"prompts 1", "decode 1"}
    assert slow["latency"]["e2e_ms"]["p50"] > fast["latency"]["e2e_ms"]["p50"] + 1000  # 134 MB at 0.1 GB/s


# --- fleet
def test_fleet_is_melange_s_in_both_modes(call: Call, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(MELANGE)
    assert ask(call, "fleet", spec)["fleet"]["usd_per_h"] == pytest.approx(4.68)
    assert ask(call, "fleet", spec, "--compatible")["fleet"]["usd_per_h"] == pytest.approx(6.70)
    assert ask(call, "fleet", spec, "--compatible", 4)["fleet"]["usd_per_h"] == pytest.approx(5.69)
    text = call("fleet", spec)
    assert "runner-up: 7 x a10g at 7.07 $/h" in text
    assert re.search(r"^100 in, 100 out +15 +33% +67%", text, re.M)


def test_fleet_estimates_rates_and_verifies_them(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everybit.plan.fleet_checks.REQUESTS", 100)
    spec = tmp_path / "spec.toml"
    spec.write_text(SERVICE.replace("output = 100", "output = 25"))
    found = ask(call, "fleet", spec, "--verify", "--brief")
    assert found["verified"]
    three, eight = (one["rates"][0] for one in found["types"])
    assert three > eight > 0
    (count,) = found["fleet"]["counts"].values()
    assert count * max(three, eight) * found["fleet"]["utilisation"] >= 2
    assert found["fleet"]["gco2_per_h"] == pytest.approx(found["fleet"]["power_w"] / 1e3 * 400)
    assert "not simulated" in call("fleet", spec, "--brief")


def test_of_equal_bills_the_finer_precision_wins(call: Call, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(SERVICE.replace("= 2\n", "= 0.2\n") + "[quality]\neverybit3 = 0.8\neverybit8 = 0.99\n")
    assert list(ask(call, "fleet", spec)["fleet"]["counts"]) == ["1 x A10G, everybit8"]


def test_cautious_fleets_serve_less_of_each(call: Call, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(SERVICE)
    bold = ask(call, "fleet", spec, "--brief")["types"]
    spec.write_text("cautious = true\n" + SERVICE)
    careful = {one["name"]: one for one in ask(call, "fleet", spec, "--brief")["types"]}
    assert all(careful[one["name"]]["rates"][0] < one["rates"][0] for one in bold if one["name"] in careful)


def test_a_trace_is_cut_into_buckets(call: Call, tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:15:{i:02},{100 if i % 3 else 3000},50" for i in range(31)]
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    spec = tmp_path / "spec.toml"
    demand = SERVICE[SERVICE.index("[[demand]]") : SERVICE.index("[[types]]")]
    spec.write_text(
        SERVICE.replace("a10g", "h100-sxm").replace(demand, '[trace]\nfile = "t.csv"\nprompt = [1000]\nspeed = 2\n')
    )
    buckets = ask(call, "fleet", spec, "--brief")["demand"]
    assert [(one["input_tokens"], one["requests_per_s"]) for one in buckets] == [
        (100, pytest.approx(20 / 15)),
        (3000, pytest.approx(11 / 15)),
    ]


# --- calibrate, finetune
def test_calibrate_then_estimate(call: Call, fail: Call, tmp_path: Path) -> None:
    rows = [f"{i},512,128,{i + 0.1},{i + 2.64}" for i in range(8)]
    table, file = tmp_path / "replay.csv", tmp_path / "c.json"
    table.write_text("queued_s,input_tokens,output_tokens,first_token_s,last_token_s\n" + "\n".join(rows) + "\n")
    fit = ("calibrate", table, "--on", "l40s", "--engine", "vllm", "--model", MODEL, "--draws", 2, "-o", file)
    assert "calibrated on 1 runs of L40S x vllm" in call(*fit)
    args = ("estimate", MODEL, "--on", "l40s", "--users", 2, "--prompt", 512, "--output", 128, "--calibration", file)
    one = ask(call, *args, "--engine", "vllm")["estimates"][0]
    assert one["source"].startswith("calibrated on 1 runs")
    assert "asked is L40S x any" in fail(*args)
    assert "without --model" in fail(*fit[:6], "-o", file)


def test_calibrate_from_a_folder_of_everybit_bench(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured over HTTP on a mock, twice as slow as the prior; a busy machine is slower still."""
    folder, file = tmp_path / "run", tmp_path / "c.json"
    load = ("--users", "2", "--requests", "8", "--prompt", "64", "--output-tokens", "16", "--warmup", "0")
    with running(Script(ttft_ms=60, gap_ms=16)) as url:
        assert main(["bench", "run", url, *load, "--quiet", "-o", str(folder)]) == 0
    capsys.readouterr()
    fit = ("calibrate", folder, "--on", "h100-sxm", "--engine", "vllm", "--model", MODEL, "--draws", 1, "-o", file)
    found = ask(call, *fit)
    (family,) = found["families"]
    assert (family["runs"], found["calibration"]["samples"]) == (1, 1)
    assert family["fitted"]["median_error"] < family["prior"]["median_error"]
    args = ("estimate", MODEL, "--on", "h100-sxm", "--engine", "vllm", "--users", 2, "--prompt", 64, "--output", 16)
    before, after = (ask(call, *args, *more)["estimates"][0] for more in ((), ("--calibration", file)))
    assert (before["known"], after["known"]) == ("measured", "calibrated")
    assert before["tpot_s"]["value"] < after["tpot_s"]["value"]  # 8 ms, and 16 on the mock


def test_calibrate_takes_the_rows_of_one_card(call: Call, shared_data: Path, tmp_path: Path) -> None:
    table = shared_data / "planner" / "splitwise_llama2_70b.csv"
    args = ("calibrate", table, "--on", "h100-sxm", "--engine", "vllm", "--draws", 1, "-o", tmp_path / "c.json")
    found = ask(call, *args)
    assert found["calibration"]["hardware"] == "H100 SXM"
    assert found["skipped"]["another card or engine"] > 100
    assert found["errors"]["tpot_s"] < 0.15


def test_finetune_fits_costs_and_leaves_out_what_is_unknown(call: Call, fail: Call) -> None:
    base = ("finetune", MODEL, "--tokens", "1e8")
    found = ask(call, *base, "--on", "h100-sxm", "--method", "lora", "--carbon", 400)
    assert found["usd"] == pytest.approx(found["cost"]["seconds"] / 3600 * 2.29)
    assert found["gco2"] == pytest.approx(found["kwh"] * 400)
    assert ask(call, *base, "--on", "h200-sxm", "--method", "qlora")["usd"] is None
    assert "nearest that fits: lora" in fail(*base, "--on", "h100-sxm", "--method", "full")
    away = ("--on", "h100-sxm", "--method", "full", "--batch", 1, "--offload", "host", "--hidden", 1)
    assert ask(call, *base, *away, "--devices", 8, "--zero", 2)["cost"]["fits"]


# --- bad input
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"estimate {MODEL} --on h100-sxm --price -1", "--price -1: expected on-demand"),
        (f"estimate {MODEL} --on h100sxm", "no card 'h100sxm'"),
        ("estimate llama-9 --on l4", "neither a path nor"),
        (f"estimate {MODEL} --on l4 --users 0", "--users"),
        (f"estimate {MODEL} --on l4 --bits 9-2", "--bits 9-2"),
        (f"estimate {MODEL} --on l4 --bits 4,4", "a width twice"),
        (f"estimate {MODEL} --on l4 --carbon 4tons", "carbon intensity"),
        (f"estimate {MODEL} --on l4 --pue 1.2", "--pue 1.2: expected 1 to 5, and --carbon"),
        (f"estimate {MODEL} --on l4 --drafts 3", "give all three"),
        (f"estimate {MODEL} --on l4 --engine x", "engine 'x' has no prior"),
        (f"estimate {MODEL} --on l4 --prompt 200000", "context of 131072"),
        ("estimate meta-llama/Llama-3.1-405B --on all", "none of 29 is possible; on the largest"),
        ("memory meta-llama/Llama-3.1-405B --on l4", "GB of each device; nearest that fits"),
        (f"roofline {MODEL} --on l4 --bits 4,8", "this command takes one width"),
        (f"explain {MODEL} --on all", "explain is of one card, the first --on"),
        (f"roofline {MODEL} --on l4 --on t4", "this command takes one card"),
        (f"estimate {MODEL} --on l4 --kv-bits fp9", "expected a number from 1 to 32 or one of fp8, int8"),
        (f"explain {MODEL} --on l4 --slo e2e=1s", "explain knows ttft and tpot"),
        (f"explain {MODEL} --on l4 --slo tpot=1s,share=0.9", "explain knows ttft and tpot"),
        (f"estimate {MODEL} --on l4 --on l4", "--on: L4 was given twice"),
        (f"estimate {MODEL} --on l4 --bits 1e-300", "expected 1 to 32 bits"),
        (f"estimate {MODEL} --on l4 --kv-bits 1e-320", "--kv-bits: '1e-320': expected a number from 1 to 32"),
        (f"estimate {MODEL} --on l4 --kv-bits 0.0001", "--kv-bits: '0.0001': expected a number from 1 to 32"),
        (f"estimate {MODEL} --on l4 --drafts 3 --acceptance 0.5 --draft-bits 0.1", "expected bits from 1 to 32"),
        (f"estimate {MODEL} --on h100-sxm --bits w4a4", "no 4-bit activations"),
        (f"roofline {MODEL} --on v100-sxm2 --bits w8a8", "no 8-bit activations"),
        (f"simulate {MODEL} --on h100-sxm --bits w4a4 --rate 1", "such as w4a8"),
        (f"explain {MODEL} --on v100-sxm2 --bits w4a8", "such as w4a16"),
        (f"estimate {MODEL} --on l4 --ep 2", "unrecognized arguments: --ep"),
        (f"simulate {MODEL} --on l4 --rate 1e-300", "--rate 1e-300: expected 1e-06 to 1e+06"),
        (f"simulate {MODEL} --on l4", "expected one load"),
        (f"simulate {MODEL} --on l4 --rate 1 --users 2", "expected one load"),
        (f"simulate {MODEL} --on l4 --users 1 --speed 2", "--speed goes with --trace"),
        (f"simulate {MODEL} --on l4 --rate 1 --prompt 9-2", "--prompt 9-2"),
        (f"simulate {MODEL} --on l4 --rate 1 --decode-replicas 1", "--engine vllm"),
        (f"simulate {MODEL} --on l4 --rate 1 --link-gbps 1", "--link-gbps goes with"),
        (f"simulate {MODEL} --on l4 --rate 1 --engine vllm --bits 3-8", "only everybit changes them"),
        (f"simulate {MODEL} --on l4 --rate 1 --bits fp8,int4", "precisions, such as 3-8"),
        (f"simulate {MODEL} --on l4 --rate 1 --deadlines 1s", "expected FIRST,GAP"),
        (f"finetune {MODEL} --on l4 --method lora --tokens 1e6 --offload tape", "no such slower memory"),
        (f"finetune {MODEL} --on l4 --method lora --tokens 1e6 --hidden 1", "go with --offload"),
    ],
)
def test_bad_options_are_one_line(fail: Call, line: str, said: str) -> None:
    assert said in fail(*line.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("tpot=40ms", "tpot=1ms"), "keeps the SLO ttft=1s,tpot=1ms,share=0.9 for no bucket"),
        (("requests_per_s = 2", "requests_per_s = -2"), "requests_per_s is -2"),
        (('"a10g"', '"l4"'), "no on-demand price is known"),
        (('"a10g"', '"a10g"\nprice = -1'), "price -1, expected"),
        (('"a10g"', '"a10g"\ncolour = 1'), "unknown colour"),
        (('"a10g"', '"a10g"\n[limits]\nquotas = { "A10G" = 0 }'), "no fleet at utilisation 0.8 keeps quota A10G = 0"),
        (('"a10g"', '"a10g"\n[limits]\nleast_quality = 0.9'), "[quality] lacks everybit3, everybit8"),
        (("[[demand]]", "[[wishes]]"), "unknown wishes"),
        (("engine =", "engine"), "expected TOML"),
    ],
)
def test_bad_specs_are_one_line(fail: Call, tmp_path: Path, change: tuple[str, str], said: str) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(SERVICE.replace(*change))
    assert said in fail("fleet", spec)


def test_empty_traces_and_wrong_units_are_one_line(fail: Call, tmp_path: Path) -> None:
    empty = tmp_path / "t.csv"
    empty.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    assert "no requests" in fail("simulate", MODEL, "--on", "l4", "--trace", empty)
    card = tmp_path / "card.toml"
    figures = (
        'name = "x"\nkind = "gpu"\n[flops]\nbf16 = 989e12\n[[memory]]\nname = "HBM"\nbytes = 80\nbytes_per_s = 3e12\n'
    )
    card.write_text(figures)
    assert "as 80e9 for 80 GB" in fail("hardware", card)


def test_help_of_every_command_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    from everybit.cli.plan import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main(["plan", name, "--help"], ("plan",))
        assert "--json" in (text := capsys.readouterr().out) or name == "probe", text


def test_the_manual_s_fleet_can_be_planned(call: Call, tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    spec = tmp_path / "service.toml"
    spec.write_text(manual.split("```toml\n")[1].split("```")[0].replace('["h100.json"]', "[]"))
    assert ask(call, "fleet", spec, "--brief")["fleet"]["mean_quality"] >= 0.95
