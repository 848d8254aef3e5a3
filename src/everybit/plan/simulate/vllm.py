"""A scheduler in the manner of vLLM's v1 engine (its documentation and Kwon et al., SOSP 2023), written anew.

A step has `budget` tokens. Running sequences get theirs first, in the order of their admission, then waiting ones are
admitted while tokens, places and KV blocks last; prompts are cut to fit (chunked prefill). Where blocks run out the
last admitted is put back at the head of the queue and computed again. Full blocks stay cached until others need them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from everybit.errors import RequestError, SourceError
from everybit.plan.simulate.engine import Batch, Load, Pass
from everybit.plan.simulate.requests import BLOCK_TOKENS, Request
from everybit.plan.step import Step

Key = tuple[int, int]


class _Sequence:
    """`known` tokens it has; `computed` of them, those in flight included, are in the KV cache.

    `blocks`: how many it holds, the first `shared` under keys that others may find. `flying`: tokens on their way.
    """

    __slots__ = ("blocks", "computed", "epoch", "flying", "known", "last", "request", "running", "shared", "started")

    def __init__(self, request: Request, produced: int) -> None:
        self.request = request
        self.known = request.prompt_tokens + produced
        self.last = request.prompt_tokens + request.output_tokens
        self.computed = max(0, self.known - 1) if produced else 0
        self.blocks = self.shared = self.flying = self.epoch = 0
        self.running = False
        self.started = bool(produced)


class Vllm:
    """`blocks` of `block_tokens` tokens; `context` tokens a sequence; `most` run at once, of `budget` tokens a step.

    `caching`: full blocks are found again by equal beginnings. `overlaps`: asynchronous scheduling. `holds`: blocks of
    a finished request stay taken until `release`. Raises: SourceError
    """

    def __init__(
        self,
        *,
        blocks: int,
        context: int,
        block_tokens: int = 16,
        budget: int = 2048,
        most: int = 256,
        caching: bool = True,
        overlaps: bool = True,
        holds: bool = False,
    ) -> None:
        if min(blocks, context, block_tokens, budget, most) < 1:
            raise SourceError(
                f"{blocks} blocks of {block_tokens}, context {context}, budget {budget}, most {most}: expected 1 or "
                "more of each"
            )
        self.overlaps = overlaps
        self._total, self._size, self._context, self._budget, self._most = blocks, block_tokens, context, budget, most
        self._caching, self.holds = caching, holds
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # in the order of admission
        self._held: dict[int, _Sequence] = {}
        self._flights: deque[list[tuple[_Sequence, int]]] = deque()
        self._free = blocks
        self._holders: dict[Key, int] = {}
        self._unused: OrderedDict[Key, None] = OrderedDict()  # cached, the longest unused first
        self._preempted = 0

    def submit(self, request: Request, now_s: float, produced: int = 0) -> None:
        prompt, more = request.prompt_tokens, request.output_tokens
        needed = -(-(prompt + more - 1) // self._size)  # the last token is never computed: nothing follows it
        if prompt + more > self._context or needed > self._total:
            raise RequestError(
                "request",
                f"{request.id}: a prompt of {prompt} tokens and {more} more are {prompt + more} tokens in {needed} KV "
                f"blocks of {self._size}; the context is {self._context} tokens and there are {self._total} blocks",
            )
        self._waiting.append(_Sequence(request, produced))

    def next(self, now_s: float) -> Batch | None:
        left = self._budget
        chunks: list[tuple[int, int]] = []
        decodes: list[int] = []
        flight: list[tuple[_Sequence, int]] = []
        started: list[tuple[int, int]] = []
        preempted = self._preempted
        for one in list(self._running.values()):
            if not left:
                break
            known = one.known + one.flying
            new = min(known - one.computed, left)
            if not one.running or known >= one.last or not self._grow(one, one.computed + new):
                continue  # put back for another, or its last token is on its way
            left -= new
            if new == 1 and one.computed >= one.request.prompt_tokens:
                decodes.append(one.computed)
            else:
                chunks.append((new, one.computed))
            self._compute(one, new, known, flight)
        while self._waiting and left and len(self._running) < self._most and self._preempted == preempted:
            one = self._waiting[0]
            found = self._find(one)
            new = min(one.known - one.computed, left)
            needed = -(-(one.computed + new) // self._size) - one.blocks
            if needed > self._free + len(self._unused):
                self._let_go(one)
                one.computed -= found
                break
            self._waiting.popleft()
            self._take(needed)
            one.blocks += needed
            one.running = True
            self._running[one.request.id] = one
            if not one.started:
                one.started = True
                started.append((one.request.id, found))
            left -= new
            if new == 1 and one.computed >= one.request.prompt_tokens:
                decodes.append(one.computed)
            else:
                chunks.append((new, one.computed))
            self._compute(one, new, one.known, flight)
        if left == self._budget:
            return None
        self._flights.append(flight)
        return Batch((Pass(Step(tuple(chunks), tuple(decodes))),), tuple(started))

    def done(self, now_s: float, took_s: Sequence[float]) -> list[tuple[int, int | None]]:
        tokens: list[tuple[int, int | None]] = []
        for one, epoch in self._flights.popleft():
            if one.epoch != epoch:
                continue  # put back meanwhile: its token is computed again
            one.flying -= 1
            one.known += 1
            tokens.append((one.request.id, None))
            if one.known == one.last:
                del self._running[one.request.id]
                if self.holds:
                    self._held[one.request.id] = one
                else:
                    self._let_go(one)
        return tokens

    def release(self, id: int) -> None:
        self._let_go(self._held.pop(id))

    def load(self) -> Load:
        used = self._total - self._free - len(self._unused)
        return Load(len(self._waiting), len(self._running), self._total, used, self._preempted)

    def _compute(self, one: _Sequence, new: int, known: int, flight: list[tuple[_Sequence, int]]) -> None:
        one.computed += new
        if one.computed == known:
            one.flying += 1
            flight.append((one, one.epoch))
        if self._caching and one.computed // self._size > one.shared:
            self._share(one)

    def _grow(self, one: _Sequence, tokens: int) -> bool:
        """Blocks for `tokens` in all; the last admitted are put back for it, itself at last."""
        needed = -(-tokens // self._size) - one.blocks
        while needed > self._free + len(self._unused):
            _, last = self._running.popitem()
            self._let_go(last)
            last.computed = last.flying = 0
            last.epoch += 1
            last.running = False
            self._waiting.appendleft(last)
            self._preempted += 1
            if last is one:
                return False
        if needed > 0:
            self._take(needed)
            one.blocks += needed
        return True

    # --- blocks
    def _take(self, count: int) -> None:
        for _ in range(count - self._free):
            key, _ = self._unused.popitem(last=False)
            del self._holders[key]
            self._free += 1
        self._free -= count

    def _key(self, one: _Sequence, place: int) -> Key:
        """Of a sequence's block: what the trace says of its text, which stands for all before it; else its own."""
        text = one.request.blocks
        begin = place * self._size
        if text and begin + self._size <= one.request.prompt_tokens:
            return text[(begin + self._size - 1) // BLOCK_TOKENS], place
        return -1 - one.request.id, place

    def _find(self, one: _Sequence) -> int:
        """Hold the cached blocks of its beginning, never all it has. Returns their tokens."""
        if not self._caching or one.computed:
            return 0
        for place in range((one.known - 1) // self._size):
            key = self._key(one, place)
            if key not in self._holders:
                break
            self._hold(key)
            one.blocks += 1
            one.shared += 1
        one.computed = one.shared * self._size
        return one.computed

    def _hold(self, key: Key) -> None:
        if not self._holders[key]:
            del self._unused[key]
        self._holders[key] += 1

    def _share(self, one: _Sequence) -> None:
        """Its full blocks can be found; where one is there already it takes the place of its own."""
        for place in range(one.shared, one.computed // self._size):
            key = self._key(one, place)
            if key in self._holders:
                self._hold(key)
                self._free += 1
            else:
                self._holders[key] = 1
            one.shared += 1

    def _let_go(self, one: _Sequence) -> None:
        for place in range(one.shared - 1, -1, -1):  # the end of a text is forgotten before its beginning
            key = self._key(one, place)
            self._holders[key] -= 1
            if not self._holders[key]:
                self._unused[key] = None
        self._free += one.blocks - one.shared
        one.blocks = one.shared = 0
