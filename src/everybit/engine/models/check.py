"""Whether a program and a checkpoint belong together: every parameter there, of the right shape, and none left over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.program import Program
from everybit.errors import ModelError
from everybit.formats.tensors import show

# Buffers that old checkpoints carry.
_LEFTOVER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|position_ids)")

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")  # the hub's layout


@dataclass(frozen=True)
class _Need:
    """A parameter as an op reads it: `shape` output-first. Only a `matrix` may be quantized."""

    name: str
    shape: tuple[int, ...]
    matrix: bool = False
    transposed: bool = False


def check(program: Program, checkpoint: Checkpoint) -> None:
    """Refuses what would be read wrongly, before a back end reads it.

    Raises: ModelError naming the parameter
    """
    needed: set[str] = set()
    for op in program.ops:
        for need in _needs(op, program, checkpoint):
            _check_one(need, checkpoint)
            needed.add(need.name)
    for name in checkpoint.names:
        if name not in needed and not _LEFTOVER.fullmatch(name):
            raise ModelError(
                f"{checkpoint.folder}: parameter {show(name)} is stored, but config.json makes a model without it: "
                "the config and the weights do not belong together, download both again"
            )


def _check_one(need: _Need, checkpoint: Checkpoint) -> None:
    if need.name not in checkpoint:
        hint = "download the folder again"
        if any(_ONE_EXPERT.search(name) for name in checkpoint.names):
            hint = "it has one matrix per expert, which everybit quantize fuses into what the engine reads"
        raise ModelError(
            f"{checkpoint.folder}: parameter {show(need.name)} is missing, config.json asks for it: {hint}"
        )
    spec = checkpoint.quantized(need.name)
    if spec and (not need.matrix or spec.transposed != need.transposed):
        why = "transposed" if need.matrix else "quantized"
        raise ModelError(
            f"{checkpoint.folder}: parameter {show(need.name)} is {why} in the overlay, which this model does not "
            "expect: quantize again"
        )
    expected, found = need.shape, checkpoint.shape(need.name)
    if need.transposed and not spec:
        expected = (*expected[:-2], expected[-1], expected[-2])
    if found != expected:
        raise ModelError(
            f"{checkpoint.folder}: parameter {show(need.name)} has shape {list(found)}, config.json implies "
            f"{list(expected)}: the config and the weights do not belong together, download both again"
        )
    if not spec and checkpoint.dtype(need.name) not in ("F32", "F16", "BF16", "F64"):
        raise ModelError(
            f"{checkpoint.folder}: parameter {show(need.name)} is stored as {checkpoint.dtype(need.name)}, "
            "expected F32, F16 or BF16: convert the model first"
        )


def _needs(op: ops.Op, program: Program, checkpoint: Checkpoint) -> Iterator[_Need]:
    if isinstance(op, ops.Embed):
        rows = program.vocabulary
        if op.source == "positions":  # the table may be longer than the context
            rows = max(program.context + op.offset, _stored(op.weight, 0, checkpoint))
        yield _Need(op.weight, (rows, op.out.width))
    elif isinstance(op, ops.Norm):
        for name in (op.weight, op.bias):
            if name is not None:
                yield _Need(name, (op.x.width // op.groups,))
    elif isinstance(op, ops.Linear):
        for i, (out, weight) in enumerate(zip(op.outs, op.weights, strict=True)):
            yield _Need(weight, (out.width, op.x.width), True, op.transposed)
            if op.biases and (bias := op.biases[i]) is not None:
                yield _Need(bias, (out.width,))
    elif isinstance(op, ops.Attention):
        if op.sinks is not None:
            yield _Need(op.sinks, (op.heads,))
    elif isinstance(op, ops.Experts):
        experts = op.scores.width
        turned = op.transposed and not checkpoint.quantized(op.down)
        inner = _stored(op.down, 1 if turned else 2, checkpoint)  # the op does not say it; both must have the same
        yield _Need(op.gate_up, (experts, 2 * inner, op.x.width), True, op.transposed)
        yield _Need(op.down, (experts, op.out.width, inner), True, op.transposed)
        if op.gate_up_bias is not None:
            yield _Need(op.gate_up_bias, (experts, 2 * inner))
        if op.down_bias is not None:
            yield _Need(op.down_bias, (experts, op.out.width))


def _stored(name: str, axis: int, checkpoint: Checkpoint) -> int:
    """The stored size of one axis, 0 where there is none (the parameter is then refused for its name or shape)."""
    shape = checkpoint.shape(name) if name in checkpoint else ()
    return shape[axis] if axis < len(shape) else 0
