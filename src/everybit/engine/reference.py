"""The definition of every op, in numpy: float32 storage, float64 sums. The plain path beside native/src/engine/."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.ops import Columns
from everybit.engine.plan import Precision, own_bits, require_precision
from everybit.engine.program import Program, Step
from everybit.errors import ShapeError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


class Reference:
    """Runs a program; holds the weights it has read (dense, per precision) and the KV cache.

    `block_size` tokens lie in one KV block; the cache grows to the highest block a step names. `half_cache` rounds
    keys and values through float16.

    Cost: a dense float32 copy of every weight at every precision used.
    """

    def __init__(
        self, program: Program, checkpoint: Checkpoint, block_size: int = 16, half_cache: bool = False
    ) -> None:
        self.program = program
        self.checkpoint = checkpoint
        self.block_size = block_size
        self.half_cache = half_cache
        self._dense: dict[tuple[str, int], F32] = {}
        shape = (program.layers, 2, 0, block_size, program.kv_heads * program.head_dim)
        self._cache: F32 = np.zeros(shape, np.float32)  # [L, key or value, block, token, Hkv*D]

    def run(self, step: Step, bits: Precision = 0) -> F32:
        """One forward pass at `bits`, a number or a plan (not looked at where the weights are float).

        Shapes: -> logits f32[R, V]
        Mutates: the KV cache
        Raises: PrecisionError, FormatError (a plan for another overlay), ShapeError (a step that contradicts itself or
                the cache)
        """
        if self.checkpoint.overlay:
            require_precision(bits, self.checkpoint.overlay)
        self._check(step)
        state = _Pass(self, step, bits)
        for op in self.program.ops:
            state.execute(op)
        return state.buffers["logits"]

    def weight(self, name: str, bits: Precision, transposed: bool = False) -> F32:
        """A parameter output-first: quantized ones are stored so, plain ones are turned if `transposed`."""
        spec = self.checkpoint.quantized(name)
        key = (name, own_bits(spec, bits) if spec else 0)
        if key not in self._dense:
            dense = self.checkpoint.dense(name, bits)
            self._dense[key] = dense if spec or not transposed else dense.swapaxes(-1, -2)
        return self._dense[key]

    def keep(self, layer: int, blocks: NDArray[np.int32], past: int, keys: F32, values: F32) -> tuple[F32, F32]:
        """Append a sequence's new keys and values; all of them so far come back, oldest first.

        Shapes: keys, values [new, Hkv*D] -> [past + new, Hkv*D]
        """
        end = past + len(keys)
        where = np.arange(end)
        block, row = blocks[where // self.block_size], where % self.block_size
        for part, new in enumerate((keys, values)):
            rounded = new.astype(np.float16).astype(np.float32) if self.half_cache else new
            self._cache[layer, part, block[past:], row[past:]] = rounded
        return self._cache[layer, 0, block, row], self._cache[layer, 1, block, row]

    def _check(self, step: Step) -> None:
        tokens, sequences = len(step.tokens), len(step.past)
        if len(step.starts) != sequences + 1 or step.starts[0] != 0 or step.starts[-1] != tokens:
            raise ShapeError(
                f"starts {step.starts.tolist()} arrived for {sequences} sequences and {tokens} tokens, expected "
                f"{sequences + 1} numbers from 0 to {tokens}"
            )
        for kind, found, limit in (("token", step.tokens, self.program.vocabulary), ("row", step.rows, tokens)):
            if found.size and not 0 <= int(found.min()) <= int(found.max()) < limit:
                raise ShapeError(f"{kind}s {found.min()} to {found.max()} arrived, expected 0 to {limit - 1}")
        for s in range(sequences):
            length = int(step.past[s]) + int(step.starts[s + 1] - step.starts[s])
            if length > self.program.context:
                raise ShapeError(
                    f"sequence {s} has {length} tokens, the program was built for {self.program.context}: "
                    "build it with a longer context"
                )
            used = step.blocks[s, : -(-length // self.block_size)]
            if len(used) * self.block_size < length or (used < 0).any():
                raise ShapeError(
                    f"sequence {s} has {length} tokens and the blocks {step.blocks[s].tolist()} of {self.block_size}: "
                    "give it enough blocks"
                )
            if used.size and int(used.max()) >= self._cache.shape[2]:
                more = int(used.max()) + 1 - self._cache.shape[2]
                self._cache = np.pad(self._cache, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])


class _Pass:
    """One step in progress: its buffers, and one method for each op."""

    def __init__(self, owner: Reference, step: Step, bits: Precision) -> None:
        self.owner = owner
        self.step = step
        self.bits = bits
        self.rows = len(step.tokens)
        self.buffers: dict[str, F32] = {}
        lengths = np.diff(step.starts)
        self.positions = np.concatenate([p + np.arange(n) for p, n in zip(step.past, lengths, strict=True)] or [[]])
        self.positions = self.positions.astype(np.int64)

    def execute(self, op: ops.Op) -> None:
        getattr(self, f"_{type(op).__name__.lower()}")(op)

    def read(self, columns: Columns) -> F32:
        return self.buffers[columns.buffer][:, columns.start : columns.start + columns.width]

    def write(self, columns: Columns, values: NDArray[Any], add: bool = False) -> None:
        if columns.buffer not in self.buffers:
            width = self.owner.program.buffers[columns.buffer]
            self.buffers[columns.buffer] = np.zeros((self.rows, width), np.float32)
        target = self.read(columns)
        target[:] = target + values if add else values

    def plain(self, name: str) -> F32:
        return self.owner.weight(name, self.bits)

    def _embed(self, op: ops.Embed) -> None:
        index = self.step.tokens if op.source == "tokens" else self.positions
        rows = self.plain(op.weight)[index.astype(np.int64) + op.offset]
        self.write(op.out, np.float32(op.scale) * rows, op.add)

    def _norm(self, op: ops.Norm) -> None:
        x = self.read(op.x).reshape(self.rows, op.groups, -1).astype(np.float64)
        if op.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + op.eps)
        if op.weight is not None:
            x = x * (self.plain(op.weight).astype(np.float64) + (1.0 if op.unit_offset else 0.0))
        if op.bias is not None:
            x = x + self.plain(op.bias)
        self.write(op.out, x.reshape(self.rows, -1))

    def _linear(self, op: ops.Linear) -> None:
        x = self.read(op.x).copy()  # an out may overwrite it
        for i, (out, name) in enumerate(zip(op.outs, op.weights, strict=True)):
            y = product(x, self.owner.weight(name, self.bits, op.transposed))
            if op.biases and (bias := op.biases[i]) is not None:
                y = y + self.plain(bias)
            self.write(out, y, op.add)

    def _rope(self, op: ops.Rope) -> None:
        self.write(op.x, rotate(self.read(op.x), self.positions, op))

    def _attention(self, op: ops.Attention) -> None:
        step, sinks = self.step, self.plain(op.sinks) if op.sinks else None
        out = np.zeros((self.rows, op.out.width), np.float64)
        for s, past in enumerate(step.past.tolist()):
            own = slice(int(step.starts[s]), int(step.starts[s + 1]))
            new_keys, new_values = self.read(op.k)[own], self.read(op.v)[own]
            keys, values = self.owner.keep(op.layer, step.blocks[s], past, new_keys, new_values)
            out[own] = attend(self.read(op.q)[own], keys, values, self.positions[own], op, sinks)
        self.write(op.out, out)

    def _activate(self, op: ops.Activate) -> None:
        up = None if op.up is None else self.read(op.up)
        self.write(op.out, activate(op.kind, self.read(op.gate), up, op.limit))

    def _add(self, op: ops.Add) -> None:
        self.write(op.out, self.read(op.x) + self.read(op.y))

    def _softcap(self, op: ops.Softcap) -> None:
        self.write(op.x, op.cap * np.tanh(self.read(op.x).astype(np.float64) / op.cap))

    def _experts(self, op: ops.Experts) -> None:
        x = self.read(op.x)
        chosen, shares = route(self.read(op.scores), op.top_k, op.routing, op.normalize)
        gate_up = self.owner.weight(op.gate_up, self.bits, op.transposed)
        down = self.owner.weight(op.down, self.bits, op.transposed)
        out = np.zeros((self.rows, op.out.width), np.float64)
        for e in np.unique(chosen):
            rows, rank = np.nonzero(chosen == e)
            both = product(x[rows], gate_up[e])
            if op.gate_up_bias:
                both = both + self.plain(op.gate_up_bias)[e]
            half = both.shape[1] // 2
            gate, up = (both[:, ::2], both[:, 1::2]) if op.interleaved else (both[:, :half], both[:, half:])
            y = product(activate(op.kind, gate, up, op.limit).astype(np.float32), down[e])
            if op.down_bias:
                y = y + self.plain(op.down_bias)[e]
            out[rows] += shares[rows, rank, None] * y
        self.write(op.out, out, op.add)

    def _select(self, op: ops.Select) -> None:
        chosen = self.read(op.x)[self.step.rows]
        self.rows = len(chosen)
        self.write(op.out, chosen)


def product(x: F32, weight: F32) -> F64:
    """x @ weight.T, summed in float64. Shapes: x [T, K], weight [N, K] -> [T, N]"""
    return np.asarray(x.astype(np.float64) @ weight.T.astype(np.float64))


def rotate(x: F32, positions: NDArray[np.int64], op: ops.Rope) -> F64:
    """The rotated heads.

    The angle is formed in float64. transformers rounds it to float32, which at position 100,000 is up to 0.004 off.
    """
    frequencies = np.asarray(op.inv_freq, np.float32).astype(np.float64)
    angle = (positions[:, None] * frequencies)[:, None, :]
    cosine, sine = np.cos(angle) * op.scale, np.sin(angle) * op.scale
    heads = x.reshape(len(x), op.heads, -1).astype(np.float64)
    n = len(frequencies)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if op.interleaved else (slice(0, n), slice(n, 2 * n))
    a, b = heads[..., first].copy(), heads[..., second].copy()
    heads[..., first] = a * cosine - b * sine
    heads[..., second] = b * cosine + a * sine
    return heads.reshape(x.shape)


def attend(q: F32, keys: F32, values: F32, positions: NDArray[np.int64], op: ops.Attention, sinks: F32 | None) -> F64:
    """Causal attention of one sequence. Shapes: q [new, H*D], keys and values [so far, Hkv*D] -> [new, H*D]"""
    group = op.heads // op.kv_heads
    queries = q.reshape(len(q), op.kv_heads, group, -1).astype(np.float64)
    k, v = (part.reshape(len(part), op.kv_heads, -1).astype(np.float64) for part in (keys, values))
    score = op.scale * np.einsum("tkgd,skd->kgts", queries, k)
    if op.softcap:
        score = op.softcap * np.tanh(score / op.softcap)
    distance = positions[:, None] - np.arange(len(keys))[None, :]
    seen = (distance >= 0) & (distance < op.window if op.window else True)
    score = np.where(seen, score, -np.inf)
    sink = np.full((op.kv_heads, group, 1, 1), -np.inf)
    if sinks is not None:
        sink = sinks.astype(np.float64).reshape(op.kv_heads, group, 1, 1)
    top = np.maximum(score.max(-1, keepdims=True), sink)
    weight = np.exp(score - top)
    weight /= weight.sum(-1, keepdims=True) + np.exp(sink - top)
    return np.asarray(np.einsum("kgts,skd->tkgd", weight, v)).reshape(q.shape)


def activate(kind: ops.Activation, gate: NDArray[Any], up: NDArray[Any] | None, limit: float) -> F64:
    """f(gate) * up; see `ops.Activate`."""
    g = gate.astype(np.float64)
    if kind == "swiglu_clamped":
        if up is None:
            raise ShapeError("swiglu_clamped arrived without up: it is defined for gate and up together")
        g = np.minimum(g, limit)
        return np.asarray((np.clip(up.astype(np.float64), -limit, limit) + 1) * g * sigmoid(1.702 * g))
    if kind == "silu":
        y = g * sigmoid(g)
    elif kind == "gelu":
        y = 0.5 * g * (1 + _erf(g / math.sqrt(2)))
    elif kind == "gelu_tanh":
        y = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    else:
        y = np.maximum(g, 0)
        y = y * y if kind == "relu2" else y
    return np.asarray(y if up is None else y * up)


def sigmoid(x: F64) -> F64:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def route(scores: F32, top_k: int, routing: str, normalize: bool) -> tuple[NDArray[np.intp], F64]:
    """The experts of each token and their shares. Shapes: scores [T, E] -> [T, top_k] twice"""
    logits = scores.astype(np.float64)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # stable: ties go to the lower expert
    if routing == "top_k_softmax":
        return chosen, softmax(np.take_along_axis(logits, chosen, 1))
    shares = np.take_along_axis(softmax(logits), chosen, 1)
    return chosen, shares / shares.sum(1, keepdims=True) if normalize else shares


def softmax(x: F64) -> F64:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))
