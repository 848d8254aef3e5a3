"""Every op of `engine.ops` in torch, on buffers in F32. `engine/reference.py` is the definition.

Nothing here asks the device for a number, except `Experts`, which asks who was chosen; so a step without experts whose
sequences have one new token each can be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from everybit.engine import ops
from everybit.engine.ops import Columns
from everybit.engine.program import Program
from everybit.gpu.parameters import Parameters


@dataclass(frozen=True)
class Group:
    """Sequences of a step with equally many new tokens, in rows `begin` to `end`. `keys`: where in the cache all their
    tokens lie, in order, more of them than there are yet.

    Shapes: keys i64[S, longest]
    """

    begin: int
    end: int
    keys: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """A step on the device. `slots`: where in the cache each new token goes; `rows`: whose logits are wanted, None all.

    Shapes: tokens, positions, slots i64[T]; rows i64[R]
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None
    groups: Sequence[Group]


class Pass:
    """One step in progress. `cache` [L, key or value, slot, Hkv*D] is written; `own`: at which of its own bits each
    quantized weight is read."""

    def __init__(
        self,
        program: Program,
        parameters: Parameters,
        cache: torch.Tensor,
        own: Mapping[str, int],
        inputs: Inputs,
    ) -> None:
        self.program, self.parameters, self.cache, self.own, self.inputs = program, parameters, cache, own, inputs
        self.rows = len(inputs.tokens)
        self.buffers: dict[str, torch.Tensor] = {}

    def run(self) -> torch.Tensor:
        """The logits. Shapes: -> f32[R, V]"""
        for op in self.program.ops:
            if not self.rows:  # none is wanted
                return torch.zeros(0, self.program.vocabulary)
            getattr(self, f"_{type(op).__name__.lower()}")(op)
        return self.buffers["logits"]

    def read(self, columns: Columns) -> torch.Tensor:
        return self.buffers[columns.buffer][:, columns.start : columns.start + columns.width]

    def write(self, columns: Columns, values: torch.Tensor, add: bool = False) -> None:
        if columns.buffer not in self.buffers:
            width = self.program.buffers[columns.buffer]
            self.buffers[columns.buffer] = torch.zeros(self.rows, width, device=self.cache.device)
        target = self.read(columns)
        target.add_(values) if add else target.copy_(values)

    def _product(self, x: torch.Tensor, name: str, expert: int | None = None, transposed: bool = False) -> torch.Tensor:
        return self.parameters.times(x, name, self.own.get(name, 0), expert=expert, transposed=transposed)

    def _embed(self, op: ops.Embed) -> None:
        index = self.inputs.tokens if op.source == "tokens" else self.inputs.positions
        self.write(op.out, op.scale * self.parameters.plain(op.weight)[index + op.offset].float(), op.add)

    def _norm(self, op: ops.Norm) -> None:
        x = self.read(op.x).reshape(self.rows, op.groups, -1)
        if op.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + op.eps)
        if op.weight is not None:
            x = x * (self.parameters.vector(op.weight) + (1.0 if op.unit_offset else 0.0))
        if op.bias is not None:
            x = x + self.parameters.vector(op.bias)
        self.write(op.out, x.reshape(self.rows, -1))

    def _linear(self, op: ops.Linear) -> None:
        x = self.read(op.x).clone()  # an out may overwrite it
        for i, (out, name) in enumerate(zip(op.outs, op.weights, strict=True)):
            y = self._product(x, name, transposed=op.transposed)
            if op.biases and (bias := op.biases[i]) is not None:
                y = y + self.parameters.vector(bias)
            self.write(out, y, op.add)

    def _rope(self, op: ops.Rope) -> None:
        x = self.read(op.x).reshape(self.rows, op.heads, -1)
        frequencies = self.parameters.constant(op.inv_freq)
        angle = (self.inputs.positions[:, None].double() * frequencies)[:, None]
        cosine, sine = (angle.cos() * op.scale).float(), (angle.sin() * op.scale).float()
        n = len(op.inv_freq)
        first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if op.interleaved else (slice(0, n), slice(n, 2 * n))
        a, b = x[..., first].clone(), x[..., second].clone()
        x = x.clone()
        x[..., first] = a * cosine - b * sine
        x[..., second] = b * cosine + a * sine
        self.write(op.x, x.reshape(self.rows, -1))

    def _attention(self, op: ops.Attention) -> None:
        for part, new in enumerate((op.k, op.v)):
            # Finite, always: what a mask hides is still multiplied by 0, and blocks change their owners.
            most = torch.finfo(self.cache.dtype).max
            kept = torch.nan_to_num(self.read(new), 0.0, most, -most).clamp(-most, most)
            self.cache[op.layer, part].index_copy_(0, self.inputs.slots, kept.to(self.cache.dtype))
        sinks = self.parameters.vector(op.sinks) if op.sinks else None
        for group in self.inputs.groups:
            own = slice(group.begin, group.end)
            sequences = len(group.keys)
            q = self.read(op.q)[own].reshape(sequences, -1, op.heads, op.q.width // op.heads)
            keys, values = (
                self.cache[op.layer, part, group.keys].view(*group.keys.shape, op.kv_heads, -1).transpose(1, 2)
                for part in (0, 1)
            )
            positions = self.inputs.positions[own].view(sequences, -1)
            out = attend(q.transpose(1, 2), keys, values, positions, op, sinks)
            self.write_rows(op.out, own, out.transpose(1, 2).flatten(2).flatten(0, 1))

    def write_rows(self, columns: Columns, rows: slice, values: torch.Tensor) -> None:
        if columns.buffer not in self.buffers:
            self.write(columns, torch.zeros((), device=self.cache.device))
        self.read(columns)[rows] = values

    def _activate(self, op: ops.Activate) -> None:
        up = None if op.up is None else self.read(op.up)
        self.write(op.out, activate(op.kind, self.read(op.gate), up, op.limit))

    def _add(self, op: ops.Add) -> None:
        self.write(op.out, self.read(op.x) + self.read(op.y))

    def _softcap(self, op: ops.Softcap) -> None:
        self.write(op.x, op.cap * torch.tanh(self.read(op.x) / op.cap))

    def _experts(self, op: ops.Experts) -> None:
        x = self.read(op.x)
        chosen, shares = route(self.read(op.scores), op.top_k, op.routing, op.normalize)
        out = torch.zeros(self.rows, op.out.width, device=x.device)
        for e in sorted(set(chosen.flatten().tolist())):
            rows, rank = (chosen == e).nonzero(as_tuple=True)
            both = self._product(x[rows], op.gate_up, e, op.transposed)
            if op.gate_up_bias:
                both = both + self.parameters.vector(op.gate_up_bias)[e]
            gate, up = (both[:, ::2], both[:, 1::2]) if op.interleaved else both.chunk(2, 1)
            y = self._product(activate(op.kind, gate, up, op.limit), op.down, e, op.transposed)
            if op.down_bias:
                y = y + self.parameters.vector(op.down_bias)[e]
            out.index_add_(0, rows, shares[rows, rank, None] * y)
        self.write(op.out, out, op.add)

    def _select(self, op: ops.Select) -> None:
        chosen = self.read(op.x)
        if self.inputs.rows is not None:
            chosen = chosen[self.inputs.rows]
        self.rows = len(chosen)
        self.write(op.out, chosen)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    op: ops.Attention,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention; keys beyond a token's position are not looked at.

    Shapes: q f32[S, H, T, D], keys, values [S, Hkv, longest, D], positions [S, T] -> f32[S, H, T, D]
    """
    distance = positions[:, :, None] - torch.arange(keys.shape[2], device=q.device)
    seen = distance >= 0
    if op.window:
        seen = seen & (distance < op.window)
    seen = seen[:, None]
    if not op.softcap and sinks is None:  # the heads that share keys as more tokens: torch would copy the keys
        group = op.heads // op.kv_heads
        mask = seen[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
        folded = q.to(keys.dtype).reshape(len(q), op.kv_heads, -1, q.shape[-1])
        out = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=op.scale)
        return out.float().view(q.shape[:-1] + values.shape[-1:])
    keys, values = (part.float().repeat_interleave(op.heads // op.kv_heads, 1) for part in (keys, values))
    score = op.scale * (q @ keys.mT)
    if op.softcap:
        score = op.softcap * torch.tanh(score / op.softcap)
    score = score.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return score.softmax(-1) @ values
    sink = sinks[:, None, None].expand(*score.shape[:3], 1)
    return torch.cat([score, sink], -1).softmax(-1)[..., :-1] @ values


def activate(kind: ops.Activation, gate: torch.Tensor, up: torch.Tensor | None, limit: float) -> torch.Tensor:
    """f(gate) * up; see `ops.Activate`."""
    if kind == "swiglu_clamped":
        assert up is not None
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(1.702 * gate)
    if kind == "silu":
        y = functional.silu(gate)
    elif kind in ("gelu", "gelu_tanh"):
        y = functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        y = gate.relu()
        y = y.square() if kind == "relu2" else y
    return y if up is None else y * up


def route(scores: torch.Tensor, top_k: int, routing: str, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their shares. Shapes: [T, E] -> [T, top_k] twice"""
    chosen = torch.sort(scores, descending=True, stable=True).indices[:, :top_k]  # ties go to the lower expert
    if routing == "top_k_softmax":
        return chosen, scores.gather(1, chosen).softmax(-1)
    shares = scores.softmax(-1).gather(1, chosen)
    return chosen, shares / shares.sum(1, keepdim=True) if normalize else shares
