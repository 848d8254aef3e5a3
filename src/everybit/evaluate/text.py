"""Text to scored windows: one protocol for every model, tokenizer and precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from everybit.errors import SourceError

LONGEST_DEFAULT_CONTEXT = 2048  # as most published perplexities; models that know more are asked for it with context=


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ours, or one of transformers."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Windows:
    """Token windows of at least two tokens; all but the first token of each are scored.

    `documents` numbers the document that each window is of, ascending; empty where that is not known.
    """

    ids: list[list[int]]
    text_bytes: int  # UTF-8 bytes of the scored tokens, decoded
    documents: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(len(window) - 1 for window in self.ids)


def context_length(config: Mapping[str, Any], wanted: int | None = None) -> int:
    """The window length for a model's config.json: `wanted`, or the model's own up to 2048 tokens.

    Raises: SourceError when `wanted` is below 2 (nothing to score) or beyond the model
    """
    text_config = config.get("text_config")
    keys = [part.get(key) for part in (config, text_config or {}) for key in ("max_position_embeddings", "n_positions")]
    longest = next((value for value in keys if type(value) is int), None)
    if wanted is None:
        return min(longest or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if wanted < 2:
        raise SourceError(f"a context of {wanted} tokens leaves nothing to score; expected 2 or more")
    if longest is not None and wanted > longest:
        raise SourceError(f"a context of {wanted} tokens is beyond this model's {longest}; ask for {longest} or fewer")
    return wanted


def windows(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    context: int,
    truncate: bool = False,
    max_tokens: int | None = None,
) -> Windows:
    """Cut documents into non-overlapping windows of `context` tokens.

    Each document is encoded whole, with the special tokens the tokenizer adds (a BOS stands at its start only).
    All but the first token of a window are scored. A last window of one token has nothing to score and is dropped.

    Needs:  context >= 2; `truncate` keeps the first window of each document; `max_tokens` stops after that many scored
            tokens, cutting the last window short
    Raises: SourceError when no token can be scored
    """
    if context < 2:
        raise SourceError(f"a context of {context} tokens leaves nothing to score; expected 2 or more")
    if max_tokens is not None and max_tokens < 1:
        raise SourceError(f"at most {max_tokens} scored tokens leaves nothing to score; expected 1 or more")
    kept: list[list[int]] = []
    numbers: list[int] = []
    text_bytes = 0
    room = max_tokens
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document)
        for start in range(0, min(len(ids), context) if truncate else len(ids), context):
            window = ids[start : start + context]
            if room is not None:
                window = window[: room + 1]
                room -= max(len(window) - 1, 0)
            if len(window) > 1:
                kept.append(window)
                numbers.append(number)
                text_bytes += _text_bytes(tokenizer, window[1:])
        if room == 0:
            break
    if not kept:
        raise SourceError("the text is too short: no document has two tokens, so there is nothing to score")
    return Windows(kept, text_bytes, tuple(numbers))


def _text_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return len(text.encode("utf-8", errors="replace"))
