"""What every request passes first: its id, whose it is, how large it may be; and the line that the log gets of it.

Pure ASGI: a streamed piece costs two calls more here, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everybit.server.jsonbody import read_json
from everybit.server.keys import Key, Keys
from everybit.server.log import write
from everybit.server.problems import Problem, problem_of

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPEN = ("/health", "/ready", "/", "/plan", "/page/", "/openapi.json", "/docs")  # without a key
GENERATES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")  # what a key's concurrency counts
_SECURE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
]


@dataclass(frozen=True)
class Limits:
    """`hosts`: the names under which the server may be asked for; empty: any."""

    body_bytes: int = 4 << 20
    body_s: float = 30
    depth: int = 64
    send_s: float = 60
    hosts: Collection[str] = ()


def _nothing() -> None:
    pass


class Edge:
    """`draining` refuses what is new while what runs is finished.

    In the state of a request's scope: `line` of the log, `key`, and what its body says, `json`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        line: dict[str, Any] = {"id": id, "method": scope["method"], "path": scope["path"][:200]}
        scope["state"] = {**scope.get("state", {}), "line": line}
        began, status, started, key = time.perf_counter(), 0, False, None

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                extra = [(b"x-request-id", id.encode()), *_SECURE]
                message = {**message, "headers": [*message["headers"], *extra]}
            try:
                async with asyncio.timeout(self.limits.send_s):
                    await send(message)
            except TimeoutError:
                line["problem"] = "the client does not read"
                scope["state"].get("abort", _nothing)()
                raise ConnectionError("the client does not read") from None

        try:
            key = self._admit(scope, headers)
            if key is not None:
                line["key"] = key.name
                scope["state"]["key"] = key
                key.running += scope["path"] in GENERATES
            if scope["method"] == "POST":
                body = await self._body(headers, receive)
                scope["state"]["json"] = read_json(body, self.limits.depth)
                receive = _replay(body, receive)
            await self.app(scope, receive, answer)
        except ConnectionError as error:  # nobody is there to be told
            line.setdefault("problem", str(error))
            status = status or 499
        except Exception as error:
            problem = problem_of(error)
            if not isinstance(error, Problem):
                line["problem"] = f"{type(error).__name__}: {error}"[:500]
            if not started:
                with contextlib.suppress(ConnectionError):
                    await send_problem(problem, answer)
        finally:
            if key is not None:
                key.running -= scope["path"] in GENERATES
            line["status"], line["s"] = status, round(time.perf_counter() - began, 6)
            write(line)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> Key | None:
        """The key of the request; None where none is needed. Raises: Problem"""
        path = scope["path"]
        if self.limits.hosts and _host(headers.get(b"host", b"")) not in self.limits.hosts:
            raise Problem(
                403,
                f"the server was asked for as {headers.get(b'host', b'').decode('latin-1')[:80]!r}: expected one of "
                f"{', '.join(sorted(self.limits.hosts))}, or start it with --allow-host",
            )
        if path in OPEN or path.startswith("/page/"):
            return None
        key = self.keys.find(headers.get(b"authorization", b"").decode("latin-1"))
        if key is None:
            raise Problem(
                401,
                "no valid API key arrived: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            if self.draining:
                raise Problem(503, "the server is shutting down: ask another", code="draining")
            if path in GENERATES and key.running >= key.concurrency:
                raise Problem(429, f"{key.running} requests of this key run, {key.concurrency} may", code="key_busy")
            if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
                raise Problem(415, "expected Content-Type: application/json")
        return key

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most, body = self.limits.body_bytes, bytearray()
        too_large = Problem(413, f"the body has more than {most} bytes, the most that is taken", code="too_large")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError("the client left before its request was complete")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Problem(408, f"the body took more than {self.limits.body_s:g} s") from None
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, and then what comes after it."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def again() -> Message:
        nonlocal first
        if first is not None:
            message, first = first, None
            return message
        return await receive()

    return again


def _host(header: bytes) -> str:
    """The host without its port."""
    text = header.decode("latin-1").lower()
    return text[1 : text.index("]")] if text.startswith("[") and "]" in text else text.partition(":")[0]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def send_problem(problem: Problem, send: Send) -> None:
    body = json.dumps(problem.body()).encode()
    headers = [(name.encode(), value.encode()) for name, value in problem.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
