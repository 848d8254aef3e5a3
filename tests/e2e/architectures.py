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
    "smollm3": ("SmolLM3Config", {**NO_HEAD_DIM, "no_rope_layers": [1, 0]}, 7),
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

EXPERTS: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SLIDING_FIRST = ["sliding_attention", "full_attention"]

# The switches of each family, for code that has to honour them: name -> (config class, arguments, as above).
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama_rope_llama3": (
        "LlamaConfig",
        {
            **NO_HEAD_DIM,
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1000.0, **LLAMA3},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        7,
    ),
    "llama_rope_linear": ("LlamaConfig", {**GATED, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 7),
    "llama_rope_dynamic": ("LlamaConfig", {**GATED, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 7),
    "llama_rope_yarn": (
        "LlamaConfig",
        {**GATED, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        7,
    ),
    "llama_wide_heads": ("LlamaConfig", {**GATED, "head_dim": 16, "hidden_act": "gelu"}, 7),
    "mistral_window": ("MistralConfig", {**GATED, "sliding_window": 12}, 7),
    "qwen2_window": (
        "Qwen2Config",
        {**NO_HEAD_DIM, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        7,
    ),
    "qwen3_window": (
        "Qwen3Config",
        {
            **GATED,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": SLIDING_FIRST,
            "attention_bias": True,
        },
        7,
    ),
    "gemma2_window": (
        "Gemma2Config",
        {
            **GATED,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.0,
            "attention_bias": True,
        },
        7,
    ),
    "gemma3_ropes": (
        "Gemma3TextConfig",
        {
            **GATED,
            "query_pre_attn_scalar": 10,
            "sliding_window": 12,
            "layer_types": SLIDING_FIRST,
            "final_logit_softcapping": 1.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        7,
    ),
    "phi3_longrope": (
        "Phi3Config",
        {
            **NO_HEAD_DIM,
            "sliding_window": 20,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.6,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 2.5, 4.0],
            },
        },
        4,
    ),
    "olmo2_bias": ("Olmo2Config", {**NO_HEAD_DIM, "attention_bias": True, "rms_norm_eps": 1e-2}, 7),
    "smollm3_window": (
        "SmolLM3Config",
        {**NO_HEAD_DIM, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 12, "mlp_bias": True},
        7,
    ),
    "opt_post_norm": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 52, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
        6,
    ),
    "opt_bare": (
        "OPTConfig",
        {
            **COMMON,
            "ffn_dim": 52,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
        6,
    ),
    "gpt2_scaled": (
        "GPT2Config",
        {
            "vocab_size": 96,
            "n_embd": 40,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 36,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        4,
    ),
    "bitnet_silu": ("BitNetConfig", {**NO_HEAD_DIM, "hidden_act": "silu", "attention_bias": True}, 7),
    "mixtral_window": ("MixtralConfig", {**GATED, **EXPERTS, "sliding_window": 12}, 6),
    "qwen3_moe_mixed": (
        "Qwen3MoeConfig",
        {
            **GATED,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 12,
        },
        6,
    ),
    "gpt_oss_clamped": (
        "GptOssConfig",
        {
            **GATED,
            **EXPERTS,
            "sliding_window": 12,
            "swiglu_limit": 0.1,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
                "rope_theta": 1000.0,
            },
        },
        6,
    ),
}


def make(family: str, seed: int = 0) -> Any:
    """A tiny model of a family or variant; seeded random weights, biases and norms too, so that a lost one shows."""
    import torch

    config_class, arguments, _ = {**FAMILIES, **VARIANTS}[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
