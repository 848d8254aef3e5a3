"""`everybit allocate` and `everybit generate --bits PLAN.json` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import everybit
from everybit.allocate import latency, sensitivities
from everybit.cli.main import main
from everybit.engine.plan import Plan
from everybit.engine.runtime import Runtime
from everybit.formats import Overlay
from tests.e2e.commands import refused

TEXT = "The quick brown fox jumps over the lazy dog while nobody is looking.\n" * 20


@pytest.fixture
def overlay(tiny_llama: Path, tmp_path: Path) -> Path:
    everybit.quantize(tiny_llama, tmp_path / "overlay", bits=(2, 3, 4, 8), progress=False)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "overlay"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_allocate_and_generate(overlay: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Overlay.open(overlay) as opened:
        rows = opened.sizes().rows
    middle = (rows[3].bpw + rows[4].bpw) / 2
    options = ("--text", overlay.parent / "text.txt", "--max-tokens", 200, "--threads", 2)
    found = run(capsys, "allocate", overlay, "--budget", f"{middle}bpw", *options)
    assert rows[3].bpw < found["bpw"] <= middle
    assert set(found["units"].values()) <= {2, 3, 4, 8}
    assert len(set(found["units"].values())) > 1
    assert found["totals"]["ilp"]["predicted_kl"] <= found["totals"]["greedy"]["predicted_kl"]
    path = Path(found["plan"])
    assert path.parent == overlay.parent  # beside the overlay, nothing in it
    assert not [file for file in overlay.iterdir() if "plan" in file.name or "sensitivities" in file.name]

    monkeypatch.setattr(sensitivities.Divergence, "of", None)  # a second budget measures nothing
    second = run(
        capsys, "allocate", overlay, "--budget", f"{rows[3].bytes}B", *options, "--method", "greedy", "--out", path
    )
    assert second["bytes"] <= rows[3].bytes
    assert second["predicted_kl"] > found["predicted_kl"]
    assert main(["allocate", str(overlay), "--budget", f"{middle}bpw", *map(str, options), "--out", str(path)]) == 0
    table = capsys.readouterr().out
    assert "sum of costs by ilp" in table
    assert "(chosen)" in table
    with Overlay.open(overlay) as opened:
        plan = Plan.open(path, opened)
    assert plan.bits == found["units"]

    arguments = ("generate", overlay, "--prompt", "The", "--max-tokens", 6)
    document = run(capsys, *arguments, "--bits", path)
    assert (document["bits"], document["plan"], document["bpw"]) == (None, str(path), plan.bpw)
    assert document["new_tokens"] == 6
    assert main([*map(str, arguments), "--bits", str(path)]) == 0
    out, err = capsys.readouterr()
    assert document["text"].strip() in out
    assert f"a plan of {plan.bpw:.2f} bits per weight" in err


def test_a_plan_of_equal_bits_generates_as_these(overlay: Path, capsys: Any) -> None:
    with Overlay.open(overlay) as opened:
        Plan.of(opened, dict.fromkeys(opened.weights, 3)).save(overlay.parent / "p.json")
    arguments = ("generate", overlay, "--prompt", "The", "--max-tokens", 20, "--bits")
    texts = [run(capsys, *arguments, bits)["text"] for bits in (overlay.parent / "p.json", 3, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_eval_scores_a_plan_as_these_bits(overlay: Path, tiny_llama: Path, capsys: Any, tmp_path: Path) -> None:
    with Overlay.open(overlay) as opened:
        plan = Plan.of(opened, dict.fromkeys(opened.config["quantization_config"]["weights"], 3))
        plan.save(tmp_path / "three.json")
    text = tmp_path / "text.txt"
    options = ("eval", overlay, "--text", text, "--reference", tiny_llama, "--threads", 1)
    by_plan = run(capsys, *options, "--bits", tmp_path / "three.json")["rows"]
    by_bits = run(capsys, *options, "--bits", 3)["rows"]
    assert [row.pop("bits") for row in by_plan + by_bits] == ["three", 3]
    assert by_plan == by_bits
    assert "--plot works with precisions" in refused(
        capsys, *options, "--bits", tmp_path / "three.json", "--plot", tmp_path / "a.svg"
    )


def test_layers_time_and_the_models_own_text(overlay: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a model this small precisions differ by microseconds, and the machine's noise by more: times are made up.
    times = {2: 1.0, 3: 2.0, 4: 3.0, 8: 6.0}
    monkeypatch.setattr(latency, "measure_ms", lambda runtime, which: [times.get(b, 2.4) for b in which])
    options = ("--group", "layer", "--max-tokens", 100)
    found = run(capsys, "allocate", overlay, "--budget", "2.4ms/token", *options)
    assert sorted(found["units"].values()) in ([2, 4], [3, 3])
    assert set(found["units"]) == {"model.layers.0", "model.layers.1"}
    assert found["predicted_ms"] == pytest.approx(2.0)
    assert found["measured_ms"] == 2.4
    assert "expected 1.000ms/token to 6.000ms/token" in refused(
        capsys, "allocate", overlay, "--budget", "9ms", *options
    )


def test_real_times(overlay: Path) -> None:
    with Runtime.open(overlay, threads=1) as runtime:
        assert all(0 < ms < 1000 for ms in latency.measure_ms(runtime, runtime.bits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "1bpw"), "--budget 1bpw is below what any plan needs: expected "),
        (("--budget", "99bpw"), "--budget 99bpw is above what the highest precisions need: expected "),
        (("--budget", "1kB"), "--budget 1kB is below what any plan needs: expected "),
        (("--budget", "4"), "--budget '4': expected a number with its unit"),
        (("--budget", "4bpw", "--text", "absent.txt"), "absent.txt"),
        (("--budget", "4bpw", "--max-tokens", "0"), "'0' is not a whole number of at least 1"),
        (("--budget", "4bpw", "--group", "head"), "invalid choice: 'head'"),
    ],
)
def test_refusals(overlay: Path, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, "allocate", overlay, *arguments)


def test_refusals_of_files(overlay: Path, tiny_llama: Path, capsys: Any) -> None:
    mine = overlay.parent / "mine.json"
    mine.write_text("{}")
    line = refused(capsys, "allocate", overlay, "--budget", "4bpw", "--out", mine)
    assert "exists and is not a plan: choose another name with --out" in line
    assert "expected an overlay" in refused(capsys, "allocate", tiny_llama, "--budget", "4bpw", "--max-tokens", "9")
    generate = ("generate", overlay, "--prompt", "x", "--bits")
    assert "has no key 'everybit_plan'" in refused(capsys, *generate, mine)
    assert "no such file, expected a plan" in refused(capsys, *generate, "absent.json")
    with Overlay.open(overlay) as opened:
        Plan.of(opened, dict.fromkeys(opened.weights, 3)).save(overlay.parent / "p.json")
    line = refused(capsys, "generate", tiny_llama, "--prompt", "x", "--bits", overlay.parent / "p.json")
    assert "float weights, which have one precision" in line
