"""Models and texts that cannot be quantized: one clear line each, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import everybit
from everybit.errors import EverybitError, OutputError, PrecisionError, SourceError


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refuse(model: Path | str, expected: type[EverybitError], message: str, tmp: Path, **options: Any) -> None:
    """Quantizing raises `expected` with `message` on one line and leaves nothing under the final name."""
    out = tmp / "out"
    with pytest.raises(expected, match=message) as caught:
        everybit.quantize(model, out, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not (tmp / "out.partial").exists()


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_missing_model(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", SourceError, "no folder .*nothing: pass a model folder", tmp_path)


def test_unknown_or_gated_hub_id(tmp_path: Path) -> None:
    refuse("nobody/no-such-model", SourceError, "neither a folder nor to be had from the hub", tmp_path)


def test_file_instead_of_folder(tmp_path: Path, model: Path) -> None:
    refuse(model / "config.json", SourceError, "is a file: pass the folder", tmp_path)


def test_no_config(tmp_path: Path, model: Path) -> None:
    (model / "config.json").unlink()
    refuse(model, SourceError, r"holds no config\.json", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_broken_config(tmp_path: Path, model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    refuse(model, SourceError, r"config\.json (is not valid JSON|holds a list)", tmp_path)


def test_no_weights(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    refuse(model, SourceError, r"holds no \*\.safetensors weights", tmp_path)


def test_pickle_weights_only(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuse(model, SourceError, "pickle weights only", tmp_path)


def test_truncated_weights(tmp_path: Path, model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refuse(model, SourceError, "not a readable safetensors file", tmp_path)


def test_index_naming_a_missing_shard(tmp_path: Path, model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(model, SourceError, "the index names model-00002-of-00002.safetensors, which is not there", tmp_path)


def test_missing_parameter(tmp_path: Path, model: Path) -> None:
    edit(model, lambda t: t.__delitem__("model.layers.1.mlp.up_proj.weight"))
    refuse(model, SourceError, r"1 parameters of the model are not in .*layers\.1\.mlp\.up_proj", tmp_path)


def test_shape_of_another_configuration(tmp_path: Path, model: Path) -> None:
    edit(model, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    refuse(model, SourceError, r"model\.norm\.weight has shape \(7,\), config\.json implies \(48,\)", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_non_finite_weights(tmp_path: Path, model: Path, value: float, name: str) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    edit(model, poison)
    refuse(model, SourceError, rf"{name} holds (nan|inf|-inf) at", tmp_path)


def test_unknown_architecture(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "flurb", "architectures": ["Flurb"]}))
    refuse(model, SourceError, "transformers cannot build a causal language model from it", tmp_path)


def test_already_quantized(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (model / "config.json").write_text(json.dumps(config))
    refuse(model, SourceError, r"is already quantized \(gptq\)", tmp_path)


def test_overlay_as_source(tmp_path: Path, model: Path) -> None:
    everybit.quantize(model, tmp_path / "overlay", bits=(2, 3), progress=False)
    refuse(tmp_path / "overlay", SourceError, "is already an overlay: pass the float model", tmp_path)


def test_original_any_precision_checkpoint(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "anyprec": {"seed_precision": 3}}))
    refuse(model, SourceError, "original Any-Precision checkpoint.*everybit import", tmp_path)


@pytest.mark.parametrize("bits", [(1, 2), (2, 9), (), (3, 3), (4, 2), (2.5,)])
def test_bad_bits(tmp_path: Path, model: Path, bits: tuple[int, ...]) -> None:
    refuse(model, PrecisionError, "expected a list of different integers from 2 to 8", tmp_path, bits=bits)


def test_output_not_empty(tmp_path: Path, model: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="full exists and is not empty"):
        everybit.quantize(model, tmp_path / "full", progress=False)
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_output_below_a_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        everybit.quantize(model, tmp_path / "file" / "out", progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file; expected UTF-8 text"),
        (b"  \n\n", "4 bytes and no text"),
        (b"too short", "tokens, at least 64 are needed"),
        (b"caf\xe9 " * 100, "byte 0xe9 at offset 3 is not UTF-8"),
    ],
)
def test_calibration_text(tmp_path: Path, model: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    refuse(model, SourceError, message, tmp_path, calibration=tmp_path / "text.txt")


def test_missing_calibration_file(tmp_path: Path, model: Path) -> None:
    refuse(model, SourceError, "no such file; expected a UTF-8 text file", tmp_path, calibration=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed -1: expected 0 to"),
        ({"threads": -1}, "--threads -1: expected 0 to 1024"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"ignore": ["("]}, "is not a regular expression"),
        ({"ignore": ["no_such_layer"]}, "matches no layer"),
        ({"ignore": ["."]}, "no layer is left to quantize"),
        ({"override": {"no_such_layer": (4,)}}, "matches no layer"),
        ({"table_dtype": "int3", "codebook": "table"}, "unknown table dtype"),
        ({"codebook": "nf4"}, "unknown codebook 'nf4': expected compact or table"),
        ({"table_dtype": "float32"}, "table dtype 'float32' has no effect with the codebook compact"),
        ({"codebook": "compact", "solver": "uniform"}, "codebook 'compact' has no effect with the solver uniform"),
        ({"calibration_sequences": 0, "calibration": "self"}, "expected 1 or more"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, options: dict[str, Any], message: str) -> None:
    refuse(model, SourceError, message, tmp_path, **options)


def test_weights_beyond_float16_tables(tmp_path: Path, model: Path) -> None:
    edit(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e7))
    refuse(model, SourceError, "overflow a float16 codebook: use --table-dtype", tmp_path, codebook="table")
    everybit.quantize(model, tmp_path / "tables", codebook="table", table_dtype="float32", progress=False)
    everybit.quantize(model, tmp_path / "compact", progress=False)  # scales are float32


def test_grids_beyond_float32(tmp_path: Path, model: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.0.mlp.up_proj.weight"]  # rows with a cell at the very edge of float32
        ramp = torch.linspace(0.97, 1, weight.shape[1]) * torch.finfo(torch.float32).max
        weight.copy_(ramp.expand_as(weight))
        weight[:, ::3] *= -1

    edit(model, enlarge)
    advice = "overflow a compact codebook: use --codebook table --table-dtype float32"
    refuse(model, SourceError, advice, tmp_path)
    everybit.quantize(model, tmp_path / "out", codebook="table", table_dtype="float32", progress=False)


def test_a_layer_of_zeros_is_kept_exactly_and_named(tmp_path: Path, model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(model, lambda t: t.update({name: torch.zeros_like(t[name])}))
    report = everybit.quantize(model, tmp_path / "out", progress=False)
    assert report.zeros == [name]
    loaded = everybit.load(tmp_path / "out", bits=2)
    assert not loaded.get_submodule("model.layers.0.mlp.up_proj").weight.any()


def test_disk_full(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse(model, OutputError, r"needs \d+ more bytes, the disk has 1000 free", tmp_path)


def test_dry_run_writes_nothing(tmp_path: Path, model: Path) -> None:
    report = everybit.quantize(model, tmp_path / "out", dry_run=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    real = everybit.quantize(model, tmp_path / "out", progress=False)
    assert report.sizes == real.sizes
    data = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert real.sizes.stored_bytes <= data  # the rest is the header
