"""Text generation for one sequence: the prompt in one go, then token by token.

generation = generate(runtime, prompt, Sampling(temperature=0.7), max_tokens=100, bits=4, stop_ids=tokenizer.eos_ids)
for token in generation: ...
generation.reason, generation.prefill_s, generation.decode_s
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from everybit.engine.plan import Plan, Precision
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampler, Sampling
from everybit.errors import ContextError, ModelError, PrecisionError, RequestError
from everybit.formats.weights import require_bits

Reason = Literal["", "stop", "length", "context"]


class Generation(Iterator[int]):
    """An iterator of tokens, computed as they are asked for. Make one with `generate`.

    `tokens` so far; `reason` it ended: a stop token (not among the tokens), the asked length or the context; `bits`.
    Seconds: `prepare_s` to verify and build what the precision needs, `prefill_s` from the prompt to the first token,
    `decode_s` for the `decode_steps` after it, without what the caller does in between.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompt: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        bits: Precision,
        stop_ids: Collection[int],
        clock: Callable[[], float],
    ) -> None:
        self.tokens: list[int] = []
        self.reason: Reason = ""
        self.bits = bits
        self.prefill_s = self.decode_s = 0.0
        self.decode_steps = 0
        self._runtime, self._prompt, self._sampler, self._clock = runtime, prompt, sampler, clock
        self._max_tokens, self._stop_ids = max_tokens, stop_ids
        start = clock()
        runtime.native.prepare(bits)
        self.prepare_s = clock() - start

    @property
    def tokens_per_s(self) -> float:
        """Of the decode steps; 0 where there was none."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    def __next__(self) -> int:
        if self.reason:
            raise StopIteration
        start = self._clock()
        if not self.tokens:
            token = self._sampler.choose(self._runtime.prefill(0, self._prompt, self.bits)).token
            self.prefill_s = self._clock() - start
        else:
            if self._runtime.lengths[0] != (expected := len(self._prompt) + len(self.tokens) - 1):
                raise ModelError(
                    f"sequence 0 has {self._runtime.lengths[0]} tokens where this generation left {expected}: "
                    "use the runtime for one generation at a time"
                )
            token = self._sampler.choose(self._runtime.decode(self.tokens[-1:], self.bits)[0]).token
            self.decode_s += self._clock() - start
            self.decode_steps += 1
        if token in self._stop_ids:
            self.reason = "stop"
            raise StopIteration
        self.tokens.append(token)
        if len(self.tokens) == self._max_tokens:
            self.reason = "length"
        elif len(self._prompt) + len(self.tokens) == self._runtime.context:
            self.reason = "context"
        return token


def generate(
    runtime: Runtime,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    bits: Precision | None = None,
    stop_ids: Collection[int] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Continue `prompt` in sequence 0 of the runtime, which is emptied first.

    `bits` is a precision or a plan; None is the highest of an overlay, and the only choice where the weights are float.

    Raises: PrecisionError, ContextError, RequestError, FormatError, ChecksumError; while iterating also ModelError
    """
    bits = choose_bits(runtime, bits)
    if max_tokens < 1:
        raise RequestError("max_tokens", f"{max_tokens}: expected 1 or more")
    if not 0 < len(prompt) < runtime.context:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens, expected 1 to {runtime.context - 1} (the context is "
            f"{runtime.context}): give a shorter one, or a larger context where the model has it"
        )
    runtime.reset()
    return Generation(runtime, prompt, Sampler(sampling, prompt), max_tokens, bits, stop_ids, clock)


def choose_bits(runtime: Runtime, bits: Precision | None) -> Precision:
    """The precision to run at: `bits` (a number or a plan), or the highest there is; 0 for float weights.

    Raises: PrecisionError; a plan is compared with the overlay when it is first used
    """
    if not runtime.bits:
        if bits:
            asked = "a plan" if isinstance(bits, Plan) else f"{bits} bits"
            raise PrecisionError(
                f"{asked} were asked of {runtime.checkpoint.folder}, a float model with one precision: "
                "leave bits out, or run everybit quantize on it first"
            )
        return 0
    if bits is None:
        return max(runtime.bits)
    if not isinstance(bits, Plan):
        require_bits(bits, runtime.bits, "the overlay")
    return bits
