"""Models: parameter counts against published ones and against transformers, caches, bits of checkpoints, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everybit.errors import EverybitError, ModelError, PrecisionError, SourceError
from everybit.formats import Overlay, OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from everybit.plan.model import active_parameters, describe, distinct_experts, models, read_model
from everybit.plan.operators import Linear, Model
from everybit.plan.overlays import place_of
from everybit.plan.stored import codebook_bits

# As their model cards, papers and checkpoints state them, in 1e9.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6.738, "meta-llama/Llama-2-70b-hf": 68.98, "meta-llama/Meta-Llama-3-8B": 8.030,
    "meta-llama/Llama-3.1-70B": 70.55, "meta-llama/Llama-3.1-405B": 405.9, "meta-llama/Llama-3.2-1B": 1.236,
    "mistralai/Mistral-7B-v0.1": 7.242, "mistralai/Mixtral-8x7B-v0.1": 46.70, "mistralai/Mixtral-8x22B-v0.1": 140.6,
    "Qwen/Qwen2.5-7B": 7.616, "Qwen/Qwen2-72B": 72.71, "Qwen/Qwen2.5-0.5B": 0.494, "Qwen/Qwen3-8B": 8.191,
    "Qwen/Qwen3-32B": 32.76, "Qwen/Qwen3-30B-A3B": 30.53, "Qwen/Qwen3-235B-A22B-FP8": 235.1,
    "Qwen/Qwen1.5-MoE-A2.7B": 14.32, "Qwen/Qwen3-Next-80B-A3B-Instruct": 80.0, "Qwen/Qwen3.5-397B-A17B": 397.0,
    "deepseek-ai/DeepSeek-V3": 671.0, "deepseek-ai/DeepSeek-V2-Lite": 15.71, "moonshotai/Kimi-K2-Instruct": 1026.0,
    "zhipuai/GLM-5": 744.0, "openai/gpt-oss-120b": 116.83, "openai/gpt-oss-20b": 20.91,
    "google/gemma-2-9b": 9.242, "google/gemma-3-27b-it": 27.01, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.100,
    "tiiuae/falcon-7b": 6.922, "tiiuae/falcon-40b": 41.30, "facebook/opt-6.7b": 6.658,
    "openai-community/gpt2": 0.1244, "microsoft/Phi-3-mini-4k-instruct": 3.821, "microsoft/phi-4": 14.66,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 400.7, "EleutherAI/gpt-neox-20b": 20.55, "bigscience/bloom": 176.2,
    "state-spaces/mamba-2.8b-hf": 2.768, "ai21labs/Jamba-v0.1": 51.57, "nvidia/Nemotron-H-8B-Base-8K": 8.10,
    "google-bert/bert-base-uncased": 0.1095, "FacebookAI/xlm-roberta-large": 0.5599,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    assert read_model(name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


# In 1e9. Whether the source counts the embedding as active differs.
ACTIVE = {
    "mistralai/Mixtral-8x7B-v0.1": (12.9, True), "Qwen/Qwen3-30B-A3B": (3.35, True),
    "openai/gpt-oss-120b": (5.13, False), "openai/gpt-oss-20b": (3.61, False),
    "deepseek-ai/DeepSeek-V3": (37.55, True), "zhipuai/GLM-5": (41, False),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVE)
def test_active_counts_are_the_published_ones(name: str) -> None:
    published, embedded = ACTIVE[name]
    model = read_model(name)
    found = active_parameters(model) + (model.embedding.weights if embedded else 0)
    assert found / 1e9 == pytest.approx(published, rel=0.01)


BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 128}  # fmt: skip
OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 200, "n_positions": 128}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**MOE, "shared_expert_intermediate_size": 40}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
       "num_key_value_heads": 4}  # fmt: skip
ROUTED = {**MLA, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "first_k_dense_replace": 1}  # fmt: skip
DELTA = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
NEMOTRON = {"num_hidden_layers": 6, "hybrid_override_pattern": "M-*EM-", "ssm_state_size": 8, "mamba_num_heads": 8,
            "mamba_head_dim": 16, "n_groups": 2, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 24}  # fmt: skip
# Parameters with two or more dimensions (positions apart) of these configs in transformers 5.24, on the meta device.
COUNTED: list[tuple[str, dict[str, Any], int]] = [
    ("llama", BASE, 209_920),
    ("qwen3", {**BASE, "head_dim": 24}, 246_784),
    ("gemma3_text", {**BASE, "head_dim": 24, "sliding_window": 16}, 233_984),
    ("phi", BASE, 173_056),
    ("starcoder2", BASE, 160_256),
    ("cohere", BASE, 197_120),
    ("gpt2", OLD, 160_256),
    ("gpt_bigcode", OLD, 141_824),
    ("falcon", {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 200,
                "max_position_embeddings": 128}, 270_848),
    ("opt", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 200,
             "max_position_embeddings": 128, "word_embed_proj_dim": 64}, 184_832),
    ("mixtral", {**BASE, "num_local_experts": 4}, 543_232),
    ("gpt_oss", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, 543_232),
    ("qwen2_moe", {**BASE, **SHARED, "decoder_sparse_step": 2}, 326_848),
    ("qwen3_moe", {**BASE, **MOE, "mlp_only_layers": [1]}, 366_080),
    ("llama4_text", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
                     "interleave_moe_layer_step": 2, "head_dim": 16}, 450_304),
    ("deepseek_v3", {**BASE, **ROUTED}, 384_512),
    ("deepseek_v2", {**BASE, **ROUTED, "q_lora_rank": None}, 398_336),
    ("glm_moe_dsa", {**BASE, **ROUTED, "index_n_heads": 2, "index_head_dim": 8}, 390_656),
    ("minicpm3", {**BASE, **MLA}, 184_832),
    ("qwen3_next", {**BASE, **SHARED, **DELTA}, 431_232),
    ("qwen3_5_text", {**BASE, **DELTA}, 197_376),
    ("mamba", {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 200, "state_size": 4}, 178_688),
    ("mamba2", {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 200, "state_size": 4, "num_heads": 8,
                "head_dim": 16, "n_groups": 2}, 185_728),
    ("jamba", {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 3, "attn_layer_offset": 1,
               "expert_layer_period": 2, "expert_layer_offset": 1}, 456_448),
    ("nemotron_h", {**BASE, **NEMOTRON}, 133_632),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config", "count"), COUNTED, ids=[one[0] for one in COUNTED])
def test_counts_are_those_of_transformers(family: str, config: dict[str, Any], count: int) -> None:
    model = read_model({"model_type": family, **config})
    assert model.parameters == count
    assert model.unknown == ()


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("meta-llama/Meta-Llama-3-8B", 131_072), ("deepseek-ai/DeepSeek-V3", 70_272), ("tiiuae/falcon-7b", 8192),
     ("google-bert/bert-base-uncased", 0), ("nvidia/Llama-3.1-8B-Instruct-FP8", 65_536)],
)  # fmt: skip
def test_cache_of_a_token(name: str, nbytes: int) -> None:
    model = read_model(name)
    assert describe(model)["cache_bytes_per_token"] == model.cache_bytes(100) / 100 == nbytes
    assert read_model(name, kv_bits=4).cache_bytes(100) == nbytes * 100 * 4 / model.kv_bits


def test_windows_and_states_bound_the_cache() -> None:
    gemma = read_model("google/gemma-2-9b")
    assert [(one.count, one.attention.window) for one in gemma.layers if one.attention] == [(21, 4096), (21, None)]
    assert gemma.cache_bytes(8192) == 0.75 * 344_064 * 8192
    twice = read_model("google/gemma-3-27b-it")
    assert sorted(one.count for one in twice.layers) == [10, 52]
    mamba = read_model("state-spaces/mamba-2.8b-hf")
    assert mamba.cache_bytes(1) == mamba.cache_bytes(10**6) == 64 * 5120 * (16 + 4) * 4
    assert {one.attention.window for one in read_model("mistralai/Mistral-7B-v0.1").layers if one.attention} == {4096}
    llama4 = read_model("meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert {one.attention.window: one.count for one in llama4.layers if one.attention} == {8192: 36, None: 12}


def test_a_qwen_window_is_off_unless_said() -> None:
    config = {**BASE, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 4}
    windows = [
        {
            one.attention.window: one.count
            for one in read_model({**config, "use_sliding_window": on}).layers
            if one.attention
        }
        for on in (False, True)
    ]
    assert windows == [{None: 6}, {None: 4, 32: 2}]


def test_key_value_heads_can_differ_by_layer() -> None:
    model = read_model({**BASE, "model_type": "deci", "num_key_value_heads_per_layer": [4, 4, 2, 2, 2, 1]})
    assert {one.attention.kv_heads: one.count for one in model.layers if one.attention} == {4: 2, 2: 3, 1: 1}


def test_distinct_experts() -> None:
    assert distinct_experts(8, 2, 1) == 2
    assert distinct_experts(8, 2, 32) == pytest.approx(8 * (1 - 0.75**32))
    assert distinct_experts(4, 4, 3) == 4
    assert distinct_experts(8, 2, 0) == 0
    with pytest.raises(SourceError, match="9 of 8 experts"):
        distinct_experts(8, 9, 1)


# --- bits
def test_stored_bits_of_formats() -> None:
    assert codebook_bits("int4") == 4.125
    assert codebook_bits("int4", 32) == 4.5
    assert codebook_bits("mxfp4") == 4.25
    assert codebook_bits("nvfp4") == 4.5
    assert codebook_bits("fp8_block") == pytest.approx(8.002, abs=1e-3)
    assert codebook_bits("everybit", 4096, 4) == 4 + 8 * (4 + 16) / 4096
    assert codebook_bits("everybit", 4096, 8) == 8 + 8 * (4 + 26) / 4096
    with pytest.raises(SourceError, match="'int3' is unknown, expected one of fp32"):
        codebook_bits("int3")
    with pytest.raises(SourceError, match="bits -4 arrived"):
        codebook_bits("int4", bits=-4)


def bits_of(model: Model) -> dict[str, float]:
    routed = [one for layer in model.layers if layer.experts for one in layer.experts.linears]
    outside: list[Linear] = [model.embedding, *([model.head] if model.head else [])]
    return {one.name: one.bits for one in [*(linear for linear, _ in model.linears), *routed, *outside]}


def test_asked_bits_leave_router_and_head() -> None:
    found = bits_of(read_model("mistralai/Mixtral-8x7B-v0.1", weight_bits="int4"))
    assert found == {
        "qkv": 4.125, "o": 4.125, "router": 16, "expert_up": 4.125, "expert_down": 4.125, "head": 16, "embedding": 16
    }  # fmt: skip
    mixed = bits_of(read_model("mistralai/Mixtral-8x7B-v0.1", weight_bits={"experts": "everybit3", "head": 8}))
    assert mixed["expert_down"] == 3 + 8 * 12 / 14336
    assert (mixed["head"], mixed["qkv"]) == (8, 16)
    assert set(bits_of(read_model("openai-community/gpt2", weight_bits="fp32")).values()) == {32}


@pytest.mark.parametrize(
    ("name", "gigabytes", "activations"),
    [("openai/gpt-oss-120b", 65.3, 16), ("moonshotai/Kimi-K2.5", 595, 16), ("deepseek-ai/DeepSeek-R1", 673, 8),
     ("nvidia/DeepSeek-R1-NVFP4", 396, 4), ("nvidia/Llama-3.1-8B-Instruct-FP8", 9.08, 8)],
)  # fmt: skip
def test_checkpoints_bring_their_own_bits(name: str, gigabytes: float, activations: float) -> None:
    model = read_model(name)
    assert model.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert model.activation_bits == activations
    assert read_model(name, weight_bits=16).weight_bytes == 2 * model.parameters


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, **weights}}


@pytest.mark.parametrize(
    ("scheme", "up", "head", "qkv"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, 16, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]},
         4.15625, 16, 16),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, 16, 4.5),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp.up_proj"]}, 16, 16, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*self_attn*"]}, 4.5, 16, 16),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": group(symmetric=True)}}, 4.125, 4.125, 4.125),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*", "lm_head"],
          "config_groups": {"a": group(type="float", group_size=16)}}, 4.5, 16, 16),
        ({"quant_method": "compressed-tensors", "config_groups": {
            "all": group(), "down": {**group(num_bits=8, group_size=None), "targets": ["re:.*mlp[.].*"]}}},
         8, 4.125, 4.125),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, 16, 8),
        ({"quant_method": "fp8", "weight_block_size": [8, 16]}, 8.25, 16, 8.25),
    ],
)  # fmt: skip
def test_quantized_configs(scheme: dict[str, Any], up: float, head: float, qkv: float) -> None:
    one_layer = {**BASE, "num_hidden_layers": 1, "model_type": "llama", "quantization_config": scheme}
    found = bits_of(read_model(one_layer))
    assert (found["up"], found["head"], found["qkv"], found["embedding"]) == (up, head, qkv, 16)


def test_caches_of_quantized_configs(tmp_path: Path) -> None:
    scheme = {"quant_method": "compressed-tensors", "config_groups": {"a": group()}, "kv_cache_scheme": {"num_bits": 8}}
    assert read_model({**BASE, "model_type": "llama", "quantization_config": scheme}).kv_bits == 8
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    beside = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    model = read_model(tmp_path)
    assert (model.kv_bits, model.activation_bits, bits_of(model)["o"]) == (8, 4, 4.5)


# --- overlays
@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Of a Llama of two layers; o_proj is kept at 8 bits."""
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
              "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
              "mlp.down_proj": (64, 96)}  # fmt: skip
    weights = {}
    for layer in range(2):
        for leaf, shape in shapes.items():
            name = f"model.layers.{layer}.{leaf}.weight"
            weights[name] = WeightSpec(name, shape, (8,) if leaf.endswith("o_proj") else (2, 4, 8), "compact")
    plain = {"model.embed_tokens.weight": TensorSpec("BF16", (200, 64)), "model.norm.weight": TensorSpec("F32", (64,))}
    tensors = {name: spec for one in weights.values() for name, spec in one.tensors().items()} | plain
    quantization = QuantizationConfig((2, 4, 8), "compact", weights)
    config = {**BASE, "num_hidden_layers": 2, "model_type": "llama", "tie_word_embeddings": True}
    with OverlayWriter(tmp_path / "o", tensors, {**config, "quantization_config": quantization.to_dict()}) as writer:
        for name, spec in tensors.items():
            writer.write(name, np.zeros(spec.shape, spec.numpy))
        writer.finish()
    return tmp_path / "o"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_overlay_costs_what_its_container_says(overlay: Path, bits: int) -> None:
    model = read_model(overlay, weight_bits=bits)
    with Overlay.open(overlay) as opened:
        assert model.weight_bytes == pytest.approx(opened.sizes().rows[bits].bytes - 64 * 4)  # norms are not counted
    assert bits_of(model)["o"] == 8 + 8 * 30 / 64
    assert (model.unknown, model.activation_bits, len(model.layers)) == ((), 16, 1)


