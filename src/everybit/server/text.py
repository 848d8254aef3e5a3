"""From the tokens of one sequence to the text that its client sees: characters made whole, stop texts held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from everybit.tokenizer import Tokenizer


class StopText:
    """Cuts a text, which comes in pieces, before the first of several stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """What can be shown now: all but an end that may be the beginning of a stop text."""
        if not self._stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


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
