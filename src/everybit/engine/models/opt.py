"""OPT: learned positions (from row 2 on), layer norms before the blocks, or after them in the 350m variant."""

from __future__ import annotations

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models.config import MOST_LAYERS, MOST_WIDTH, Config
from everybit.engine.models.decoder import Names, choose_context, linear
from everybit.engine.ops import Activate, Attention, Columns, Embed, Linear, Norm, Select
from everybit.engine.program import Program

EPS = 1e-5  # of torch.nn.LayerNorm; the config has no key for it
FIRST_POSITION = 2  # rows 0 and 1 of the position table were kept for padding


def build(config: Config, checkpoint: Checkpoint) -> Program:
    """The program of an OPTForCausalLM."""
    hidden, heads = config.size("hidden_size", most=MOST_WIDTH), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers", most=MOST_LAYERS)
    if hidden % heads:
        raise config.wrong("hidden_size", hidden, f"a multiple of num_attention_heads {heads}")
    ffn, vocabulary = config.size("ffn_dim"), config.size("vocab_size")
    narrow = config.size("word_embed_proj_dim", hidden)
    context = choose_context(config, config.size("max_position_embeddings"))
    activation, bias = config.activation("activation_function"), config.flag("enable_bias", True)
    before, affine = config.flag("do_layer_norm_before", True), config.flag("layer_norm_elementwise_affine", True)
    final_norm = before and not config.flag("_remove_final_layer_norm", False)
    # The first checkpoints hold the names of the base model.
    prefix = "decoder." if "decoder.embed_tokens.weight" in checkpoint else "model.decoder."
    names = Names.read(config, checkpoint, tied=True, embedding=f"{prefix}embed_tokens.weight")

    program = Program(layers, heads, hidden // heads, vocabulary, context)
    x, normed = program.buffer("x", hidden), program.buffer("normed", hidden)
    qkv, attended = program.buffer("qkv", 3 * hidden), program.buffer("attention", hidden)
    wide = program.buffer("wide", ffn)
    q, k, v = qkv[:hidden], qkv[hidden : 2 * hidden], qkv[2 * hidden :]

    def norm(out: Columns, source: Columns, name: str) -> Norm:
        weight, shift = (f"{name}.weight", f"{name}.bias") if affine else (None, None)
        return Norm(out, source, weight, EPS, "layer", shift)

    if narrow == hidden:
        program.add(Embed(x, names.embedding))
    else:
        words = program.buffer("words", narrow)
        program.add(Embed(words, names.embedding), linear(words, (x,), [f"{prefix}project_in"], False))
    program.add(Embed(x, f"{prefix}embed_positions.weight", "positions", FIRST_POSITION, add=True))
    for index in range(layers):
        name = f"{prefix}layers.{index}."
        own = f"{name}self_attn."
        source = normed if before else x
        if before:
            program.add(norm(normed, x, f"{name}self_attn_layer_norm"))
        program.add(
            linear(source, (q, k, v), [f"{own}q_proj", f"{own}k_proj", f"{own}v_proj"], bias),
            Attention(attended, q, k, v, index, heads, heads, (hidden // heads) ** -0.5),
            linear(attended, (x,), [f"{own}out_proj"], bias, add=True),
        )
        program.add(norm(normed, x, f"{name}final_layer_norm") if before else norm(x, x, f"{name}self_attn_layer_norm"))
        program.add(
            linear(source, (wide,), [f"{name}fc1"], bias),
            Activate(wide, wide, activation),
            linear(wide, (x,), [f"{name}fc2"], bias, add=True),
        )
        if not before:
            program.add(norm(x, x, f"{name}final_layer_norm"))
    last, logits = program.buffer("last", hidden), program.buffer("logits", vocabulary)
    program.add(Select(last, x))
    if final_norm:
        program.add(norm(last, last, f"{prefix}final_layer_norm"))
    if narrow != hidden:
        words = program.buffer("last_words", narrow)
        program.add(linear(last, (words,), [f"{prefix}project_out"], False))
        last = words
    program.add(Linear(last, (logits,), (names.head,)))
    return program
