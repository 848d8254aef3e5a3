"""A probe's measurements become a card and a calibration that predict what was measured; the command measures."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest

from everybit.cli.main import main
from everybit.cli.plan import probe as command
from everybit.errors import OutputError, SourceError
from everybit.plan.calibrate import read_calibration
from everybit.plan.cost import Cost, Parallel
from everybit.plan.efficiency import Products
from everybit.plan.estimate import estimate
from everybit.plan.hardware import Hardware, read_hardware, trust
from everybit.plan.model import read_model
from everybit.plan.probe import Measurements, calibration_of, card_of, write_card
from everybit.plan.step import Step

BITS, ROWS, WIDTHS = (2, 4, 8, 16), (1, 4, 16), (512, 1024, 4096)


def weight_s(bits: int, rows: int, width: int) -> float:
    """Reading, arithmetic, and a cost of each output."""
    return bits * 4e-12 + rows * 3e-12 + 1e-9 * bits / width


FOUND = Measurements(
    processor="A Processor",
    date="2026-11-26",
    version="1.0",
    threads=2,
    memory_bytes=32e9,
    bytes_per_s={1: 17e9, 2: 32e9},
    fp32_flops=200e9,
    weight_s={key: weight_s(*key) for key in itertools.product(BITS, ROWS, WIDTHS)},
    step_s=50e-6,
    layer_s=10e-6,
    launch_s=3e-6,
    number_s=0.2e-9,
    attention_flops=100e9,
    cache_bytes_per_s=24e9,
)
LLAMA = read_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", weight_bits={"default": "everybit4", "head": "everybit4"})


def products() -> Products:
    found = calibration_of(FOUND).efficiency.products
    assert found is not None
    return found


def test_products_are_what_was_measured_and_lie_between_otherwise() -> None:
    one = products()
    for bits, rows, width in itertools.product(BITS, ROWS, WIDTHS):
        assert one.seconds(bits + 0.3, rows, width, 1e6, 0) == pytest.approx(3e-6 + 1e6 * weight_s(bits, rows, width))
    for rows, width in ((2, 512), (9, 1024), (64, 2048), (3.5, 700)):  # 64: beyond the last, as between the last two
        expected = 3e-6 + 1e6 * (4 * 4e-12 + rows * 3e-12 + 4e-9 / width) + 5000 * 0.2e-9
        assert one.seconds(4, rows, width, 1e6, 5000) == pytest.approx(expected)
    assert one.seconds(3.9, 1, 512, 1e6, 0) == one.seconds(2, 1, 512, 1e6, 0)
    assert one.seconds(1, 0.5, 128, 1e6, 0) == one.seconds(2, 1, 512, 1e6, 0)
    assert one.seconds(12.5, 1, 512, 1e6, 0) == one.seconds(8, 1, 512, 1e6, 0)


def test_a_step_is_the_sum_of_its_parts() -> None:
    card, efficiency, rows, past = card_of(FOUND), calibration_of(FOUND).efficiency, 4, 100
    expected = 50e-6 + 22 * 10e-6 + rows * 1e-8
    for linear, count in LLAMA.linears:
        each = 4 * 4e-12 + rows * 3e-12 + 4e-9 / min(4096, linear.into)
        expected += count * (3e-6 + linear.weights * each + rows * (linear.into + linear.out) * 0.2e-9)
    flops, read = 2 * 32 * 128 * past * rows / 100e9, 2 * 4 * 64 * 2 * past * rows / 24e9
    expected += 22 * max(flops, read)
    assert Cost(LLAMA, card, efficiency=efficiency).seconds(Step(decodes=(past,) * rows)) == pytest.approx(expected)


def test_an_estimate_uses_it_after_a_trip_through_files(tmp_path: Path) -> None:
    write_card(card_of(FOUND), tmp_path / "card.toml")
    calibration_of(FOUND).save(tmp_path / "found.json")
    card, calibration = read_hardware(tmp_path / "card.toml"), read_calibration(tmp_path / "found.json")
    assert card == card_of(FOUND)
    assert calibration == calibration_of(FOUND)
    one = estimate(LLAMA, card, prompt=100, output=64, engine="everybit", calibration=calibration)
    step = Cost(LLAMA, card, efficiency=calibration.efficiency).seconds(Step(decodes=(132,)))
    assert one.tpot_s.value == pytest.approx(step)
    assert one.card == "measured"
    assert one.source == "everybit plan probe, 2026-11-26, A Processor: 36 products"
    assert one.tpot_s.low < step < one.tpot_s.high


def test_the_interval_holds_nine_of_ten_measured_steps() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    lines = [line for file in folder.glob("*-plan-cpu*.jsonl") for line in file.read_text("utf-8").splitlines()]
    cells = [one for one in map(json.loads, lines) if "error" in one]
    assert len(cells) >= 56
    wide = NormalDist().inv_cdf(0.95) * calibration_of(FOUND).efficiency.spread
    misses = [math.log(one["predicted_tps"] / one["measured_tps"]) for one in cells]
    assert sum(abs(one) <= wide for one in misses) / len(cells) == pytest.approx(0.9, abs=0.05)


def test_a_card_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "card.toml").mkdir()
    with pytest.raises(SourceError, match="cannot be written"):
        write_card(card_of(FOUND), tmp_path / "card.toml")
    with pytest.raises(SourceError, match="cannot be written"):
        calibration_of(FOUND).save(tmp_path / "card.toml")
    assert [one.name for one in tmp_path.iterdir()] == ["card.toml"]


def test_devices_split_the_products() -> None:
    efficiency = calibration_of(FOUND).efficiency
    card = read_hardware("h100-sxm")
    step = Step(decodes=(100,) * 4)
    one, two = (sum(Cost(LLAMA, card, Parallel(tp), efficiency).times(step)[:2]) for tp in (1, 2))
    launches = sum(count for _, count in LLAMA.linears) * 3e-6
    assert two - launches == pytest.approx((one - launches) / 2)


@pytest.mark.parametrize("name", ["h100-sxm", "xeon-vm-2", "h200-sxm", "flightllm-vhk158"])
def test_every_part_of_a_card_survives_toml(tmp_path: Path, name: str) -> None:
    card = replace(read_hardware(name), note='a "quoted" \\ note\nof two lines, 5 µs')
    write_card(card, tmp_path / "card.toml")
    assert read_hardware(tmp_path / "card.toml") == card


def test_the_card_says_how_it_knows() -> None:
    card = card_of(FOUND)
    assert trust(card, "memory.DRAM.bytes_per_s").source.endswith("GB/s by threads 1: 17.0, 2: 32.0")
    assert {trust(card, figure).kind for figure in ("flops.fp32", "memory.DRAM.bytes")} == {"measured"}


def without(key: tuple[int, int, int]) -> dict[tuple[int, int, int], float]:
    return {one: value for one, value in FOUND.weight_s.items() if one != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"launch_s": -1e-6}, "a measured -1e-06 arrived, expected a number above 0"),
        ({"fp32_flops": float("nan")}, "a measured nan arrived"),
        ({"weight_s": {}}, "0 products"),
        ({"weight_s": without((4, 4, 1024))}, "35 products"),
        ({"threads": 4}, "no bandwidth of 4 threads"),
    ],
)
def test_measurements_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        replace(FOUND, **change)  # type: ignore[arg-type]


# --- the commands
def test_calibrate_refuses_a_folder_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "calibrate", str(tmp_path / "none"), "--on", "l4", "--engine", "vllm", "-o", str(tmp_path)]
    assert main(args, ("plan",)) == 2
    assert "a folder is there, expected the name of a file" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "ROWS": (1, 8, 16), "MANY": 16, "WIDTHS": (512, 1024), "BITS": (2, 16, 4, 8), "WEIGHTS": 1 << 21,
        "LEAST_ROUNDS": 2, "PAST": 256, "PROMPT": 128,
    }.items():  # fmt: skip
        monkeypatch.setattr(command, name, value)
    return


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["probe", *words])


def test_the_command_measures_this_machine(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments("-o", str(tmp_path / "me.toml"), "--seconds", "1", "--threads", "1")
    assert args.run(args) == 0
    card: Hardware = read_hardware(tmp_path / "me.toml")
    efficiency = read_calibration(tmp_path / "me.calibration.json").efficiency
    assert card.name.endswith(", 1 threads")
    assert 1e8 < card.main_memory.bytes_per_s < 1e12
    assert efficiency.products is not None
    assert efficiency.products.bits == (2, 4, 8, 16)
    assert efficiency.products.rows == (1, 8, 16)
    many = [lines[-1][-1] for lines in efficiency.products.weight_s]
    assert all(1e-13 < one < 1e-8 for one in many)
    out = capsys.readouterr().out
    assert "me.calibration.json" in out
    assert "2 bits" in out


def test_where_it_cannot_write_it_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "card.calibration.json").mkdir()
    for name, error, message in (
        ("card.json", SourceError, "expected a name that ends in .toml"),
        ("none/card.toml", OutputError, "make it first"),
        ("folder.toml", OutputError, "folder.toml is a folder, expected the name of a file"),
        ("card.toml", OutputError, "card.calibration.json is a folder, expected the name of a file"),
    ):
        args = arguments("-o", str(tmp_path / name))
        with pytest.raises(error, match=message):
            args.run(args)
