"""An overlay as a float model folder: the same values, the same logits, whatever the dtype, the shards, the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import everybit
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.plan import Plan
from everybit.errors import OutputError, PrecisionError, SourceError
from everybit.formats import Overlay
from everybit.integrations.dense_export import export_safetensors
from everybit.quantize.workspace import free_output
from tests.unit import formats_tiny

TOKENS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 4), override={"down_proj": (6,)}, progress=False)
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def test_the_folder_gives_the_logits_of_the_overlay(overlay: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export_safetensors(overlay, out, bits=2)
    assert (report.precision, report.dtype) == ("2 bits", "F32")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wanted = logits(everybit.load(overlay, bits=2))
    assert torch.equal(logits(model), wanted)
    assert not torch.equal(logits(everybit.load(overlay, bits=4)), wanted)
    assert (
        AutoTokenizer.from_pretrained(out)("abc").input_ids == AutoTokenizer.from_pretrained(overlay)("abc").input_ids
    )
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_the_highest_precision_is_the_default_and_shards_change_nothing(overlay: Path, tmp_path: Path) -> None:
    export_safetensors(overlay, tmp_path / "one")
    export_safetensors(overlay, tmp_path / "many", shard_bytes=30_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with (
        Checkpoint.open(overlay) as wanted,
        Checkpoint.open(tmp_path / "one") as one,
        Checkpoint.open(tmp_path / "many") as many,
    ):
        assert one.names == many.names == wanted.names
        for name in wanted.names:
            assert np.array_equal(one.plain(name), wanted.dense(name, 4))
            assert np.array_equal(many.plain(name), one.plain(name))


def test_a_plan_chooses_each_weight(overlay: Path, tmp_path: Path) -> None:
    with Overlay.open(overlay) as opened:
        bits = {name: spec.bits[i % len(spec.bits)] for i, (name, spec) in enumerate(opened.weights.items())}
        Plan.of(opened, bits).save(tmp_path / "plan.json")
    export_safetensors(overlay, tmp_path / "out", bits=tmp_path / "plan.json")
    with Checkpoint.open(overlay) as wanted, Checkpoint.open(tmp_path / "out") as found:
        assert set(bits.values()) == {2, 4, 6}
        for name, own in bits.items():
            assert np.array_equal(found.plain(name), wanted.dense(name, own if own != 6 else 4))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_dtypes_round_to_nearest(overlay: Path, tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    export_safetensors(overlay, tmp_path / "out", bits=4, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with Checkpoint.open(overlay) as wanted:
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch_dtype
            assert torch.equal(parameter.data, torch.tensor(wanted.dense(name, 4)).to(torch_dtype))


def test_transposed_experts_come_back_as_the_model_holds_them(tmp_path: Path) -> None:
    formats_tiny.write(tmp_path / "overlay")
    export_safetensors(tmp_path / "overlay", tmp_path / "out", bits=3, dtype="f32")
    with Checkpoint.open(tmp_path / "overlay") as wanted, Checkpoint.open(tmp_path / "out") as found:
        assert found.shape("b.experts") == (2, 16, 3)
        assert np.array_equal(found.plain("b.experts").swapaxes(1, 2), wanted.dense("b.experts", 3))
        assert found.dtype("norm.weight") == "F32"


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    overlay = formats_tiny.write(tmp_path / "overlay")  # its norm holds any BF16
    with pytest.raises(SourceError, match=r"norm\.weight has values up to .*: use --dtype bf16"):
        export_safetensors(overlay, tmp_path / "out", dtype="f16")
    with pytest.raises(PrecisionError, match="bits 5 asked, the overlay has 2, 3, 4"):
        export_safetensors(overlay, tmp_path / "out", bits=5)
    with pytest.raises(SourceError, match="dtype 'f8': expected one of bf16, f16, f32"):
        export_safetensors(overlay, tmp_path / "out", dtype="f8")
    assert {p.name for p in tmp_path.iterdir()} == {"overlay"}
    with pytest.raises(OutputError, match="exists and is not empty"):
        export_safetensors(overlay, overlay, bits=4)


def test_another_run_that_began_in_between_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = formats_tiny.write(tmp_path / "overlay")
    theirs = tmp_path / "out.partial"

    def look(*arguments: Any, **options: Any) -> Path:
        found = free_output(*arguments, **options)
        theirs.mkdir()
        (theirs / "model.safetensors").write_bytes(b"theirs")
        return found

    monkeypatch.setattr("everybit.integrations.model_folder.free_output", look)
    with pytest.raises(OutputError, match=r"cannot write .*File exists"):
        export_safetensors(overlay, tmp_path / "out", bits=4)
    assert (theirs / "model.safetensors").read_bytes() == b"theirs"
