"""Text to scored windows: one protocol for every model, tokenizer and precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from everybit.errors import SourceError

SEPARATOR = "<|endoftext|>"
LONGEST_DEFAULT_CONTEXT = 2048  # as most published perplexities; models that know more are asked for it with context=


class Tokenizer(Protocol):
    """The two calls of a transformers tokenizer that are used here."""

    def __call__(self, text: str, /, *, verbose: bool) -> Any: ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class Windows:
    """Token windows of at least two tokens; all but the first token of each are scored."""

    ids: list[list[int]]
    text_bytes: int  # UTF-8 bytes of the scored tokens, decoded

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(len(window) - 1 for window in self.ids)


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 text file, split at lines that are `<|endoftext|>`.

    Raises: SourceError when the file is absent, empty, blank or not UTF-8 (with the offset of the first bad byte)
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a UTF-8 text file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise SourceError(
            f"{path}: byte 0x{raw[offset]:02x} at offset {offset} is not UTF-8 ({error.reason}); "
            "expected UTF-8 text: convert it first, for example with iconv -t UTF-8"
        ) from error
    documents = split_documents(text)
    if not documents:
        what = "an empty file" if not raw else f"{len(raw)} bytes and no text"
        raise SourceError(f"{path}: {what}; expected UTF-8 text")
    return documents


def split_documents(text: str) -> list[str]:
    """The documents of `text`, which lines equal to `<|endoftext|>` end; blank ones are dropped."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.removesuffix("\r") == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines) for lines in documents)
    return [document for document in joined if document.strip()]


def context_length(config: Any, wanted: int | None = None) -> int:
    """The window length for a transformers config: `wanted`, or the model's own up to 2048 tokens.

    Raises: SourceError when `wanted` is below 2 (nothing to score) or beyond the model
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
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
    text_bytes = 0
    room = max_tokens
    for document in documents:
        ids = [int(i) for i in tokenizer(document, verbose=False)["input_ids"]]
        for start in range(0, min(len(ids), context) if truncate else len(ids), context):
            window = ids[start : start + context]
            if room is not None:
                window = window[: room + 1]
                room -= max(len(window) - 1, 0)
            if len(window) > 1:
                kept.append(window)
                text_bytes += _text_bytes(tokenizer, window[1:])
        if room == 0:
            break
    if not kept:
        raise SourceError("the text is too short: no document has two tokens, so there is nothing to score")
    return Windows(kept, text_bytes)


def _text_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", errors="replace"))
