"""Bodies of requests, in the words of each interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from everybit.bench.records import Session, Turn
from everybit.errors import SourceError

_OURS = (
    *("model", "prompt", "messages", "input", "stream", "stream_options"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens"),
)


@dataclass(frozen=True)
class Asking:
    """How every request of a run is asked. `extra` is what the user adds to each body."""

    api: str
    model: str
    stream: bool = True
    usage: bool = True  # ask for it in the stream
    token_field: str = "max_tokens"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := [name for name in self.extra if name in _OURS]:
            raise SourceError(f"--body sets {taken[0]}, which the bench sets itself; it has an option of its own")

    def body(self, session: Session, turn: Turn, past: Sequence[tuple[str, str]] = ()) -> bytes:
        """`past` are the turns before and their answers, where the session keeps them."""
        body: dict[str, Any] = {"model": self.model, "stream": self.stream, **self.extra}
        if self.stream and self.usage and self.api != "responses":
            body["stream_options"] = {"include_usage": True}
        if self.api == "completions":
            told = "".join(f"{user}\n{answer}\n" for user, answer in past)
            body["prompt"] = (session.prefix + "\n" if session.prefix else "") + told + turn.text
            body["max_tokens"] = turn.output_tokens
            return json.dumps(body).encode()
        messages = [{"role": "system", "content": session.prefix}] if session.prefix else []
        for user, answer in past:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": turn.text})
        if self.api == "chat":
            body |= {"messages": messages, self.token_field: turn.output_tokens}
        else:
            body |= {"input": messages, "max_output_tokens": turn.output_tokens}
        return json.dumps(body).encode()
