"""Llama 1 to 3, and the many models published as such (TinyLlama, SmolLM, Yi, DeepSeek-LLM, ...)."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a LlamaForCausalLM."""
    sizes, rotation = Sizes.read(config, kv_heads_default=True), rope.read(config)
    context, attention_bias = choose_context(config, rotation.limit), config.flag("attention_bias", False)
    config.ignore("pretraining_tp")  # splits products for tensor parallelism; the sums are the same
    return Decoder(
        sizes,
        context,
        (Layer(rope.frequencies(rotation, sizes.head_dim, context)),) * sizes.layers,
        config.activation("hidden_act"),
        Names.read(config, checkpoint, tied=False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    ).build()
