"""How many tokens each piece carried, and who says so.

A tool was seen to count twice the tokens that the server had made, by tokenizing the text anew, and to report half the
true time between tokens. So the source is named with every count, and two sources that differ are shown.

    server      each piece says its tokens itself (precisions or log-probabilities of each)
    tokenizer   the text was tokenized here, with the tokenizer that the user gave
    usage       one token a piece, and the server's usage gives the same total
    spread      usage gives another total than pieces have: it is spread over them by their characters
    pieces      one token a piece, and there is no usage to compare with
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from everybit.errors import SourceError

# What usage may claim: a character has 4 bytes at most, and some tokens have no text. More is a mistake or a trap.
_MOST_PER_CHARACTER, _MOST_SILENT = 4, 64

SOURCES = ("server", "tokenizer", "usage", "spread", "pieces")


def attribute(
    texts: Sequence[str],
    counts: Sequence[int | None],
    usage: int | None,
    tokenize: Callable[[str], list[int]] | None,
    finish: str = "",
) -> tuple[list[int], str, int | None]:
    """(tokens of each piece, source, total by the pieces where usage says otherwise).

    One token more in usage than in pieces, at the end of a text that the model ended, is its end-of-text token, which
    has no text: no disagreement.
    """
    if counts and all(count is not None for count in counts):
        tokens, source = [count or 0 for count in counts], "server"
    elif tokenize is not None:
        tokens, source = _by_ends(texts, tokenize("".join(texts))), "tokenizer"
    else:
        tokens, source = [1] * len(texts), "pieces"
    total = sum(tokens)
    if usage is None or not texts:
        return tokens, source, None
    believable = 0 < usage <= _MOST_PER_CHARACTER * sum(map(len, texts)) + _MOST_SILENT * len(texts)
    if source == "pieces" and len(texts) == 1 and believable:  # all of it came at once
        return [usage], "usage", None
    if total == usage or (finish == "stop" and total + 1 == usage):
        return tokens, "usage" if source == "pieces" else source, None
    if source == "pieces" and believable:
        return _spread(usage, [len(text) for text in texts]), "spread", total
    return tokens, source, total


def _by_ends(texts: Sequence[str], ends: Sequence[int]) -> list[int]:
    """Each token belongs to the piece that holds its last character: only then it is whole."""
    tokens, place, at = [], 0, 0
    for text in texts:
        place += len(text)
        begin = at
        while at < len(ends) and ends[at] <= place:
            at += 1
        tokens.append(at - begin)
    if tokens:
        tokens[-1] += len(ends) - at
    return tokens


def _spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `sizes`, each cumulated share rounded."""
    whole, seen, given, tokens = sum(sizes) or 1, 0, 0, []
    for size in sizes:
        seen += size
        due = (2 * total * seen + whole) // (2 * whole)
        tokens.append(due - given)
        given = due
    return tokens


def load_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """A `tokenizer.json`, or a folder that has one, by the tokenizers library. Raises: SourceError"""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SourceError("--tokenizer needs the tokenizers library: pip install tokenizers") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise SourceError(f"{file}: not a tokenizer.json ({str(error).splitlines()[0]})") from None

    def ends(text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON can hold
        return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]

    return ends
