"""The log: one JSON object a line. A log that cannot be written loses lines, which are counted, and stops nothing."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everybit.errors import OutputError

_REQUESTS = logging.getLogger("everybit.requests")


class Lines(logging.StreamHandler[Any]):
    """Writes to a stream; `lost` lines could not be written."""

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        self.lost += 1


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        if isinstance(record.msg, Mapping):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def write(line: Mapping[str, Any]) -> None:
    """A line about a request."""
    _REQUESTS.info(line)


def open_log(path: Path | None) -> Lines:
    """Lines go to `path`, appended, or to stderr. Raises: OutputError"""
    try:
        stream = path.open("a", encoding="utf-8", buffering=1) if path is not None else sys.stderr
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}: name a file that can be written with --log") from None
    return log_to(stream)


def log_to(stream: Any) -> Lines:
    """Lines go to `stream`, a write each."""
    handler = Lines(stream)
    handler.setFormatter(_Json())
    for name in ("everybit.requests", "everybit.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
    return handler
