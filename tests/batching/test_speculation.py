"""Guessing changes when tokens come and never which: real models, chosen acceptances, and what it rests on.

It rests on steps in which a token's logits do not depend on what runs beside it, which is tested here, too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everybit
from everybit import _native
from everybit.batching.batcher import Batcher, Event
from everybit.batching.fluidity import Target
from everybit.batching.ngrams import NGrams
from everybit.batching.precision import Auto, Costs
from everybit.batching.scheduler import Part, Request, Scheduler
from everybit.batching.speculation import Draft, Speculation, Times
from everybit.engine.native import make_step
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import F32, Sampler, Sampling
from everybit.errors import FormatError, PrecisionError

BITS = (2, 3, 4, 6, 8)
MS = 1_000_000
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9, seed=5)
PENALIZED = Sampling(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.4, seed=2)


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speculate") / "overlay"
    everybit.quantize(tiny_llama, out, bits=BITS, solver="tree", calibration="none")
    return out


@pytest.fixture(params=["fast", "exact"])
def runtime(overlay: Path, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with Runtime.open(overlay, threads=2, sequences=4, context=96, mode=request.param) as opened:
        yield opened


def prompt(i: int, length: int) -> tuple[int, ...]:
    return tuple((7 * i + 3 * k) % 250 + 2 for k in range(length))


def eager(batcher: Batcher, seed: int = 0, truth: dict[Hashable, list[int]] | None = None) -> None:
    """Makes it guess in every step, by any source and any number, whatever that is worth.

    `truth`, whole texts, in place of what was earlier in the text: it is spoiled here and there.
    """
    speculation, r = batcher._speculation, Random(seed)
    assert speculation is not None

    def plan(parts: Sequence[Part], rooms: Any, costs: Costs) -> dict[Hashable, Draft]:
        found = {}
        for part in parts:
            stream = speculation._streams.get(part.id)
            if stream is None or not part.ahead:
                continue
            tokens = stream.text.guess(r.randint(1, part.ahead))
            if truth is not None:
                known = part.past + 1
                tokens = truth[part.id][known : known + r.randint(1, part.ahead)]
                tokens = [t if r.random() < 0.8 else (t + 1) % 250 for t in tokens]
            sources = speculation.candidates(part.bits) if stream.model else []
            if sources and r.random() < (0.8 if truth is None else 0.4):
                found[part.id] = Draft(r.choice(sources), r.randint(1, part.ahead), [])
            elif tokens:
                found[part.id] = Draft(0, len(tokens), tokens)
        return found

    speculation.plan = plan  # type: ignore[method-assign]


def drain(batcher: Batcher) -> dict[Hashable, list[Event]]:
    found: dict[Hashable, list[Event]] = {}
    while batcher.busy:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
        batcher.check()
    return found


Case = tuple[Hashable, tuple[int, ...], Any, Sampling, int]


def run(
    runtime: Runtime, cases: Sequence[Case], speculate: bool, rounds: int = 1, truth: Any = None, **options: Any
) -> list[Any]:
    """(token, bits, reason) of each request; of `rounds`, of which all but the first find beginnings cached."""
    submit = {key: options.pop(key) for key in ("stop_ids", "top") if key in options}
    batcher = Batcher(runtime, speculate=speculate, **options)
    if speculate:
        eager(batcher, truth=truth)
    found = []
    for _ in range(rounds):
        for id, tokens, bits, sampling, more in cases:
            batcher.submit(Request(id, tokens, more, bits), sampling, **submit)
        events = drain(batcher)
        found.append({id: [(e.token, e.bits, e.reason, e.choice) for e in es] for id, es in events.items()})
    if speculate:
        assert sum(batcher.speculated().accepted.values()) > 5
        assert sum(batcher.speculated().drafted.values()) > sum(batcher.speculated().accepted.values())
    if options.get("budget") == 24 and rounds == 2:
        assert batcher.counts().tokens_cached > 0
    return found


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALIZED], ids=["greedy", "drawn", "penalized"])
def test_tokens_are_those_of_plain_decoding_at_every_precision(runtime: Runtime, sampling: Sampling) -> None:
    cases: list[Case] = [(f"{b}.{i}", prompt(i, 5 + 17 * i), b, sampling, 3 + 9 * i) for b in BITS for i in range(3)]
    plain = run(runtime, cases, False, rounds=2, budget=24, most=8)
    assert plain[0] == plain[1]
    assert run(runtime, cases, True, rounds=2, budget=24, most=8, truth=texts(cases, plain)) == plain


def texts(cases: Sequence[Case], plain: list[Any]) -> dict[Hashable, list[int]]:
    return {id: [*tokens, *(t for t, *_ in plain[0][id] if t is not None)] for id, tokens, *_ in cases}


def test_log_probabilities_and_stop_tokens_inside_a_run(runtime: Runtime) -> None:
    cases: list[Case] = [(i, prompt(i, 8), 8, DRAWN, 40) for i in range(4)]
    free = run(runtime, cases, False, top=2)[0]
    stops = {free[i][9 + i][0] for i in range(4)}
    plain = run(runtime, cases, False, top=2, stop_ids=stops)
    assert all(events[-1][2] == "stop" for events in plain[0].values())
    assert all(events[-1][0] is None for events in plain[0].values())
    assert run(runtime, cases, True, top=2, stop_ids=stops) == plain
    assert run(runtime, cases, True, truth=texts(cases, [free]), top=2, stop_ids=stops) == plain  # beyond the stop


def test_under_preemption(overlay: Path) -> None:
    with Runtime.open(overlay, threads=2, sequences=1, context=96, mode="fast") as small:
        cases: list[Case] = [(i, prompt(i, 20), BITS[i + 1], DRAWN, 40) for i in range(4)]
        plain = run(small, cases, False)
        assert run(small, cases, True) == plain
        batcher = Batcher(small)
        eager(batcher)
        for id, tokens, bits, sampling, more in cases:
            batcher.submit(Request(id, tokens, more, bits), sampling)
        drain(batcher)
        assert batcher.counts().preempted > 0


def test_the_cache_afterwards_is_that_of_plain_decoding(runtime: Runtime) -> None:
    """A conversation goes on from blocks that verification wrote: tokens, and log-probabilities to the last bit."""

    def talk(speculate: bool) -> list[Any]:
        batcher, text, found = Batcher(runtime, speculate=speculate), prompt(1, 20), []
        if speculate:
            eager(batcher)
        for turn in range(3):
            batcher.submit(Request(turn, text, 16, 8), GREEDY, top=5)
            events = drain(batcher)[turn]
            found.append([(event.token, event.choice) for event in events])
            text += tuple(event.token for event in events if event.token is not None) + prompt(turn, 3)
        assert batcher.counts().tokens_cached == 32 + 48
        return found

    assert talk(True) == talk(False)


def test_a_grammar_that_ends_inside_a_run(runtime: Runtime) -> None:
    class Pattern:
        """1 2 3 1 2 3 ... for 20 tokens: what earlier text guesses well."""

        def __init__(self) -> None:
            self.count = 0

        def limit(self, logits: F32) -> None:
            logits[np.arange(len(logits)) != 1 + self.count % 3] = -np.inf

        def accept(self, token: int) -> None:
            assert token == 1 + self.count % 3
            self.count += 1

        @property
        def complete(self) -> bool:
            return self.count == 20

    batcher = Batcher(runtime)
    eager(batcher)
    batcher.submit(Request(0, prompt(0, 8), 40, 8), DRAWN, constraint=Pattern())
    steps = 0
    found: list[Event] = []
    while batcher.busy:
        found += batcher.step()
        batcher.check()
        steps += 1
    assert [event.token for event in found] == [1 + i % 3 for i in range(20)]
    assert [event.reason for event in found] == [""] * 19 + ["stop"]
    assert steps < 15
    assert set(batcher.speculated().drafted) == {"ngram"}


def test_set_bits_and_cancel_between_steps(runtime: Runtime) -> None:
    def serve(speculate: bool) -> list[Any]:
        batcher, found = Batcher(runtime, speculate=speculate), list[Any]()
        if speculate:
            eager(batcher)
        batcher.submit(Request(0, prompt(0, 8), 24, 8), DRAWN)
        batcher.submit(Request(1, prompt(1, 8), 24, 8), DRAWN)
        changed = False
        while batcher.busy:
            found += [(event.token, event.bits) for event in batcher.step() if event.id == 0]
            if not changed and len(found) >= 9:
                del found[9:]  # in whichever step they came: compare what was computed before the change
                batcher.set_bits(0, 3)
                assert batcher.cancel(1)
                changed = True
            batcher.check()
        return found[:9]

    assert serve(True) == serve(False)


@pytest.mark.parametrize("failing", [2, 8])
def test_a_draft_or_a_verification_that_fails_changes_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    cases: list[Case] = [(i, prompt(i, 8), 8, DRAWN, 20) for i in range(3)]
    want = run(runtime, cases, False)[0]
    batcher, native_run, r, failures = Batcher(runtime, draft_bits=2), runtime.native.run, Random(3), 0
    eager(batcher)
    for id, tokens, bits, sampling, more in cases:
        batcher.submit(Request(id, tokens, more, bits), sampling)

    def fails(step: Any, bits: Any) -> Any:
        nonlocal failures
        if bits == failing and r.random() < 0.3:
            failures += 1
            raise FormatError("a file that shrank")
        return native_run(step, bits)

    monkeypatch.setattr(runtime.native, "run", fails)
    found: dict[Hashable, list[Any]] = {}
    while batcher.busy:
        try:
            for e in batcher.step():
                found.setdefault(e.id, []).append((e.token, e.bits, e.reason, e.choice))
        except FormatError:
            batcher.check()
    assert failures > 3
    assert found == want


def test_what_is_not_a_number_in_a_draft_is_no_guess(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(runtime, [(0, prompt(0, 8), 8, DRAWN, 20)], False)[0]
    batcher, native_run = Batcher(runtime, draft_bits=2), runtime.native.run
    eager(batcher)
    batcher.submit(Request(0, prompt(0, 8), 20, 8), DRAWN)
    monkeypatch.setattr(runtime.native, "run", lambda s, bits: native_run(s, bits) * (np.nan if bits == 2 else 1))
    assert [(e.token, e.bits, e.reason, e.choice) for e in drain(batcher)[0]] == want[0]
    assert set(batcher.speculated().drafted) <= {"ngram"}


class Model:
    """A pass takes bits * (1 + 0.02 tokens) ms. Its text is 8 bits' own; lower ones agree at `agree` of the places."""

    def __init__(self, agree: float, slow: float = 0.02) -> None:
        self.now, self.passes, self.slow = 0, dict[int, int](), slow
        self.bits, self.context, self.sequences, self.vocabulary = (2, 3, 4, 8), 4096, 16, 512
        self.agree = {2: agree, 3: agree, 4: agree, 8: 1.0}
        self.native = SimpleNamespace(prepare=lambda bits: None, run=self.run, most_tokens=512)
        self.check_tokens = lambda tokens: None
        self.checkpoint = SimpleNamespace(folder="folder")

    def run(self, step: Any, bits: int) -> F32:
        self.now += int(bits * (1 + self.slow * len(step.tokens)) * MS)
        self.passes[bits] = self.passes.get(bits, 0) + 1
        places = np.concatenate([
            past + np.arange(end - start)
            for past, start, end in zip(step.past, step.starts[:-1], step.starts[1:], strict=True)
        ])  # fmt: skip
        logits = np.zeros((len(step.rows), self.vocabulary), np.float32)
        for row, place in zip(logits, places[step.rows].tolist(), strict=True):
            right = Random(place).randrange(self.vocabulary)
            row[right if Random(bits * 9973 + place).random() < self.agree[bits] else (right + 1) % 512] = 9
        return logits


