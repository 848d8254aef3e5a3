"""The mock server: which answer a request gets, who is served at once, and each byte at its time.

Times are absolute: what is due is computed from the request's begin, so lateness of one write moves no other, and a
slot that is handed on begins when the answer before it should have ended.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from everybit.bench.mock.asks import PATHS, read_ask, read_body
from everybit.bench.mock.connection import Connection, Request
from everybit.bench.mock.forms import FORMS
from everybit.bench.mock.refusals import Refusal, whole
from everybit.bench.mock.script import HIGHEST_BITS, LOWEST_BITS, Script
from everybit.bench.mock.timing import Write, beats, piece, stream
from everybit.bench.mock.truth import TRUTH, Truth
from everybit.bench.records import SECOND
from everybit.errors import SourceError, reason

_BACKLOG = 1024


@dataclass(slots=True)
class _Answer:
    """`truth`: of a request for text. `serves`: it takes a slot. `cut`: the connection ends with it."""

    writes: Iterator[Write]
    truth: Truth | None = None
    serves: bool = False
    cut: bool = False


class Mock:
    """A server of `script` on the running event loop."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._truth: list[Truth] = []
        self._frozen = (0, 0)  # from, to
        self._busy = 0
        self._waiting: deque[_Running] = deque()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Returns the port. Raises: SourceError"""
        context = None
        if self.script.tls_certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(self.script.tls_certificate, self.script.tls_key)
            except OSError as error:
                raise SourceError(f"{self.script.tls_certificate}: no TLS certificate with its key ({error})") from None
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._handle, self._connections), host, port, ssl=context, backlog=_BACKLOG
            )
        except (OSError, OverflowError) as error:
            raise SourceError(f"{host}:{port}: cannot listen there ({reason(error)}): give another port") from None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Ends all connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def truth(self) -> list[Truth]:
        """Of all requests for text since the begin or `reset`, in the order they came."""
        return list(self._truth)

    def reset(self) -> None:
        """The next request is the first again."""
        self._truth, self._frozen = [], (0, 0)

    def thaw(self, due_ns: int) -> int:
        """When what is due can be written."""
        begin, end = self._frozen
        return end if begin <= due_ns < end else due_ns

    def release(self, at_ns: int) -> None:
        """A slot is free."""
        self._busy -= 1
        if self._waiting:
            self._busy += 1
            self._waiting.popleft().begin(at_ns)

    def leave(self, running: _Running) -> None:
        """One that waited for a slot is gone."""
        self._waiting.remove(running)

    def _handle(self, connection: Connection, request: Request) -> _Running:
        answer = self._answer(request)
        running = _Running(self, connection, request.arrived_ns, answer)
        if not answer.serves:
            running.begin(request.arrived_ns)
        elif self._full:
            self._waiting.append(running)
        else:
            self._busy += 1
            running.begin(request.arrived_ns)
        return running

    @property
    def _full(self) -> bool:
        return self.script.slots is not None and self._busy >= self.script.slots

    def _answer(self, request: Request) -> _Answer:
        asks = request.method == "POST" and request.path in PATHS
        truth = self._note(request) if asks else None
        headers = {"x-request-id": request.headers["x-request-id"]} if "x-request-id" in request.headers else {}
        try:
            self._require_key(request)
            if truth is not None:
                return self._text(request, truth, headers)
            data = self._other(request, headers)
        except Refusal as refusal:
            if refusal.status in (429, 503):
                headers["retry-after"] = f"{self.script.retry_after_s:g}"
            if truth is not None:
                truth.status = refusal.status
            data = whole(refusal.status, refusal.document(), headers)
        return _Answer(iter([(0, data, 0)]), truth)

    def _note(self, request: Request) -> Truth:
        if not self._truth and self.script.freeze is not None:
            begin, length = (round(s * SECOND) for s in self.script.freeze)
            self._frozen = (request.arrived_ns + begin, request.arrived_ns + begin + length)
        id = request.headers.get("x-request-id", "")
        self._truth.append(Truth(len(self._truth) + 1, id, request.path, request.arrived_ns))
        return self._truth[-1]

    def _require_key(self, request: Request) -> None:
        wanted = self.script.key
        if wanted is not None and request.path.startswith("/v1/"):
            given = request.headers.get("authorization", "")
            if given.removeprefix("Bearer ").strip() != wanted:
                raise Refusal(401, "the key is missing or wrong", "invalid_api_key")

    def _text(self, request: Request, truth: Truth, headers: dict[str, str]) -> _Answer:
        script = self.script
        body = read_body(request.body)
        truth.id = truth.id or str(body.get("user") or "")
        if script.status is not None and truth.number % script.status_every == 0:
            raise Refusal(script.status, f"the script wants {script.status}", "scripted_status")
        ask = read_ask(script, request.path, body)
        if self._full and script.queue is not None and len(self._waiting) >= script.queue:
            raise Refusal(429, f"{len(self._waiting)} others wait", "queue_full")
        form = FORMS[request.path](script, ask, f"mock-{truth.number}")
        times = beats(script, truth.number, ask.prompt_tokens)
        if not ask.stream and script.end == "error":
            truth.status = 500
        writes = (stream if ask.stream else piece)(script, form, times, headers)
        return _Answer(writes, truth, serves=True, cut=script.end == "cut")

    def _other(self, request: Request, headers: dict[str, str]) -> bytes:
        match request.method, request.path:
            case "GET", "/health":
                return whole(200, {"status": "ok"}, headers)
            case "GET", "/v1/models":
                aliases = ["", *(f"@{bits}bit" for bits in range(LOWEST_BITS, HIGHEST_BITS + 1))]
                names = [name + alias for name in self.script.models for alias in aliases]
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "mock"} for name in names]
                return whole(200, {"object": "list", "data": models}, headers)
            case "GET", path if path == TRUTH:
                return whole(200, [one.document() for one in self._truth], headers)
            case "DELETE", path if path == TRUTH:
                self.reset()
                return whole(200, [], headers)
        raise Refusal(404, f"no {request.method} {request.path[:80]} here")


class _Running:
    """An answer on its way: one write after another, each when it is due."""

    def __init__(self, mock: Mock, connection: Connection, arrived_ns: int, answer: _Answer) -> None:
        self._mock, self._connection, self._arrived_ns, self._answer = mock, connection, arrived_ns, answer
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._next: Write | None = None
        self._begun_ns = 0  # not yet
        self._last_ns = 0  # when the write before was due

    def begin(self, at_ns: int) -> None:
        self._begun_ns = self._last_ns = max(at_ns, self._arrived_ns)
        if self._answer.truth is not None and self._answer.serves:
            self._answer.truth.started_ns = self._begun_ns
        self._next = next(self._answer.writes, None)
        # Not at once: answers that are late hand their slot on one in another, without end.
        self._timer = self._loop.call_soon(self._step)

    def resume(self) -> None:
        if self._begun_ns and self._timer is None:
            self._step()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._begun_ns:
            self._mock.leave(self)
        elif self._answer.serves:
            self._mock.release(time.perf_counter_ns())

    def _step(self) -> None:
        """Writes all that is due."""
        self._timer = None
        while self._next is not None:
            if self._connection.paused:
                return
            at, data, tokens = self._next
            due = self._begun_ns + at
            now = time.perf_counter_ns()
            if (wait := self._mock.thaw(due) - now) > 0:
                self._timer = self._loop.call_later(wait / SECOND, self._step)
                return
            self._connection.transport.write(data)
            if tokens and self._answer.truth is not None:
                self._answer.truth.due_ns.extend([due] * tokens)
                self._answer.truth.written_ns.extend([now] * tokens)
            self._last_ns = due
            self._next = next(self._answer.writes, None)
        if self._answer.truth is not None:
            self._answer.truth.ended_ns = time.perf_counter_ns()
        if self._answer.serves:
            self._mock.release(self._last_ns)
        self._connection.finish(self._answer.cut)
