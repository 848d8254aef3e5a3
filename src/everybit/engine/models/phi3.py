"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, partly rotated heads and longrope."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Phi3ForCausalLM."""
    sizes = Sizes.read(config, kv_heads_default=True)
    rotation = rope.read(config, partial=True, aliases={"su": "longrope", "yarn": "longrope"})  # its first configs
    context = choose_context(config, rotation.limit)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    return Decoder(
        sizes,
        context,
        (Layer(frequencies, config.window()),) * sizes.layers,
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
        fused=True,
    ).build()
