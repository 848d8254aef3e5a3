"""Guesses what follows in a text from what followed its last tokens before (prompt lookup, Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

_LONG, _SHORT = 3, 2


class NGrams:
    """A text that grows, and where each of its runs of 3 and of 2 tokens was last seen.

    Cost: two entries of a dictionary per token
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run -> where the token is that last followed it
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        text = self._tokens
        for token in tokens:
            place = len(text)  # a run is entered when its next token comes: the last one is not its own occurrence
            for length in (_LONG, _SHORT):
                if place >= length:
                    self._after[tuple(text[place - length :])] = place
            text.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens; none where neither the last 3 tokens nor the last 2 have been there before.

        A continuation that reaches the end of the text goes on with itself.
        """
        text = self._tokens
        start = self._after.get(tuple(text[-_LONG:]))
        if start is None:
            start = self._after.get(tuple(text[-_SHORT:]))
        if start is None:
            return []
        found = text[start : start + count]
        period = len(text) - start
        while len(found) < count:
            found.append(found[len(found) - period])
        return found
