"""Quantizing with calibration from end to end: guided and tuned by default, every switch, every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import everybit
from everybit.cli.main import main
from everybit.errors import SourceError
from everybit.formats import Overlay
from everybit.quantize import build, calibrate
from tests.e2e.architectures import make

TEXT = "The quick brown fox jumps over the lazy dog while nobody is looking. " * 40
HOW: dict[str, Any] = {"calibration_sequences": 6, "calibration_length": 32, "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def provenance(overlay: Path) -> dict[str, Any]:
    config = json.loads((overlay / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]["provenance"]
    return found


def content(overlay: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(overlay.glob("*.safetensors")))


@torch.no_grad()
def divergence(folder: Path, overlay: Path, bits: int) -> float:
    """KL to the float model on random tokens that calibration did not see, nats per token."""
    ids = torch.from_numpy(np.random.default_rng(99).integers(0, 96, (16, 48)))
    expected, found = (
        functional.log_softmax(m(input_ids=ids).logits.double(), -1)
        for m in (calibrate.load_float(folder), everybit.load(overlay, bits=bits))
    )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_calibration_means_guided_and_tuned(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    report = everybit.quantize(tiny_llama, tmp_path / "out", calibration=text, tune_steps=8, **HOW)
    assert provenance(tmp_path / "out")["solver"] == "guided"
    assert provenance(tmp_path / "out")["tuning"] == {"steps": 8}
    assert set(report.tuned) == {2, 3, 4}
    assert all(t.after <= t.before and 1 <= t.steps <= 8 for t in report.tuned.values())
    assert report.untuned is None
    assert report.to_dict()["tuned"]["2"]["before"] == report.tuned[2].before
    with Overlay.open(tmp_path / "out") as overlay:
        assert {spec.codebook for spec in overlay.weights.values()} == {"compact"}
        overlay.verify_all()
    assert not list(tmp_path.glob("out/*.part*"))


def test_without_calibration_it_is_the_tree_untuned(tiny_llama: Path, tmp_path: Path) -> None:
    report = everybit.quantize(tiny_llama, tmp_path / "out", bits=(2, 3), progress=False)
    assert provenance(tmp_path / "out")["solver"] == "tree"
    assert provenance(tmp_path / "out")["tuning"] == {"steps": 0}
    assert (report.tuned, report.untuned) == ({}, "no calibration")


def test_each_step_lowers_the_divergence(tmp_path: Path) -> None:
    """Tree, then guided, then tuned tables, on tokens that neither has seen; 2 bits, where errors are large."""
    model = make("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(tmp_path / "float")
    found = {}
    how = {"calibration_sequences": 64, "calibration_length": 48, "progress": False, "calibration": "random"}
    for name, options in {
        "tree": {"solver": "tree", "tune": False},
        "guided": {"tune": False},
        "tuned": {"tune_steps": 30},
    }.items():
        everybit.quantize(tmp_path / "float", tmp_path / name, bits=(2,), **how, **options)
        found[name] = divergence(tmp_path / "float", tmp_path / name, 2)
    assert found["guided"] < 0.9 * found["tree"], found
    assert found["tuned"] < 0.95 * found["guided"], found


def test_no_tune(tiny_llama: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--bits", "2,3", "--calibration", text, "--calibration-sequences", 4, "--calibration-length", 32]
    arguments = ["quantize", tiny_llama, tmp_path / "out", *options, "--no-tune"]
    assert main([str(a) for a in arguments]) == 0
    assert "tuned" not in capsys.readouterr().out
    assert provenance(tmp_path / "out")["tuning"] == {"steps": 0}
    assert provenance(tmp_path / "out")["solver"] == "guided"
    arguments = ["quantize", tiny_llama, tmp_path / "tuned", *options, "--tune-steps", 2]
    assert main([str(a) for a in arguments]) == 0
    shown = capsys.readouterr().out
    assert "tuned 2 bits: KL " in shown
    assert "on calibration text held out of it, 2 steps" in shown


@pytest.mark.parametrize("tune", [False, True])
def test_threads_do_not_change_a_byte(tune: bool, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        out = tmp_path / str(threads)
        everybit.quantize(tiny_llama, out, (2, 8), text, threads=threads, tune=tune, tune_steps=4, **HOW)
    assert content(tmp_path / "1") == content(tmp_path / "3")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_other_layouts(family: str, tmp_path: Path) -> None:
    """Every matrix, of every expert too, is solved under a Hessian of its own: none comes out as the tree has it."""
    make(family).save_pretrained(tmp_path / "float")
    how = {**HOW, "calibration": "random", "calibration_sequences": 12}
    report = everybit.quantize(tmp_path / "float", tmp_path / "guided", (2, 3, 6), tune_steps=4, **how)
    everybit.quantize(tmp_path / "float", tmp_path / "tree", (2, 3, 6), solver="tree", tune=False, **how)
    assert set(report.tuned) == {2, 3}
    assert provenance(tmp_path / "guided")["calibration"]["kind"] == "random"
    with Overlay.open(tmp_path / "guided") as ours, Overlay.open(tmp_path / "tree") as tree:
        ours.verify_all()
        for name, spec in ours.weights.items():
            experts = spec.shape[0] if len(spec.shape) == 3 else 1
            planes = [
                np.stack([o.tensor(spec.plane_name(k)) for k in range(spec.planes)]).reshape(spec.planes, experts, -1)
                for o in (ours, tree)
            ]
            assert (planes[0] != planes[1]).any(axis=(0, 2)).all(), name
    loaded = everybit.load(tmp_path / "guided", bits=2)
    assert loaded(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_a_layer_that_no_token_reached_is_named(tmp_path: Path, capsys: Any) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "float")
    arguments = ["quantize", tmp_path / "float", tmp_path / "out", "--calibration", "random", "--tune-steps", 2]
    arguments += ["--calibration-sequences", 4, "--calibration-length", 16, "--bits", "2,3"]
    assert main([str(a) for a in arguments]) == 0
    shown = capsys.readouterr().out
    assert "no calibration token reached model.layers.0.mlp." in shown
    assert "all zeros (kept exactly): model.layers.0.mlp.up_proj.weight" in shown


def test_statistics_are_kept_for_the_same_model_and_text(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = calibrate.load_float
    monkeypatch.setattr(calibrate, "load_float", lambda folder: loads.append(folder) or original(folder))
    how = {**HOW, "bits": (2, 3), "tune": False, "statistics": tmp_path / "kept"}
    everybit.quantize(tiny_llama, tmp_path / "a", calibration=text, **how)
    assert len(loads) == 1
    everybit.quantize(tiny_llama, tmp_path / "b", calibration=text, **how)
    assert len(loads) == 1, "measured again"
    assert content(tmp_path / "a") == content(tmp_path / "b")
    everybit.quantize(tiny_llama, tmp_path / "plain", calibration=text, **{**how, "statistics": None})
    assert content(tmp_path / "a") == content(tmp_path / "plain")
    count = len(loads)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    (tmp_path / "float").mkdir()
    make("llama").save_pretrained(tmp_path / "float")
    for name, model, changed in (
        ("text", tiny_llama, {"calibration": other}),
        ("length", tiny_llama, {"calibration": text, "calibration_length": 16}),
        ("seed", tiny_llama, {"calibration": text, "seed": 1}),
        ("kind", tiny_llama, {"calibration": "random"}),
        ("model", tmp_path / "float", {"calibration": "random"}),
        ("solver", tiny_llama, {"calibration": text, "solver": "tree"}),
    ):
        everybit.quantize(model, tmp_path / name, **{**how, **changed})
        count += 1
        assert len(loads) == count, f"statistics of another {name} were taken"
    everybit.quantize(tiny_llama, tmp_path / "again", calibration=text, **how)
    assert len(loads) == count, "another run's statistics took the place of these"
    assert all((folder / "origin.json").is_file() for folder in (tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "guided"], "the solver guided needs calibration: give a text file, self or random"),
        (["--calibration", "none", "--tune-steps", "5"], "--tune-steps has no effect without calibration"),
        (["--statistics", "kept"], "--statistics has no effect without calibration"),
        (["--calibration", "random", "--tune-steps", "0"], "--tune-steps 0: expected 1 to 1000000"),
        (["--calibration", "random", "--tune-steps", "5", "--no-tune"], "--tune-steps has no effect with --no-tune"),
        (
            ["--calibration", "random", "--solver", "guided", "--codebook", "table"],
            "the solver guided makes compact codebooks only: choose the solver tree for tables",
        ),
    ],
)
def test_options_that_contradict(
    options: list[str], message: str, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"solver": "uniform"}, "no precision has tables"),
        ({"bits": (5, 8)}, "no precision has tables"),
        ({"bits": (5, 8), "override": {"down_proj": (3, 4)}}, "no precision has tables"),
        ({"calibration": "none"}, "tuning needs calibration"),
    ],
)
def test_tuning_that_cannot_be_says_why(options: dict[str, Any], why: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=why):
        everybit.quantize(tiny_llama, tmp_path / "out", tune=True, **{**HOW, "calibration": "random", **options})
    assert not list(tmp_path.iterdir())


def test_a_machine_without_memory_does_not_tune(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(build, "memory_bytes", lambda *_: 1 << 60)
    monkeypatch.setattr(build, "block_memory_bytes", lambda *_: 1 << 60)
    options = ["--calibration", "random", "--calibration-sequences", "2", "--calibration-length", "16", "--bits", "2"]
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), *options]) == 0
    assert "tables are not tuned: it needs about 1152921505 GB of memory, this machine has" in capsys.readouterr().out
    with pytest.raises(SourceError, match=r"tables cannot be tuned: it needs about .* GB of memory"):
        everybit.quantize(tiny_llama, tmp_path / "other", calibration="random", tune=True, **HOW)


def test_tables_of_free_numbers_are_tuned_too(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """Codebook table holds tables at 5 to 8 bits as well, and takes the tree for a solver."""
    report = everybit.quantize(tiny_llama, tmp_path / "out", (2, 5), text, codebook="table", tune_steps=2, **HOW)
    assert provenance(tmp_path / "out")["solver"] == "tree"
    assert set(report.tuned) == {2, 5}


def test_a_dry_run_measures_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "load_float", lambda folder: pytest.fail("the model was loaded"))
    report = everybit.quantize(tiny_llama, tmp_path / "out", calibration="random", dry_run=True, **HOW)
    assert report.dry_run
    assert report.untuned is None
    assert not list(tmp_path.iterdir())
