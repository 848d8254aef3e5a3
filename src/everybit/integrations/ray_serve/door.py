"""In front of Serve's HTTP proxy, inside its process: what our own server checks first, and errors in OpenAI's form.

Keys and their limits are counted here, once for all replicas, and bodies are read here, whole: the proxy itself would
hold a body of any length in memory. What a replica answers passes as it is. What Serve answers itself is plain text or
nothing, and becomes one of our errors; so does a replica that dies: before its answer a status code, within a stream
an error frame and a connection that ends early, without [DONE].
"""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everybit.integrations.ray_serve.log import Sender
from everybit.server.edge import Edge, Limits
from everybit.server.keys import Keys
from everybit.server.log import log_to
from everybit.server.problems import Problem
from everybit.server.stream import frame

VARIABLE = "EVERYBIT_RAY_DOOR"  # the file of the settings
_OURS = b"x-content-type-options"  # in every answer of a replica, in none of Serve's
_AGAIN = (_OURS, b"x-request-id", b"referrer-policy", b"content-security-policy")  # the door says these itself
_SERVES = (b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id")


@dataclass(frozen=True)
class DoorSettings:
    keys: Keys
    limits: Limits
    log: Path


def middlewares() -> list[Middleware]:
    """What Serve's proxy is to put around itself (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    settings: DoorSettings = pickle.loads(Path(os.environ[VARIABLE]).read_bytes())
    log_to(Sender(settings.log))
    logging.getLogger("everybit.requests").addFilter(_only_here)
    return [Middleware(Door, keys=settings.keys, limits=settings.limits)]


def _only_here(record: logging.LogRecord) -> bool:
    """A replica writes the line of what it answers."""
    return not (isinstance(record.msg, dict) and record.msg.pop("answered", False))


class Door(Edge):
    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        super().__init__(_Guard(app), keys, limits)


class _Guard:
    """Around Serve's application: its errors become ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("/-/"):
            raise Problem(404, f"there is nothing at {scope['path'][:80]!r}")
        line = scope["state"]["line"]
        refused, said = 0, b""
        started = done = stream = gone = False

        async def take() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def answer(message: Message) -> None:
            nonlocal refused, said, started, done, stream
            if message["type"] == "http.response.start":
                headers = [(bytes(name).lower(), bytes(value)) for name, value in message["headers"]]
                if _OURS not in dict(headers):
                    refused = message["status"]
                    return
                started = line["answered"] = True
                stream = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
                message = {**message, "headers": [pair for pair in headers if pair[0] not in _AGAIN]}
            elif refused:
                said += message.get("body", b"")[:500]
                return
            elif message["type"] == "http.response.body":
                done = not message.get("more_body", False)
            await send(message)

        headers = [pair for pair in scope["headers"] if pair[0].lower() not in _SERVES]
        headers.append((b"x-request-id", line["id"].encode()))
        await self._app({**scope, "headers": headers, "state": {}}, take, answer)
        if done:
            return
        if gone:
            raise ConnectionError("the client left")
        problem = _problem(refused, said)
        line["problem"], line["answered"] = problem.message, False
        if stream and started:
            await send({"type": "http.response.body", "body": _frame(scope["path"], problem), "more_body": True})
        if started:
            raise ConnectionError(problem.message)  # the server closes the connection: nobody takes it for whole
        raise problem


def _problem(status: int, said: bytes) -> Problem:
    """What Serve meant; status 0: it said nothing."""
    if status == 404:
        return Problem(503, "no model runs here: the server starts, or shuts down", code="not_ready")
    if status in (429, 503) and b"backpressure" in said.lower():
        return Problem(429, "every replica is full, and so is the queue for them: try again later", code="queue_full")
    if status == 503:
        return Problem(503, "no replica can take a request now: try again later", code="not_ready")
    return Problem(503, "the replica that ran this request ended before it was done: ask again", code="replica_lost")


def _frame(path: str, problem: Problem) -> bytes:
    if path.startswith("/v1/responses"):
        return frame({"type": "error", "code": problem.code, "message": problem.message, "param": None}, event="error")
    return frame(problem.body())
