"""Which engine of which replica gets a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from everybit.errors import SourceError
from everybit.plan.simulate.replica import Replica
from everybit.plan.simulate.requests import Request

Lane = tuple[Replica, int]  # an engine by its replica and place
_OVERLOAD = 1.5  # times the least work, and one prompt, is what affinity may cost


class Router(Protocol):
    def choose(self, request: Request, lanes: Sequence[Lane]) -> Lane: ...


class RoundRobin:
    def __init__(self) -> None:
        self._turn = -1

    def choose(self, request: Request, lanes: Sequence[Lane]) -> Lane:
        self._turn += 1
        return lanes[self._turn % len(lanes)]


class ShortestQueue:
    """Fewest requests, one that waits counting as four that run: the balancer of vLLM's data parallel engines.

    Equals take turns.
    """

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: Request, lanes: Sequence[Lane]) -> Lane:
        loads = [replica.engines[place].load() for replica, place in lanes]
        self._turn += 1
        order = sorted(range(len(lanes)), key=lambda i: (i - self._turn) % len(lanes))
        return lanes[min(order, key=lambda i: 4 * loads[i].waiting + loads[i].running)]


class LeastWork:
    """Fewest tokens yet to be computed. It knows how long answers will be: a bound for what a router can reach."""

    def choose(self, request: Request, lanes: Sequence[Lane]) -> Lane:
        return min(lanes, key=lambda lane: lane[0].work_tokens[lane[1]])


class PrefixAffinity:
    """Where the longest beginning of the prompt, else the session, has been before, unless that one has too much to do.

    Others go where there is least work.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], set[int]] = {}
        self._sessions: dict[int, Lane] = {}

    def choose(self, request: Request, lanes: Sequence[Lane]) -> Lane:
        work = [replica.work_tokens[place] for replica, place in lanes]
        lengths = [self._length(request, lane) for lane in lanes]
        best = max(range(len(lanes)), key=lambda i: (lengths[i], -work[i]))
        if not lengths[best] and request.session is not None and self._sessions.get(request.session) in lanes:
            best = lanes.index(self._sessions[request.session])
        if work[best] > _OVERLOAD * min(work) + request.prompt_tokens:
            best = work.index(min(work))
        replica, place = lanes[best]
        self._seen.setdefault((replica.name, place), set()).update(request.blocks)
        if request.session is not None:
            self._sessions[request.session] = lanes[best]
        return lanes[best]

    def _length(self, request: Request, lane: Lane) -> int:
        seen = self._seen.get((lane[0].name, lane[1]), set())
        return next((n for n, block in enumerate(request.blocks) if block not in seen), len(request.blocks))


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "shortest-queue": ShortestQueue,
    "least-work": LeastWork,
    "prefix-affinity": PrefixAffinity,
}


def make_router(name: str) -> Router:
    """Raises: SourceError"""
    if name not in ROUTERS:
        raise SourceError(f"router {name!r}: expected one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
