"""`everybit export` and `everybit import`: what they print, what they pass on, and one line for every mistake."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from everybit.cli.main import main
from everybit.engine.checkpoint import Checkpoint
from tests.e2e.commands import refused
from tests.unit import formats_tiny


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return formats_tiny.write(tmp_path / "overlay")


def test_export_prints_what_it_wrote(overlay: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(overlay), str(tmp_path / "out"), "--to", "safetensors", "--bits", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["precision"] == "3 bits"
    assert Path(document["out"]) == tmp_path / "out"
    with Checkpoint.open(overlay) as wanted, Checkpoint.open(tmp_path / "out") as found:
        rounded = wanted.dense("a.weight", 3)
        assert np.allclose(found.plain("a.weight"), rounded, rtol=2**-8)  # the norm, the largest left plain, is BF16
    assert (document["dtype"], document["losses"]) == ("BF16", [])


def test_export_states_the_loss_of_each_weight(shared_data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["import", str(shared_data / "models" / "bitllama-3m"), str(tmp_path / "overlay")]) == 0
    assert "ternary checkpoint, 56 quantized weights" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "overlay"), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 2 bits, floats in F16, ")
    assert lines[-1] == "56 of 56 weights keep the overlay's grid, the others were fitted anew"
    assert "calibration weighed them: a smaller error is no proof of a better model):" in lines
    assert sum(line.split()[1:3] == ["2", "exact"] for line in lines) == 56


def test_gguf_gets_its_options(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from everybit.integrations import gguf

    calls = []

    def export_gguf(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return gguf.Report(10, 8.5, {"Q8_0": 2}, ("a note",))

    monkeypatch.setattr(gguf, "export_gguf", export_gguf)
    out = tmp_path / "m.gguf"
    command = ["export", str(overlay), str(out), "--to", "gguf", "--type", "Q8_0", "--source", "float"]
    assert main(command) == 0
    options = {"bits": None, "progress": True, "type": "Q8_0", "source": Path("float")}
    assert calls == [((overlay, out), options)]
    assert capsys.readouterr().out == f"{out}: 10 bytes, 8.50 bits per weight (2 Q8_0)\na note\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--dtype", "f16"], "--dtype has no effect with --to gguf, only with safetensors and compr"),
        (["--to", "safetensors", "--group-size", "64"], "--group-size has no effect with --to safetensors"),
        (["--to", "compressed-tensors", "--type", "Q8_0"], "--type has no effect with --to compressed-tensors"),
        (["--to", "safetensors", "--source", "x"], "--source has no effect with --to safetensors, only with gguf"),
        (["--to", "safetensors", "--bits", "2-4"], "--bits 2-4: expected one precision"),
        (["--to", "safetensors", "--bits", "6"], "bits 6 asked, the overlay has 2, 3, 4"),
        (["--to", "safetensors", "--bits", "none.json"], "none.json: no such file, expected a plan"),
        (["--to", "gguf", "--bits", "plan.json"], "--to gguf takes one precision"),
        (["--to", "compressed-tensors", "--bits", "3"], "is fused experts, which compressed-tensors cannot hold"),
        (["--to", "onnx"], "invalid choice: 'onnx'"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_export_refuses(overlay: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "export", overlay, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "gguf"])
def test_export_wants_an_overlay_and_a_free_place(overlay: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    assert "does not exist" in refused(capsys, "export", tmp_path / "none", tmp_path / "out", "--to", to)
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text("{}")
    (tmp_path / "float" / "model.safetensors").touch()
    assert "is a model but not an overlay" in refused(
        capsys, "export", tmp_path / "float", tmp_path / "out", "--to", to
    )
    if to == "safetensors":
        assert "exists and is not empty" in refused(capsys, "export", overlay, tmp_path / "float", "--to", to)


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_nothing_is_written_into_what_is_read(overlay: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    (tmp_path / "link").symlink_to(overlay)
    before = sorted(overlay.iterdir())
    for out in (overlay / "out", overlay / "a" / "b", tmp_path / "link" / "out", overlay / ".." / "overlay" / "out"):
        assert "which is read: choose a place outside it" in refused(capsys, "export", overlay, out, "--to", to)
    assert "expected one line" in refused(capsys, "export", overlay, tmp_path / "a\nb", "--to", to)
    assert sorted(overlay.iterdir()) == before


def test_import_refuses(overlay: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert "none does not exist, expected the folder of an" in refused(capsys, "import", tmp_path / "none", out)
    (tmp_path / "model.gguf").touch()
    assert "model.gguf is no folder, expected the folder of an Any-Precision, BitNet or other ternary" in refused(
        capsys, "import", tmp_path / "model.gguf", out
    )
    assert "has no config.json, expected the folder of" in refused(capsys, "import", tmp_path, out)
    assert "is an overlay already" in refused(capsys, "import", overlay, out)
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text('{"anyprec": {"seed_precision": 3, "parent_precision": 4}}')
    (original / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "is no zip archive" in refused(capsys, "import", original, out)
    assert "--absmean has no effect" in refused(capsys, "import", original, out, "--absmean")
    (original / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert "holds its tensors as pickle" in refused(capsys, "import", original, out)
    assert not out.exists()


def test_import_prints_a_command_that_can_be_run(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    signs = np.random.default_rng(0).integers(-1, 2, (8, 21)).astype(np.float32)
    save_file({"model.layers.0.mlp.up_proj.weight": signs}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "which is read" in refused(capsys, "import", folder, folder / "out")
    assert "--absmean would round it again" in refused(capsys, "import", folder, tmp_path / "out", "--absmean")
    assert main(["import", str(folder), str(tmp_path / "its overlay")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"next: everybit generate '{tmp_path}/its overlay' ")
    assert (tmp_path / "its overlay" / "README.md").read_text().count("# model, 2 bits\n") == 1
