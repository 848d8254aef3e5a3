"""Who runs in the next step: continuous batching with chunked prompts over paged KV blocks.

A pure state machine: no clock, no threads, no model. `next` says what to run, `done` takes what came of it; everything
else is called between `done` and `next`. Every running sequence gets its one token in each step before prompts get what
is left of the budget (Sarathi, Agrawal et al. 2024); sequences join and leave between steps (Orca, Yu et al. 2022).
Where blocks run out, the last in rank is put back and computed again later (vLLM, Kwon et al. 2023).

Tokens that somebody guesses (speculation.py) are verified in the same step as the one before them: a sequence that
decodes can have room for some `ahead`, after everybody else got what they need, and brings several tokens home.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from everybit.batching.blocks import Blocks, Path
from everybit.errors import BusyError, RequestError

SCORED = 64  # rows of logits, a vocabulary wide each, are kept at once
_rank = attrgetter("rank")


@dataclass(frozen=True)
class Request:
    """What a client asks for. `bits` is whatever names a precision; cached text is shared within `tenant` only.

    `scores`: the logits of the prompt's tokens are wanted as well, so none of it is taken from the cache, and it is run
    in parts of up to SCORED tokens.

    A smaller `priority`, then an earlier `deadline`, is admitted first and put back last; the deadline is any number
    that grows with time. Neither takes the turn of what is running already. They are for the operator to set: whoever
    has them can keep others waiting for ever.
    """

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    bits: Hashable
    tenant: Hashable = None
    priority: int = 0
    deadline: float = float("inf")
    scores: bool = False


class Part(NamedTuple):
    """What one sequence does in a step: `tokens` after `past` others. A token is sampled where `samples`.

    `blocks` and the budget have room for `ahead` more tokens: guesses to verify. All from `past` on is the sequence's
    own to write, however often.
    """

    id: Hashable
    tokens: tuple[int, ...]
    past: int
    blocks: tuple[int, ...]
    bits: Hashable
    samples: bool
    scores: bool = False  # the logits of all its tokens are wanted
    ahead: int = 0


@dataclass(eq=False, slots=True)
class _Sequence:
    request: Request
    rank: tuple[int, float, int]
    path: Path
    tokens: list[int]
    most: int  # tokens that it may have
    bits: Hashable
    key_bits: Hashable = None  # the precision under which the path is shared
    computed: int = 0  # tokens in the KV cache
    pure: int = 0  # of these, the leading ones that `key_bits` wrote
    cached: int = 0  # tokens that it found in the KV cache
    running: bool = False
    started: bool = False


@dataclass(frozen=True)
class Counts:
    """A glance at the load."""

    waiting: int
    running: int
    blocks: int
    blocks_available: int
    blocks_cached: int  # and held by nobody
    preempted: int  # since the beginning
    tokens_cached: int  # not computed (again) because they were cached


class Scheduler:
    """`budget` tokens a step, `most` sequences running, `queue` requests waiting.

    `context` tokens a sequence may have. `blocks` of `block_tokens` tokens are shared by all.
    """

    def __init__(
        self, *, blocks: int, block_tokens: int, context: int, budget: int = 512, most: int = 64, queue: int = 1024
    ) -> None:
        if not 1 <= most <= budget:
            raise RequestError(
                "most", f"{most} sequences a step and a budget of {budget} tokens: expected 1 to the budget"
            )
        self._blocks = Blocks(blocks, block_tokens)
        self._context, self._budget, self._most, self._queue = context, budget, most, queue
        self._sequences: dict[Hashable, _Sequence] = {}
        self._ranked: list[_Sequence] = []  # the same, by rank
        self._arrivals = self._preempted = self._tokens_cached = 0
        self._batch: list[tuple[_Sequence, Part]] = []

    @property
    def capacity(self) -> int:
        """Requests that may be there, running or waiting."""
        return self._most + self._queue

    def submit(self, request: Request) -> None:
        """Raises: RequestError where it can never run, with the arithmetic; BusyError where the queue is full"""
        if request.id in self._sequences:
            raise RequestError("id", f"{request.id!r} is in use: give every request its own")
        self.require_fit(request)
        if len(self._sequences) >= self.capacity:
            raise BusyError(
                f"{len(self._sequences)} requests run or wait, {self._most} may run and {self._queue} wait: try later"
            )
        rank = (request.priority, request.deadline, self._arrivals)
        self._arrivals += 1
        most = len(request.prompt) + request.max_tokens
        sequence = _Sequence(request, rank, self._blocks.path(), list(request.prompt), most, request.bits)
        self._sequences[request.id] = sequence
        insort(self._ranked, sequence, key=_rank)

    def require_fit(self, request: Request) -> None:
        """That it can run when it is alone. Looks at nothing that changes: any thread may ask. Raises: RequestError"""
        prompt, more = len(request.prompt), request.max_tokens
        if not prompt or not isinstance(more, int) or more < 1:
            raise RequestError("prompt", f"{prompt} tokens and max_tokens {more}: expected at least 1 of each")
        if request.deadline != request.deadline:
            raise RequestError("deadline", "not a number arrived, expected a time")
        # The last token is never computed: nothing follows it.
        blocks = -(-(prompt + more - 1) // self._blocks.size)
        if prompt + more > self._context or blocks > self._blocks.total:
            raise RequestError(
                "max_tokens",
                f"a prompt of {prompt} tokens and {more} more are {prompt + more} tokens in {blocks} KV blocks of "
                f"{self._blocks.size}; the context is {self._context} tokens and there are {self._blocks.total} blocks",
            )

    def cancel(self, id: Hashable) -> bool:
        """Its blocks are free at once: not while a step runs. False where no such request is there (any more)."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            sequence.path.close()
            del self._ranked[bisect_left(self._ranked, sequence.rank, key=_rank)]
        return sequence is not None

    def set_bits(self, id: Hashable, bits: Hashable) -> bool:
        """From the next step on. What is in the KV cache stays as it was written; it is shared no further.

        False where no such request is there (any more).
        """
        sequence = self._sequences.get(id)
        if sequence is not None:
            sequence.bits = bits
        return sequence is not None

    def recompute(self, id: Hashable) -> None:
        """What it has read and written so far is computed again, at its precision of now."""
        sequence = self._sequences.get(id)
        if sequence is not None and sequence.running:
            self._leave(sequence)

    def cached(self, id: Hashable) -> int:
        """Tokens that were cached when it was last admitted; 0 where no such request is there."""
        sequence = self._sequences.get(id)
        return sequence.cached if sequence is not None else 0

    def next(self, ahead: Mapping[Hashable, int] | None = None, budget: int | None = None) -> tuple[Part, ...]:
        """What to run now; empty where nothing is there. Called again without `done`, the step counts as not run.

        `ahead`: room that is asked for, by request. It is what nobody else needs in this step. `budget`: tokens of this
        step, where that is to be fewer than ever; what decodes comes first.
        """
        left = self._budget if budget is None else min(budget, self._budget)
        running = [s for s in self._ranked if s.running]
        decodes: list[_Sequence] = []
        prompts: list[_Sequence] = []
        for sequence in running:
            (decodes if len(sequence.tokens) - sequence.computed == 1 else prompts).append(sequence)
        parts: dict[Hashable, Part] = {}
        for sequence in decodes + prompts:
            if left > 0 and sequence.running:  # one may have been put back for another
                left -= self._add_part(sequence, left, running, parts)
        for sequence in self._ranked:
            if sequence.running:
                continue
            if left < 1 or len(running) == self._most or not self._admit(sequence):
                break  # those behind it wait too: small ones do not overtake for ever
            running.append(sequence)
            left -= self._add_part(sequence, left, running, parts)
        if ahead:
            self._look_ahead(parts, ahead)
        self._batch = [(self._sequences[id], part) for id, part in parts.items()]
        return tuple(parts.values())

    def done(self, sampled: Mapping[Hashable, Sequence[int | None]]) -> None:
        """What the last `next` led to: for each part that samples its tokens, the last None where its sequence ended.

        Several tokens say that all but the last were guessed, and verified at the part's bits. A sequence also ends, by
        itself, at its max_tokens: give its last token, it is not asked for another.
        """
        batch, self._batch = [(q, p) for q, p in self._batch if self._sequences.get(p.id) is q], []  # others: cancelled
        size = self._blocks.size
        for sequence, part in batch:
            computed, ended = len(part.tokens), False
            if part.samples:
                new = sampled[part.id]
                if new[-1] is None:
                    new, ended = new[:-1], True
                sequence.tokens += new  # type: ignore[arg-type]  # None comes last
                computed += max(len(new) - 1, 0)
                ended = ended or len(sequence.tokens) == sequence.most
            if sequence.computed == sequence.pure and part.bits == sequence.key_bits:
                sequence.pure += computed
            sequence.computed += computed
            if sequence.pure // size > len(sequence.path.nodes):
                sequence.path.share(sequence.tokens, sequence.pure)
            if ended:
                self.cancel(part.id)

    def counts(self) -> Counts:
        running = sum(s.running for s in self._sequences.values())
        return Counts(
            waiting=len(self._sequences) - running,
            running=running,
            blocks=self._blocks.total,
            blocks_available=self._blocks.available,
            blocks_cached=self._blocks.cached,
            preempted=self._preempted,
            tokens_cached=self._tokens_cached,
        )

    def check(self) -> None:
        """That no block is lost or in two places. Raises: EverybitError"""
        self._blocks.check([s.path for s in self._sequences.values()])

    def _admit(self, sequence: _Sequence) -> bool:
        """Make it running if its whole text so far has room."""
        known = sequence.tokens[:1] if sequence.request.scores else sequence.tokens
        sequence.computed = sequence.pure = sequence.path.open((sequence.request.tenant, sequence.bits), known)
        needed = -(-len(sequence.tokens) // self._blocks.size) - len(sequence.path)
        if needed > self._blocks.available:
            self._leave(sequence)
            return False
        sequence.running = sequence.started = True
        sequence.key_bits = sequence.bits
        sequence.cached = sequence.computed
        self._tokens_cached += sequence.computed
        return True

    def _add_part(
        self, sequence: _Sequence, budget: int, running: Sequence[_Sequence], parts: dict[Hashable, Part]
    ) -> int:
        """Its part of the step, or none. For its blocks the last in rank are put back, and their parts taken out.

        Returns how many tokens the step has more for it, below 0 where parts were taken out.
        """
        request, computed, freed = sequence.request, sequence.computed, 0
        left = len(sequence.tokens) - computed
        scores = request.scores and computed < len(request.prompt)
        count = min(left, budget, SCORED) if scores else min(left, budget)
        while not sequence.path.grow(computed + count):
            last = max((s for s in running if s.running), key=lambda s: s.rank)
            self._leave(last)
            self._preempted += 1
            if (part := parts.pop(last.request.id, None)) is not None:
                freed += len(part.tokens)
            if last is sequence:
                return -freed
        tokens = tuple(sequence.tokens[computed : computed + count])
        blocks = sequence.path.all
        parts[request.id] = Part(request.id, tokens, computed, blocks, sequence.bits, count == left, scores)
        return count - freed

    def _look_ahead(self, parts: dict[Hashable, Part], ahead: Mapping[Hashable, int]) -> None:
        """Give room to the parts that decode, each its share, from blocks and budget that are left over.

        Blocks that running prompts have yet to fill stay. What a sequence got and does not use it keeps: its next
        tokens come there.
        """
        running = [s for s in self._sequences.values() if s.running]
        size = self._blocks.size
        spare = self._blocks.available - sum(max(0, -(-len(s.tokens) // size) - len(s.path)) for s in running)
        budget = self._budget - sum(len(part.tokens) for part in parts.values())
        asking = [p for p in parts.values() if p.samples and not p.scores and len(p.tokens) == 1 and p.id in ahead]
        for turn, part in enumerate(asking):
            sequence = self._sequences[part.id]
            count = min(ahead[part.id], sequence.most - len(sequence.tokens) - 1, budget // (len(asking) - turn))
            here = part.past + 1
            count = min(count, (len(sequence.path) + max(0, spare)) * size - here)
            if count < 1:
                continue
            before = len(sequence.path)
            sequence.path.grow(here + count)
            spare, budget = spare - len(sequence.path) + before, budget - count
            parts[part.id] = part._replace(blocks=sequence.path.all, ahead=count)

    def _leave(self, sequence: _Sequence) -> None:
        sequence.path.close()
        sequence.computed = sequence.pure = 0
        sequence.running = False
