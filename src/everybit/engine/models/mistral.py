"""Mistral 7B and its kin: Llama, with one attention window for all layers."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a MistralForCausalLM."""
    sizes, rotation = Sizes.read(config), rope.read(config)
    context = choose_context(config, rotation.limit)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    return Decoder(
        sizes,
        context,
        (Layer(frequencies, config.window(default=4096)),) * sizes.layers,
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
    ).build()
