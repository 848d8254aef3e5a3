"""The decoder that most families share: Llama's skeleton with switches. A family's file fills in a `Decoder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models.config import MOST_LAYERS, MOST_WIDTH, Config
from everybit.engine.models.rope import Frequencies
from everybit.engine.ops import (
    Activate,
    Activation,
    Add,
    Attention,
    Columns,
    Embed,
    Experts,
    Linear,
    Norm,
    Select,
    Softcap,
)
from everybit.engine.ops import Rope as Rotate
from everybit.engine.program import Program
from everybit.errors import ModelError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The norms around attention and around the MLP: (before, after, before, after), by their names in a layer.
Norms = tuple[str | None, str | None, str | None, str | None]
PRE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
POST: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Sizes:
    """The numbers every family has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    eps: float

    @classmethod
    def read(cls, config: Config, head_dim: int | None = None, kv_heads_default: bool = False) -> Sizes:
        """From Llama's keys. `head_dim`: the family's default where that is not hidden / heads; `kv_heads_default`:
        whether a missing num_key_value_heads means all heads.

        Raises: ModelError
        """
        hidden, heads = config.size("hidden_size", most=MOST_WIDTH), config.size("num_attention_heads")
        kv_heads = config.size("num_key_value_heads", heads if kv_heads_default else None)
        if heads % kv_heads:
            raise config.wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
        if config.get("head_dim") is None and head_dim is None and hidden % heads:
            raise config.wrong("hidden_size", hidden, f"a multiple of num_attention_heads {heads}")
        return cls(
            hidden,
            config.size("num_hidden_layers", most=MOST_LAYERS),
            heads,
            kv_heads,
            config.size("head_dim", head_dim or hidden // heads, MOST_WIDTH),
            config.size("intermediate_size"),
            config.size("vocab_size"),
            config.positive("rms_norm_eps"),
        )


@dataclass(frozen=True)
class Names:
    """The parameters that hold the token embedding and the output head."""

    embedding: str
    head: str

    @classmethod
    def read(cls, config: Config, checkpoint: Checkpoint, tied: bool, embedding: str = EMBEDDING) -> Names:
        """`tied`: what tie_word_embeddings is when it is missing.

        Where a tied model's folder holds the head as well, the head is read: transformers ties the two only if they
        are equal. Where it holds the head alone, the head is the embedding.
        """
        if not config.flag("tie_word_embeddings", tied) or (embedding in checkpoint and HEAD in checkpoint):
            return cls(embedding, HEAD)
        only = HEAD if HEAD in checkpoint else embedding
        return cls(only, only)


@dataclass(frozen=True)
class Routing:
    """A layer's experts; see `ops.Experts`."""

    router: str
    experts: int
    top_k: int
    routing: Literal["softmax", "top_k_softmax"]
    kind: Activation
    normalize: bool = True
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    limit: float = 0.0


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: rotation (None: no positions), window (0: none), experts (None: an MLP)."""

    rope: Frequencies | None
    window: int = 0
    experts: Routing | None = None


@dataclass(frozen=True)
class Decoder:
    """Llama with switches; `build` makes the program."""

    sizes: Sizes
    context: int
    layers: tuple[Layer, ...]
    activation: Activation
    names: Names
    norms: Norms = PRE
    unit_offset: bool = False  # norms multiply by 1 + weight
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False  # q and k, each head by itself
    row_norm: bool = False  # q and k, all heads together
    sub_norms: bool = False  # before the output and the down projection (BitNet)
    fused: bool = False  # qkv_proj and gate_up_proj (Phi-3)
    sinks: bool = False
    embed_scale: float = 1.0
    scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    softcap: float = 0.0  # of attention scores
    final_softcap: float = 0.0

    def build(self) -> Program:
        """The model as ops."""
        s = self.sizes
        program = Program(s.layers, s.kv_heads, s.head_dim, s.vocabulary, self.context)
        x = program.buffer("x", s.hidden)
        program.add(Embed(x, self.names.embedding, scale=self.embed_scale))
        for index, layer in enumerate(self.layers):
            name = f"model.layers.{index}."
            before_attention, after_attention, before_mlp, after_mlp = self.norms
            source, target, add = self._enter(program, name, before_attention, after_attention)
            self._attention(program, name, index, layer, source, target, add)
            self._leave(program, name, after_attention)
            source, target, add = self._enter(program, name, before_mlp, after_mlp)
            if layer.experts:
                self._experts(program, name, layer.experts, source, target, add)
            else:
                self._mlp(program, name, source, target, add)
            self._leave(program, name, after_mlp)
        last = program.buffer("last", s.hidden)
        logits = program.buffer("logits", s.vocabulary)
        norm = self._norm(last, last, "model.norm")
        program.add(Select(last, x), norm, Linear(last, (logits,), (self.names.head,)))
        if self.final_softcap:
            program.add(Softcap(logits, self.final_softcap))
        return program

    def _norm(self, out: Columns, x: Columns, name: str, groups: int = 1) -> Norm:
        return Norm(out, x, f"{name}.weight", self.sizes.eps, unit_offset=self.unit_offset, groups=groups)

    def _enter(
        self, program: Program, name: str, before: str | None, after: str | None
    ) -> tuple[Columns, Columns, bool]:
        """Where a block reads, where it writes, and whether it adds there."""
        x = program.buffer("x", self.sizes.hidden)
        source = x
        if before:
            source = program.buffer("normed", self.sizes.hidden)
            program.add(self._norm(source, x, name + before))
        return (source, program.buffer("branch", self.sizes.hidden), False) if after else (source, x, True)

    def _leave(self, program: Program, name: str, after: str | None) -> None:
        if after:
            x, branch = program.buffer("x", self.sizes.hidden), program.buffer("branch", self.sizes.hidden)
            program.add(self._norm(branch, branch, name + after), Add(x, x, branch))

    def _attention(
        self, program: Program, name: str, index: int, layer: Layer, source: Columns, target: Columns, add: bool
    ) -> None:
        s, own = self.sizes, f"{name}self_attn."
        q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
        qkv = program.buffer("qkv", q_width + 2 * kv_width)
        q, k, v = qkv[:q_width], qkv[q_width : q_width + kv_width], qkv[q_width + kv_width :]
        names, outs = (("qkv_proj",), (qkv,)) if self.fused else (("q_proj", "k_proj", "v_proj"), (q, k, v))
        program.add(linear(source, outs, [own + one for one in names], self.qkv_bias))
        if self.head_norm or self.row_norm:
            for part, one, heads in ((q, "q_norm", s.heads), (k, "k_norm", s.kv_heads)):
                program.add(self._norm(part, part, own + one, heads if self.head_norm else 1))
        if layer.rope:
            for part, heads in ((q, s.heads), (k, s.kv_heads)):
                program.add(Rotate(part, heads, layer.rope.inv_freq, layer.rope.scale))
        out = program.buffer("attention", q_width)
        scale = s.head_dim**-0.5 if self.scale is None else self.scale
        sinks = f"{own}sinks" if self.sinks else None
        program.add(Attention(out, q, k, v, index, s.heads, s.kv_heads, scale, layer.window, self.softcap, sinks))
        if self.sub_norms:
            program.add(self._norm(out, out, f"{own}attn_sub_norm"))
        program.add(linear(out, (target,), [f"{own}o_proj"], self.out_bias, add))

    def _mlp(self, program: Program, name: str, source: Columns, target: Columns, add: bool) -> None:
        width, own = self.sizes.intermediate, f"{name}mlp."
        both = program.buffer("gate_up", 2 * width)
        gate, up = both[:width], both[width:]
        names, outs = (("gate_up_proj",), (both,)) if self.fused else (("gate_proj", "up_proj"), (gate, up))
        program.add(linear(source, outs, [own + one for one in names], self.mlp_bias))
        program.add(Activate(gate, gate, self.activation, up))
        if self.sub_norms:
            program.add(self._norm(gate, gate, f"{own}ffn_sub_norm"))
        program.add(linear(gate, (target,), [f"{own}down_proj"], self.mlp_bias, add))

    def _experts(
        self, program: Program, name: str, routing: Routing, source: Columns, target: Columns, add: bool
    ) -> None:
        scores, own = program.buffer("scores", routing.experts), f"{name}mlp.experts."
        gate_up, down = f"{own}gate_up_proj", f"{own}down_proj"
        program.add(linear(source, (scores,), [f"{name}mlp.{routing.router}"], routing.bias))
        program.add(
            Experts(
                target,
                source,
                scores,
                gate_up,
                down,
                routing.top_k,
                routing.routing,
                routing.kind,
                routing.normalize,
                f"{gate_up}_bias" if routing.bias else None,
                f"{down}_bias" if routing.bias else None,
                routing.interleaved,
                routing.limit,
                routing.transposed,
                add,
            )
        )


def linear(x: Columns, outs: tuple[Columns, ...], modules: list[str], bias: bool, add: bool = False) -> Linear:
    """One Linear for modules that share an input, by their names without `.weight`."""
    biases = tuple(f"{module}.bias" for module in modules) if bias else ()
    return Linear(x, outs, tuple(f"{module}.weight" for module in modules), biases, add)


def choose_context(config: Config, limit: int) -> int:
    """The context asked for, or the longest the model was made for. Raises: ModelError"""
    context = limit if config.context is None else config.context
    if not 0 < context <= limit:
        raise ModelError(
            f"{config.where}: a context of {context} tokens was asked for, the model was made for {limit}: ask for less"
        )
    return context


def read_experts(config: Config, key: str, default: int | None = None) -> tuple[int, int]:
    """How many experts there are (under `key`), and how many a token goes to. Raises: ModelError"""
    experts, top_k = config.size(key, default), config.size("num_experts_per_tok")
    if top_k > experts:
        raise config.wrong("num_experts_per_tok", top_k, f"at most the {experts} experts")
    return experts, top_k