def decode(
    model: Model, count: int, streams: int = 1, bits: Any = 8, speculate: bool = True, gap_ms: int = 1000
) -> tuple[Batcher, int, int]:
    """The batcher, the steps and the virtual ns that `count` tokens of each stream took."""
    batcher = Batcher(model, clock=lambda: model.now, speculate=speculate, target=Target(gap_ms * MS, gap_ms * MS))  # type: ignore[arg-type]
    for id in range(streams):
        batcher.submit(Request(id, (1, 2 + id, 3), count, bits), GREEDY)
    found: dict[Hashable, list[Any]] = {}
    steps = 0
    while batcher.busy:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event.token)
        steps += 1
    assert list(found.values()) == [[Random(2 + i).randrange(512) for i in range(count)]] * streams
    return batcher, steps, model.now


@pytest.mark.parametrize("streams", [1, 4])
def test_it_turns_itself_off_where_no_guess_is_right(streams: int) -> None:
    _, plain_steps, plain_ns = decode(Model(0), 2000, streams, speculate=False)
    batcher, steps, ns = decode(Model(0), 2000, streams)
    assert steps == plain_steps == 2000
    assert ns < 1.03 * plain_ns  # with what finding out costs
    assert batcher.speculated().gain < 1
    assert batcher.speculated().steps < 100  # of which the most are tries


