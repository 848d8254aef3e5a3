"""GPT-2: learned positions, layer norms, fused qkv, and matrices that the model holds transposed (Conv1D)."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models.config import MOST_LAYERS, MOST_WIDTH, Config
from everybit.engine.models.decoder import Names, choose_context
from everybit.engine.ops import Activate, Attention, Columns, Embed, Linear, Norm, Select
from everybit.engine.program import Program


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of a GPT2LMHeadModel."""
    hidden, heads = config.size("n_embd", most=MOST_WIDTH), config.size("n_head")
    layers = config.size("n_layer", most=MOST_LAYERS)
    if hidden % heads:
        raise config.wrong("n_embd", hidden, f"a multiple of n_head {heads}")
    inner, activation = config.size("n_inner", 4 * hidden), config.activation("activation_function")
    eps, vocabulary = config.positive("layer_norm_epsilon", 1e-5), config.size("vocab_size")
    context = choose_context(config, config.size("n_positions"))
    scaled, by_layer = config.flag("scale_attn_weights", True), config.flag("scale_attn_by_inverse_layer_idx", False)
    config.ignore("reorder_and_upcast_attn")  # a matter of rounding in float16
    # The hub's first checkpoints hold the names of the base model.
    prefix = "" if "wte.weight" in checkpoint and "transformer.wte.weight" not in checkpoint else "transformer."
    names = Names.read(config, checkpoint, tied=True, embedding=f"{prefix}wte.weight")

    program = Program(layers, heads, hidden // heads, vocabulary, context)
    x, normed = program.buffer("x", hidden), program.buffer("normed", hidden)
    qkv, attended = program.buffer("qkv", 3 * hidden), program.buffer("attention", hidden)
    wide = program.buffer("wide", inner)

    def norm(out: Columns, source: Columns, name: str) -> Norm:
        return Norm(out, source, f"{name}.weight", eps, "layer", f"{name}.bias")

    def linear(source: Columns, out: Columns, name: str, add: bool = False) -> Linear:
        return Linear(source, (out,), (f"{name}.weight",), (f"{name}.bias",), add, transposed=True)

    program.add(Embed(x, names.embedding), Embed(x, f"{prefix}wpe.weight", "positions", add=True))
    for index in range(layers):
        name = f"{prefix}h.{index}."
        scale = ((hidden // heads) ** -0.5 if scaled else 1.0) / (index + 1 if by_layer else 1)
        q, k, v = qkv[:hidden], qkv[hidden : 2 * hidden], qkv[2 * hidden :]
        program.add(
            norm(normed, x, f"{name}ln_1"),
            linear(normed, qkv, f"{name}attn.c_attn"),
            Attention(attended, q, k, v, index, heads, heads, scale),
            linear(attended, x, f"{name}attn.c_proj", add=True),
            norm(normed, x, f"{name}ln_2"),
            linear(normed, wide, f"{name}mlp.c_fc"),
            Activate(wide, wide, activation),
            linear(wide, x, f"{name}mlp.c_proj", add=True),
        )
    last, logits = program.buffer("last", hidden), program.buffer("logits", vocabulary)
    program.add(Select(last, x), norm(last, last, f"{prefix}ln_f"), Linear(last, (logits,), (names.head,)))
    return program
