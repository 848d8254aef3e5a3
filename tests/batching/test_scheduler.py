"""The scheduler before a stand-in model that knows what every KV slot holds: a step that would read wrong fails.

Where a part has room ahead, `guess` drafts tokens for it at "draft" bits, right and wrong ones, and verifies them.
"""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everybit.batching.blocks import Blocks
from everybit.batching.scheduler import Part, Request, Scheduler
from everybit.errors import BusyError, EverybitError, RequestError

SIZE = 4


class Memory:
    """KV slots by (block, place): the token and precision that wrote them. The next token is a function of the text."""

    def __init__(self, stop: int = -1) -> None:
        self.slots: dict[tuple[int, int], tuple[int, Hashable]] = {}
        self.stop = stop
        self.computed = 0

    def run(self, parts: tuple[Part, ...], texts: dict[Hashable, list[int]]) -> dict[Hashable, list[int | None]]:
        sampled: dict[Hashable, list[int | None]] = {}
        for part in parts:
            text = texts[part.id]
            for place in range(part.past):
                token, _ = self.slots[part.blocks[place // SIZE], place % SIZE]
                assert token == text[place], f"{part.id} would read another's token at {place}"
            for offset, token in enumerate(part.tokens):
                place = part.past + offset
                assert token == text[place]
                self.slots[part.blocks[place // SIZE], place % SIZE] = token, part.bits
            self.computed += len(part.tokens)
            if part.samples:
                assert part.past + len(part.tokens) == len(text)
                sampled[part.id] = self.verify(part, text, guess(text, part.ahead))
        return sampled

    def verify(self, part: Part, text: list[int], guessed: list[int]) -> list[int | None]:
        """The tokens of a part, up to the first wrong guess or the end. Guesses are written at its bits."""
        for place, token in enumerate(guessed, len(text)):
            self.slots[part.blocks[place // SIZE], place % SIZE] = token, part.bits
        found: list[int | None] = []
        for token in [*guessed, None]:
            wanted = follow([*text, *(t for t in found if t is not None)])
            found.append(wanted if wanted != self.stop else None)
            if found[-1] != token or token is None:
                break
        return found

    def precisions(self, part: Part) -> set[Hashable]:
        """Of what the part reads."""
        return {self.slots[part.blocks[place // SIZE], place % SIZE][1] for place in range(part.past)}


def follow(text: list[int]) -> int:
    return (sum(text) * 31 + len(text)) % 7


def guess(text: list[int], count: int) -> list[int]:
    """Guesses of which none, some or all are right, depending on the text."""
    wrong, guessed = sum(text) % (count + 2), []
    for i in range(count):
        right = follow([*text, *guessed])
        guessed.append(right if i < wrong else (right + 1) % 7)
    return guessed


def alone(request: Request, stop: int = -1) -> list[int]:
    text = list(request.prompt)
    while len(text) < len(request.prompt) + request.max_tokens and follow(text) != stop:
        text.append(follow(text))
    return text


def request(id: Hashable, prompt: list[int], more: int = 3, bits: int = 4, **rest) -> Request:
    return Request(id, tuple(prompt), more, bits, **rest)


def step(scheduler: Scheduler, memory: Memory, texts: dict[Hashable, list[int]], ahead: int = 0) -> tuple[Part, ...]:
    parts = scheduler.next(dict.fromkeys(texts, ahead))
    scheduler.check()
    sampled = memory.run(parts, texts)
    for id, tokens in sampled.items():
        texts[id] += [token for token in tokens if token is not None]
    scheduler.done(sampled)
    scheduler.check()
    return parts


def run_all(scheduler: Scheduler, requests: list[Request], memory: Memory, most_steps: int = 500, ahead: int = 0):
    """Submits all, runs until nothing is left; yields each step's parts."""
    texts = {r.id: list(r.prompt) for r in requests}
    for r in requests:
        scheduler.submit(r)
    steps = []
    while parts := step(scheduler, memory, texts, ahead):
        steps.append(parts)
        assert len(steps) < most_steps, "it never ends"
    assert scheduler.counts().waiting == scheduler.counts().running == 0
    return texts, steps


@settings(max_examples=300)
@given(st.data())
def test_every_text_is_what_it_is_alone_and_no_block_is_lost(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(6, 14), "blocks")
    scheduler = Scheduler(
        blocks=blocks,
        block_tokens=SIZE,
        context=SIZE * blocks,
        budget=data.draw(st.integers(3, 20), "budget"),
        most=data.draw(st.integers(1, 3), "most"),
    )
    beginning = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=10), "shared beginning")
    requests = []
    for i in range(data.draw(st.integers(1, 7), "requests")):
        prompt = beginning + data.draw(st.lists(st.integers(0, 2), max_size=6))
        requests.append(
            request(
                i,
                prompt,
                data.draw(st.integers(1, SIZE * 6 - len(prompt))),
                data.draw(st.sampled_from([3, 4])),
                tenant=data.draw(st.sampled_from("ab")),
                priority=data.draw(st.integers(0, 1)),
            )
        )
    stop = data.draw(st.integers(-1, 3), "stop")
    memory = Memory(stop)
    texts, steps = run_all(scheduler, requests, memory, ahead=data.draw(st.integers(0, 6), "ahead"))
    for r in requests:
        assert texts[r.id] == alone(r, stop)
    bits = {r.id: r.bits for r in requests}
    assert all(part.bits == bits[part.id] for parts in steps for part in parts)
    assert scheduler.counts().blocks_available == blocks


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_whatever_comes_when_it_comes(seed: int) -> None:
    """Late arrivals, changes of precision, cancellations, steps that fail.

    Every slot that is read was written by the same tenant for the same beginning and, where nothing changed, at the
    same precision; no slot is written twice in a step.
    """
    r = Random(seed)
    blocks, most = r.randint(4, 14), r.randint(1, 4)
    budget = r.randint(most, 20)
    scheduler = Scheduler(blocks=blocks, block_tokens=SIZE, context=SIZE * blocks, budget=budget, most=most)
    beginning = [r.randint(0, 2) for _ in range(10)]
    texts: dict[Hashable, list[int]] = {}
    requests: dict[Hashable, Request] = {}
    slots: dict[tuple[int, int], tuple[Hashable, frozenset[Hashable], tuple[int, ...]]] = {}
    bits: dict[Hashable, int] = {}
    changed, arrived = set(), 0
    for _ in range(600):
        if arrived < 14 and r.random() < 0.4:
            prompt = beginning[: r.randint(1, 10)] + [r.randint(0, 2) for _ in range(r.randint(0, 4))]
            more = min(SIZE * blocks - len(prompt), r.randint(1, 20))
            if more > 0:
                new = request(arrived, prompt, more, r.choice([3, 4]), tenant=r.choice("ab"), priority=r.randint(0, 2))
                scheduler.submit(new)
                texts[arrived], requests[arrived], bits[arrived] = list(prompt), new, new.bits
            arrived += 1
        if requests and r.random() < 0.1:
            id = r.choice(list(requests))
            bits[id] = r.choice([3, 4])
            assert scheduler.set_bits(id, bits[id])
            changed.add(id)
        if requests and r.random() < 0.05:
            id = r.choice(list(requests))
            assert scheduler.cancel(id)
            del requests[id]
        parts = scheduler.next({id: r.randint(0, 6) for id in requests if r.random() < 0.8})
        scheduler.check()
        assert bool(parts) == bool(requests)
        assert len(parts) <= most
        assert sum(len(p.tokens) + p.ahead for p in parts) <= budget
        for p in parts:
            assert p.ahead == 0 or (p.samples and len(p.tokens) == 1)
            assert len(texts[p.id]) + p.ahead < len(requests[p.id].prompt) + requests[p.id].max_tokens
        guessed = {p.id: guess(texts[p.id], r.randint(0, p.ahead)) for p in parts if p.samples}
        places = {
            p.id: [(p.blocks[i // SIZE], i % SIZE) for i in range(p.past + len(p.tokens) + p.ahead)] for p in parts
        }
        written = [slot for p in parts for slot in places[p.id][p.past :]]
        assert len(set(written)) == len(written)
        for p in parts:
            assert p.bits == bits[p.id]
            for i, slot in enumerate(places[p.id][: p.past]):
                tenant, by, text = slots[slot]
                assert slot not in written
                assert (tenant, text) == (requests[p.id].tenant, tuple(texts[p.id][: i + 1]))
                assert p.id in changed or by == {p.bits}
        if r.random() < 0.5:
            for slot in written:  # drafts do
                slots[slot] = "nobody", frozenset(), ()
        if r.random() < 0.1:
            continue  # the step failed
        for p in parts:
            by = slots[places[p.id][p.past - 1]][1] if p.past else frozenset()
            for i in range(p.past, p.past + len(p.tokens)):
                slots[places[p.id][i]] = requests[p.id].tenant, by | {p.bits}, tuple(texts[p.id][: i + 1])
        sampled: dict[Hashable, list[int]] = {}
        for p in parts:
            if p.samples:
                by, new = slots[places[p.id][p.past + len(p.tokens) - 1]][1], sampled.setdefault(p.id, [])
                for token in [*guessed[p.id], -1]:
                    new.append(follow(texts[p.id]))
                    texts[p.id].append(new[-1])
                    if new[-1] != token:
                        break
                    slots[places[p.id][len(texts[p.id]) - 1]] = requests[p.id].tenant, by, tuple(texts[p.id])
        scheduler.done(sampled)
        scheduler.check()
        for id in [i for i in requests if len(texts[i]) == len(requests[i].prompt) + requests[i].max_tokens]:
            assert texts[id] == alone(requests.pop(id))
        if arrived >= 14 and not requests:
            break
    assert not requests
    assert scheduler.counts().blocks_available == blocks


def test_small_requests_do_not_overtake_a_large_one_that_waits() -> None:
    scheduler, memory = Scheduler(blocks=8, block_tokens=SIZE, context=32, budget=16, most=4), Memory()
    texts = {"runs": [1] * 16, "large": [2] * 24, "small": [0] * 2}
    scheduler.submit(request("runs", texts["runs"], 8))
    step(scheduler, memory, texts)
    scheduler.submit(request("large", texts["large"], 2))
    scheduler.submit(request("small", texts["small"], 2))
    assert [p.id for p in step(scheduler, memory, texts)] == ["runs"]


def test_the_whole_context_can_be_used() -> None:
    scheduler = Scheduler(blocks=99, block_tokens=SIZE, context=20)
    with pytest.raises(RequestError, match="the context is 20"):
        scheduler.submit(request(0, [1] * 17, 4))
    texts, _ = run_all(scheduler, [request(0, [1] * 17, 3)], Memory())
    assert len(texts[0]) == 20


def test_an_id_that_comes_again_is_another_request() -> None:
    scheduler, memory = Scheduler(blocks=8, block_tokens=SIZE, context=32), Memory()
    scheduler.submit(request(0, [1] * 5, 1))
    sampled = memory.run(scheduler.next(), {0: [1] * 5})
    scheduler.cancel(0)
    scheduler.submit(request(0, [2] * 5))
    scheduler.done(sampled)  # the last token of the request before
    assert run_all_of(scheduler, memory, {0: [2] * 5}) == {0: alone(request(0, [2] * 5))}


def test_tenants_that_left_are_forgotten() -> None:
    scheduler = Scheduler(blocks=8, block_tokens=SIZE, context=32)
    for tenant in range(100):
        run_all(scheduler, [request(0, [1] * 9, tenant=tenant)], Memory())
    assert len(scheduler._blocks._roots) == len(scheduler._blocks._keys) <= 8


def run_all_of(scheduler: Scheduler, memory: Memory, texts: dict[Hashable, list[int]]) -> dict[Hashable, list[int]]:
    while step(scheduler, memory, texts):
        pass
    return texts


def test_running_sequences_are_not_held_up_by_a_long_prompt_that_goes_before_them() -> None:
    scheduler, memory = Scheduler(blocks=64, block_tokens=SIZE, context=200, budget=8, most=4), Memory()
    texts = {"short": [1], "long": [2] * 60}
    scheduler.submit(request("short", [1], 12))
    step(scheduler, memory, texts)
    scheduler.submit(request("long", [2] * 60, 2, priority=-1))
    for _ in range(8):
        parts = step(scheduler, memory, texts)
        assert {p.id: len(p.tokens) for p in parts} == {"short": 1, "long": 7}


def test_a_smaller_budget_shortens_prompts_and_not_what_decodes() -> None:
    scheduler = Scheduler(blocks=40, block_tokens=4, context=64, budget=32, most=8)
    scheduler.submit(request("reads", [1, 2], more=9))
    scheduler.next()
    scheduler.done({"reads": [3]})
    scheduler.submit(request("comes", list(range(20))))
    assert {part.id: len(part.tokens) for part in scheduler.next(budget=6)} == {"reads": 1, "comes": 5}
    scheduler.done({"reads": [4]})
    assert {part.id: len(part.tokens) for part in scheduler.next(budget=100)} == {"reads": 1, "comes": 15}


def test_no_more_sequences_run_than_asked() -> None:
    scheduler, memory = Scheduler(blocks=64, block_tokens=SIZE, context=200, budget=8, most=2), Memory()
    texts = {i: [i] for i in range(5)}
    for i in texts:
        scheduler.submit(request(i, [i], 4))
    step(scheduler, memory, texts)
    step(scheduler, memory, texts)
    assert scheduler.counts().running == 2


def test_a_part_whose_sequence_is_put_back_for_another_is_not_run() -> None:
    scheduler, memory = Scheduler(blocks=7, block_tokens=SIZE, context=28, budget=6, most=4), Memory()
    texts = {"low": [1] * 6, "high": [2] * 17}
    scheduler.submit(request("low", texts["low"], 18, priority=1))
    step(scheduler, memory, texts)
    scheduler.submit(request("high", texts["high"], 4, priority=0))
    seen = [step(scheduler, memory, texts) for _ in range(4)]
    assert [[p.id for p in parts] for parts in seen] == [["low", "high"]] * 3 + [["high"]]
    assert scheduler.counts().preempted == 1


def test_a_beginning_is_computed_once_for_each_tenant_and_precision() -> None:
    beginning = list(range(20))
    same = [request(i, [*beginning, i]) for i in range(3)]
    other = [request("tenant", [*beginning, 9], tenant="b"), request("bits", [*beginning, 9], bits=3)]
    for second, cached in ((same[1], 20), (other[0], 0), (other[1], 0)):
        scheduler, memory = Scheduler(blocks=40, block_tokens=SIZE, context=100), Memory()
        run_all(scheduler, [same[0]], memory)
        before = memory.computed
        run_all(scheduler, [second], memory)
        assert scheduler.counts().tokens_cached == cached
        assert memory.computed - before == 21 - cached + 2
    # and two that come together end up with the same blocks
    scheduler, memory = Scheduler(blocks=40, block_tokens=SIZE, context=100), Memory()
    run_all(scheduler, same, memory)
    assert scheduler.counts().blocks_cached == 40 - len(scheduler._blocks._free) <= 5 + 3


def test_the_whole_prompt_is_never_taken_from_the_cache() -> None:
    scheduler, memory = Scheduler(blocks=40, block_tokens=SIZE, context=100), Memory()
    run_all(scheduler, [request(0, [1] * 8, 1)], memory)
    _, steps = run_all(scheduler, [request(1, [1] * 8, 1)], memory)
    assert [len(p.tokens) for p in steps[0]] == [4]


def test_what_two_precisions_wrote_is_shared_with_nobody() -> None:
    scheduler, memory = Scheduler(blocks=40, block_tokens=SIZE, context=100, budget=4, most=2), Memory()
    texts = {0: [1] * 16}
    scheduler.submit(request(0, texts[0], 6))
    steps = 0
    while parts := scheduler.next():
        texts[0] += [t for tokens in memory.run(parts, texts).values() for t in tokens if t is not None]
        scheduler.done({0: [texts[0][-1]]} if parts[0].samples else {})
        steps += 1
        if steps == 2:
            scheduler.set_bits(0, 3)
    assert scheduler.counts().blocks_cached == 2  # the 8 tokens of the first two steps
    _, steps = run_all(scheduler, [request(1, [1] * 16, 1)], memory)
    assert steps[0][0].past == 8
    assert memory.precisions(steps[0][0]) == {4}


def test_the_last_in_rank_is_put_back_where_blocks_run_out() -> None:
    scheduler, memory = Scheduler(blocks=6, block_tokens=SIZE, context=24, budget=16, most=4), Memory()
    requests = [request("late", [1] * 4, 16, priority=1), request("early", [2] * 4, 16)]
    texts, steps = run_all(scheduler, requests, memory)
    assert scheduler.counts().preempted > 0
    assert [p.id for p in steps[0]] == ["early", "late"]
    first = {id: next(i for i, parts in enumerate(reversed(steps)) if any(p.id == id for p in parts)) for id in texts}
    assert first["early"] > first["late"]  # the early one ended first
    assert all(texts[r.id] == alone(r) for r in requests)


def test_an_earlier_deadline_goes_first() -> None:
    scheduler = Scheduler(blocks=40, block_tokens=SIZE, context=100, budget=4, most=1)
    requests = [request("b", [1], deadline=5.0), request("a", [1], deadline=4.0), request("c", [1], priority=-1)]
    _, steps = run_all(scheduler, requests, Memory())
    assert list(dict.fromkeys(p.id for parts in steps for p in parts)) == ["c", "a", "b"]


def test_a_cancelled_request_leaves_its_blocks() -> None:
    scheduler = Scheduler(blocks=8, block_tokens=SIZE, context=32)
    scheduler.submit(request(0, [1] * 10, 5))
    scheduler.done(Memory().run(scheduler.next(), {0: [1] * 10}))
    assert scheduler.cancel(0)
    assert not scheduler.cancel(0)
    assert scheduler.counts().blocks_available == 8
    assert scheduler.next() == ()
    scheduler.check()


def test_what_can_never_run_is_refused_with_the_arithmetic() -> None:
    scheduler = Scheduler(blocks=4, block_tokens=SIZE, context=32, most=1, queue=0)
    with pytest.raises(
        RequestError, match=r"a prompt of 10 tokens and 8 more are 18 tokens in 5 KV blocks of 4.*are 4"
    ):
        scheduler.submit(request(0, [1] * 10, 8))
    with pytest.raises(RequestError, match=r"30 tokens and 8 more are 38 .* the context is 32"):
        scheduler.submit(request(0, [1] * 30, 8))
    with pytest.raises(RequestError, match="expected at least 1 of each"):
        scheduler.submit(request(0, [], 8))
    scheduler.submit(request(0, [1] * 9, 8))  # 16 computed tokens are 4 blocks
    with pytest.raises(RequestError, match="0 is in use"):
        scheduler.submit(request(0, [1], 1))
    with pytest.raises(BusyError, match="1 requests run or wait, 1 may run and 0 wait"):
        scheduler.submit(request(1, [1], 1))
    with pytest.raises(RequestError, match="expected 1 to the budget"):
        Scheduler(blocks=4, block_tokens=SIZE, context=32, budget=2, most=3)


def test_the_end_of_a_beginning_is_forgotten_first() -> None:
    blocks = Blocks(3, SIZE)
    text = list(range(13))
    for taken, kept in ((1, 8), (2, 4)):
        path = blocks.path()
        path.open("key", text)
        path.grow(12)
        path.share(text, 12)
        path.close()
        mine = [blocks.take() for _ in range(taken)]
        again = blocks.path()
        assert again.open("key", text) == kept
        again.close()
        for block in mine:
            assert block is not None
            blocks.give(block)


def test_a_lost_block_is_noticed() -> None:
    blocks = Blocks(4, SIZE)
    path = blocks.path()
    path.open("key", [1, 2])
    path.grow(6)
    blocks.check([path])
    path.own.pop()
    with pytest.raises(EverybitError, match="the scheduler lost count"):
        blocks.check([path])


def test_blocks_are_named_in_the_order_of_the_text() -> None:
    blocks = Blocks(12, SIZE)
    text = list(range(24))
    first, second = blocks.path(), blocks.path()
    for path, used in ((first, (5, 9, 24)), (second, (7, 24))):
        path.open("key", text if path is second else text[:1])
        for tokens in used:
            path.grow(tokens)
            assert path.all == (*(node.block for node in path.nodes), *path.own)
            path.share(text, tokens - 1)
            assert path.all == (*(node.block for node in path.nodes), *path.own)
    assert first.all[:5] == second.all[:5]
    blocks.check([first, second])
    first.close()
    assert first.all == ()
