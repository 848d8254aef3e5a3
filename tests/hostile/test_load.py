"""Overlays that open but must not be run as they stand: what `everybit.load` and the commands refuse."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import everybit
from everybit.cli.main import main
from everybit.errors import ChecksumError, FormatError, SourceError
from everybit.quantize.source import load_float


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("load") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 3), progress=False)
    return out


@pytest.fixture
def overlay(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "overlay"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the shard with honest checksums of the changed tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    sums = {f"sha256:{n}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt", **sums})


def test_the_edit_itself_is_harmless(overlay: Path) -> None:
    edit_tensors(overlay, lambda tensors: None)
    everybit.load(overlay)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_an_unquantized_tensor_under_another_name(overlay: Path, name: str) -> None:
    edit_tensors(overlay, lambda tensors: tensors.update({"other": tensors.pop(name)}))
    with pytest.raises(FormatError, match="tensor other belongs to no parameter of LlamaForCausalLM"):
        everybit.load(overlay)


def test_an_unquantized_tensor_is_missing(overlay: Path) -> None:
    edit_tensors(overlay, lambda tensors: tensors.__delitem__("model.norm.weight"))
    with pytest.raises(FormatError, match=r"1 parameters of LlamaForCausalLM are missing \(first: model.norm.weight\)"):
        everybit.load(overlay)


@pytest.mark.parametrize(
    "lie",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": False},
        {"hidden_size": 96},
        {"vocab_size": 100},
        {"num_attention_heads": 3},
        {"rms_norm_eps": "x"},
        {"dtype": "floaty"},
        {"model_type": "flurb"},
    ],
    ids=str,
)
def test_a_config_that_describes_another_model(overlay: Path, lie: dict[str, Any]) -> None:
    edit_config(overlay, **lie)
    with pytest.raises(FormatError):
        everybit.load(overlay)


def test_a_flipped_bit_in_an_unquantized_tensor(overlay: Path) -> None:
    file = overlay / "model.safetensors"
    data = bytearray(file.read_bytes())
    with safe_open(file, framework="pt") as opened:
        values = opened.get_tensor("model.embed_tokens.weight").numpy().tobytes()
    data[data.find(values) + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"'model.embed_tokens.weight'.*download it again"):
        everybit.load(overlay)


@pytest.mark.parametrize("where", ["model", "overlay", "tokenizer"])
def test_code_in_a_folder_is_never_run(
    where: str, tiny_llama: Path, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    marker = tmp_path / "executed"
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model")) if where == "model" else overlay
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    if where == "tokenizer":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        edit_config(folder, model_type="evil", architectures=["Evil"], auto_map=auto_map)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    if where == "model":
        main(["quantize", str(folder), str(tmp_path / "out")])
    else:
        main(["generate", str(folder), "--prompt", "x", "--max-tokens", "1"])
    assert not marker.exists()


@pytest.mark.parametrize(
    "provenance",
    [
        {"calibration": "none"},
        {"source": "x", "solver": "\x1b[31mred\x1b]0;title\x07"},
        {"x": float("nan"), "calibration": [1]},
        {},
    ],
    ids=str,
)
def test_inspect_takes_any_provenance(overlay: Path, provenance: dict[str, Any], capsys: Any) -> None:
    config = json.loads((overlay / "config.json").read_text())
    config["quantization_config"]["provenance"] = provenance
    edit_config(overlay, **{**config, "architectures": {"not": "a list"}})
    assert main(["inspect", str(overlay)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["inspect", str(overlay), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_floats(tiny_llama: Path, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"is stored as (I8|F8_E4M3|C64), expected one of F16"):
        everybit.quantize(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()


def test_a_link_out_of_the_source_is_not_published(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (tmp_path / "secret").write_text("{}")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"links to .*secret, outside the folder"):
        everybit.quantize(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_reference_must_be_a_whole_float_model(made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is already an overlay"):
        load_float(made)
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 parameters of the model are not in its weight files"):
        load_float(folder)


def test_a_model_used_under_inference_mode_can_be_trained_afterwards(made: Path) -> None:
    model = everybit.load(made, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert model.model.norm.weight.grad is not None
