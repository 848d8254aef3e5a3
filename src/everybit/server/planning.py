"""Plans over HTTP: `everybit plan` for the page at /plan, one at a time, in a thread beside what the server serves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI
from starlette.responses import FileResponse, JSONResponse, Response

from everybit.errors import EverybitError
from everybit.server.answers import described
from everybit.server.planning_fields import EstimateFields, FleetFields, SimulateFields, Width
from everybit.server.problems import Problem

PAGE = Path(__file__).parent / "plan_page"
LIMIT_S = 10.0
_LATE_S = 1.0  # what a plan may take beyond it until it looks at the clock
_RESPONSES = {**described(), 501: {**described()[500], "description": "A package that plans need is not installed"}}


class Deadline:
    """A thread cannot be stopped from outside: plans look here between their steps."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._end = limit_s, time.monotonic() + limit_s

    def check(self) -> None:
        """Raises: Problem"""
        if time.monotonic() > self._end:
            raise self.problem()

    @property
    def left_s(self) -> float:
        return max(0.1, self._end - time.monotonic())

    def problem(self) -> Problem:
        return Problem(504, f"the plan takes more than {self._limit_s:g} s: ask for less of it", code="plan_too_long")


class Desk:
    """Where plans are made, one at a time; one that is late blocks the next ones until it has really ended."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s, self._busy = limit_s, False

    async def plan(self, work: Callable[[Deadline], dict[str, Any]]) -> Response:
        """The JSON of what `work` makes. Raises: Problem"""
        if self._busy:
            raise Problem(429, "another plan is being made: ask again when it is done", code="plan_busy")
        self._busy = True
        deadline = Deadline(self._limit_s)
        running = asyncio.ensure_future(asyncio.to_thread(_json, work, deadline))
        running.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(self._limit_s + _LATE_S):
                return Response(await asyncio.shield(running), media_type="application/json")
        except TimeoutError:
            raise deadline.problem() from None

    def _ended(self, running: asyncio.Future[bytes]) -> None:
        self._busy = False
        if not running.cancelled():
            running.exception()  # of one that was late nobody else asks


def add_routes(app: FastAPI) -> None:
    """Mutates: app"""
    desk = Desk()

    @app.get("/plan", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "plan.html")

    @app.get("/plan/choices", responses=_RESPONSES)
    async def choices() -> Response:
        """Models, cards and widths that plans are made of."""
        return JSONResponse(await asyncio.to_thread(_choices))

    @app.post("/plan/estimate", responses=_RESPONSES)
    async def estimates(body: EstimateFields) -> Response:
        """Latency, throughput, money and energy of each card and width, and what binds them."""

        def work(deadline: Deadline) -> dict[str, Any]:
            from everybit.server.planning_work import estimate_all

            return estimate_all(body, deadline)

        return await desk.plan(work)

    @app.post("/plan/fleet", responses=_RESPONSES)
    async def fleet(body: FleetFields) -> Response:
        """The cheapest fleet for a demand; not simulated."""

        def work(deadline: Deadline) -> dict[str, Any]:
            from everybit.server.planning_work import solve_fleet

            return solve_fleet(body, deadline)

        return await desk.plan(work)

    @app.post("/plan/simulate", responses=_RESPONSES)
    async def simulation(body: SimulateFields) -> Response:
        """A deployment step by step, and when each request was queued, read and answered."""

        def work(deadline: Deadline) -> dict[str, Any]:
            from everybit.server.planning_work import run_simulation

            return run_simulation(body, deadline)

        return await desk.plan(work)


@contextmanager
def blame(param: str | None) -> Iterator[None]:
    """Whatever of ours is raised within is the fault of this field. Raises: Problem"""
    try:
        yield
    except EverybitError as error:
        raise Problem(400, str(error), param=param, code="invalid_value") from None


def _json(work: Callable[[Deadline], dict[str, Any]], deadline: Deadline) -> bytes:
    try:
        with blame(None):
            found = work(deadline)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "scipy":
            raise
        said = "this plan needs scipy, which the server lacks: pip install 'everybit[plan]' there"
        raise Problem(501, said, code="not_installed") from None
    return json.dumps(found, allow_nan=False).encode()


def _choices() -> dict[str, Any]:
    from everybit.plan.hardware import cards, read_hardware, weakest
    from everybit.plan.model import models

    found = []
    for name in cards():
        card = read_hardware(name)
        if card.plannable:
            prices = [one for one in card.prices if one.kind == "on-demand"]
            found.append(
                {
                    "card": name,
                    "name": card.name,
                    "kind": card.kind,
                    "memory_bytes": card.main_memory.bytes,
                    "usd_per_h": card.price().usd_per_h if prices else None,
                    "known": weakest(card),
                }
            )
    return {"models": models(), "cards": found, "bits": list(get_args(Width))}
