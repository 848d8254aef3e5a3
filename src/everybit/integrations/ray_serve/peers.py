"""What concerns all replicas, though a request reaches but one: metrics, status, and the switch of a running request.

Each replica listens on a socket in a folder that only the server's user can enter, and asks the others' there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from everybit.server.edge import Edge
from everybit.server.problems import Problem

HEADER = b"x-everybit-replica"
ANSWER_S = 5.0
_SWITCH = re.compile(r"/v1/requests/[!-.0-~]+/precision")  # it goes into the head of a request as it is
_LOWEST = ("bits_now",)  # of these the lowest stands for all replicas; other numbers add up


class Peers:
    """Puts itself between a replica's edge and its application. `name`: the replica's, and its socket's."""

    def __init__(self, edge: Edge, name: str, folder: Path) -> None:
        self._app, self.name, self._folder = edge.app, name, folder
        self._for_peers = Edge(self._silent, edge.keys, edge.limits)
        edge.app = self
        logging.getLogger("everybit.requests").addFilter(_not_of_peers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with self._listening():
                await self._app(scope, receive, send)
            return
        scope["state"]["line"]["replica"] = self.name

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER, self.name.encode())]}
            await send(message)

        method, path = scope["method"], scope["path"]
        switch = method == "POST" and _SWITCH.fullmatch(path) is not None
        if switch or (method, path) in (("GET", "/metrics"), ("GET", "/status")):
            body = (await receive()).get("body", b"") if switch else b""
            found = await self._ask(method, path, dict(scope["headers"]).get(b"authorization", b""), body)
            answer = _metrics(found) if path == "/metrics" else _status(found) if path == "/status" else _one_of(found)
            await answer(scope, receive, signed)
            return
        await self._app(scope, receive, signed)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        path = self._folder / f"{self.name}.sock"
        config = uvicorn.Config(
            self._for_peers,
            uds=str(path),
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve())
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.wait([task], timeout=ANSWER_S)
            path.unlink(missing_ok=True)

    async def _silent(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The replica that was asked first writes the line."""
        scope["state"]["line"]["peer"] = True
        await self._app(scope, receive, send)

    async def _ask(self, method: str, path: str, key: bytes, body: bytes) -> dict[str, tuple[int, bytes]]:
        """Status and body of every replica's answer, this one's too; of those that answer."""
        sockets = sorted(self._folder.glob("*.sock"))
        head = f"{method} {path} HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nauthorization: "
        request = head.encode("latin-1", "replace") + key + b"\r\n\r\n" + body
        found = await asyncio.gather(*(_exchange(path, request) for path in sockets), return_exceptions=True)
        return {
            one.stem: answer
            for one, answer in zip(sockets, found, strict=True)
            if not isinstance(answer, BaseException)
        }


def _not_of_peers(record: logging.LogRecord) -> bool:
    return not (isinstance(record.msg, dict) and record.msg.get("peer"))


async def _exchange(path: Path, request: bytes) -> tuple[int, bytes]:
    """Raises: OSError, TimeoutError, ValueError; also where a replica has died and left its socket"""
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(request)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    return int(head.split(b" ", 2)[1]), body


def _metrics(found: Mapping[str, tuple[int, bytes]]) -> Response:
    texts = {name: body.decode() for name, (status, body) in found.items() if status == 200}
    return Response(merge_metrics(texts), media_type="text/plain; version=0.0.4")


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Every replica's metrics, with its name as one more label."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]

    class All:
        def collect(self) -> Iterator[Metric]:
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(All())
    return generate_latest(registry)


def _status(found: Mapping[str, tuple[int, bytes]]) -> Response:
    each = {name: json.loads(body)["models"] for name, (status, body) in found.items() if status == 200}
    return JSONResponse({"models": merge_status(list(each.values())), "replicas": each})


def merge_status(each: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all replicas as if they were one server's."""
    names = list(dict.fromkeys(name for one in each for name in one))
    return {name: _merged(name, [one[name] for one in each if name in one]) for name in names}


def _merged(name: str, values: list[Any]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        return merge_status(values)
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return min(values) if name in _LOWEST else round(sum(values), 2)
    return values[0]


def _one_of(found: Mapping[str, tuple[int, bytes]]) -> Response:
    """The answer of the replica where the request runs; where it runs nowhere, anyone's."""
    if not found:
        raise Problem(503, "no replica answers: try again later", code="not_ready")
    status, body = min(found.values(), key=lambda one: one[0] == 404)
    return Response(body, status, media_type="application/json")
