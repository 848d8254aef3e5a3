"""From the tokens of one sequence to the text that its client sees: characters made whole, stop texts held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from everybit.tokenizer import Tokenizer


class StopText:
    """Cuts a text, which comes in pieces, before the stop text that is complete first; the pieces do not matter.

    Cost: a visit of every stop text for each character, however much of them has come (Knuth, Morris and Pratt 1977)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _falls(stop)) for stop in stops]
        self._begun = [0] * len(self._stops)  # characters of each that the text ends with
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """What can be shown now: all but an end that may be the beginning of a stop text."""
        if not self._stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            longest = max(self._step(i, character) for i in range(len(self._stops)))
            if longest:
                self.stopped, self._held = True, ""
                return text[: end - longest]
        shown = len(text) - max(self._begun)
        self._held = text[shown:]
        return text[:shown]

    def _step(self, i: int, character: str) -> int:
        """The length of a stop text where it is complete with this character, else 0."""
        (stop, falls), begun = self._stops[i], self._begun[i]
        while begun and stop[begun] != character:
            begun = falls[begun]
        self._begun[i] = begun = begun + (stop[begun] == character)
        return begun if begun == len(stop) else 0

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


@lru_cache(1024)
def _falls(stop: str) -> tuple[int, ...]:
    """For each length of a beginning of `stop`: of its own ends the longest that is a shorter beginning."""
    falls, begun = [0, 0], 0
    for character in stop[1:]:
        while begun and stop[begun] != character:
            begun = falls[begun]
        begun += stop[begun] == character
        falls.append(begun)
    return tuple(falls)


class Written:
    """The text of one sequence as its tokens come. Special tokens are left out, but for those in `shown`."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = (), shown: Collection[int] = ()
    ) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._stream = tokenizer.stream(prompt[-8:])  # what comes before decides about a space, not more
        self._stop = StopText(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met; nothing comes after it."""
        return self._stop.stopped

    def add(self, token: int) -> str:
        if token in self._shown:
            piece = self._stream.finish() + self._tokenizer.decode([token], skip_special_tokens=False)
            self._stream = self._tokenizer.stream([token])
        else:
            piece = self._stream.add(token)
        return self._stop.add(piece)

    def finish(self) -> str:
        return self._stop.add(self._stream.finish()) + ("" if self.stopped else self._stop.finish())
