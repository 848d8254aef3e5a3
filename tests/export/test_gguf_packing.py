"""The K-quants against gguf's decoder, plain rounding, and llama.cpp's own quantization; the recipes by known cases."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from everybit.errors import SourceError
from everybit.integrations.gguf import export_gguf, kquants
from everybit.integrations.gguf.recipes import Sizes, choose_type

F32 = kquants.F32
LLAMA = Sizes(layers=32, heads=32, kv_heads=8, experts=0, tied=False)


def hard(rows: int = 6) -> F32:
    """Gaussian rows, with what breaks quantizers among them: zeros, constants, outliers, tiny and one-sided weights."""
    weights = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    weights[0, :300] = 0
    weights[1, :256] = 0.37
    weights[1, 256:512] = -2
    weights[2, ::97] *= 50
    weights[3] *= 1e-2
    weights[4] = np.abs(weights[4]) + 3
    return weights


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_gguf_reads_what_was_packed(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    weights = hard()
    stored = kquants.quantize(kind, weights)
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).reshape(-1, kquants.SUPERBLOCK)
    np.testing.assert_array_equal(read, kquants.fit(kind, weights.reshape(read.shape)).values())


# Squared error on Gaussian weights: a uniform grid of b bits between the extremes of 16 or 32 Gaussian numbers (about
# +-2) has step 4 / 2^b, and a twelfth of its square as error: 0.0052 at 4 bits. A search comes close to that.
@pytest.mark.parametrize("kind", kquants.KINDS)
def test_error_is_that_of_a_good_grid(kind: str) -> None:
    weights = np.random.default_rng(1).standard_normal((32, 512)).astype(np.float32)
    off = kquants.fit(kind, weights.reshape(-1, kquants.SUPERBLOCK)).values() - weights.reshape(-1, kquants.SUPERBLOCK)
    grid = (4 / 2 ** kquants.KINDS[kind].bits) ** 2 / 12
    assert 0.5 * grid < float((off**2).mean()) < 1.2 * grid


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_weights_that_are_hard(kind: str) -> None:
    weights = hard()
    read = kquants.fit(kind, weights.reshape(-1, kquants.SUPERBLOCK)).values().reshape(weights.shape)
    assert np.isfinite(read).all()
    assert not read[0, :256].any()
    assert not kquants.fit(kind, np.zeros((2, 256), np.float32)).values().any()
    np.testing.assert_allclose(read[1, :512], weights[1, :512], rtol=0.02)
    relative = ((read - weights) ** 2).sum(1) / (weights**2).sum(1)
    assert relative.max() < 4 * (4 / 2 ** kquants.KINDS[kind].bits) ** 2 / 12


def ggml_quantize(kind: str, weights: F32) -> F32:
    """By llama.cpp's own code, and read by gguf."""
    gguf = pytest.importorskip("gguf")
    found = importlib.util.find_spec("llama_cpp")
    library = found and next(Path(str(found.origin)).parent.glob("lib/*ggml-base.*"), None)
    if not library:
        pytest.skip("llama-cpp-python is not installed")
    ggml = ctypes.CDLL(str(library))
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    stored = np.empty((len(weights), weights.shape[1] // block * block_bytes), np.uint8)
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    ggml.ggml_quantize_chunk(int(number), weights.ctypes.data, stored.ctypes.data, 0, *weights.shape, None)
    return np.asarray(gguf.quants.dequantize(stored, number).reshape(weights.shape), np.float32)


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_error_against_llama_cpp(kind: str, shared_data: Path) -> None:
    """At most 2 % more than llama.cpp's, weighted as it weights without an importance matrix."""
    from safetensors.numpy import load_file

    file = next((shared_data / "weights" / "gpt2-124m-attention").glob("*.safetensors"))
    weights = load_file(file)["layers.5.v_proj.weight"].astype(np.float32)
    blocks = weights.reshape(-1, kquants.KINDS[kind].block)
    size, spread = np.abs(blocks), np.sqrt((blocks**2).mean(1, keepdims=True))
    importance = {"Q2_K": size, "Q3_K": size**2, "Q6_K": size**2}.get(kind, size + spread).reshape(weights.shape)

    def error(read: F32) -> float:
        return float((importance * (read - weights).astype(np.float64) ** 2).sum())

    ours = kquants.fit(kind, weights.reshape(-1, kquants.SUPERBLOCK)).values().reshape(weights.shape)
    assert 0.7 < error(ours) / error(ggml_quantize(kind, weights)) < 1.02


@pytest.mark.parametrize(
    ("file_type", "name", "columns", "expected"),
    [
        ("Q4_K_M", "output.weight", 4096, "Q6_K"),
        ("Q4_K_M", "token_embd.weight", 4096, "Q4_K"),
        ("Q4_K_M", "blk.0.attn_v.weight", 4096, "Q6_K"),
        ("Q4_K_M", "blk.4.attn_v.weight", 4096, "Q4_K"),
        ("Q4_K_M", "blk.6.ffn_down.weight", 4096, "Q6_K"),
        ("Q4_K_S", "blk.3.ffn_down.weight", 4096, "Q5_K"),
        ("Q3_K_M", "blk.1.ffn_down.weight", 4096, "Q5_K"),
        ("Q3_K_L", "blk.9.attn_output.weight", 4096, "Q5_K"),
        ("Q2_K", "blk.9.attn_v.weight", 4096, "Q4_K"),
        ("Q5_K_M", "blk.9.attn_norm.weight", 4096, "F32"),
        ("Q8_0", "output.weight", 4096, "Q8_0"),
        ("Q4_0", "output.weight", 4096, "Q6_K"),
        ("Q4_K_S", "blk.9.attn_q.weight", 576, "Q5_0"),
        ("Q4_K_S", "blk.9.attn_q.weight", 172, "F16"),
        ("BF16", "blk.9.attn_q.weight", 172, "BF16"),
    ],
)
def test_recipes(file_type: str, name: str, columns: int, expected: str) -> None:
    assert choose_type(file_type, name, (64, columns) if "norm" not in name else (columns,), LLAMA) == expected


def test_tied_heads_and_eight_experts_get_more() -> None:
    tied = Sizes(layers=5, heads=6, kv_heads=3, experts=0, tied=True)
    assert choose_type("Q4_K_M", "token_embd.weight", (4096, 256), tied) == "Q6_K"
    assert choose_type("Q4_K_M", "token_embd.weight", (4096, 384), tied) == "Q8_0"
    mixtral = Sizes(layers=32, heads=32, kv_heads=8, experts=8, tied=False)
    assert choose_type("Q2_K", "blk.9.attn_k.weight", (1024, 4096), mixtral) == "Q8_0"
    assert choose_type("Q2_K", "blk.9.ffn_down_exps.weight", (8, 4096, 14336), mixtral) == "Q3_K"


def test_without_the_gguf_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError, match=r"the gguf package is not installed: pip install"):
        export_gguf(tmp_path, tmp_path / "out.gguf")
