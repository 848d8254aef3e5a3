"""Rotary positions: inverse frequencies and attention factor of every rope type that decoders use.

Both spellings of config.json are read: `rope_parameters` (transformers 5; for Gemma 3 one per layer type) and the older
`rope_theta` with `rope_scaling`. Two types depend on the length of a sequence; here they depend on the context that the
engine is built for, as in vLLM, so that a cached key never becomes wrong:

    longrope   the long factors if the context is beyond original_max_position_embeddings, else the short ones.
               (transformers switches in the middle of a sequence, and recomputes the cache when it generates.)
    dynamic    the base frequencies, which is what it gives up to max_position_embeddings; more is refused.

Source: transformers' modeling_rope_utils.py, with its roundings to float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.models.config import Config, as_number
from everybit.errors import ModelError

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ORIGINAL = "original_max_position_embeddings"
KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    _ORIGINAL,
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",  # says how the model was made
}


@dataclass(frozen=True)
class Frequencies:
    """What `ops.Rope` needs."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Rope:
    """Rope parameters in one spelling. `most` is the model's max_position_embeddings."""

    config: Config
    values: Mapping[str, Any]
    theta: float
    partial: float
    most: int

    @property
    def kind(self) -> str:
        """The rope type."""
        found = self.values.get("rope_type") or self.values.get("type") or "default"
        if found not in TYPES:
            raise self.config.wrong("rope type", found, f"one of {', '.join(TYPES)}")
        return str(found)

    @property
    def original(self) -> int:
        """The context before it was stretched."""
        found = self.config.get(_ORIGINAL)  # Phi-3: beside the rope's own keys
        found = found or self.values.get(_ORIGINAL) or self.most
        if type(found) is not int or found < 1:
            raise self.config.wrong(_ORIGINAL, found, "a positive integer")
        return found

    @property
    def limit(self) -> int:
        """The longest context: max_position_embeddings, or what yarn stretches to where that says the old one."""
        if self.kind != "yarn" or self.values.get("factor") is None:
            return self.most
        stretched = self.number("factor") * self.original
        if stretched >= 2**31:  # positions are int32
            raise self.config.wrong("rope factor", self.values["factor"], "a context below 2^31 tokens")
        return max(self.most, int(stretched))

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 of the rope's own (0 where that is the default). Raises: ModelError"""
        found = self.values.get(key)
        number = as_number(default if found is None else found, f"rope {key}", self.config)
        if number < 0 or (number == 0 and default != 0):
            raise self.config.wrong(f"rope {key}", number, "a number above 0")
        return number

    def numbers(self, key: str, count: int) -> NDArray[np.float32]:
        """A list of numbers of the rope's own. Raises: ModelError"""
        found = self.values.get(key)
        if not isinstance(found, list) or len(found) != count:
            raise self.config.wrong(f"rope {key}", found, f"a list of {count} numbers")
        return np.asarray([as_number(one, f"rope {key}", self.config) for one in found], np.float32)


