"""Qwen2, Qwen2.5 and Qwen3, dense: windows from some layer on; biases (2) or norms (3) on queries and keys."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build_qwen2(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Qwen2ForCausalLM."""
    return _build(config, checkpoint, Sizes.read(config), qkv_bias=True, out_bias=False, head_norm=False)


def build_qwen3(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Qwen3ForCausalLM."""
    bias = config.flag("attention_bias", False)
    return _build(config, checkpoint, Sizes.read(config, head_dim=128), bias, bias, head_norm=True)


def _build(
    config: Config, checkpoint: Checkpoint, sizes: Sizes, qkv_bias: bool, out_bias: bool, head_norm: bool
) -> Program:
    rotation = rope.read(config)
    context = choose_context(config, rotation.limit)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    first = config.get("max_window_layers", 28)
    if type(first) is not int:
        raise config.wrong("max_window_layers", first, "a number of layers")
    window = config.window(default=4096) if config.flag("use_sliding_window", False) else 0
    config.ignore("sliding_window")
    late = [bool(window) and index >= first for index in range(sizes.layers)]
    return Decoder(
        sizes,
        context,
        tuple(Layer(frequencies, one) for one in config.windows(sizes.layers, window, late)),
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        head_norm=head_norm,
    ).build()
