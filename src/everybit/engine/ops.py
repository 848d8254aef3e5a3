"""The op set: everything a model is made of. Model code (engine/models/) writes these once; back ends execute them.

Activations are buffers float32[T, width] with one row per token of the step, or, from `Select` on, one row per token
whose logits were asked for. An op names columns of buffers (`Columns`) and parameters of the checkpoint (by their full
name); it may write in place where its docstring says so.

`engine/reference.py` is the definition of every op, in numpy; `native/src/engine/` is the fast back end.
Shape letters: T tokens, H heads, D head size, E experts, N out-features, K in-features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped"]


@dataclass(frozen=True)
class Columns:
    """Columns start .. start+width-1 of a buffer. Slicing narrows: `qkv[0:64]`."""

    buffer: str
    start: int
    width: int

    def __getitem__(self, part: slice) -> Columns:
        begin, end, step = part.indices(self.width)
        if step != 1 or end <= begin:
            raise IndexError(f"columns {part} of {self.width}: expected a non-empty slice without a step")
        return Columns(self.buffer, self.start + begin, end - begin)


@dataclass(frozen=True)
class Embed:
    """out (+)= scale * weight[index + offset]; index is the token id, or its position in the sequence."""

    out: Columns
    weight: str  # [V, width]
    source: Literal["tokens", "positions"] = "tokens"
    offset: int = 0
    scale: float = 1.0
    add: bool = False


@dataclass(frozen=True)
class Norm:
    """Normalize each of `groups` equal parts of a row by itself. In place allowed.

    rms: x / sqrt(mean(x^2) + eps) * weight; layer: (x - mean) / sqrt(var + eps) * weight + bias.
    The weight has width/groups entries, shared by the groups; None is all ones. `unit_offset`: 1 + weight (Gemma).
    """

    out: Columns
    x: Columns
    weight: str | None
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None
    unit_offset: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Linear:
    """outs[i] (+)= x @ weights[i].T + biases[i]; several weights share one input (q, k, v; gate, up).

    A weight is [N, K], quantized or plain. `transposed`: the plain parameter is stored [K, N] (GPT-2).
    """

    x: Columns
    outs: tuple[Columns, ...]
    weights: tuple[str, ...]
    biases: tuple[str | None, ...] = ()  # () means none at all
    add: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotate the first 2*len(inv_freq) numbers of each head by position * inv_freq; in place.

    Pair i is (i, i + len(inv_freq)), or (2i, 2i + 1) when `interleaved`; both are multiplied by `scale` as well
    (attention factor of yarn and longrope; numbers beyond the rotated ones are not).
    """

    x: Columns  # [T, H*D]
    heads: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    """Append k, v to the cache of `layer`, then causal attention of q over the sequence so far.

    score = scale * q.k, then softcap * tanh(score / softcap) if softcap; a window w lets a token see itself and the
    w - 1 before it; `sinks` [H] adds one score per head to the softmax's denominator that has no value.
    """

    out: Columns  # [T, H*D]
    q: Columns  # [T, H*D]
    k: Columns  # [T, Hkv*D]
    v: Columns  # [T, Hkv*D]
    layer: int
    heads: int
    kv_heads: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: str | None = None


@dataclass(frozen=True)
class Activate:
    """out = f(gate) * up, or f(gate) without up. `gate` and `up` may be columns of one buffer; out may be gate.

    relu2: relu(x)^2. swiglu_clamped (gpt-oss): gate = min(gate, limit), up = clip(up, -limit, limit),
    out = (up + 1) * gate * sigmoid(1.702 * gate).
    """

    out: Columns
    gate: Columns
    kind: Activation
    up: Columns | None = None
    limit: float = 0.0


@dataclass(frozen=True)
class Add:
    """out = x + y. In place allowed."""

    out: Columns
    x: Columns
    y: Columns


@dataclass(frozen=True)
class Softcap:
    """x = cap * tanh(x / cap), in place."""

    x: Columns
    cap: float


@dataclass(frozen=True)
class Experts:
    """Routed experts: out (+)= sum over the top_k experts e of p_e * down_e(f(gate_e x) * up_e x).

    `scores` [T, E] are the router's logits. routing "softmax": p = softmax over all E, then the top_k, divided by their
    sum if `normalize`; "top_k_softmax": softmax over the top_k logits only. Ties go to the lower expert.
    gate_up is [E, 2*I, K], rows 0..I-1 the gate and I.. the up part, or alternating (gate, up, gate, ...) when
    `interleaved`; down is [E, N, I]. Biases: gate_up_bias [E, 2*I], down_bias [E, N] (added before p_e multiplies).
    `transposed`: the plain parameters are stored [E, K, 2*I] and [E, I, N] (gpt-oss).
    """

    out: Columns
    x: Columns
    scores: Columns
    gate_up: str
    down: str
    top_k: int
    routing: Literal["softmax", "top_k_softmax"]
    kind: Activation
    normalize: bool = True
    gate_up_bias: str | None = None
    down_bias: str | None = None
    interleaved: bool = False
    limit: float = 0.0
    transposed: bool = False
    add: bool = False


@dataclass(frozen=True)
class Select:
    """Keep the rows whose logits are wanted; ops from here on see those rows only."""

    out: Columns
    x: Columns


Op = Embed | Norm | Linear | Rope | Attention | Activate | Add | Softcap | Experts | Select
