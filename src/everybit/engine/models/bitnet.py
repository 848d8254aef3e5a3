"""BitNet b1.58 with float activations: Llama with norms before the output and the down projection."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a BitNetForCausalLM."""
    sizes, rotation = Sizes.read(config), rope.read(config, theta=500000.0)
    context, bias = choose_context(config, rotation.limit), config.flag("attention_bias", False)
    return Decoder(
        sizes,
        context,
        (Layer(rope.frequencies(rotation, sizes.head_dim, context)),) * sizes.layers,
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
        qkv_bias=bias,
        out_bias=bias,
        sub_norms=True,
    ).build()