def test_few_steps_where_every_guess_is_right_and_the_cheapest_precision_drafts() -> None:
    _, _, plain_ns = decode(Model(1), 1000, speculate=False)
    batcher, steps, ns = decode(Model(1), 1000)
    assert steps < 1000 / 6
    assert plain_ns / ns > 2
    drafted = batcher.speculated().drafted
    assert drafted["2bit"] > 0.9 * sum(drafted.values())
    assert batcher.speculated().gain > 2


def test_it_finds_the_precision_that_gains_most() -> None:
    model = Model(0.3)
    model.agree[3] = 0.95
    batcher, _, ns = decode(model, 2000)
    drafted, accepted = batcher.speculated().drafted, batcher.speculated().accepted
    assert drafted["3bit"] > 0.8 * sum(drafted.values())
    assert accepted["3bit"] / drafted["3bit"] > 0.75
    assert ns < decode(Model(0), 2000, speculate=False)[2] / 1.4


def test_it_comes_back_when_guesses_become_right() -> None:
    model = Model(0)
    batcher = Batcher(model, clock=lambda: model.now)  # type: ignore[arg-type]
    batcher.submit(Request(0, (1, 2, 3), 3900, 8), GREEDY)
    tokens, steps = 0, 0
    while batcher.busy:
        tokens += len(batcher.step())
        if tokens >= 300 and model.agree[2] == 0:
            model.agree.update({2: 1.0, 3: 1.0, 4: 1.0})
        steps += tokens > 3000
    assert steps < 300  # of 900 tokens


