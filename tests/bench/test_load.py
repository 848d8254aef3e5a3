"""Arrivals, lengths, texts and the workloads that are made of them."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean, median, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.bench.load import arrivals as arrive
from everybit.bench.load.arrivals import CONSTANT, Arrivals, Stage, Users
from everybit.bench.load.lengths import MOST_TOKENS, parse_length, parse_lengths, parse_seconds
from everybit.bench.load.texts import Texts, random_words, read_pool, read_prompts
from everybit.bench.load.traces import Trace, TraceRequest, read_trace, select
from everybit.bench.load.workload import (
    Drawn,
    Prefixes,
    Workload,
    Written,
    closed_loop,
    conversations,
    open_loop,
    replay,
)
from everybit.bench.records import SECOND, Turn
from everybit.errors import SourceError

WORDS = replace(random_words(seed=3), chars_per_token=4.0)
SHORT = Drawn(WORDS, parse_lengths("5-20", "3"))

Plain = tuple[int, int, tuple[Turn, ...], bool, str]


def taken(workload: Workload, worker: int = 0, workers: int = 1, most: int | None = None) -> list[Plain]:
    """Sessions with their turns (at most so many of each), to be compared."""
    return [
        (one.number, one.at_ns, tuple(islice(one.turns, most)), one.history, one.prefix)
        for one in workload.sessions(worker, workers)
    ]


# Arrivals


def test_constant_arrivals_are_exact() -> None:
    assert list(arrive.constant(3, count=4)) == [0, 333_333_333, 666_666_667, SECOND]
    assert len(list(arrive.constant(20, duration_s=5))) == 100


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_spread_of_their_gamma(burstiness: float) -> None:
    times = [0, *arrive.gamma(50, burstiness, count=20_000, seed=1)]
    gaps = [after - before for before, after in pairwise(times)]
    assert fmean(gaps) == pytest.approx(SECOND / 50, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_constant_ramp_follows_the_integral_of_its_rate() -> None:
    times = list(arrive.ramp(10, 30, 10, burstiness=CONSTANT))
    assert len(times) == 200
    for number, at_ns in enumerate(times):
        seconds = at_ns / SECOND
        assert 10 * seconds + seconds**2 == pytest.approx(number, abs=1e-6)
    assert len(list(arrive.ramp(30, 10, 10, burstiness=CONSTANT))) == 200


def test_a_random_ramp_has_its_rates() -> None:
    times = list(arrive.ramp(100, 300, 100, seed=2))
    early, late = (sum(begin <= at < begin + 10 * SECOND for at in times) for begin in (0, 90 * SECOND))
    assert early == pytest.approx(1100, abs=5 * math.sqrt(1100))
    assert late == pytest.approx(2900, abs=5 * math.sqrt(2900))


def test_steps_follow_one_another() -> None:
    times = list(arrive.steps([(2, 5), (1, 50)], burstiness=CONSTANT))
    assert len(times) == 60
    assert [at for at in times if at < 2 * SECOND] == [n * SECOND // 5 for n in range(10)]
    assert times[10] == 2 * SECOND
    assert Arrivals((Stage(5, 5, 2), Stage(50, 50, 1)), CONSTANT).duration_ns == 3 * SECOND


rates = st.floats(0.1, 200)


@given(
    st.lists(st.tuples(rates, rates, st.floats(0.1, 5)), min_size=1, max_size=3),
    st.sampled_from([0.3, 1.0, 5.0, CONSTANT]),
    st.none() | st.integers(1, 50),
    st.integers(0, 9),
)
def test_arrivals_are_in_order_within_their_bounds_and_repeatable(
    stages: list[tuple[float, float, float]], burstiness: float, count: int | None, seed: int
) -> None:
    drawn = Arrivals(tuple(Stage(*one) for one in stages), burstiness, count, seed)
    times = list(drawn)
    assert times == sorted(times) == list(drawn)
    assert drawn.duration_ns is not None
    assert all(0 <= at < drawn.duration_ns + 1 for at in times)
    assert len(times) <= (count or math.inf)
    if burstiness is CONSTANT and count is None:
        assert abs(len(times) - math.ceil(sum(stage.arrivals for stage in drawn.stages))) <= 1


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, 1e9])
def test_a_rate_has_to_be_a_rate(rate: float) -> None:
    with pytest.raises(SourceError, match="rate"):
        arrive.poisson(rate, count=1)


def test_arrivals_need_an_end_and_sense() -> None:
    for wrong in (
        lambda: arrive.poisson(1),
        lambda: arrive.poisson(1, duration_s=0),
        lambda: arrive.poisson(1, duration_s=math.nan),
        lambda: arrive.poisson(1, count=0),
        lambda: arrive.poisson(1e6, duration_s=1e6),
        lambda: arrive.gamma(1, 0, count=1),
        lambda: arrive.ramp(1, 2, math.inf, count=3),
        lambda: arrive.steps([]),
        lambda: Users(0),
        lambda: Users(1, -1),
    ):
        with pytest.raises(SourceError):
            wrong()


def test_users_start_evenly() -> None:
    assert list(Users(4, 2)) == [0, SECOND // 2, SECOND, 3 * SECOND // 2]
    assert list(Users(3)) == [0, 0, 0]


# Lengths


@pytest.mark.parametrize(
    ("text", "middle", "least", "most"),
    [
        ("128", 128, 128, 128),
        ("64-256", 160, 64, 256),
        ("normal:256,64", 256, 1, 1000),
        ("normal:mean=256,sd=64:min=200:max=300", 256, 200, 300),
        ("lognormal:median=512,sigma=0.8", 512, 1, MOST_TOKENS),
        ("lognormal:512,0.8:max=600", 512, 1, 600),
        ("exp:200", 200 * math.log(2), 1, 10_000),
        ("exp:200:min=100", 200 * math.log(2), 100, 10_000),
    ],
)
def test_lengths_have_their_median_and_limits(text: str, middle: float, least: int, most: int) -> None:
    random, length = Random(5), parse_length(text)
    drawn = [length.draw(random) for _ in range(4000)]
    assert median(drawn) == pytest.approx(middle, rel=0.06)
    assert least <= min(drawn)
    assert max(drawn) <= most
    assert all(type(one) is int for one in drawn)


def test_a_uniform_length_reaches_both_ends_equally() -> None:
    random, length = Random(1), parse_length("1-4")
    assert all(900 < count < 1100 for count in Counter(length.draw(random) for _ in range(4000)).values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "0",
        "-5",
        "12.5",
        "1e3",
        "64-32",
        "0-5",
        "normal:5",
        "normal:5,x",
        "normal:sd=5,mean=2",
        "exp:0",
        "lognormal:5,11",
        "exp:1,2",
        "128:max=0",
        "9:min=5:max=4",
        "9:max=5:max=6",
        "99999999999",
        "zipf:1",
        "nan",
    ],
)
def test_a_length_that_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_length(text)
    assert f"length {text!r}: expected" in str(caught.value)


def test_pairs_of_a_file_are_drawn_together(tmp_path: Path) -> None:
    for header in ("prompt,output", "num_prefill_tokens,num_decode_tokens", "ContextTokens,GeneratedTokens"):
        file = tmp_path / "lengths.csv"
        file.write_text(f"{header},other\n" + "".join(f"{n},{n * n},x\n" for n in range(1, 30)))
        random, both = Random(0), parse_lengths(f"file:{file}", f"file:{file}:max=400")
        pairs = {both.draw(random) for _ in range(500)}
        assert len(pairs) == 29
        assert all(output == min(prompt**2, 400) for prompt, output in pairs)
        alone = parse_length(f"file:{file}", "output")
        assert {alone.draw(random) for _ in range(500)} <= {n * n for n in range(1, 30)}


@pytest.mark.parametrize(
    ("text", "told"), [("a,b\n1,2\n", "columns 'a,b'"), ("prompt,output\n", "no lengths"), ("", "columns ''")]
)
def test_a_file_without_lengths(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(SourceError, match=told):
        parse_length(f"file:{file}")


def test_seconds_are_drawn_in_ns() -> None:
    random = Random(0)
    assert parse_seconds("1.5").draw(random) == 1_500_000_000
    assert parse_seconds("0").draw(random) == 0
    assert all(SECOND / 2 <= parse_seconds("0.5-2").draw(random) <= 2 * SECOND for _ in range(50))
    assert parse_seconds("exp:5:max=0.001").draw(random) <= SECOND // 1000
    for text in ("file:x.csv", "-1", "exp:0", "nan"):
        with pytest.raises(SourceError, match="seconds"):
            parse_seconds(text)


# Texts


def test_a_text_has_about_its_length_and_whole_words() -> None:
    for tokens in (3, 50, 1000):
        text = WORDS.text("one", tokens)
        assert abs(len(text) - 4 * tokens) <= 5
        assert f" {text} ".count("  ") == 0
    assert set(WORDS.text("one", 1000).split()) <= set(WORDS.pool.split())
    wide = Texts(WORDS.pool, chars_per_token=6.5)
    assert len(wide.text("one", 1000)) == pytest.approx(6500, abs=5)


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 300))
def test_a_longer_text_begins_as_the_shorter(name: int, one: int, other: int) -> None:
    short, long = (WORDS.text(str(name), tokens) for tokens in sorted((one, other)))
    assert long.startswith(short)


def test_texts_of_different_names_or_seeds_share_no_start() -> None:
    openings = {tuple(WORDS.text(f"{n}", 40).split()[:5]) for n in range(3000)}
    assert len(openings) == 3000
    assert random_words(4).text("one", 40) != WORDS.text("one", 40)


def test_a_small_file_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "pool.txt"
    file.write_text("One  fine\nday\n")
    text = read_pool(file).text("x", 100)
    assert len(text) == pytest.approx(400, abs=5)
    words = text.split()[8:-1]
    assert words[3:] == words[:-3]
    assert set(words) == {"One", "fine", "day"}


def test_a_text_without_spaces_is_cut_anywhere() -> None:
    text = Texts("字" * 1000, chars_per_token=1.5).text("x", 200)
    assert len(text) == 300


def count_long_words_twice(text: str) -> int:
    return sum(1 + (len(word) > 4) for word in text.split())


def test_a_counter_brings_texts_as_near_as_words_allow() -> None:
    counted = replace(WORDS, chars_per_token=3.0, count=count_long_words_twice)
    for name in map(str, range(100)):
        words = WORDS.text(name, 500).split()
        counts = [count_long_words_twice(" ".join(words[:end])) for end in range(1, len(words))]
        assert abs(count_long_words_twice(counted.text(name, 200)) - 200) == min(abs(one - 200) for one in counts)
    with pytest.raises(SourceError, match="finds 0 tokens"):
        Texts("word", count=lambda text: 0).text("x", 5)


def test_a_pool_needs_words(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(SourceError, match="without words"):
        read_pool(tmp_path / "empty")
    for wrong in (0.0, math.nan):
        with pytest.raises(SourceError, match="characters a token"):
            Texts("a", chars_per_token=wrong)


# Own prompts


def test_own_prompts_in_order_and_shuffled(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    lines = [{"prompt": f"question {n}", "output_tokens": n + 1} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    plain, shuffled = read_prompts(file), read_prompts(file, shuffle=1)
    assert [one.texts[0] for one in plain] == [line["prompt"] for line in lines]
    assert shuffled != plain
    assert sorted(shuffled, key=str) == sorted(plain, key=str)
    assert shuffled == read_prompts(file, shuffle=1)
    file.write_text("One?\n\n  Two?\n")
    assert [one.texts for one in read_prompts(file)] == [("One?",), ("Two?",)]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a"}',
        '{"prompt": ""}',
        '{"messages": []}',
        '{"prompt": "a", "messages": ["b"]}',
        '{"prompt": "a"',
        '{"messages": [{"role": "system", "content": "a"}]}',
        '{"prompt": "a", "output_tokens": 0}',
        '["a"]',
    ],
)
def test_a_prompt_that_cannot_be_read_names_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(SourceError, match="line 2"):
        read_prompts(file)


def written(tmp_path: Path, *lines: object) -> Written:
    (tmp_path / "prompts").write_text("\n".join(map(json.dumps, lines)))
    return Written(read_prompts(tmp_path / "prompts"), parse_length("7"))


def test_own_prompts_go_round_among_users(tmp_path: Path) -> None:
    source = written(tmp_path, *({"prompt": str(n)} for n in range(5)), {"prompt": "5", "output_tokens": 2})
    sessions = taken(closed_loop(Users(2), source, count=8))
    assert [[turn.text for turn in one[2]] for one in sessions] == [["0", "2", "4", "0"], ["1", "3", "5", "1"]]
    assert [turn.output_tokens for turn in sessions[1][2]] == [7, 7, 2, 7]
    assert "more than once" in closed_loop(Users(2), source, count=8).notes[0]
    assert closed_loop(Users(2), source, count=6).notes == ()
    with pytest.raises(SourceError, match="5 prompts without output_tokens"):
        Written(source.prompts)


def test_own_conversations(tmp_path: Path) -> None:
    source = written(tmp_path, {"messages": ["a", {"role": "user", "content": "b"}]}, {"prompt": "c"})
    workload = conversations(arrive.constant(1, count=3), source, think=parse_seconds("2"))
    assert workload.count == 5
    assert [[(turn.text, turn.think_ns) for turn in one[2]] for one in taken(workload)] == [
        [("a", 0), ("b", 2 * SECOND)],
        [("c", 0)],
        [("a", 0), ("b", 2 * SECOND)],
    ]
    with pytest.raises(SourceError, match="several messages"):
        open_loop(arrive.constant(1, count=3), source)
    with pytest.raises(SourceError, match="lines say theirs"):
        conversations(Users(1), source, turns=parse_length("2"))


# Workloads


def workloads() -> dict[str, Workload]:
    trace = Trace([TraceRequest(n * SECOND, 9 + n, 4, session=n % 3) for n in range(20)], ["a note"], "azure")
    arrivals, pause = arrive.poisson(10, count=20), parse_seconds("exp:1")
    prefixes = Prefixes(WORDS, parse_length("30"), 3)
    return {
        "open": open_loop(arrivals, SHORT, prefixes=prefixes),
        "closed": closed_loop(Users(7, 2), SHORT, count=20, think=pause, prefixes=Prefixes(WORDS, parse_length("9"))),
        "endless": closed_loop(Users(7), SHORT, duration_s=9, think=pause),
        "conversations": conversations(arrivals, SHORT, turns=parse_length("1-4"), think=pause, prefixes=prefixes),
        "replay": replay(trace, WORDS),
    }


@pytest.mark.parametrize("kind", ["open", "closed", "endless", "conversations", "replay"])
def test_workers_make_the_whole_between_them_wherever_they_are(kind: str) -> None:
    workload = workloads()[kind]
    whole = taken(workload, most=6)
    sent = pickle.loads(pickle.dumps(workload))
    shares = [taken(sent, worker, 3, most=6) for worker in (2, 0, 1)]
    assert sorted(one for share in shares for one in share) == whole
    assert [one[1] for one in whole] == sorted(one[1] for one in whole)
    assert [one[0] for one in whole] == list(range(len(whole)))
    if kind != "endless":
        assert sum(len(one[2]) for one in whole) == workload.count
    described = workload.describe()
    assert json.loads(json.dumps(described)) == described


def test_an_open_loop_is_sessions_of_one_turn_at_the_arrivals() -> None:
    sessions = taken(workloads()["open"])
    assert [one[1] for one in sessions] == list(arrive.poisson(10, count=20))
    assert len({one[4] for one in sessions}) == 3
    for _, _, (turn,), history, prefix in sessions:
        assert not history
        assert len(prefix) == pytest.approx(120, abs=5)
        assert turn.output_tokens == 3
        assert turn.prompt_tokens is not None
        assert len(turn.text) == pytest.approx(4 * (turn.prompt_tokens - 30), abs=5)


def test_another_seed_is_another_workload_even_of_the_same_texts() -> None:
    source = Drawn(WORDS, parse_lengths("9", "3"))
    prefixes = Prefixes(WORDS, parse_length("5"))
    runs = [taken(open_loop(arrive.constant(1, count=5), source, seed=seed, prefixes=prefixes)) for seed in (1, 2, 1)]
    assert runs[0] == runs[2]
    assert len({one[4] for run in runs for one in run}) == len({one[2][0].text for run in runs for one in run}) == 10


def test_a_closed_loop_shares_its_count_and_pauses_between_turns() -> None:
    sessions = taken(workloads()["closed"])
    assert [len(one[2]) for one in sessions] == [3, 3, 3, 3, 3, 3, 2]
    assert [turn.think_ns > 0 for turn in sessions[0][2]] == [False, True, True]
    assert len({turn.text for one in sessions for turn in one[2]}) == 20
    assert len({one[4] for one in sessions}) == 7
    endless = workloads()["endless"]
    assert (endless.count, endless.duration_ns) == (None, 9 * SECOND)
    assert len(taken(endless, most=100)[3][2]) == 100


def test_conversations_keep_history_and_do_not_guess_its_length() -> None:
    sessions = taken(workloads()["conversations"])
    assert all(one[3] for one in sessions)
    assert {len(one[2]) for one in sessions} == {1, 2, 3, 4}
    for _, _, turns, _, _ in sessions:
        assert [turn.prompt_tokens is None for turn in turns] == [index > 0 for index in range(len(turns))]


def test_texts_are_made_only_when_turns_are_taken() -> None:
    asked: list[str] = []

    def count(text: str) -> int:
        asked.append(text)
        return 5

    source = Drawn(Texts("word", count=count), parse_lengths("5", "5"))
    sessions = open_loop(arrive.constant(1, count=1000), source).sessions()
    first = next(sessions)
    assert asked == []
    next(iter(first.turns))
    assert len(asked) == 1


def test_workloads_need_an_end_and_something_to_send() -> None:
    with pytest.raises(SourceError, match="without an end"):
        closed_loop(Users(2), SHORT)
    with pytest.raises(SourceError, match="1 requests of 2 users"):
        closed_loop(Users(2), SHORT, count=1)
    with pytest.raises(SourceError, match="duration nan"):
        closed_loop(Users(2), SHORT, duration_s=math.nan)
    with pytest.raises(SourceError, match="no arrival"):
        open_loop(arrive.poisson(0.001, duration_s=0.01), SHORT)
    with pytest.raises(SourceError, match="number of turns"):
        conversations(Users(2), SHORT)
    with pytest.raises(SourceError, match="0 prefixes"):
        Prefixes(WORDS, parse_length("3"), 0)


def test_equal_blocks_are_equal_text() -> None:
    requests = [
        TraceRequest(0, 1030, 1, (0, 1, 2)),
        TraceRequest(0, 1030, 1, (0, 1, 3)),
        TraceRequest(0, 800, 1, (0, 1)),
        TraceRequest(0, 1030, 1, (9, 1, 2)),
    ]
    for scale in (1.0, 0.3):
        trace = select(Trace(requests, [], "mooncake"), scale_prompt=scale)
        one, other, shorter, apart = (turns[0].text for _, _, turns, _, _ in taken(replay(trace, WORDS)))
        assert len(one) == pytest.approx(4 * 1030 * scale, abs=9)
        shared = sum(a == b for a, b in zip(one, other, strict=False))
        assert shared >= 4 * 1024 * scale - 9
        assert one != other
        assert one.startswith(shorter)
        assert one[:20] != apart[:20]


def test_a_conversation_in_a_trace_begins_with_what_came_before() -> None:
    requests = [
        TraceRequest(0, 50, 10, session=1),
        TraceRequest(1, 80, 10, session=1),  # holds 50 + 10
        TraceRequest(2, 80, 10, session=1),  # cannot hold 80 + 10: another conversation
        TraceRequest(3, 90, 10, session=1),  # holds just that
        TraceRequest(4, 90, 10),
        TraceRequest(5, 100, 10, session=1),  # goes on further
    ]
    texts = [turns[0].text for _, _, turns, _, _ in taken(replay(Trace(requests, [], "burstgpt"), WORDS))]
    assert texts[1].startswith(texts[0])
    assert texts[5].startswith(texts[3])
    assert texts[3].startswith(texts[2])
    assert len({text[:40] for text in texts}) == 3


def test_a_real_replay_is_made_within_its_gaps(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / "mooncake_conversation_head.jsonl")
    workload = replay(select(trace, part=":300", speed=20), WORDS)
    sessions = taken(workload)
    letters = sum(len(one[2][0].text) for one in sessions)
    assert letters == pytest.approx(4 * sum(one.prompt_tokens for one in trace.requests[:300]), rel=0.01)
    assert workload.duration_ns == round(trace.requests[299].at_ns / 20)
