"""vLLM's whole forward pass, by its own loaders and discovery of plug-ins, gives our transformers load's logits."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from everybit.formats import Overlay
from everybit.integrations.vllm import linear
from tests.parity.test_families_native import make_cells
from tests.vllm import engine
from tests.vllm.overlays import BITS, IDS, MODELS, build, quantize_embedding, wanted

# Two evaluations of the same float32 sums in another order. Measured: at most 2e-6 of logits up to 4.
NEAR = 2e-5


@pytest.fixture(scope="module", params=MODELS)
def overlay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def worst(overlay: Path, bits: int, method: str | None = None) -> float:
    with engine.model(overlay, quantization=method or f"everybit-{bits}bit") as loaded:
        return float((engine.logits(loaded, IDS) - wanted(overlay, bits)).abs().max())


@pytest.mark.parametrize("bits", BITS)
def test_logits(overlay: Path, bits: int) -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="everybit")
    assert found.value == "everybit.integrations.vllm:register"
    assert worst(overlay, bits) < NEAR
    assert (wanted(overlay, bits) - wanted(overlay, 11 - bits if bits in (3, 8) else 10 - bits)).abs().max() > 0.1


@pytest.mark.parametrize("codebook", ["compact", "table", "affine", "cells"])
def test_every_codebook_with_mixed_bits(codebook: str, tmp_path: Path) -> None:
    """In fused layers one weight at bits of its own and one left plain; the head and the embedding quantized, too."""
    made = {"affine": {"solver": "uniform"}, "cells": {"codebook": "table"}}.get(codebook, {"codebook": codebook})
    override = {"k_proj": (4, 8), "down_proj": (4,), "lm_head": (4, 6)}
    overlay = build("qwen2", tmp_path, override=override, ignore=["up_proj"], **made)
    if codebook == "cells":
        make_cells(overlay)
    quantize_embedding(overlay)
    with Overlay.open(overlay) as opened:
        assert {spec.codebook for spec in opened.weights.values()} == {codebook, "affine"}
        assert "lm_head.weight" in opened.weights
    for bits in (3, 6):
        assert worst(overlay, bits) < NEAR


def test_without_an_alias_the_most_bits_or_those_of_the_config(tmp_path: Path) -> None:
    overlay = build("llama", tmp_path)
    assert worst(overlay, 8, "everybit") < NEAR
    config = json.loads((overlay / "config.json").read_text())["quantization_config"]
    for bits in (4, [3, 4]):
        with engine.model(overlay, hf_overrides={"quantization_config": {**config, "bits": bits}}) as loaded:
            assert (engine.logits(loaded, IDS) - wanted(overlay, 4)).abs().max() < NEAR


@pytest.mark.parametrize("bits", [3, 6])
def test_by_the_kernels(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles, by the operator's CPU path, in the float16 of the kernels: rounding of 2^-11 in each of 2 layers."""
    overlay = build(
        "qwen2", tmp_path, override={"k_proj": (4,), "lm_head": BITS}, ignore=["up_proj"], codebook="compact"
    )
    monkeypatch.setattr(linear, "kernels_run", lambda device, dtype: True)
    with engine.model(overlay, "float16", quantization=f"everybit-{bits}bit") as loaded:
        names = {name.rpartition(".")[2] for name, _ in loaded[0].named_parameters()}
        assert {"rows0_planes", "rows1_scales", "rows1_dense", "rows2_entries"} <= names
        assert not any(name.startswith("weight_") for name in names)
        found = engine.logits(loaded, IDS)
    expected = wanted(overlay, bits)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_tables_without_a_kernel_are_made_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = build("llama", tmp_path, codebook="table")
    monkeypatch.setattr(linear, "kernels_run", lambda device, dtype: True)
    with engine.model(overlay, "float16", quantization="everybit-6bit") as loaded:
        found = engine.logits(loaded, IDS)
    expected = wanted(overlay, 6)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert found.dtype == torch.float32