def read(
    config: Config, theta: float = 10000.0, partial: bool = False, aliases: Mapping[str, str] | None = None
) -> Rope:
    """The one rope of a model; `theta` is the family's default base, `aliases` its old names of rope types.

    `partial`: whether the family rotates a part of each head (partial_rotary_factor).
    Raises: ModelError
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    values = old or new or {}
    return _rope(config, values, config.number("rope_theta", theta), partial, aliases or {})


def read_by_type(config: Config, full: float, sliding: float) -> dict[str, Rope]:
    """The ropes of a model with one for each layer type (Gemma 3); `full` and `sliding` are default bases.

    The old spelling: rope_theta and rope_scaling are the full layers', rope_local_base_freq is the sliding ones'.
    Raises: ModelError
    """
    new = config.get("rope_parameters", {})
    if not isinstance(new, Mapping) or not set(new) <= {"full_attention", "sliding_attention"}:
        raise config.wrong("rope_parameters", new, "an object with full_attention and sliding_attention")
    own = {kind: new.get(kind) or {} for kind in ("full_attention", "sliding_attention")}
    old = config.get("rope_scaling", {})
    if isinstance(old, Mapping) and isinstance(own["full_attention"], Mapping):
        own["full_attention"] = {**own["full_attention"], **old}
    bases = {
        "full_attention": config.number("rope_theta", full),
        "sliding_attention": config.number("rope_local_base_freq", sliding),
    }
    return {kind: _rope(config, values, bases[kind], False, {}) for kind, values in own.items()}


def _rope(config: Config, values: Any, theta: float, partial: bool, aliases: Mapping[str, str]) -> Rope:
    if not isinstance(values, Mapping):
        raise config.wrong("rope_parameters", values, "an object")
    if unknown := sorted(set(values) - KEYS):
        raise config.wrong(f"rope_parameters: {unknown[0]}", values[unknown[0]], f"only {', '.join(sorted(KEYS))}")
    kind = values.get("rope_type") or values.get("type")
    if isinstance(kind, str) and kind in aliases:
        values = {**values, "rope_type": aliases[kind]}
    most = config.size("max_position_embeddings")
    rope = Rope(config, values, theta, 1.0, most)
    own_theta = rope.number("rope_theta", theta)
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if not 0 < share <= 1 or (share != 1 and not partial):
        raise config.wrong("partial_rotary_factor", share, "more than 0 and at most 1" if partial else "1")
    if own_theta <= 1:
        raise config.wrong("rope_theta", own_theta, "a number above 1")
    return Rope(config, values, own_theta, share, most)


def frequencies(rope: Rope, head_dim: int, context: int) -> Frequencies:
    """Inverse frequencies and attention factor for an engine that holds `context` tokens of a sequence.

    Raises: ModelError
    """
    if context > rope.limit:
        raise ModelError(
            f"{rope.config.where}: a context of {context} tokens was asked for, the model was made for {rope.limit}: "
            "ask for less"
        )
    dim = int(head_dim * rope.partial)
    if dim < 2 or dim % 2:
        raise ModelError(f"{rope.config.where}: {dim} numbers of each head are rotated, expected an even number from 2")
    exponent = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    powers = (np.float64(rope.theta) ** exponent).astype(np.float32)
    kind, scale = rope.kind, 1.0
    if kind == "yarn":
        inverse, scale = _yarn(rope, powers)
    elif kind == "longrope":
        inverse, scale = _longrope(rope, powers, context)
    else:
        inverse = np.float32(1) / powers
        if kind == "linear":
            inverse = inverse / np.float32(rope.number("factor"))
        elif kind == "llama3":
            inverse = _llama3(rope, inverse)
    return Frequencies(tuple(float(one) for one in inverse), scale)


def _llama3(rope: Rope, inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Long waves are stretched by `factor`, short ones left, those between blended."""
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not 0 < low < high:
        raise rope.config.wrong("rope high_freq_factor", high, "more than low_freq_factor, and that more than 0")
    waves = rope.original * inverse.astype(np.float64) / (2 * math.pi)  # turns within the original context
    blend = np.clip((waves - low) / (high - low), 0, 1)
    return np.asarray(((1 - blend) / factor + blend) * inverse, np.float32)


def _yarn(rope: Rope, powers: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Source: Peng et al., YaRN (2023), as in transformers."""
    half, original = len(powers), rope.original
    factor = rope.number("factor", rope.most / original)
    fast, slow = rope.number("beta_fast", 32), rope.number("beta_slow", 1)

    def mscale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    scale = mscale(1)
    one, all_dim = rope.number("mscale", 0), rope.number("mscale_all_dim", 0)
    if one and all_dim:
        scale = mscale(one) / mscale(all_dim)
    scale = rope.number("attention_factor", scale)

    def dimension(turns: float) -> float:
        """The pair that turns so often within the original context."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(fast), dimension(slow)
    if rope.values.get("truncate", True) is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / (high - low if high != low else 0.001), 0, 1).astype(np.float32)
    kept = np.float32(1) - ramp
    powers64 = powers.astype(np.float64)
    return np.asarray((1 - kept) / (factor * powers64) + kept / powers64, np.float32), scale


def _longrope(rope: Rope, powers: NDArray[np.float32], context: int) -> tuple[NDArray[np.float32], float]:
    """Source: Ding et al., LongRoPE (2024), as in transformers."""
    original = rope.original
    if not (rope.values.get(_ORIGINAL) or rope.config.get(_ORIGINAL)):  # no hub config omits it
        raise rope.config.wrong(_ORIGINAL, None, "the context before it was stretched")
    if original < 2:
        raise rope.config.wrong(_ORIGINAL, original, "2 or more")
    factor = rope.number("factor", rope.most / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scale = rope.number("attention_factor", scale)
    stretch = rope.numbers("long_factor" if context > original else "short_factor", len(powers))
    if not (stretch > 0).all():
        raise rope.config.wrong("rope long_factor or short_factor", stretch.tolist(), "numbers above 0")
    return np.asarray(np.float32(1) / (stretch * powers), np.float32), scale
