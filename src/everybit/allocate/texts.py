"""The tokens that sensitivities are measured on: windows spread over a text, or text that the model writes itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from everybit import evaluate
from everybit.engine.generate import generate
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import SourceError
from everybit.tokenizer import Tokenizer

Windows = list[list[int]]
MOST_DRAWS = 64  # or more, where texts of 16 tokens would still do


def from_file(path: str | os.PathLike[str], tokenizer: Tokenizer, context: int, most_tokens: int) -> Windows:
    """Windows of a UTF-8 text file, evenly spread over it, of about `most_tokens` scored tokens together.

    Raises: SourceError
    """
    found = evaluate.windows(tokenizer, evaluate.read_documents(Path(path)), context)
    count = len(found.ids)
    take = max(1, min(count, round(most_tokens * count / found.tokens)))
    return [window[: most_tokens + 1] for window in (found.ids[(2 * i + 1) * count // (2 * take)] for i in range(take))]


def from_model(runtime: Runtime, tokenizer: Tokenizer, context: int, most_tokens: int) -> Windows:
    """As many windows as fill `most_tokens` with draws from the model at its highest precision, seeded.

    Mutates: sequence 0 of the runtime
    Source:  data-free calibration by self-generation, LLM-QAT (arXiv:2305.17888), section 3.1
    """
    start = tokenizer.encode("") or sorted(tokenizer.eos_ids)[:1] or [0]
    windows: Windows = []
    left, draws = most_tokens, 0
    while left > 0 and draws < max(MOST_DRAWS, most_tokens // 16):
        room = min(left, context - len(start))
        drawn = list(generate(runtime, start, Sampling(seed=draws), room, stop_ids=tokenizer.eos_ids))
        draws += 1
        left -= len(drawn)
        if drawn:
            windows.append([*start, *drawn])
    if left > most_tokens // 2:
        raise SourceError(
            f"the model wrote {most_tokens - left} tokens in {draws} texts, {most_tokens} are wanted: pass --text FILE"
        )
    return windows


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
