"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everybit.errors import (
    BusyError,
    ContextError,
    EverybitError,
    FormatError,
    ModelError,
    PrecisionError,
    RequestError,
)

RETRY_AFTER_S = 1


class Problem(Exception):  # noqa: N818 - an answer
    """An answer that is an error. `param` names the field of the request that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}}


def _kind(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error of ours; of others nothing, they are in the log."""
    match error:
        case Problem():
            return error
        case RequestError():
            return Problem(400, str(error), param=error.parameter, code="invalid_value")
        case ContextError():
            return Problem(400, str(error), code="context_length_exceeded")
        case PrecisionError():
            return Problem(400, str(error), param="precision", code="invalid_value")
        case BusyError():
            return Problem(429, str(error), code="queue_full")
        case FormatError():  # it names places of this machine
            return Problem(500, "the model's files cannot be read, the server's log says more", code="model_failed")
        case ModelError():
            return Problem(500, str(error), code="model_failed")
        case EverybitError():
            return Problem(400, str(error))
    return Problem(500, "the server failed on this request; its log says how", code="internal_error")
