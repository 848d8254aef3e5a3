"""The tensors of a GGUF file: which there are, their names there, and how each is made from the model's parameters.

What there is follows from the engine's program for the model. llama.cpp's form differs from transformers' in this:

    rotation     some architectures rotate neighbours (2i, 2i + 1) instead of halves: rows of q and k change places
    norms        1 + weight (Gemma) is stored as the sum
    experts      gate and up are tensors of their own
    orientation  always output-first (GPT-2 is not)

Source: names by gguf.get_tensor_name_map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.program import Program
from everybit.errors import ModelError
from everybit.formats.tensors import show
from everybit.integrations.gguf.families import Family

F32 = NDArray[np.float32]
Make = Callable[[F32], F32]
_RENAMED = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}  # BitNet


@dataclass(frozen=True)
class Tensor:
    """`name` and `shape` (output-first) in the file; `read` makes the values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], F32]


def list_tensors(program: Program, checkpoint: Checkpoint, bits: int, family: Family) -> list[Tensor]:
    """Every tensor of the model, in the program's order; values at `bits` (0 where they are float).

    Raises: ModelError for a parameter that llama.cpp's architecture has no place for
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, program.layers)
    embedding, head = end_names(program)
    if family.head == ("own" if embedding == head else "tied"):
        raise ModelError(
            f"{checkpoint.folder}: output head {show(head)} arrived, llama.cpp's {family.architecture} has "
            f"{'one beside the embedding' if family.head == 'own' else 'the embedding'}: export to safetensors instead"
        )
    found = {}
    for parameter, name, make in _parameters(program, family, checkpoint):
        translated = names.get_name(name, (".weight", ".bias"))
        if parameter in (embedding, head):
            translated = "token_embd.weight" if parameter == embedding else "output.weight"
        if translated is None or (name.endswith(".bias") and not name.endswith(family.biases)):
            raise ModelError(
                f"{checkpoint.folder}: parameter {show(parameter)} has no place in llama.cpp's "
                f"{family.architecture}: export to safetensors instead"
            )
        shape = make(np.broadcast_to(np.float32(0), checkpoint.shape(parameter))).shape
        found[translated] = Tensor(translated, shape, partial(_read, checkpoint, parameter, bits, make))
    return list(found.values())


def _read(checkpoint: Checkpoint, parameter: str, bits: int, make: Make) -> F32:
    return make(checkpoint.dense(parameter, bits))


def end_names(program: Program) -> tuple[str, str]:
    """The parameters of the token embedding and of the output head; tied, they are one."""
    embedding = next(op.weight for op in program.ops if isinstance(op, ops.Embed) and op.source == "tokens")
    head = [op for op in program.ops if isinstance(op, ops.Linear)][-1]
    return embedding, head.weights[0]


def _parameters(program: Program, family: Family, checkpoint: Checkpoint) -> Iterator[tuple[str, str, Make]]:
    """Each parameter, a name by which gguf knows it or a part of it, and what makes that."""
    attention = next(op for op in program.ops if isinstance(op, ops.Attention))
    heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads}
    for op in program.ops:
        if isinstance(op, ops.Embed):
            yield op.weight, op.weight, _as_is
        elif isinstance(op, ops.Norm):
            for name in (op.weight, op.bias):
                if name:
                    known = name
                    for old, new in _RENAMED.items():
                        known = known.replace(old, new)
                    yield name, known, _plus_one if op.unit_offset else _as_is
        elif isinstance(op, ops.Linear):
            for name in filter(None, (*op.weights, *op.biases)):
                module = name.split(".")[-2]
                if family.pairs and module in heads:
                    yield name, name, _to_pairs(heads[module])
                elif op.transposed and name in op.weights and checkpoint.quantized(name) is None:
                    yield name, name, np.transpose
                else:
                    yield name, name, _as_is
        elif isinstance(op, ops.Experts):  # their names have no suffix
            stem = op.gate_up.removesuffix("gate_up_proj")
            yield op.gate_up, f"{stem}gate_proj.weight", _first_half
            yield op.gate_up, f"{stem}up_proj.weight", _second_half
            yield op.down, f"{op.down}.weight", _as_is


def _as_is(values: F32) -> F32:
    return values


def _plus_one(values: F32) -> F32:
    return values + np.float32(1)


def _first_half(values: F32) -> F32:
    """Shapes: [E, 2 * I, K] -> [E, I, K]"""
    return values[:, : values.shape[1] // 2]


def _second_half(values: F32) -> F32:
    return values[:, values.shape[1] // 2 :]


def _to_pairs(heads: int) -> Make:
    """Row i of a head's first half goes to 2i, that of the second to 2i + 1. Shapes: [N, ...]"""

    def move(values: F32) -> F32:
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return move
