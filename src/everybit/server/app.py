"""The HTTP server as an ASGI application: which path does what."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from everybit import __version__
from everybit.engine.plan import Plan
from everybit.errors import EverybitError, RequestError
from everybit.server import answers, fields, planning
from everybit.server.answers import described
from everybit.server.asking import Asking
from everybit.server.chat import chat, read_messages, render
from everybit.server.completions import complete, read_prompts
from everybit.server.edge import Edge, Limits
from everybit.server.generation import Live
from everybit.server.keys import Keys
from everybit.server.metrics import Metrics
from everybit.server.problems import Problem, problem_of
from everybit.server.responses import respond
from everybit.server.served import Served, find
from everybit.server.stream import Gone
from everybit.server.worker import Worker

_TYPE = re.compile(r"(str|int)$|(list|dict|constrained-\w+)\[")  # pydantic's names of the types a field may have
PAGE = Path(__file__).parent / "page"


@dataclass
class Settings:
    """`queue`: sequences that may wait, for each model; `strict`: unknown fields are refused."""

    queue: int = 1024
    timeout_s: float = 600
    strict: bool = False
    keys: Keys = field(default_factory=lambda: Keys([]))
    limits: Limits = field(default_factory=Limits)
    lost_lines: Callable[[], int] = lambda: 0


class _Request(Request):
    async def json(self) -> Any:
        return self.state.json  # the edge has read it


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_json(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return with_json


class Server:
    """The application (`app`, ASGI) around opened models. The worker runs between the application's start and stop."""

    def __init__(self, models: dict[str, Served], settings: Settings) -> None:
        self.models, self.settings, self.metrics = models, settings, Metrics()
        self.worker: Worker | None = None
        self.live: Live | None = None
        self.edge = Edge(self._routes(), settings.keys, settings.limits)
        self.app = self.edge

    @property
    def draining(self) -> bool:
        return self.edge.draining

    @property
    def busy(self) -> bool:
        return self.live is not None and bool(self.live.generations)

    def drain(self, grace_s: float) -> None:
        """Nothing new is taken; what still runs after `grace_s` ends with an error. To be called in the event loop."""
        if self.draining:
            return
        self.edge.draining = True
        problem = Problem(503, "the server is shutting down", code="draining")
        if self.live is not None:
            asyncio.get_running_loop().call_later(grace_s, self.live.end, problem)

    @asynccontextmanager
    async def running(self, app: FastAPI | None = None) -> AsyncIterator[None]:
        """The models run; the application's lifespan."""
        batchers = {name: served.batcher for name, served in self.models.items()}
        loop = asyncio.get_running_loop()
        self.worker = Worker(batchers, loop, lambda name, events: self.metrics.step(self.models[name], events))
        self.live = Live(self.worker, self.settings.timeout_s)
        self.worker.start()
        try:
            yield
        finally:
            self.live.end(Problem(503, "the server is shutting down", code="draining"))
            await asyncio.to_thread(self.worker.stop)

    def _ready(self) -> Problem | None:
        if self.worker is None or self.live is None or not self.worker.alive:
            return Problem(503, "the models do not run", code="not_ready")
        if self.draining:
            return Problem(503, "the server is shutting down", code="draining")
        if any(self.live.sequences(served) >= served.batcher.capacity for served in self.models.values()):
            return Problem(503, "the queue is full", code="queue_full")
        return None

    def _asking(self, request: Request, body: fields.Common) -> Asking:
        if self.live is None or self.worker is None or not self.worker.alive:
            raise Problem(503, "the models do not run", code="not_ready")
        return Asking(request, body, self.models, self.live, self.settings.strict)

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="everybit",
            version=__version__,
            description="OpenAI-compatible; every precision from one set of weights.",
            lifespan=self.running,
            redoc_url=None,
            docs_url=None,
            redirect_slashes=False,
        )
        app.router.route_class = _Route
        for error in (RequestValidationError, HTTPException, EverybitError, Problem, Gone, Exception):
            app.add_exception_handler(error, _handle)

        @app.post("/v1/completions", responses=described(answers.CompletionAnswer, streams=True))
        async def completions(body: fields.CompletionRequest, request: Request) -> Response:
            return await complete(self._asking(request, body), body, self.metrics)

        @app.post("/v1/chat/completions", responses=described(answers.ChatAnswer, streams=True))
        async def chat_completions(body: fields.ChatRequest, request: Request) -> Response:
            return await chat(self._asking(request, body), body, self.metrics)

        @app.post("/v1/responses", responses=described(answers.ResponsesAnswer, streams=True))
        async def responses(body: fields.ResponsesRequest, request: Request) -> Response:
            return await respond(self._asking(request, body), body, self.metrics)

        @app.post("/v1/embeddings", responses=described())
        async def embeddings(body: fields.EmbeddingsRequest) -> Response:
            served, _ = find(self.models, body.model)
            raise Problem(
                400,
                f"{served.name} writes text and makes no embeddings: use a model that was trained for them",
                param="model",
                code="unsupported_model",
            )

        @app.get("/v1/models", responses=described(answers.ModelsAnswer))
        async def models() -> Response:
            cards = [card for served in self.models.values() for card in served.cards()]
            return JSONResponse({"object": "list", "data": cards})

        @app.get("/v1/models/{name:path}", responses=described(answers.ModelAnswer))
        async def model(name: str) -> Response:
            served, precision = find(self.models, name)
            card = next((card for card in served.cards() if card["id"] == name), served.cards()[0])
            about = {**card["everybit"], "alias_of": None if precision is None else served.name}
            return JSONResponse({**card, "id": name, "precision": precision, "everybit": about})

        @app.post("/v1/requests/{id}/precision", responses=described(answers.SwitchAnswer))
        async def switch(id: str, body: fields.SwitchRequest, request: Request) -> Response:
            """A request that runs goes on at another precision, from its next token on."""
            generation = self.live.generations.get(id) if self.live else None
            if generation is None or generation.key != request.state.key.name:
                raise Problem(404, f"no request {id[:80]!r} runs", param="id", code="request_not_found")
            bits = generation.ask.served.precision(body.precision)
            if not isinstance(bits, (int, Plan)):
                raise RequestError("precision", "is auto: a request that runs can be given a fixed one only")
            changed = await generation.set_bits(bits, body.recompute)
            return JSONResponse({"id": id, "precision": body.precision, "sequences": changed})

        @app.post("/tokenize", responses=described(answers.TokensAnswer))
        async def tokenize(body: fields.TokenizeRequest) -> Response:
            served = self._named(body.model)
            if (body.prompt is None) == (body.messages is None):
                raise RequestError("prompt", "or messages: expected one of them")

            def find_tokens() -> list[int]:
                if body.messages is not None:
                    return render(served, read_messages(body.messages), None)
                if body.add_special_tokens:
                    return read_prompts(served, body.prompt or "")[0][0]
                return served.tokenizer.encode(body.prompt or "", add_special_tokens=False)

            tokens = await asyncio.to_thread(find_tokens)
            return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": served.runtime.context})

        @app.post("/detokenize", responses=described(answers.TextAnswer))
        async def detokenize(body: fields.DetokenizeRequest) -> Response:
            served = self._named(body.model)
            tokens = served.tokens(body.tokens, "tokens")
            text = await asyncio.to_thread(served.tokenizer.decode, tokens, skip_special_tokens=False)
            return JSONResponse({"prompt": text})

        @app.get("/tokenizer_info", responses=described(answers.TokenizerAnswer))
        async def tokenizer_info(model: str | None = None) -> Response:
            """What lm-eval asks for, and /tokenize without a model, where it was given no tokenizer of its own."""
            served = self._named(model)
            first, ends = served.tokenizer.encode("")[:1], served.tokenizer.eos_ids
            bos_token = served.token_text(first[0]) if first else None
            eos_token = served.token_text(min(ends)) if ends else None
            template = served.template.source if served.template else None
            return JSONResponse({"bos_token": bos_token, "eos_token": eos_token, "chat_template": template})

        @app.get("/health")
        async def health() -> Response:
            return JSONResponse({"status": "alive", "version": __version__})

        @app.get("/ready", responses=described())
        async def ready() -> Response:
            if (problem := self._ready()) is not None:
                raise problem
            return JSONResponse({"status": "ready", "models": list(self.models)})

        @app.get("/metrics", responses=described(), response_class=PlainTextResponse)
        async def metrics() -> Response:
            counts = await self._counts()
            text = self.metrics.text(self.models, counts, self.settings.lost_lines())
            return Response(text, media_type="text/plain; version=0.0.4")

        @app.get("/status", responses=described())
        async def status() -> Response:
            counts = await self._counts()
            queue = self.settings.queue
            found = {n: self.metrics.status(s, counts[n], queue) for n, s in self.models.items()}
            return JSONResponse({"models": found})

        @app.get("/", include_in_schema=False)
        async def page() -> Response:
            return FileResponse(PAGE / "index.html")

        @app.get("/page/{name}", include_in_schema=False)
        async def asset(name: str) -> Response:
            known = {path.name: path for folder in (PAGE, planning.PAGE) for path in folder.iterdir() if path.is_file()}
            if name not in known:
                raise Problem(404, f"there is no {name[:80]!r} on the page")
            return FileResponse(known[name])

        planning.add_routes(app)
        answers.describe_keys(app, bool(self.settings.keys))
        return app

    def _named(self, model: str | None) -> Served:
        """None where there is one model. Raises: Problem"""
        if model is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if model is None:
            raise RequestError("model", f"is missing, expected one of {', '.join(self.models)}")
        return find(self.models, model)[0]

    async def _counts(self) -> dict[str, Any]:
        if self.worker is None or not self.worker.alive:
            raise Problem(503, "the models do not run", code="not_ready")
        return dict(self.worker.counts)


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        problem = _validation(error)
    elif isinstance(error, HTTPException):
        problem = Problem(error.status_code, _status_text(request, error), headers=error.headers)
    elif isinstance(error, Gone):
        request.state.line["problem"] = "the client left"
        return Response(status_code=499)
    else:
        problem = problem_of(error)
    if problem.status >= 500:
        request.state.line["problem"] = f"{type(error).__name__}: {error}"[:500]
    return JSONResponse(problem.body(), problem.status, headers=problem.headers)


def _validation(error: RequestValidationError) -> Problem:
    """The first thing that is wrong, without what was sent: it may be long, or secret."""
    first = error.errors()[0]
    parts = itertools.takewhile(lambda part: not _TYPE.match(part), map(str, first["loc"][1:]))
    where = ".".join(part[:40] for part in parts)[:200]
    return Problem(400, f"{where or 'the body'}: {first['msg']}", param=where or None, code="invalid_value")


def _status_text(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is nothing at {request.url.path[:80]!r}: see /openapi.json"
    return f"{request.method} {request.url.path[:80]}: {error.detail}"
