"""From logits to the next token: what a request asks for (`Sampling`) and one sequence's sampler.

The choice depends on (logits, tokens so far, `Sampling`) and on nothing else: the random number is a function of the
seed and the token's position. `reference_sampling.py` is the definition; native/src/engine/sample.cc does the work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.errors import ModelError, RequestError

F32 = NDArray[np.float32]
_OK, _NOT_A_NUMBER = 0, 1
# (lowest, highest, how to say it); beside a range, the value that switches a parameter off is allowed.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.01, 100, "0, or 0.01 to 100"),
    "top_k": (0, 2**31 - 1, "0 (off) or a whole number above"),
    "top_p": (1e-9, 1, "above 0, at most 1"),
    "min_p": (0, 1, "0 to 1"),
    "repetition_penalty": (0.01, 100, "0.01 to 100"),
    "presence_penalty": (-2, 2, "-2 to 2"),
    "frequency_penalty": (-2, 2, "-2 to 2"),
    "seed": (0, 2**63 - 1, "0 to 2^63 - 1"),
}
_WHOLE = ("top_k", "seed")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; as it stands, a draw from the model's own distribution.

    In this order: logit_bias (token, number to add), penalties, temperature, top_k, top_p, min_p, one draw. Temperature
    0 takes the likeliest token, after penalties. repetition_penalty is of every token in the prompt or the output; the
    other two, as OpenAI's, of tokens that were generated.

    Raises: RequestError
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for token, bias in self.logit_bias:
            if type(token) is not int or token < 0 or not math.isfinite(bias):
                raise RequestError("logit_bias", f"{token}: {bias}: expected token ids and finite numbers")
        for field in dataclasses.fields(self):
            if field.name == "logit_bias":
                continue
            value = getattr(self, field.name)
            lowest, highest, expected = _RANGES[field.name]
            number = isinstance(value, int if field.name in _WHOLE else (int, float)) and not isinstance(value, bool)
            if not (number and (lowest <= value <= highest or (field.name == "temperature" and value == 0))):
                raise RequestError(field.name, f"{value}: expected {expected}")

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far matter."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own, before penalties and temperature, if asked for."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


class Constraint(Protocol):
    """Which tokens may come next in one sequence, a grammar's state for example."""

    def limit(self, logits: F32) -> None:
        """Set what may not come to -infinity. Shapes: logits f32[V]. Raises: ModelError"""

    def accept(self, token: int) -> None:
        """`token` came. Raises: ModelError"""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""


class Sampler:
    """Chooses the tokens of one sequence, and remembers what penalties need to know of it.

    Cost: per token a pass or two over the logits; with penalties also one visit of every distinct token so far
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), constraint: Constraint | None = None) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self._bias_tokens = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self.position = 0  # of the next token in its sequence
        self._place: dict[int, int] = {}  # token -> its place in the arrays
        self._tokens = np.zeros(256, np.int32)  # distinct, in order of appearance
        self._generated = np.zeros(256, np.int32)
        for token in prompt:
            self._see(token, 0)

    def choose(self, logits: F32, top: int = -1) -> Choice:
        """The next token, which counts as generated. `top` >= 0 asks for log-probabilities, of so many others too.

        Shapes:  logits f32[V]
        Mutates: logits (scratch afterwards), the history
        Raises:  ModelError when a logit is not a number, or no token is possible
        """
        seen, sampling = len(self._place), self.sampling
        edited = bool(sampling.logit_bias) or self.constraint is not None
        own = logits.copy() if edited and top >= 0 else None
        if sampling.logit_bias:
            logits[self._bias_tokens] += self._bias
        if self.constraint is not None:
            self.constraint.limit(logits)
        status, token, logprob, likeliest = _native.sample(
            logits,
            self._tokens[:seen],
            self._generated[:seen],
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.seed,
            self.position,
            -1 if edited else top,
        )
        if status != _OK:
            what = "holds a number that is not finite" if status == _NOT_A_NUMBER else "leaves no token possible"
            raise ModelError(
                f"the model's output at token {self.position} {what}: --debug-numerics (or Runtime.open with "
                "debug=True) names the layer that broke"
            )
        self._see(token, 1)
        return Choice(token, logprob, likeliest) if own is None else score(own, token, top)

    def _see(self, token: int, generated: int) -> None:
        self.position += 1
        if generated and self.constraint is not None:
            self.constraint.accept(token)
        if not self.sampling.penalizes:
            return
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._generated = np.concatenate([self._generated, np.zeros_like(self._generated)])
        self._tokens[place] = token
        self._generated[place] += generated


def score(logits: F32, token: int, top: int) -> Choice:
    """What the model itself says of `token`, and of the `top` likeliest. Shapes: logits f32[V]"""
    shifted = logits.astype(np.float64) - float(logits.max())
    shifted -= math.log(float(np.exp(shifted).sum()))
    top = min(top, len(shifted))
    first = np.argpartition(-shifted, top - 1)[:top] if top else np.empty(0, np.int64)
    first = first[np.lexsort((first, -shifted[first]))]
    return Choice(token, float(shifted[token]), [(int(i), float(shifted[i])) for i in first])