def test_an_overlay_under_a_bit_plan(overlay: Path, tmp_path: Path) -> None:
    with Overlay.open(overlay) as opened:
        bits = {name: 2 if ".0." in name and len(spec.bits) > 1 else 8 for name, spec in opened.weights.items()}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"everybit_plan": 1, "bits": bits}))
    model = read_model(overlay, weight_bits=plan)
    assert [layer.linears[3].bits for layer in model.layers] == [2 + 8 * 8 / 96, 8 + 8 * 30 / 96]
    with pytest.raises(SourceError, match="no overlay"):
        read_model("openai-community/gpt2", weight_bits=plan)
    plan.write_text(json.dumps({"bits": {**bits, next(iter(bits)): 3}}))
    with pytest.raises(PrecisionError, match="bits 3 asked"):
        read_model(overlay, weight_bits=plan)
    plan.write_text(json.dumps({"bits": {"x": 4}}))
    with pytest.raises(SourceError, match="its own plan"):
        read_model(overlay, weight_bits=plan)


def test_an_overlay_of_other_shapes_than_its_config_is_refused(overlay: Path) -> None:
    with pytest.raises(PrecisionError, match="bits 3 asked, the overlay has 2, 4, 8"):
        read_model(overlay, weight_bits=3)
    config = json.loads((overlay / "config.json").read_text())
    (overlay / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    with pytest.raises(ModelError, match="12288 weights of 'up' of layer 0, expected 200 x 64"):
        read_model(overlay)
    with pytest.raises(ModelError, match="pass the folder"):
        read_model(config)


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("transformer.h.3.attn.c_proj.weight", ("o", 3)),
        ("transformer.h.3.mlp.c_proj.weight", ("down", 3)),
        ("model.decoder.layers.0.self_attn.out_proj.weight", ("o", 0)),
        ("gpt_neox.layers.1.attention.dense.weight", ("o", 1)),
        ("backbone.layers.2.mixer.out_proj.weight", ("state_out", 2)),
        ("model.layers.4.mlp.experts.gate_up_proj", ("expert_up", 4)),
        ("model.layers.4.block_sparse_moe.experts.7.w2.weight", ("expert_down", 4)),
        ("model.layers.4.mlp.shared_experts.up_proj.weight", ("shared_up", 4)),
        ("lm_head.weight", ("head", None)),
        ("vision.blocks.0.proj.weight", None),
    ],
)
def test_parameters_find_their_linear(parameter: str, place: tuple[str, int | None] | None) -> None:
    assert place_of(parameter) == place


