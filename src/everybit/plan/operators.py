"""A model as the planner sees it: operators with shapes, and how many bytes each reads and keeps.

Shapes are those of one token: a linear maps `into` numbers to `out`. Everything is of the whole model, before it is
split over devices; `split` says along which side a linear is cut by tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """`out` x `into` weights of `bits` stored bits each, scales included. `split`: column, row or none.

    `modules`: how many linear modules of transformers it stands for (3: queries, keys, values apart); 0: a bare
    parameter, as most routers are.
    """

    name: str
    out: int
    into: int
    bits: float = 16.0
    split: str = "column"
    modules: int = 1

    @property
    def weights(self) -> int:
        return self.out * self.into

    @property
    def bytes(self) -> float:
        return self.weights * self.bits / 8


@dataclass(frozen=True, slots=True)
class Experts:
    """`count` experts of the same `linears`, of which each token takes `chosen`."""

    linears: tuple[Linear, ...]
    count: int
    chosen: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Scores over what came before. `key_dim`, `value_dim`: of a head as it is multiplied.

    `cache_numbers`: numbers that a token leaves in this layer's cache (2 * kv_heads * head_dim, or MLA's latent), split
    over devices as far as there are `kv_heads`. `window`: how far back a layer looks (None: all).
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    cache_numbers: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A layer whose memory does not grow: `numbers` a sequence, of `bytes_each`, read and written for each token."""

    numbers: int
    bytes_each: float = 4.0


@dataclass(frozen=True, slots=True)
class Layer:
    """`count` equal layers."""

    count: int
    linears: tuple[Linear, ...]
    attention: Attention | None = None
    experts: Experts | None = None
    state: State | None = None


@dataclass(frozen=True)
class Model:
    """`kv_bits`, `activation_bits`: of the cache and of what is multiplied. `unknown`: fields of the config not used.

    `embedding` is read a row a token; `head` is multiplied for each token that is sampled. A tied head is a Linear too
    (its bytes are read), and `tied` says that it is not stored twice.
    """

    name: str
    hidden: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    embedding: Linear
    head: Linear | None
    tied: bool = False
    kv_bits: float = 16.0
    activation_bits: float = 16.0
    unknown: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[tuple[Linear, int], ...]:
        """Each linear that every token passes, and how often the model has it; experts are apart."""
        found = [(linear, layer.count) for layer in self.layers for linear in layer.linears]
        return tuple(found + ([(self.head, 1)] if self.head else []))

    @property
    def parameters(self) -> int:
        """Weights of linears, experts and embeddings (norms and biases, a thousandth of them, are left out)."""
        dense = sum(linear.weights * count for linear, count in self.linears)
        routed = sum(
            sum(one.weights for one in layer.experts.linears) * layer.experts.count * layer.count
            for layer in self.layers
            if layer.experts
        )
        return dense + routed + (0 if self.tied and self.head else self.embedding.weights)

    @property
    def weight_bytes(self) -> float:
        dense = sum(linear.bytes * count for linear, count in self.linears)
        routed = sum(
            sum(one.bytes for one in layer.experts.linears) * layer.experts.count * layer.count
            for layer in self.layers
            if layer.experts
        )
        return dense + routed + (0 if self.tied and self.head else self.embedding.bytes)

    def cache_bytes(self, tokens: int) -> float:
        """What one sequence of `tokens` keeps: its KV cache, as far back as each layer looks, and constant states."""
        total = 0.0
        for layer in self.layers:
            if layer.attention:
                kept = tokens if layer.attention.window is None else min(tokens, layer.attention.window)
                total += layer.count * kept * layer.attention.cache_numbers * self.kv_bits / 8
            if layer.state:
                total += layer.count * layer.state.numbers * layer.state.bytes_each
        return total
