"""The exceptions a user can meet. Each message says what arrived, what was expected and what to do.

    EverybitError
    ├── FormatError        a file or folder that is not a valid overlay
    │   └── ChecksumError  bytes that differ from their recorded checksum
    ├── SourceError        a model, text or file that cannot be quantized or read
    ├── ModelError         a config.json or weights that the engine cannot run
    ├── PrecisionError     bits that are outside 2..8 or not in the overlay
    ├── ShapeError         arrays whose shapes or dtypes do not fit together
    ├── ContextError       more tokens than the context holds
    ├── RequestError       a parameter of a request that is out of its range
    └── OutputError        a place that cannot be written (not empty, disk full, belongs to another run)

The command line prints the message on one line and exits with 2.
"""

from __future__ import annotations


class EverybitError(Exception):
    """Base of every error that a user's input can cause."""


class FormatError(EverybitError):
    """A file or folder that is not a valid overlay."""


class ChecksumError(FormatError):
    """Bytes that differ from their recorded checksum."""


class SourceError(EverybitError):
    """A model, text or file that cannot be quantized or read."""


class ModelError(EverybitError):
    """A config.json or weights that the engine cannot run: an unknown family or switch, a missing parameter."""


class PrecisionError(EverybitError):
    """Bits outside 2..8 or not in the overlay."""


class ShapeError(EverybitError):
    """Arrays whose shapes or dtypes do not fit together."""


class ContextError(EverybitError):
    """More tokens than the context holds."""


class RequestError(EverybitError):
    """A parameter of a request that is out of its range; `parameter` names it, `problem` says the rest."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter} {problem}")
        self.parameter = parameter
        self.problem = problem


class BusyError(EverybitError):
    """A request that came when too many others wait."""


class OutputError(EverybitError):
    """A place that cannot be written."""


def reason(error: BaseException) -> str:
    """The first line of another library's error, to be quoted inside one of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
