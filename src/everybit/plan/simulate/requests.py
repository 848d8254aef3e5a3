"""What is asked of a simulated deployment, and what came of each request. Times are seconds from the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from everybit.errors import SourceError

BLOCK_TOKENS = 512  # of a trace's block of prompt text (Mooncake)
MOST_TOKENS = 10_000_000  # of a prompt or an answer: more is a mistake


@dataclass(frozen=True, slots=True)
class Request:
    """`blocks`: ids of the prompt's blocks of BLOCK_TOKENS tokens, equal for an equal beginning; none: text of its own.

    `session`: the conversation it belongs to, where one is named.
    """

    id: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    session: int | None = None


@dataclass(slots=True)
class Outcome:
    """`at_s`: when it was sent; `seen_s`: when an engine first looked for requests after that; `begin_s`: when it was
    chosen to run. `times_s`: of each token; `bits`: the precision of each. `refused`: why, if it was."""

    request: Request
    at_s: float
    replica: str = ""
    seen_s: float | None = None
    begin_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    bits: list[int | None] = field(default_factory=list)
    cached_tokens: int = 0
    refused: str = ""

    @property
    def complete(self) -> bool:
        return len(self.times_s) == self.request.output_tokens

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.at_s

    @property
    def e2e_s(self) -> float:
        return self.times_s[-1] - self.at_s

    @property
    def engine_ttft_s(self) -> float:
        """As an engine measures it that stamps requests when it comes to look for them, between steps (vLLM)."""
        return self.times_s[0] - (self.at_s if self.seen_s is None else self.seen_s)

    @property
    def engine_e2e_s(self) -> float:
        return self.times_s[-1] - (self.at_s if self.seen_s is None else self.seen_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None where there is no second."""
        tokens = len(self.times_s)
        return (self.times_s[-1] - self.times_s[0]) / (tokens - 1) if tokens > 1 else None


def check(requests: Sequence[Request]) -> None:
    """Raises: SourceError for no requests, and for one that cannot be"""
    if not requests:
        raise SourceError("an empty trace: expected one request or more")
    if len({one.id for one in requests}) < len(requests):
        raise SourceError("two requests with one id: give every request its own")
    for one in requests:
        if not (1 <= one.prompt_tokens <= MOST_TOKENS and 1 <= one.output_tokens <= MOST_TOKENS):
            raise SourceError(
                f"request {one.id}: {one.prompt_tokens} prompt and {one.output_tokens} output tokens; "
                f"expected 1 to {MOST_TOKENS:,} of each"
            )
        if not (0 <= one.at_s < math.inf):
            raise SourceError(f"request {one.id}: it arrives at {one.at_s} s; expected 0 or more")
        if one.blocks and len(one.blocks) != -(-one.prompt_tokens // BLOCK_TOKENS):
            raise SourceError(
                f"request {one.id}: {len(one.blocks)} block ids for {one.prompt_tokens} tokens; "
                f"expected one per {BLOCK_TOKENS}"
            )


def draw(
    rate_per_s: float, count: int, lengths: Sequence[tuple[int, int]], *, burstiness: float = 1.0, seed: int = 0
) -> list[Request]:
    """`count` requests with gamma gaps, each of one of the `lengths` (prompt, output).

    `burstiness` is the shape of the gaps, as in vLLM's bench: 1 is Poisson, less comes in bursts. Raises: SourceError
    """
    if not (0 < rate_per_s < math.inf and 0.01 <= burstiness <= 1e6 and count >= 1 and lengths):
        raise SourceError(
            f"rate {rate_per_s}, {count} requests, burstiness {burstiness}, {len(lengths)} lengths: expected a rate "
            "above 0, 1 or more requests, 0.01 to 1e6 and one length or more"
        )
    random = np.random.default_rng(seed)
    times = np.cumsum(random.gamma(burstiness, 1 / (burstiness * rate_per_s), count)).tolist()
    chosen = random.integers(0, len(lengths), count).tolist()
    return [Request(id, at, *lengths[one]) for id, (at, one) in enumerate(zip(times, chosen, strict=True))]


def speed_up(requests: Sequence[Request], speed: float) -> list[Request]:
    """The same requests at `speed` times their rate. Raises: SourceError"""
    if not 0 < speed < math.inf:
        raise SourceError(f"speed {speed}: expected a number above 0")
    return [replace(one, at_s=one.at_s / speed) for one in requests]
