"""Ternary checkpoints: two planes that give the float model back, from packed, float and still unrounded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.runtime import Runtime
from everybit.errors import FormatError, SourceError
from everybit.integrations.compressed_tensors import export_compressed_tensors
from everybit.integrations.ternary import import_ternary, unpack

NAME = "model.layers.0.mlp.up_proj.weight"


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def imported(folder: Path, out: Path, **options: Any) -> Any:
    return import_ternary(folder, out, read_config(folder), **options)


def write(folder: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "bitnet"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def signs(rows: int = 8, columns: int = 21) -> NDArray[np.int8]:
    return np.random.default_rng(0).integers(-1, 2, (rows, columns)).astype(np.int8)


def packed(weights: NDArray[np.int8]) -> torch.Tensor:
    """One weight after another: row r lies in byte row r mod N/4, in the pair of bits r div N/4."""
    quarter = len(weights) // 4
    found = np.zeros((quarter, weights.shape[1]), np.uint8)
    for r, row in enumerate(weights):
        found[r % quarter] |= ((row + 1) << (2 * (r // quarter))).astype(np.uint8)
    return torch.from_numpy(found)


def test_a_trained_ternary_model_comes_back_exactly(shared_data: Path, tmp_path: Path) -> None:
    folder, out = shared_data / "models" / "bitllama-3m", tmp_path / "overlay"
    report = imported(folder, out)
    assert (report.format, report.weights, report.notes) == ("ternary", 56, ())
    with Checkpoint.open(folder) as wanted, Checkpoint.open(out) as found:
        assert found.names == wanted.names
        quantized = 0
        for name in wanted.names:
            assert np.array_equal(found.dense(name, 2), wanted.plain(name)), name
            quantized += found.quantized(name) is not None
        assert quantized == 56
    with (
        Runtime.open(folder, threads=1, mode="exact", kv_dtype="float32") as floats,
        Runtime.open(out, threads=1, mode="exact", kv_dtype="float32") as planes,
    ):
        tokens = list(range(1, 60))
        # The same numbers in another order of summation.
        np.testing.assert_allclose(planes.prefill(0, tokens, 2), floats.prefill(0, tokens), atol=2e-4)
    losses = export_compressed_tensors(out, tmp_path / "out", dtype="f32").losses
    assert {(x.how, x.after) for x in losses} == {("exact", 0.0)}


def test_the_example_in_transformers() -> None:
    # The docstring of unpack_weights in transformers/integrations/bitnet.py.
    found = unpack(np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8))
    assert found.T.tolist() == [[0, -1, -1, -1, 1, 0, 1, 1], [-1, 1, 1, 1, 0, -1, -1, -1]]


@pytest.mark.parametrize(("kind", "value"), [("bitlinear", 1 / 3.5), ("autobitlinear", 3.5)])
def test_packed_bitnet_weights(tmp_path: Path, kind: str, value: float) -> None:
    weights = signs()
    tensors = {
        NAME: packed(weights),
        f"{NAME}_scale": torch.tensor([3.5]).bfloat16(),
        "model.norm.weight": torch.ones(4),
    }
    report = imported(write(tmp_path / "m", tensors, quant_method="bitnet", linear_class=kind), tmp_path / "out")
    assert report.notes == ("activations stay floats: the model rounded them to 8 bits for each token",)
    with Checkpoint.open(tmp_path / "out") as found:
        assert np.array_equal(found.dense(NAME, 2), weights * np.float32(value))
        assert found.names == (NAME, "model.norm.weight")
        assert found.config["quantization_config"]["quant_method"] == "everybit"


def test_weights_that_a_model_rounds_at_every_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.randn(8, 21).bfloat16()
    scale = 1.0 / weights.float().abs().mean().clamp_(min=1e-5)
    wanted = ((weights.float() * scale).round().clamp(-1, 1) / scale).bfloat16().float().numpy()
    tensors = {
        NAME: weights,
        "model.layers.0.mlp.gate.weight": torch.randn(3, 21),
        "model.embed_tokens.weight": torch.randn(5, 21),
        "lm_head.weight": torch.randn(5, 21),
    }
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    imported(write(tmp_path / "online", tensors, **online), tmp_path / "a")
    imported(write(tmp_path / "plain", tensors), tmp_path / "b", absmean=True)
    for out in ("a", "b"):
        with Checkpoint.open(tmp_path / out) as found:
            assert np.array_equal(found.dense(NAME, 2), wanted)
            assert [name for name in found.names if found.quantized(name)] == [NAME]


def test_rows_with_magnitudes_of_their_own_and_rows_of_zeros(tmp_path: Path) -> None:
    weights = signs().astype(np.float32) * np.linspace(0, 2, 8, dtype=np.float32)[:, None]
    tensors = {NAME: torch.from_numpy(weights), "model.layers.0.other.weight": torch.randn(4, 21)}
    imported(write(tmp_path / "m", tensors), tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as found:
        assert np.array_equal(found.dense(NAME, 2), weights)
        assert found.quantized("model.layers.0.other.weight") is None


def test_refusals(tmp_path: Path) -> None:
    bitnet = {"quant_method": "bitnet"}

    def attempt(name: str, wanted: str, tensors: dict[str, torch.Tensor], absmean: bool = False, **config: Any) -> None:
        folder = write(tmp_path / name, tensors, **config)
        with pytest.raises((SourceError, FormatError), match=wanted):
            imported(folder, tmp_path / "out", absmean=absmean)
        assert not (tmp_path / "out").exists()

    good, scale = {NAME: packed(signs())}, {f"{NAME}_scale": torch.ones(1)}
    attempt("float", "has no ternary weights: .* pass --absmean", {NAME: torch.randn(4, 9)})
    attempt("no-scale", "is packed and has no .*weight_scale", good, **bitnet)
    attempt("code-3", "values besides -1, 0 and 1", {NAME: good[NAME] | 3} | scale, **bitnet)
    attempt("zero", "expected one positive number", good | {f"{NAME}_scale": torch.zeros(1)}, **bitnet)
    attempt("norms", "use_rms_norm puts a norm", good | scale, **bitnet, use_rms_norm=True)
    attempt("unknown", "unknown key 'online_quant'", good | scale, **bitnet, online_quant=True)
    attempt("class", "linear_class 'other'", good | scale, **bitnet, linear_class="other")
    attempt("other", "'quant_method': 'gptq'.* expected quant_method bitnet", good | scale, quant_method="gptq")
    halves = torch.from_numpy(signs().astype(np.float32) / 2)
    attempt("floats-twice", "'model.layers.0.mlp.up_proj.weight' is ternary already, --absmean", {NAME: halves}, True)
    attempt("twice", "ternary already, --absmean would round it again", good | scale, absmean=True, **bitnet)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="holds its tensors as pickle"):
        import_ternary(tmp_path / "pickle", tmp_path / "out", {})
