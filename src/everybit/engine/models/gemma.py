"""Gemma 2 and Gemma 3 (text): norms before and after each block, scaled embeddings, windows on most layers."""

from __future__ import annotations

import numpy as np

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.models.decoder import SANDWICH, Decoder, Layer, Names, Sizes, choose_context
from everybit.engine.ops import Activation
from everybit.engine.program import Program


def build_gemma2(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Gemma2ForCausalLM."""
    sizes, rotation = Sizes.read(config, head_dim=256), rope.read(config)
    context = choose_context(config, rotation.limit)
    frequencies = rope.frequencies(rotation, sizes.head_dim, context)
    windows = _windows(config, sizes, every=2)
    return _decoder(
        config,
        checkpoint,
        sizes,
        context,
        tuple(Layer(frequencies, window) for window in windows),
        softcap=config.optional("attn_logit_softcapping", 50.0),
        final_softcap=config.optional("final_logit_softcapping", 30.0),
    )


def build_gemma3(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a Gemma3ForCausalLM, the text model by itself."""
    sizes, rotations = Sizes.read(config, head_dim=256), rope.read_by_type(config, full=1e6, sliding=1e4)
    full = rotations["full_attention"]
    context = choose_context(config, full.limit)
    by_type = {kind: rope.frequencies(one, sizes.head_dim, context) for kind, one in rotations.items()}
    config.ignore("_sliding_window_pattern")
    windows = _windows(config, sizes, every=config.size("sliding_window_pattern", 6))
    if softcap := config.optional("attn_logit_softcapping"):  # transformers reads it and does not apply it
        raise config.wrong("attn_logit_softcapping", softcap, "null")
    return _decoder(
        config,
        checkpoint,
        sizes,
        context,
        tuple(Layer(by_type["sliding_attention" if window else "full_attention"], window) for window in windows),
        softcap=0.0,
        final_softcap=config.optional("final_logit_softcapping"),
        head_norm=True,
    )


def _decoder(
    config: Config,
    checkpoint: Checkpoint,
    sizes: Sizes,
    context: int,
    layers: tuple[Layer, ...],
    softcap: float,
    final_softcap: float,
    head_norm: bool = False,
) -> Program:
    names, bias = Names.read(config, checkpoint, tied=True), config.flag("attention_bias", False)
    return Decoder(
        sizes,
        context,
        layers,
        _activation(config),
        names,
        SANDWICH,
        unit_offset=True,
        qkv_bias=bias,
        out_bias=bias,
        head_norm=head_norm,
        embed_scale=_embed_scale(sizes.hidden, names.embedding, checkpoint),
        scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
        softcap=softcap,
        final_softcap=final_softcap,
    ).build()


def _windows(config: Config, sizes: Sizes, every: int) -> tuple[int, ...]:
    """Every `every`th layer sees everything, the others a window."""
    alternating = [(index + 1) % every != 0 for index in range(sizes.layers)]
    return config.windows(sizes.layers, config.window(default=4096), alternating)


def _activation(config: Config) -> Activation:
    """`hidden_activation` decides; the older `hidden_act` beside it is not looked at, as in transformers."""
    config.ignore("hidden_act")
    return config.activation("hidden_activation")


def _embed_scale(hidden: int, embedding: str, checkpoint: Checkpoint) -> float:
    """sqrt(hidden), rounded to the dtype the embedding is stored in.

    transformers rounds it to the dtype it runs in, by default the stored one: sqrt(3072) is 55.5 in bfloat16, and
    Gemma was trained so.
    """
    scale = np.float32(hidden**0.5)
    dtype = checkpoint.dtype(embedding) if embedding in checkpoint else "F32"
    if dtype == "F16":
        return float(np.float16(scale))
    if dtype == "BF16":  # to the nearest, ties to even
        bits = int(scale.view(np.uint32))
        return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
    return float(scale)