def test_guesses_do_not_make_the_tokens_of_others_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain step takes 8.3 ms and a token is due every 10: a request that is not guessed for has 1.7 to spare."""

    class Nothing:
        complete = False

        def limit(self, logits: F32) -> None: ...
        def accept(self, token: int) -> None: ...

    def misses(limited: bool, monkeypatch: pytest.MonkeyPatch) -> int:
        model, target = Model(1), Target(10 * MS, 10 * MS)
        if not limited:
            monkeypatch.setattr(Speculation, "_limit", lambda *_: float("inf"))
        batcher = Batcher(model, clock=lambda: model.now, target=target)  # type: ignore[arg-type]
        batcher.submit(Request(0, (1, 2, 3), 800, 8), GREEDY)
        batcher.submit(Request(1, (1, 3, 3), 200, 8), GREEDY, constraint=Nothing())
        pace = batcher.pace(1)
        while batcher.busy:
            batcher.step()
        assert batcher.speculated().steps > 20
        return pace.misses

    assert misses(True, monkeypatch) <= 2  # what a further guess takes is not known before it was tried
    assert misses(False, monkeypatch) > 20


def test_auto_is_guessed_for_at_the_precision_it_has() -> None:
    model = Model(1)
    batcher, steps, _ = decode(model, 500, bits=Auto(4, 8))
    assert steps < 150
    assert batcher.speculated().steps > 40


def test_who_is_not_guessed_for(runtime: Runtime) -> None:
    speculation = Speculation(BITS)
    assert [speculation.candidates(bits) for bits in (2, 3, 4, 8, 0, "plan")] == [[], [2], [2], [2, 3, 4], [], []]
    assert Speculation(BITS, 6).candidates(8) == [6]
    assert Speculation(BITS, 6).candidates(4) == []
    with pytest.raises(PrecisionError):
        Batcher(runtime, draft_bits=5)
    off = Batcher(runtime, speculate=False)
    off.submit(Request(0, prompt(0, 8), 8, 8), GREEDY)
    drain(off)
    assert (off.speculated().steps, off.speculated().drafted, off.speculated().gain) == (0, {}, 1)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_earlier_text_guesses_what_followed_last_time(text: list[int], count: int) -> None:
    grams = NGrams(text[:20])
    for token in text[20:]:
        grams.extend([token])
    want: list[int] = []
    for length in (3, 2):
        ends = [i for i in range(length, len(text)) if text[i - length : i] == text[len(text) - length :]]
        if ends and not want:
            whole = list(text)
            for i in range(count):
                whole.append(whole[ends[-1] + i])
            want = whole[len(text) :]
    assert grams.guess(count) == want


def test_times_are_no_line() -> None:
    times = Times()
    assert times.predict(8, 1) == 0
    times.note(8, 1, 10**9)  # the first reads planes from a disk
    assert times.predict(8, 1) == 0
    for tokens, ns in ((1, 70), (4, 90), (5, 180)):
        times.note(8, tokens, ns)
    assert [times.predict(8, n) for n in (1, 2, 4, 5, 9)] == [70, pytest.approx(70 + 20 / 3), 90, 180, 180]
    times.note(8, 4, 10**9)
    assert times.predict(8, 4) <= 180  # one surprise
    for _ in range(2 * 4096):
        times.note(8, 1, 70)
    assert times.predict(8, 4) == 70  # what was not seen for long is forgotten


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_token_does_not_depend_on_what_runs_beside_it(overlay: Path, isa: str, mode: str) -> None:
    """To the last bit: decoded in batches of any size, and with prompts cut in any way."""
    text, length = np.array(prompt(0, 60), np.int32), 40

    def logits(native: Any, parts: list[tuple[Any, int, Any]], bits: int, rows: Sequence[int]) -> F32:
        found: F32 = native.run(make_step(parts, rows), bits)
        return found

    with Runtime.open(overlay, threads=2, sequences=34, context=64, mode=mode, isa=isa) as runtime:
        native, tables = runtime.native, np.arange(34 * 4, dtype=np.int32).reshape(34, 4)
        for bits in BITS:
            whole = logits(native, [(text[:length], 0, tables[0])], bits, range(length))
            one = [logits(native, [(text[i : i + 1], i, tables[0])], bits, [0])[0] for i in range(length, length + 9)]
            pieces = []
            for start, end in ((0, 7), (7, 32), (32, length)):
                pieces.append(logits(native, [(text[start:end], start, tables[1])], bits, range(end - start)))
            assert np.array_equal(np.concatenate(pieces), whole)
            verified = logits(native, [(text[length : length + 9], length, tables[1])], bits, range(9))
            assert np.array_equal(verified, np.stack(one))
            for s in range(2, 34):
                logits(native, [(np.roll(text, s)[: 3 + s % 5], 0, tables[s])], bits, [0])
            for batch in (2, 3, 5, 9, 17, 33):
                others = [(text[s : s + 1], 3 + s % 5, tables[s]) for s in range(2, batch + 1)]
                mine = (text[length : length + 1], length, tables[1])
                for place in (0, len(others)):
                    parts = list(others)
                    parts.insert(place, mine)
                    assert np.array_equal(logits(native, parts, bits, [place])[0], one[0]), (bits, batch, place)


def test_room_ahead_is_taken_from_nobody() -> None:
    scheduler = Scheduler(blocks=6, block_tokens=4, context=24, budget=9, most=4)
    scheduler.submit(Request("runs", (1,) * 4, 20, 4))
    scheduler.next()
    scheduler.done({"runs": [1]})
    scheduler.submit(Request("prompt", (2,) * 14, 2, 4))
    (runs, rest) = scheduler.next({"runs": 9, "prompt": 9})
    # 9 tokens a step: no budget is left beside the prompt
    assert (runs.ahead, len(rest.tokens), rest.ahead) == (0, 8, 0)
    scheduler.done({"runs": [1]})
    (runs, rest) = scheduler.next({"runs": 9, "prompt": 9})
    # 3 of budget, and the rest of its block of 4: 2 of them hold 6 tokens, 4 are the prompt's
    assert (runs.past, len(rest.tokens), runs.ahead) == (5, 6, 2)
    assert len(runs.blocks) == 2
    scheduler.done({"runs": [1, 1, None], "prompt": [1]})
    scheduler.check()
    (alone,) = scheduler.next({"prompt": 9})
    assert alone.ahead == 0  # it gets one more token, and no more
    scheduler.done({"prompt": [1]})
    assert scheduler.counts().blocks_available == 6


def test_room_ahead_leaves_the_blocks_that_a_prompt_has_yet_to_fill() -> None:
    scheduler = Scheduler(blocks=27, block_tokens=4, context=108, budget=512, most=4)
    scheduler.submit(Request("runs", (1,) * 4, 40, 4))
    scheduler.next()
    scheduler.done({"runs": [1]})
    scheduler.submit(Request("scores", (2,) * 100, 1, 4, scores=True))  # 25 blocks, of which a step fills 16
    runs, scores = scheduler.next({"runs": 9})
    assert (runs.past, len(runs.blocks), runs.ahead) == (4, 2, 3)
    assert (len(scores.tokens), len(scores.blocks)) == (64, 16)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_drafts_are_what_the_low_precision_goes_on_with(runtime: Runtime, sampling: Sampling) -> None:
    """Over the cache of the target, each from the one before, with the random number of its place."""
    batcher, text, found = Batcher(runtime, draft_bits=2), prompt(3, 12), list[tuple[int, list[int]]]()
    speculation = batcher._speculation
    assert speculation is not None
    speculation.plan = lambda parts, *_: {p.id: Draft(2, p.ahead) for p in parts if p.ahead}  # type: ignore[method-assign]
    speculation.note = lambda part, draft, *_: found.append((part.past, list(draft.tokens)))  # type: ignore[method-assign]
    batcher.submit(Request(0, text, 40, 8), sampling)
    whole = [*text, *(event.token or 0 for event in drain(batcher)[0])]
    assert sum(len(tokens) > 3 for _, tokens in found) > 5
    for past, tokens in found:
        runtime.reset()
        runtime.prefill(0, whole[:past], 8)
        sampler, last, want = Sampler(sampling, whole[: past + 1]), whole[past], list[int]()
        for _ in tokens:
            last = sampler.choose(runtime.decode([last], 2)[0]).token
            want.append(last)
        assert tokens == want
