"""Tiny random models as overlays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import everybit
from everybit.formats import Overlay, OverlayWriter, WeightSpec
from everybit.kernels import pack_planes

BITS = (3, 4, 6, 8)
IDS = [1, 5, 9, 33, 70, 12, 8, 41]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,  # no multiple of 8: padded planes
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # predictions far from uniform
}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
}


def build(family: str, folder: Path, **options: Any) -> Path:
    """An overlay; biases and norms random too, so that a lost one shows. `options` are those of quantize."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "float")
    everybit.quantize(folder / "float", folder / "overlay", bits=BITS, progress=False, **options)
    return folder / "overlay"


def wanted(overlay: Path, bits: int) -> torch.Tensor:
    """Logits as transformers gives them. Shapes: -> [T, V]"""
    with torch.no_grad():
        found: torch.Tensor = everybit.load(overlay, bits=bits, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    return found


def quantize_embedding(folder: Path) -> None:
    """Replaces the plain embedding by one of kind affine, an even grid over each row."""
    name = "model.embed_tokens.weight"
    with Overlay.open(folder) as overlay:
        config = overlay.config
        tensors = {n: overlay.tensor(n).copy() for n in overlay.names()}
        layout = {n: overlay.spec_of(n) for n in overlay.names()}
    values = tensors.pop(name)
    del layout[name]
    spec = WeightSpec(name, values.shape, BITS, "affine")
    low, width = values.min(1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    codes = np.clip((values - low) / width * 256, 0, 255).astype(np.uint8)
    layout |= spec.tensors()
    tensors |= {spec.plane_name(k): plane for k, plane in enumerate(pack_planes(codes, 8))}
    tensors |= {f"{name}_affine{b}": np.hstack([width / 2**b, low]).astype(np.float32) for b in BITS}
    config["quantization_config"]["weights"][name] = {"shape": list(values.shape), "codebook": "affine"}
    shutil.rmtree(folder)
    with OverlayWriter(folder, layout, config) as writer:
        writer.write_group("all", tensors)
        writer.finish()