# --- configs
def test_the_language_model_of_a_vision_model_is_taken() -> None:
    config = {"model_type": "qwen3_vl", "vision_config": {"depth": 27}, "tie_word_embeddings": True,
              "text_config": {**BASE, "model_type": "qwen3", "head_dim": 16}}  # fmt: skip
    model = read_model(config)
    assert model.unknown == ("vision_config (not counted)",)
    assert model.parameters == read_model({**BASE, "model_type": "qwen3", "tie_word_embeddings": True}).parameters


def test_unknown_fields_are_listed() -> None:
    config = {**BASE, "model_type": "newfangled", "bos_token_id": 1, "attention_dropout": 0.1, "rope_theta": 1e4,
              "extra_layers": 3, "num_nextn_predict_layers": 1, "unused_switch": False, "moe_layers": [1, 3],
              "a\nb": 1, "c\n_config": {"d": 1}}  # fmt: skip
    assert read_model(config).unknown == (
        r"'c\n_config' (not counted)", "model_type 'newfangled' (read as Llama-like)", r"'a\nb'", "extra_layers",
        "moe_layers", "num_nextn_predict_layers",
    )  # fmt: skip


def test_of_t5_the_encoder_alone_is_read() -> None:
    """Flan-T5-XL, whose encoder has 1.22e9 weights of 2.85e9."""
    config = {"model_type": "t5", "d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32, "num_layers": 24,
              "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
              "vocab_size": 32128, "is_encoder_decoder": True}  # fmt: skip
    model = read_model({**config, "architectures": ["T5EncoderModel"]})
    assert model.parameters == 24 * (4 * 2048 * 2048 + 3 * 2048 * 5120) + 32128 * 2048
    assert (model.head, model.unknown) == (None, ())
    for whole in (config, {**config, "architectures": ["T5ForConditionalGeneration"]}):
        with pytest.raises(ModelError, match="whose decoder the planner does not count"):
            read_model(whole)


