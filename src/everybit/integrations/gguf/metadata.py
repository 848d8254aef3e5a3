"""The numbers of a model in a GGUF file: sizes, norms, rope and windows, as llama.cpp reads them.

They are taken from the engine's program for the model, which has read and checked config.json. Whatever llama.cpp's
code for the family would compute otherwise is refused.

Source: gguf.constants (Keys); llama.cpp, src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from everybit.engine import ops
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.program import Program
from everybit.errors import ModelError
from everybit.integrations.gguf.families import Family
from everybit.integrations.gguf.tensors import F32, Tensor


def add_sizes(writer: Any, program: Program, config: Config, family: Family) -> tuple[list[Tensor], list[str]]:
    """Adds every key of the model; returns tensors that llama.cpp wants beside the parameters, and notes.

    Raises: ModelError for a switch that llama.cpp does not have in this family
    """
    attention = [op for op in program.ops if isinstance(op, ops.Attention)]
    first, norm = attention[0], next(op for op in program.ops if isinstance(op, ops.Norm))
    experts = next((op for op in program.ops if isinstance(op, ops.Experts)), None)
    hidden = program.buffers["x"]
    _check_activations(program, config, family)
    writer.add_block_count(program.layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(
        program.buffers.get("wide") or program.buffers.get("gate_up", 0) // 2 or config.size("intermediate_size")
    )
    writer.add_head_count(first.heads)
    writer.add_head_count_kv(first.kv_heads)
    writer.add_key_length(program.head_dim)
    writer.add_value_length(program.head_dim)
    writer.add_vocab_size(program.vocabulary)
    (writer.add_layer_norm_rms_eps if norm.kind == "rms" else writer.add_layer_norm_eps)(norm.eps)
    large = program.layers == family.large
    scale = (hidden / first.heads if large else program.head_dim) ** -0.5
    if any(not math.isclose(op.scale, scale, rel_tol=1e-6) for op in attention):
        raise _unfit(config, f"scales attention scores by {first.scale:.6g}", f"{scale:.6g}")
    if first.softcap:
        writer.add_attn_logit_softcapping(first.softcap)
    if caps := [op.cap for op in program.ops if isinstance(op, ops.Softcap)]:
        if family.architecture != "gemma2":
            raise _unfit(config, "caps its logits", "none")
        writer.add_final_logit_softcapping(caps[0])
    if experts:
        if experts.routing == "softmax" and not experts.normalize:
            raise _unfit(config, "leaves the experts' weights as they are (norm_topk_prob)", "normalized ones")
        writer.add_expert_count(experts.scores.width)
        writer.add_expert_used_count(experts.top_k)
        if family.architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(config.size("moe_intermediate_size"))
    context, notes = _context(writer, attention, program.context, config, family)
    writer.add_context_length(context)
    return list(_add_rope(writer, program, config, family)), notes


def _context(
    writer: Any, attention: list[ops.Attention], context: int, config: Config, family: Family
) -> tuple[int, list[str]]:
    windows = [op.window for op in attention]
    if family.windows:
        window = max(windows)
        if windows != [0 if (i + 1) % family.windows == 0 else window or 1 for i in range(len(windows))]:
            raise _unfit(config, f"has windows of {windows} tokens", f"none on every {family.windows}th layer only")
        writer.add_sliding_window(window)
        return context, []
    least = min((one for one in windows if one), default=context)
    if least >= context:
        return context, []
    return least, [f"llama.cpp has no attention window for this family: the context is cut from {context} to {least}"]


def _check_activations(program: Program, config: Config, family: Family) -> None:
    kinds = {op.kind for op in program.ops if isinstance(op, (ops.Activate, ops.Experts))}
    if kinds != {family.activation}:
        raise _unfit(config, f"has the activation {', '.join(sorted(kinds))}", family.activation)


def _add_rope(writer: Any, program: Program, config: Config, family: Family) -> Iterator[Tensor]:
    import gguf

    rotations = [op for op in program.ops if isinstance(op, ops.Rope)]
    if not rotations:
        return
    _check_rotated(program, config, family)
    width = 2 * len(rotations[0].inv_freq)
    writer.add_rope_dimension_count(width)
    if family.architecture == "gemma3":
        both = rope.read_by_type(config, full=family.theta, sliding=1e4)
        own, sliding = both["full_attention"], both["sliding_attention"]
        if sliding.kind != "default":
            raise _unfit(config, f"stretches the rope of its windows ({sliding.kind})", "only that of full attention")
        writer.add_rope_freq_base_swa(sliding.theta)
    else:
        aliases = {"su": "longrope", "yarn": "longrope"} if family.architecture == "phi3" else None
        own = rope.read(config, family.theta, partial=True, aliases=aliases)
    writer.add_rope_freq_base(own.theta)
    if own.kind not in family.ropes:
        raise _unfit(config, f"has a rope of type {own.kind}", ", ".join(family.ropes))
    if own.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(own.number("factor"))
    elif own.kind == "yarn":
        standard = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1}
        told = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "finetuned"}
        for key, value in own.values.items():
            if key not in told and value not in (None, standard.get(key)):
                raise _unfit(config, f"has a yarn with {key} {value}", f"{standard.get(key, 'the usual one')}")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(own.number("factor", own.most / own.original))
        writer.add_rope_scaling_orig_ctx_len(own.original)
    elif own.kind == "llama3":
        plain = np.float64(own.theta) ** -(np.arange(0, width, 2) / width)
        yield _constant("rope_freqs.weight", np.asarray(plain / np.asarray(rotations[0].inv_freq), np.float32))
    elif own.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(own.original)
        writer.add_rope_scaling_attn_factors(rotations[0].scale)
        for name in ("long", "short"):
            yield _constant(f"rope_factors_{name}.weight", own.numbers(f"{name}_factor", width // 2))


def _constant(name: str, values: F32) -> Tensor:
    return Tensor(name, values.shape, lambda: values)


def _check_rotated(program: Program, config: Config, family: Family) -> None:
    """Each layer rotates, or every `rotated`th does not."""
    order = [type(op) for op in program.ops if isinstance(op, (ops.Rope, ops.Attention))]
    found, rotates = [], False
    for kind in order:
        if kind is ops.Attention:
            found.append(rotates)
        rotates = kind is ops.Rope
    if found != [not family.rotated or (i + 1) % family.rotated != 0 for i in range(program.layers)]:
        raise _unfit(config, "rotates other layers", f"no rotation in every {family.rotated}th")


def _unfit(config: Config, what: str, has: str) -> ModelError:
    return ModelError(f"{config.where}: the model {what}, llama.cpp has {has}: export to safetensors instead")
