"""The simulation: requests arrive, replicas step, and between split pools KV caches travel (Splitwise, ISCA 2024).

Every run of the same input is the same: ties are broken by order, and nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

from everybit.errors import BusyError, EverybitError, RequestError, SourceError
from everybit.plan.simulate.replica import Replica
from everybit.plan.simulate.requests import Outcome, Request, check
from everybit.plan.simulate.router import Lane, RoundRobin, Router


@dataclass(frozen=True)
class Pool:
    """Replicas behind one router, which a request reaches `first_s` after it arrives at the server (HTTP, tokenizing).

    Raises: SourceError
    """

    replicas: tuple[Replica, ...]
    router: Router
    first_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.first_s < math.inf:
            raise SourceError(f"a pool that requests reach after {self.first_s} s: expected 0 or more")
        names = [one.name for one in self.replicas]
        if not names or len(set(names)) < len(names):
            raise SourceError(
                f"a pool of replicas {', '.join(names) or 'none'}: expected one or more, each with its name"
            )

    @property
    def lanes(self) -> list[Lane]:
        return [(one, place) for one in self.replicas for place in range(len(one.engines))]


@dataclass(frozen=True, slots=True)
class Link:
    """What a prefill replica sends KV caches over, one after another; `gbps`: 1e9 bytes/s. Raises: SourceError"""

    gbps: float
    token_bytes: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.gbps < math.inf and 0 <= self.token_bytes < math.inf and 0 <= self.latency_s < math.inf):
            raise SourceError(
                f"a link of {self.gbps} GB/s, {self.token_bytes} bytes a token, {self.latency_s} s: "
                "expected a bandwidth above 0 and the others 0 or more"
            )

    def seconds(self, tokens: int) -> float:
        return self.latency_s + tokens * self.token_bytes / (self.gbps * 1e9)


@dataclass(frozen=True)
class Simulated:
    """`outcomes` in the order of the requests; `transfers_s`: (request, begin, seconds) of KV caches sent."""

    outcomes: tuple[Outcome, ...]
    replicas: tuple[Replica, ...]
    ends_s: float
    transfers_s: tuple[tuple[int, float, float], ...]


def simulate(
    requests: Sequence[Request],
    pool: Pool | Replica,
    *,
    decode: Pool | None = None,
    link: Link | None = None,
    users: int | None = None,
    think_s: float = 0.0,
) -> Simulated:
    """All requests to their end, on replicas that nobody used before.

    `decode`, `link`: `pool` computes prompts and first tokens only, `decode` the rest. `users`: a closed loop in place
    of the arrival times: each sends the next request `think_s` after its answer. A request that can never run, or finds
    the queue full, is refused; its outcome says why. Raises: SourceError
    """
    check(requests)
    if (decode is None) != (link is None):
        raise SourceError("a pool that decodes and a link belong together: give both or neither")
    if users is not None and (users < 1 or not 0 <= think_s < math.inf):
        raise SourceError(f"{users} users who think {think_s} s: expected 1 or more and 0 or more")
    if think_s and users is None:
        raise SourceError(f"{think_s} s of thinking without users: give users")
    pool = pool if isinstance(pool, Pool) else Pool((pool,), RoundRobin())
    return _Run(requests, pool, decode, link, users, think_s).run()


class _Run:
    def __init__(
        self,
        requests: Sequence[Request],
        pool: Pool,
        decode: Pool | None,
        link: Link | None,
        users: int | None,
        think_s: float,
    ) -> None:
        self._pool, self._decode, self._link, self._think_s = pool, decode, link, think_s
        self._replicas = pool.replicas + (decode.replicas if decode else ())
        if len({one.name for one in self._replicas}) < len(self._replicas) or any(one.ran for one in self._replicas):
            raise SourceError("replicas with one name, or that ran before: make new ones for each simulation")
        for side, sends in ((pool, link is not None), (decode, False)):
            if side and any(engine.holds != sends for replica in side.replicas for engine in replica.engines):
                raise SourceError(
                    f"engines {'without' if sends else 'with'} holds in a pool that {'sends' if sends else 'keeps'} KV "
                    "caches: expected holds where, and only where, there is a link to send them over"
                )
        self._outcomes = {one.id: Outcome(one, one.at_s) for one in requests}
        self._homes: dict[int, Lane] = {}
        self._unseen: dict[Replica, list[Outcome]] = {}
        self._links = dict.fromkeys(pool.replicas, 0.0)  # when each is free
        self._transfers: list[tuple[int, float, float]] = []
        self._order = count()
        self._events: list[tuple[float, int, Request, bool]] = []  # arrivals and, True, transfers
        ordered = sorted(requests, key=lambda one: one.at_s)
        self._later = iter(ordered[users:] if users else ())
        for one in ordered[:users]:
            self._ask(0.0 if users else one.at_s, one)
        self._closed = users is not None

    def run(self) -> Simulated:
        now_s = 0.0
        while True:
            step = min(self._replicas, key=lambda one: one.ends_s)
            event_s = self._events[0][0] if self._events else math.inf
            if step.ends_s == event_s == math.inf:
                break
            now_s = min(step.ends_s, event_s)
            touched: dict[Replica, None] = {}
            for replica in self._replicas if step.ends_s == now_s else ():
                if replica.ends_s == now_s:
                    touched[replica] = None
                    for place, tokens in replica.finish():
                        self._tokens(replica, place, tokens, now_s)
            while self._events and self._events[0][0] <= now_s:
                _, _, request, transfer = heappop(self._events)
                for lane in self._transferred(request, now_s) if transfer else self._arrived(request, now_s):
                    touched[lane[0]] = None
            for replica in touched:
                idle = replica.ends_s == math.inf
                started = replica.start(now_s)
                if idle:
                    for outcome in self._unseen.pop(replica, ()):
                        outcome.seen_s = now_s if outcome.seen_s is None else outcome.seen_s
                for id, cached in started:
                    outcome = self._outcomes[id]
                    if outcome.begin_s is None:
                        outcome.begin_s, outcome.cached_tokens = now_s, cached
        stuck = [id for id, one in self._outcomes.items() if not one.complete and not one.refused]
        if stuck:
            raise EverybitError(f"requests {stuck[:5]} never ended: the simulator lost them")
        return Simulated(tuple(self._outcomes.values()), self._replicas, now_s, tuple(self._transfers))

    def _ask(self, at_s: float, request: Request) -> None:
        self._outcomes[request.id].at_s = at_s
        self._push(at_s + self._pool.first_s, request)

    def _push(self, at_s: float, request: Request, transfer: bool = False) -> None:
        heappush(self._events, (at_s, next(self._order), request, transfer))

    def _tokens(self, replica: Replica, place: int, tokens: Sequence[tuple[int, int | None]], now_s: float) -> None:
        outcomes, work = self._outcomes, 0
        for id, bits in tokens:
            outcome = outcomes[id]
            times_s, request = outcome.times_s, outcome.request
            work += 1 if times_s else 1 + request.prompt_tokens
            times_s.append(now_s)
            outcome.bits.append(bits)
            if len(times_s) == request.output_tokens:
                if self._link is not None and len(times_s) == 1:
                    replica.engines[place].release(id)
                self._ended(now_s)
            elif self._link is not None and len(times_s) == 1:
                begin_s = max(now_s, self._links[replica])
                seconds = self._link.seconds(request.prompt_tokens)
                self._links[replica] = begin_s + seconds
                self._transfers.append((id, begin_s, seconds))
                self._push(begin_s + seconds, request, True)
        replica.work_tokens[place] -= work

    def _ended(self, now_s: float) -> None:
        """A user of a closed loop thinks, and asks again."""
        if self._closed and (request := next(self._later, None)) is not None:
            self._ask(now_s + self._think_s, request)

    def _arrived(self, request: Request, now_s: float) -> list[Lane]:
        asked = replace(request, output_tokens=1) if self._link else request
        return self._submit(asked, self._pool, now_s, 0)

    def _transferred(self, request: Request, now_s: float) -> list[Lane]:
        """The prefill replica has room again, and a decode replica has work."""
        assert self._decode is not None
        replica, place = self._homes[request.id]
        replica.engines[place].release(request.id)
        return [(replica, place), *self._submit(request, self._decode, now_s, 1)]

    def _submit(self, request: Request, pool: Pool, now_s: float, produced: int) -> list[Lane]:
        replica, place = pool.router.choose(request, pool.lanes)
        outcome = self._outcomes[request.id]
        outcome.replica = replica.name
        try:
            replica.submit(place, request, now_s, produced)
        except (RequestError, BusyError) as error:
            outcome.refused = str(error)
            self._ended(now_s)
            return []
        self._homes[request.id] = (replica, place)
        self._unseen.setdefault(replica, []).append(outcome)
        return [(replica, place)]
