"""SmolLM3: Llama in which every fourth layer does not rotate, and may have a window."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a SmolLM3ForCausalLM."""
    sizes, rotation = Sizes.read(config), rope.read(config, theta=2e6)
    context, bias = choose_context(config, rotation.limit), config.flag("attention_bias", False)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    every = config.size("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(sizes.layers)])
    if not isinstance(rotated, list) or len(rotated) < sizes.layers or not all(one in (0, 1) for one in rotated):
        raise config.wrong("no_rope_layers", rotated, f"{sizes.layers} of 0 (does not rotate) and 1")
    window = config.window() if config.flag("use_sliding_window", False) else 0
    config.ignore("max_window_layers", "sliding_window", "pretraining_tp")
    sliding = [bool(window) and not rotated[index] for index in range(sizes.layers)]
    windows = config.windows(sizes.layers, window, sliding)
    return Decoder(
        sizes,
        context,
        tuple(Layer(frequencies if rotated[i] else None, windows[i]) for i in range(sizes.layers)),
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    ).build()
