"""A model as a list of ops over named buffers, written by engine/models/ and executed by a back end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from everybit.engine.ops import Columns, Op

Ints = NDArray[np.int32]


@dataclass
class Program:
    """Ops in order. The last op writes `logits`, one row per selected token.

    `layers`, `kv_heads`, `head_dim` fix the KV cache; `context` is the longest sequence the model was made for.
    """

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    buffers: dict[str, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def buffer(self, name: str, width: int) -> Columns:
        """All columns of a new buffer, or of the existing one of that name and width."""
        if self.buffers.setdefault(name, width) != width:
            raise ValueError(f"buffer {name!r} has {self.buffers[name]} columns, {width} were asked for")
        return Columns(name, 0, width)

    def add(self, *ops: Op) -> None:
        """Append ops."""
        self.ops.extend(ops)


@dataclass(frozen=True)
class Step:
    """What one forward pass works on: the new tokens of one or more sequences, one after another.

    Shapes: tokens i32[T]; starts i32[S+1], sequence s owns rows starts[s] .. starts[s+1]-1; past i32[S] tokens already
            in the cache; blocks i32[S, most]: the KV blocks of each sequence in order, enough for past + new tokens;
            rows i32[R], the rows whose logits are wanted
    """

    tokens: Ints
    starts: Ints
    past: Ints
    blocks: Ints
    rows: Ints
