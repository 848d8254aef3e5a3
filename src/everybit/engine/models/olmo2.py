"""OLMo 2: norms after the blocks instead of before, and on whole rows of queries and keys."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import POST, Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of an Olmo2ForCausalLM."""
    sizes, rotation = Sizes.read(config, kv_heads_default=True), rope.read(config)
    context, bias = choose_context(config, rotation.limit), config.flag("attention_bias", False)
    return Decoder(
        sizes,
        context,
        (Layer(rope.frequencies(rotation, sizes.head_dim, context)),) * sizes.layers,
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
        POST,
        qkv_bias=bias,
        out_bias=bias,
        row_norm=True,
    ).build()