def test_a_name_is_one_printable_line() -> None:
    config = {"model_type": "llama", **BASE}
    assert read_model({**config, "_name_or_path": "a" * 300}).name == "a" * 200
    assert [read_model({**config, "_name_or_path": one}).name for one in ("a\nb", ["a"])] == ["model", "model"]


def test_names_of_folders_do_not_command_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "red\x1b[31m"
    folder.mkdir()
    with pytest.raises(SourceError, match=r"has no config\.json") as refused:
        read_model(folder)
    assert str(refused.value).isprintable()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **BASE}))
    assert read_model(folder).name == r"'red\x1b[31m'"
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        read_model(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                                     "intermediate_size", "max_position_embeddings"])  # fmt: skip
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ModelError, match=f"field '{missing}'.* is missing"):
        read_model({"model_type": "llama", **{key: value for key, value in BASE.items() if key != missing}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**7}, "hidden_size 10000000 arrived, expected a whole number from 1 to 1000000"),
        ({"num_hidden_layers": 20_000}, "from 1 to 10000"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers '6' arrived"),
        ({"num_attention_heads": True}, "num_attention_heads True arrived"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 arrived"),
        ({"num_key_value_heads": 3}, "3 key-value heads arrived for 4 heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 attention heads do not divide hidden_size 64"),
        ({"layer_types": ["full_attention"]}, "one entry for each of 6 layers"),
        ({"layer_types": ["wavelet"] * 6}, "layer type 'wavelet' is unknown"),
        ({"layer_types": [[]] * 6}, r"layer type \[\] is unknown"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 arrived"),
        ({"model_type": 3}, "model_type 3 arrived, expected a text"),
        ({"is_encoder_decoder": True}, "an encoder-decoder arrived"),
        ({"is_encoder_decoder": True, "text_config": BASE}, "an encoder-decoder arrived"),
        ({"decoder_layers": 6}, "an encoder-decoder arrived"),
        ({"model_type": "bert", "is_decoder": True}, "an encoder-decoder arrived"),
        ({"torch_dtype": "float7"}, "torch_dtype 'float7' arrived, expected one of auto, bfloat16"),
        ({"text_config": {**BASE, "dtype": 16}}, "dtype 16 arrived"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq' is unknown, expected one of fp8"),
        ({"quantization_config": [4]}, "expected an object with quant_method"),
        ({"quantization_config": {"quant_method": "gptq"}}, "not a gptq scheme that can be read"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": []}}, "not a modelopt scheme"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": ["re:(a+)+$"]}}, "not a fp8 scheme"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "not a fp8 scheme"),
        *(
            ({"quantization_config": {"quant_method": method, **scheme}}, message)
            for method, scheme, message in (
                ("gptq", {"bits": -4}, "bits -4, expected 1 to 16"),
                ("gptq", {"bits": 0}, "bits 0, expected 1 to 16"),
                ("gptq", {"bits": float("inf")}, "bits inf, expected 1 to 16"),
                ("gptq", {"bits": 4, "group_size": 0}, "group_size 0, expected 1 to 1000000"),
                ("awq", {"w_bit": 4, "q_group_size": -128}, "group_size -128, expected 1 to"),
                ("fp8", {"weight_block_size": [-1, 128]}, "block -1, expected 1 to"),
                ("fp8", {"weight_block_size": [128]}, "expected rows and columns"),
                ("compressed-tensors", {"config_groups": {"a": group(num_bits=-4)}}, "num_bits -4, expected"),
                ("compressed-tensors", {"config_groups": {"a": group(group_size=-2)}}, "group_size -2, expected"),
                (
                    "compressed-tensors",
                    {"config_groups": {"a": group(strategy="block", block_structure=[8, 0])}},
                    "block 0, expected",
                ),
                *(
                    (
                        "compressed-tensors",
                        {"config_groups": {"a": {**group(), "input_activations": {"num_bits": n}}}},
                        f"num_bits {n}, expected",
                    )
                    for n in (0, -8)
                ),
                (
                    "compressed-tensors",
                    {"config_groups": {"a": group()}, "kv_cache_scheme": {"num_bits": -8}},
                    "num_bits -8, expected",
                ),
            )
        ),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_model({"model_type": "llama", **BASE, **change})


HOSTILE = [-1, 0, 1, 3, 2**80, 1.5, float("nan"), True, "", "x" * 300, [], [[]], [0] * 6, {}, {"a": {}}]


@pytest.mark.parametrize(
    ("family", "config"), [(family, config) for family, config, _ in COUNTED], ids=[one[0] for one in COUNTED]
)
def test_hostile_values_are_refused_or_read(family: str, config: dict[str, Any]) -> None:
    for name in ("model_type", "text_config", "quantization_config", "tie_word_embeddings", "architectures", *config):
        for value in HOSTILE:
            problem = ""
            try:
                read_model({"model_type": family, **config, name: value})
            except EverybitError as error:
                problem = str(error)
            assert "\n" not in problem
            assert len(problem) < 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight_bits 0 arrived"),
        ({"weight_bits": [4]}, r"weight_bits \[4\] arrived"),
        ({"weight_bits": {"head": 8, "tail": 4}}, "bits of 'tail' were asked"),
        ({"weight_bits": {"router": "int5"}}, "'int5' is unknown"),
        ({"weight_bits": None, "kv_bits": -1}, "kv_bits -1 arrived"),
        ({"activation_bits": float("nan")}, "activation_bits nan arrived"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_model("openai-community/gpt2", **options)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither a path nor a model of the offline set.*Meta-Llama-3-8B"):
        read_model("meta-llama/Meta-Llama-3-9B")
    with pytest.raises(SourceError, match="has no config"):
        read_model(tmp_path)


def test_sources_are_names_paths_and_mappings(shared_data: Path) -> None:
    folder = shared_data / "models" / "babyllama-105"
    by_folder, by_file = read_model(folder), read_model(folder / "config.json")
    assert by_folder == by_file
    assert (by_folder.name, by_folder.unknown) == ("babyllama-105", ())
    assert read_model("llama-3.1-8b").name == "meta-llama/Llama-3.1-8B"
    assert read_model("Llama-3.1-8B", name="mine").name == "mine"


def test_every_offline_model_is_known_and_describes_itself() -> None:
    for name in models():
        model = read_model(name)
        document = json.loads(json.dumps(describe(model)))
        assert document["parameters"] == model.parameters > 0
        assert set(model.unknown) <= {"index_topk"}, name


def test_models_of_the_measurements_are_there(shared_data: Path) -> None:
    with (shared_data / "planner" / "silicon_e2e.csv").open(newline="") as file:
        silicon = {row["model_path"] for row in csv.DictReader(file)}
    with (shared_data / "planner" / "llm_inference_bench_a100_and_others.csv").open(newline="") as file:
        bench = {row["Model"] for row in csv.DictReader(file)}
    assert (silicon | bench) - set(models()) == {
        "Deci/DeciLM-7B"
    }  # its key-value heads by layer are not published here
