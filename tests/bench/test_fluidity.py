"""The fluidity index against the study's examples, a playback clock written another way, and what must always hold."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.bench.fluidity import FAILED, Deadlines, fluid_token_rate, fluidity, least_gap
from everybit.bench.records import MS
from everybit.errors import SourceError

STUDY = Deadlines(300 * MS, 30 * MS)
streams = st.lists(st.integers(0, 400), min_size=1, max_size=40).map(lambda gaps: list(itertools.accumulate(gaps)))


def stalled(place: int, stall_ns: int = 900 * MS, tokens: int = 100, first_ns: int = 200 * MS) -> list[int]:
    """A token every 20 ms, but for one stall before token `place`."""
    gaps = [first_ns] + [stall_ns if token == place else 20 * MS for token in range(1, tokens)]
    return list(itertools.accumulate(gaps))


def played(times: list[int], deadlines: Deadlines) -> tuple[int, int, int]:
    """Hits, misses and late tokens as the paper tells it: waits, time in hand, and deadlines that pass one by one."""
    hits = misses = late = in_hand = 0
    for token, wait in enumerate(b - a for a, b in itertools.pairwise([0, *times])):
        allowed = deadlines.gap_ns if token else deadlines.first_ns
        if wait <= allowed + in_hand:
            hits += 1
            in_hand += allowed - wait
            continue
        late += 1
        passed = allowed + in_hand
        while passed <= wait:
            misses += 1
            passed += deadlines.gap_ns
        in_hand = 0
    return hits, misses, late


def test_the_study_s_examples() -> None:
    early, late = fluidity(stalled(10), STUDY), fluidity(stalled(90), STUDY)
    assert round(early.index, 3) == 0.811
    assert (early.hits, early.misses) == (99, 23)
    assert early.deadline_hit_ratio == 0.99
    assert late.index == 1.0
    assert (stalled(10)[-1] - stalled(10)[0]) / 99 / MS == pytest.approx(28.9, abs=0.05)  # which tells them not apart
    assert stalled(10)[-1] == stalled(90)[-1]


def test_a_token_at_its_deadline_is_in_time_and_one_nanosecond_later_is_not() -> None:
    deadlines = Deadlines(100, 10)
    assert fluidity([100, 110, 120], deadlines).misses == 0
    assert fluidity([101], deadlines).misses == 1
    assert fluidity([109], deadlines).misses == 1
    assert fluidity([110], deadlines).misses == 2  # the deadline after it has come too
    assert fluidity([150, 160, 171], deadlines) == fluidity([150, 150, 171], deadlines)  # both have (1, 7)


def test_no_tokens_score_nothing() -> None:
    assert fluidity([], STUDY).index == 0.0
    assert FAILED.index == FAILED.deadline_hit_ratio == 0.0
    assert least_gap([], 300 * MS) is None


def test_deadlines_have_to_pass() -> None:
    for first_ns, gap_ns in ((0, 1), (1, 0), (-5, 1)):
        with pytest.raises(SourceError, match="expected 1 or more"):
            Deadlines(first_ns, gap_ns)


def test_equals_the_playback_clock_on_ten_thousand_streams() -> None:
    source = random.Random(7)
    for _ in range(10_000):
        deadlines = Deadlines(source.randint(1, 60), source.randint(1, 15))
        shape = source.choice(((0, 12), (0, 30), (5, 9)))
        gaps = [source.randint(*shape) if source.random() < 0.9 else source.randint(0, 90) for _ in range(12)]
        times = list(itertools.accumulate(gaps))
        found = fluidity(times, deadlines)
        assert (found.hits, found.misses, found.tokens - found.hits) == played(times, deadlines), (times, deadlines)


@given(streams, st.integers(1, 300), st.integers(1, 100), st.integers(0, 200), st.integers(0, 100))
def test_more_time_never_costs(times: list[int], first: int, gap: int, more_first: int, more_gap: int) -> None:
    before, after = (
        fluidity(times, Deadlines(first, gap)),
        fluidity(times, Deadlines(first + more_first, gap + more_gap)),
    )
    assert after.index >= before.index
    assert after.misses <= before.misses


@given(st.integers(1, 29), st.integers(0, 10), st.integers(0, 1500), st.integers(0, 4))
def test_a_later_stall_in_a_steady_stream_never_costs_more(place: int, spare: int, stall: int, first: int) -> None:
    deadlines = Deadlines(300, 20 + spare)
    indices = []
    for token in (place, place + 1):
        gaps = [300 - first] + [20 + stall if one == token else 20 for one in range(1, 31)]
        indices.append(fluidity(list(itertools.accumulate(gaps)), deadlines).index)
    assert indices[0] <= indices[1]


@given(streams, st.integers(1, 300), st.sampled_from((0.5, 0.9, 1.0)))
def test_least_gap_is_the_first_that_reaches_the_share(times: list[int], first: int, share: float) -> None:
    every = (gap for gap in range(1, times[-1] + 2) if fluidity(times, Deadlines(first, gap)).index >= share)
    assert least_gap(times, first, share) == next(every, None)


def test_least_gap_of_a_steady_stream_is_exact() -> None:
    times = [300 * MS + 21_234_567 * token for token in range(100)]
    gap = least_gap(times, 300 * MS, 1.0)
    assert gap == 21_234_567
    assert fluidity(times, Deadlines(300 * MS, gap - 1)).index < 1.0


def test_a_short_stream_with_a_late_start_reaches_no_gap() -> None:
    assert least_gap([400 * MS, 420 * MS], 300 * MS) is None  # one of two is late, whatever follows
    assert least_gap([400 * MS + 20 * MS * token for token in range(10)], 300 * MS) is not None


def test_fluid_token_rate_is_that_of_the_worst_hundredth() -> None:
    assert fluid_token_rate([20 * MS] * 100) == 50.0
    assert fluid_token_rate([20 * MS] * 98 + [40 * MS] * 2) == pytest.approx(25.0)
    assert fluid_token_rate([20 * MS] * 999 + [None]) == 50.0
    assert fluid_token_rate([20 * MS] * 9 + [None]) == 0.0
    with pytest.raises(SourceError):
        fluid_token_rate([])
