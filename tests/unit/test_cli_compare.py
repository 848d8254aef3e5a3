"""`everybit compare`: the table, the document, what is left out, refusals, and that weights are replaced exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import everybit
from everybit.cli.main import main
from everybit.engine.checkpoint import Checkpoint
from everybit.errors import SourceError
from everybit.quantize import calibrate, peers
from everybit.quantize.discover import discover
from everybit.quantize.peers.collect import Collected, InputHessians, collect
from everybit.quantize.peers.model import write_model
from everybit.quantize.source import Source, load_float

TEXT = "The quick brown fox jumps over the lazy dog while nobody is looking, and comes back.\n"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return str(tmp_path / "text.txt")


@pytest.fixture
def common(tiny_llama: Path, text: str) -> list[str]:
    options = ["--text", text, "--calibration", text, "--max-tokens", "400", "--context", "32", "--threads", "1"]
    return ["compare", str(tiny_llama), *options, "--calibration-sequences", "4", "--calibration-length", "64"]


def test_one_table_of_ours_and_theirs(common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare.json"
    methods = "rtn,gptq,nf4,upscale,lnq"
    assert main([*common, "--methods", methods, "--bits", "3,4", "--seeds", "2", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    document = json.loads(out.read_text())
    rows = {(row["method"], row["bits"]): row for row in document["rows"]}
    assert set(rows) == {(m, b) for m in ("rtn", "gptq", "upscale", "lnq", "everybit") for b in (3, 4)} | {("nf4", 4)}
    assert [row["bits"] for row in document["rows"]] == sorted(row["bits"] for row in document["rows"])
    for bits in (3, 4):
        kl = [row["kl_mean"] for row in document["rows"] if row["bits"] == bits]
        assert kl == sorted(kl)
        assert rows["upscale", bits]["seeds"] == 2
        assert rows["rtn", bits]["kl_mean"] > rows["gptq", bits]["kl_mean"]
    for row in document["rows"]:
        assert row["kl_interval"][0] <= row["kl_mean"] <= row["kl_interval"][1]
        assert row["seconds"] > 0
        assert f"{row['bpw']:.2f}" in shown
    # Rows of 48 and 88 weights, 12 and 2 of 14 matrices; a scale and an offset of 16 bits each for every row.
    sizes = {48: 2 * (48 * 48 * 2 + 24 * 48 * 2 + 88 * 48 * 2), 88: 2 * 48 * 88}
    expected = sum(n * (4 + 32 / k) for k, n in sizes.items()) / sum(sizes.values())
    assert rows["rtn", 4]["bpw"] == pytest.approx(expected, rel=1e-12)
    assert document["float"]["bpw"] == 32
    assert document["left_out"] == []
    assert "upscale: mean of 2 seeds" in shown
    assert "paired resamples of 13 windows" in shown


def test_seeds_are_averaged_and_runs_repeat(common: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    everybit.quantize(tiny_llama, tmp_path / "overlay", (3,), progress=False)
    kl = []
    for i, seeds in enumerate(("1", "2", "2")):
        out = tmp_path / f"{i}.json"
        given = ["--overlay", str(tmp_path / "overlay"), "--methods", "upscale", "--bits", "3", "--seeds", seeds]
        assert main([*common, *given, "--json", str(out)]) == 0
        (row,) = (row for row in json.loads(out.read_text())["rows"] if row["method"] == "upscale")
        kl.append((row["kl_mean"], row["kl_interval"]))
    assert kl[1] == kl[2]
    assert kl[0][0] != kl[1][0]


def test_overlays_are_rows_and_their_differences_are_said(
    common: list[str], tiny_llama: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    how = {"calibration_sequences": 4, "calibration_length": 64, "progress": False}
    everybit.quantize(tiny_llama, same, (2, 4), text, **how)
    everybit.quantize(tiny_llama, other, (4,), "none", ignore=["down_proj"], progress=False)
    out = tmp_path / "c.json"
    given = ["--overlay", str(same), "--overlay", str(other), "--methods", "none", "--bits", "4", "--json", str(out)]
    assert main([*common, *given]) == 0
    shown = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert {(row["method"], row["bits"]) for row in document["rows"]} == {("same", 4), ("other", 4)}
    assert "other quantizes other weights" in shown
    assert "other was calibrated differently: {'kind': 'none'}" in shown
    assert "same quantizes" not in shown
    assert "same was" not in shown

    # and the figures are those of everybit eval
    assert (
        main(["eval", str(same), "--bits", "4", "--reference", str(tiny_llama), "--json", *common[2:4], *common[6:12]])
        == 0
    )
    row = json.loads(capsys.readouterr().out)["rows"][0]
    found = next(r for r in document["rows"] if r["method"] == "same")
    assert found["kl_mean"] == row["kl_mean"]
    assert (found["bpw"], found["kl_interval"]) == (row["bpw"], row["kl_interval"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "rtn,awq"], "unknown method 'awq': expected some of rtn, "),
        (["--bits", "9"], "not within 2..8"),
        (["--overlay", "absent"], "absent"),
        (["--json", "absent/x.json"], "cannot be written there"),
        (["--calibration", "none"], "expected a text file, the same for every method"),
        (["--calibration", "absent.txt"], "no such file"),
        (["--methods", "lnq", "--bits", "3", "--seed", "-1"], "--seed -1"),
    ],
)
def test_refusals(common: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    assert main([*common, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("everybit: error: ")


def test_a_model_that_is_no_float_model_is_refused(
    common: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everybit.quantize(tiny_llama, tmp_path / "overlay", (4,), progress=False)
    assert main(["compare", str(tmp_path / "overlay"), *common[2:]]) == 2
    assert "already an overlay" in capsys.readouterr().err.splitlines()[-1]


def test_what_everybit_quantizes_is_replaced_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    source = Source(tiny_llama)
    targets, _ = discover(source.model, [], [])
    method = peers.METHODS["rtn"]
    written = write_model(source, targets, method, 3, Collected(None, None), 0, tmp_path / "model")
    names = {target.name for target in targets}
    assert written.seconds > 0
    with Checkpoint.open(tiny_llama) as before, Checkpoint.open(written.folder) as after:
        assert before.names == after.names
        for name in before.names:
            old, new = before.plain(name), after.plain(name)
            if name in names:
                expected, _ = method.load()(np.ascontiguousarray(old), 3, None)  # type: ignore[arg-type]
                np.testing.assert_array_equal(new, expected)
            else:
                np.testing.assert_array_equal(new, old)


def test_transposed_weights_go_back_as_the_model_holds_them(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    source = Source(tmp_path / "gpt2")
    targets, _ = discover(source.model, [], [])
    method = peers.METHODS["rtn"]
    written = write_model(source, targets, method, 2, Collected(None, None), 0, tmp_path / "out")
    name = next(target.name for target in targets if target.name.endswith("c_attn.weight"))
    before = dict(source.parameters())[name].numpy()
    after = load_float(written.folder).get_parameter(name).detach().numpy()
    assert before.shape == after.shape == (16, 48)
    expected, _ = method.load()(np.ascontiguousarray(before.T), 2, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(after, expected.T)


def test_hessians_are_mean_outer_products_of_the_inputs(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    import torch

    model = load_float(tiny_llama)
    source = Source(tiny_llama)
    targets, _ = discover(source.model, [], [])
    sequences = [torch.tensor([[1, 5, 9, 7]]), torch.tensor([[3, 8]])]
    seen = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].reshape(-1, 88)))
    found = InputHessians(model, targets, sequences, progress=False)
    hook.remove()
    x = torch.cat(seen).detach().numpy().astype(np.float64)
    assert len(x) == 6
    np.testing.assert_allclose(found.hessian("model.layers.1.mlp.down_proj.weight"), x.T @ x / 6, rtol=1e-4, atol=1e-6)
    with pytest.raises(SourceError, match="no Hessian"):
        found.hessian("model.embed_tokens.weight")
    assert not any(module._forward_pre_hooks for module in model.modules())

    record, documents = calibrate.describe(text, 2, 64, 0)
    assert documents is not None
    both = collect(source, targets, record, documents, {"sensitivity", "hessian"}, tmp_path, progress=False)
    assert both.sensitivities is not None
    assert both.sensitivities.sensitivity("model.layers.1.mlp.down_proj.weight").shape == (48, 88)
    assert collect(source, targets, record, documents, (), tmp_path) == Collected(None, None)
