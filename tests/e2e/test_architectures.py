"""Every family: quantize, load, generate, save, load again, same logits; experts all see calibration data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import everybit
from everybit.formats import Overlay
from everybit.quantize.statistics import every_expert
from tests.e2e.architectures import FAMILIES, make

IDS = torch.tensor([[1, 5, 9, 33, 70, 12, 8, 41]])


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "float")
    everybit.quantize(tmp_path / "float", tmp_path / "overlay", progress=False)
    per_layer = FAMILIES[family][2]
    with Overlay.open(tmp_path / "overlay") as overlay:
        assert len(overlay.weights) == 2 * per_layer
        overlay.verify_all()
    loaded = everybit.load(tmp_path / "overlay", bits=8)
    with torch.no_grad():
        expected, got, low = model(IDS).logits, loaded(IDS).logits, loaded(IDS, bits=2).logits
    # 2^8 centroids for rows of 20 to 52 weights: every weight has its own, up to the float16 table's rounding (2^-11)
    assert torch.allclose(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert not torch.allclose(low, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert loaded.precision == 8
    out = loaded.generate(IDS, max_new_tokens=4, do_sample=False, bits=3)
    assert out.shape[1] > IDS.shape[1]
    loaded.save_pretrained(tmp_path / "again")
    again = everybit.load(tmp_path / "again", bits=8)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, got)
        assert torch.equal(again(IDS, bits=2).logits, low)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_expert_sees_every_token_and_nothing_else_changes(family: str) -> None:
    model = make(family)

    def gradients(forced: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        if forced:
            with every_expert(model):
                loss = model(IDS[:, :2], labels=IDS[:, :2], use_cache=False).loss
                loss.backward()
        else:
            loss = model(IDS[:, :2], labels=IDS[:, :2], use_cache=False).loss
            loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = gradients(False)
    forced_loss, forced = gradients(True)
    assert torch.allclose(plain_loss, forced_loss, atol=1e-6)
    for name, gradient in forced.items():
        if name.endswith(("gate_up_proj", "down_proj")) and gradient.ndim == 3:
            assert gradient.abs().amax(dim=(1, 2)).min() > 0, name
        elif "experts" not in name:
            assert torch.allclose(gradient, plain[name], atol=1e-5), name


def test_override_pins_a_layer_and_ignore_leaves_one(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    report = everybit.quantize(
        tmp_path / "float",
        tmp_path / "overlay",
        bits=(2, 3, 4),
        ignore=["layers.0.mlp"],
        override={"down_proj": (4,), "lm_head": (3, 4)},
        progress=False,
    )
    with Overlay.open(tmp_path / "overlay") as overlay:
        assert overlay.weights["model.layers.1.mlp.down_proj.weight"].bits == (4,)
        assert overlay.weights["lm_head.weight"].bits == (3, 4)
        assert not any(name.startswith("model.layers.0.mlp") for name in overlay.weights)
    assert "model.layers.0.mlp.up_proj.weight" in report.left
    loaded = everybit.load(tmp_path / "overlay")
    with torch.no_grad():
        values = [loaded(IDS, bits=b).logits for b in (2, 3, 4)]
    errors = [float(np.square((v - model(IDS).logits).detach().numpy()).mean()) for v in values]
    assert errors[0] > errors[1] > errors[2]
