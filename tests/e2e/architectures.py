"""Tiny random-weight models of every family that everybit promises to quantize."""

from __future__ import annotations

from typing import Any

import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {**COMMON, "intermediate_size": 52, "num_key_value_heads": 2, "head_dim": 10}
NO_HEAD_DIM = {k: v for k, v in GATED.items() if k != "head_dim"}

# name -> (config class, arguments, quantized parameters a layer, what the model holds transposed)
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", GATED, 7),
    "mistral": ("MistralConfig", GATED, 7),
    "qwen2": ("Qwen2Config", NO_HEAD_DIM, 7),
    "qwen3": ("Qwen3Config", GATED, 7),
    "gemma2": ("Gemma2Config", {**GATED, "query_pre_attn_scalar": 10}, 7),
    "gemma3": ("Gemma3TextConfig", {**GATED, "query_pre_attn_scalar": 10}, 7),
    "phi3": ("Phi3Config", NO_HEAD_DIM, 4),
    "olmo2": ("Olmo2Config", NO_HEAD_DIM, 7),
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 52, "word_embed_proj_dim": 40}, 6),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 96,
            "n_embd": 40,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        4,
    ),
    "bitnet": ("BitNetConfig", NO_HEAD_DIM, 7),
    "mixtral": ("MixtralConfig", {**GATED, "num_local_experts": 3, "num_experts_per_tok": 2}, 6),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GATED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        6,
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**GATED, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16},
        6,
    ),
}


def make(family: str, seed: int = 0) -> Any:
    """A tiny model of `family` with seeded random weights (biases and norms random too, so that a lost one shows)."""
    import torch

    config_class, arguments, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
