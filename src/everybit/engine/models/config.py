"""Reading config.json: every key checked when it is read, and what nobody read refused where it could matter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from everybit.engine.ops import Activation
from everybit.errors import ModelError
from everybit.formats.tensors import show

# transformers' names for what ops.Activate has. gelu_new, gelu_pytorch_tanh and gelu_fast are one formula.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

# A key with such a name changes the computation in some family. Where the family's builder has not read it, it must
# hold what switches it off.
_SWITCH = re.compile(
    "multiplier|softcap|scal|clip|bias|norm|alibi|chunk|window|rope|rotary|parallel|residual|expert|moe|layer_types"
    "|bidirectional|interleave|lora|sparse|sink|mup|attn_temperature|cross_attention|position_embedding_type|attn_mod"
)
_HARMLESS = re.compile("_eps$|_epsilon$|^initializer|^router_aux|^normalizer|^lora_dropout$")
_NEUTRAL: tuple[Any, ...] = (None, False, 0, [], {}, "")
_NEUTRAL_FACTOR = re.compile("multiplier|scal|factor|mod$")  # 1 switches these off


MOST_LAYERS, MOST_WIDTH = 10_000, 1 << 20  # beyond any model; a larger number is damage, and would take hours to refuse


class Config:
    """A model's config.json. `where` names the file in errors; `context` is the length asked for (None: the most)."""

    def __init__(self, values: Mapping[str, Any], where: str, context: int | None = None) -> None:
        self.where = where
        self.context = context
        self._values = values
        self._read: set[str] = {"architectures", "model_type"}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; null counts as absent."""
        self._read.add(key)
        found = self._values.get(key)
        return default if found is None else found

    def ignore(self, *keys: str) -> None:
        """Marks keys that this family does not look at, whatever they hold."""
        self._read.update(keys)

    def size(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """An integer from 1 to `most`. Raises: ModelError"""
        found = self.get(key, default)
        if type(found) is not int or not 0 < found <= most:
            raise self.wrong(key, found, f"an integer from 1 to {most}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises: ModelError"""
        return as_number(self.get(key, default), key, self)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0. Raises: ModelError"""
        found = self.number(key, default)
        if found <= 0:
            raise self.wrong(key, found, "a number above 0")
        return found

    def flag(self, key: str, default: bool) -> bool:
        """true or false. Raises: ModelError"""
        found = self.get(key, default)
        if type(found) is not bool:
            raise self.wrong(key, found, "true or false")
        return found

    def optional(self, key: str, default: float = 0.0) -> float:
        """A number from 0; 0 where the key is null, `default` where it is absent. Raises: ModelError"""
        found = self.get(key, 0 if key in self._values else default)
        if not as_number(found, key, self) >= 0:
            raise self.wrong(key, found, "a number from 0, or null")
        return float(found)

    def window(self, default: int = 0) -> int:
        """`sliding_window`; 0 where it is null, `default` where it is absent. Raises: ModelError"""
        found = self.optional("sliding_window", default)
        if found != int(found) or found >= 2**31:
            raise self.wrong("sliding_window", found, "a number of tokens, or null")
        return int(found)

    def activation(self, key: str) -> Activation:
        """An activation by transformers' name. Raises: ModelError"""
        found = self.get(key)
        if not isinstance(found, str) or found not in ACTIVATIONS:
            raise self.wrong(key, found, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[found]

    def windows(self, layers: int, window: int, default: Sequence[bool]) -> tuple[int, ...]:
        """The window of each layer: `window` or 0, as `layer_types` says, or else `default`. Raises: ModelError"""
        found = self.get("layer_types")
        known = {"full_attention": False, "sliding_attention": True}
        listed = found if isinstance(found, list) else []
        if found is not None and (
            len(listed) != layers or not all(isinstance(kind, str) and kind in known for kind in listed)
        ):
            raise self.wrong("layer_types", found, f"{layers} of {' and '.join(known)}")
        sliding = [known[kind] for kind in listed] if found is not None else default
        if any(sliding) and not window:
            raise self.wrong("sliding_window", self.get("sliding_window"), "a window, which layer_types asks for")
        return tuple(window if one else 0 for one in sliding)

    def wrong(self, key: str, value: Any, expected: str) -> ModelError:
        """The error for `key`."""
        absent = key not in self._values
        what = "is missing" if absent and value is None else f"{show(value)} arrived"
        return ModelError(f"{self.where}: {key} {what}, expected {expected}: run it with transformers instead")

    def finish(self) -> None:
        """Refuses switches that the builder did not read and that are not switched off. Raises: ModelError"""
        for key, value in self._values.items():
            if key in self._read or not _SWITCH.search(key) or _HARMLESS.search(key) or value in _NEUTRAL:
                continue
            if type(value) in (int, float) and value == 1 and _NEUTRAL_FACTOR.search(key):
                continue
            raise self.wrong(key, value, "a key this engine knows for the family, or one that is switched off")


def as_number(found: Any, key: str, config: Config) -> float:
    """`found` as a finite number. Raises: ModelError"""
    if type(found) not in (int, float) or not abs(found) < 1e30:
        raise config.wrong(key, found, "a number")
    return float(found)
