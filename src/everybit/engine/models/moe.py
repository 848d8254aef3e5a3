"""Mixtures of experts: Mixtral, Qwen3-MoE and gpt-oss, with each layer's experts fused as transformers holds them."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Routing, Sizes, choose_context, read_experts
from everybit.engine.program import Program


def build_mixtral(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a MixtralForCausalLM."""
    sizes, rotation = Sizes.read(config), rope.read(config, theta=1e6)
    context, kind = choose_context(config, rotation.limit), config.activation("hidden_act")
    experts, top_k = read_experts(config, "num_local_experts")
    layer = Layer(
        rope.frequencies(rotation, sizes.head_dim, context),
        config.window(),
        Routing("gate", experts, top_k, "softmax", kind),
    )
    names = Names.read(config, checkpoint, tied=False)
    return Decoder(sizes, context, (layer,) * sizes.layers, kind, names).build()


def build_qwen3_moe(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Qwen3MoeForCausalLM."""
    sizes, rotation = Sizes.read(config), rope.read(config)
    context, kind = choose_context(config, rotation.limit), config.activation("hidden_act")
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    window = config.window(default=4096) if config.flag("use_sliding_window", False) else 0
    config.ignore("sliding_window", "max_window_layers", "moe_intermediate_size")  # the last is in the weights' shapes
    experts, top_k = read_experts(config, "num_experts" if config.get("num_experts") else "num_local_experts")
    config.ignore("num_local_experts")
    routing = Routing("gate", experts, top_k, "softmax", kind, config.flag("norm_topk_prob", False))
    step, dense = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise config.wrong("mlp_only_layers", dense, "a list of layer numbers")
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes,
        context,
        tuple(
            Layer(frequencies, window, routing if (i + 1) % step == 0 and i not in dense else None)
            for i in range(sizes.layers)
        ),
        kind,
        Names.read(config, checkpoint, tied=False),
        qkv_bias=bias,
        out_bias=bias,
        head_norm=True,
    ).build()


def build_gpt_oss(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a GptOssForCausalLM whose experts are float or in an overlay (the hub's MXFP4 is refused)."""
    if config.get("rope_parameters", config.get("rope_scaling")) is None:  # to transformers that means a certain yarn
        raise config.wrong("rope_parameters", None, "the rope of the model, as its hub config has it")
    sizes, rotation = Sizes.read(config, head_dim=64), rope.read(config, theta=150000.0)
    context, bias = choose_context(config, rotation.limit), config.flag("attention_bias", True)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    if (alpha := config.number("swiglu_alpha", 1.702)) != 1.702:
        raise config.wrong("swiglu_alpha", alpha, "1.702")
    if config.activation("hidden_act") != "silu":
        raise config.wrong("hidden_act", config.get("hidden_act"), "silu")
    config.ignore("experts_per_token", "initial_context_length")  # OpenAI's own names beside transformers'
    experts, top_k = read_experts(config, "num_local_experts")
    routing = Routing(
        "router",
        experts,
        top_k,
        "top_k_softmax",
        "swiglu_clamped",
        bias=True,
        interleaved=True,
        transposed=True,
        limit=config.positive("swiglu_limit", 7.0),
    )
    alternating = [index % 2 == 0 for index in range(sizes.layers)]
    windows = config.windows(sizes.layers, config.window(default=128), alternating)
    return Decoder(
        sizes,
        context,
        tuple(Layer(frequencies, window, routing) for window in windows),
        "silu",
        Names.read(config, checkpoint, tied=False),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
    ).build()
