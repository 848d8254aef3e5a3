"""The metrics of records whose figures can be told by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everybit.bench.fluidity import Deadlines
from everybit.bench.ideal import Ideal, fit, parse_ideal, read_ideal
from everybit.bench.metrics import arrivals, latencies, measure, stalls
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.statistics import (
    bootstrap_interval,
    difference_interval,
    percentile,
    ratio_interval,
    summary,
    wilson,
)
from everybit.bench.targets import Slo, Targets, Window, parse_slo
from everybit.errors import SourceError

WINDOW = Window(0, 10 * SECOND)
TARGETS = Targets(Deadlines(300 * MS, 30 * MS))


def answer(
    number: int = 0,
    at_ms: float = 0,
    first_ms: float = 200,
    gaps_ms: tuple[float, ...] = (20,) * 9,
    lag_ms: float = 0,
    pieces: tuple[int, ...] | None = None,
    **more: Any,
) -> Record:
    """A complete stream; `first_ms` is from the intended send."""
    times = [round((at_ms + first_ms + wait) * MS) for wait in itertools.accumulate(gaps_ms, initial=0)]
    known: dict[str, Any] = {
        "sent_ns": round((at_ms + lag_ms) * MS),
        "end_ns": times[-1] + MS,
        "status": 200,
        "times_ns": times,
        "tokens": list(pieces or (1,) * len(times)),
        "source": "usage",
    }
    return Record(number, number, 0, 0, round(at_ms * MS), **{**known, **more})


def failure(error: str = "busy", at_ms: float = 0, **more: Any) -> Record:
    return Record(
        99, 99, 0, 0, round(at_ms * MS), sent_ns=round(at_ms * MS), end_ns=round(at_ms * MS) + MS, error=error, **more
    )


# --- statistics
def test_percentiles_are_numpy_s() -> None:
    source = random.Random(1)
    for n in (1, 2, 3, 10, 101):
        values = sorted(source.randint(0, 10**12) for _ in range(n))
        for q in (0, 1, 33.3, 50, 90, 99, 100):
            assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-12)
    assert percentile([1, math.inf, math.inf], 75) == math.inf
    with pytest.raises(SourceError):
        percentile([1], 101)


def test_summary_is_numpy_s_and_says_when_there_are_few() -> None:
    values = [random.Random(2).gauss(50, 9) * MS for _ in range(100)]
    found = summary(values, MS)
    assert found["mean"] == pytest.approx(np.mean(values) / MS)
    assert found["std"] == pytest.approx(np.std(values) / MS)
    assert (found["n"], found["few"]) == (100, False)
    assert summary(values[:99])["few"] is True
    with pytest.raises(SourceError):
        summary([])


def test_wilson_is_the_textbook_s() -> None:
    found = wilson(81, 263)  # Newcombe (1998), table I
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20).low == 0.0
    assert round(wilson(0, 20).high, 4) == 0.1611
    assert wilson(7, 7).high == 1.0
    for successes, total in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(SourceError):
            wilson(successes, total)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    source, hits = random.Random(3), 0
    for trial in range(200):
        values = [source.expovariate(1) for _ in range(30)]
        found = bootstrap_interval(values, lambda v: sum(v) / len(v), resamples=200, seed=trial)
        hits += found.low <= 1 <= found.high
    assert 175 <= hits <= 199


@pytest.mark.parametrize("rounds", [3, 6])
def test_ratio_of_like_rounds_holds_one_and_of_unlike_does_not(rounds: int) -> None:
    def mean(values: Any) -> float:
        return sum(values) / len(values)

    source, held, found_out = random.Random(rounds), 0, 0
    for trial in range(100):
        shared = [source.gauss(100, 20) for _ in range(rounds)]  # the server's state, which A and B meet alike
        a = [[one + source.gauss(0, 2) for _ in range(10)] for one in shared]
        b = [[one + source.gauss(0, 2) for _ in range(10)] for one in shared]
        same = ratio_interval(a, b, mean, resamples=100, seed=trial)
        other = ratio_interval([[1.1 * v for v in block] for block in a], b, mean, resamples=100, seed=trial)
        held += same.low <= 1 <= same.high
        found_out += other.low > 1
    assert held >= 90
    assert found_out >= 95
    wide = ratio_interval(a, b, mean, paired=False, resamples=100)
    assert wide.high - wide.low > 2 * (same.high - same.low)  # the rounds' own differences are in it


def test_intervals_refuse_what_they_cannot_judge() -> None:
    with pytest.raises(SourceError, match="2 blocks"):
        ratio_interval([[1]] * 2, [[1]] * 2, max)
    with pytest.raises(SourceError, match="pairs"):
        ratio_interval([[1]] * 3, [[1]] * 4, max)
    with pytest.raises(SourceError, match="without values"):
        difference_interval([[1], [1], []], [[1]] * 3, max)
    with pytest.raises(SourceError, match="compare by difference"):
        ratio_interval([[1]] * 3, [[0]] * 3, max)
    assert difference_interval([[1]] * 3, [[0]] * 3, max).value == 1
    with pytest.raises(SourceError, match="1 values"):
        bootstrap_interval([1], max)


# --- targets
def test_an_slo_is_parsed_exactly() -> None:
    found = parse_slo("ttft=200ms, tpot=50.5ms,e2e=5s,fluidity=0.9,share=0.95")
    assert found == Slo(200 * MS, 50_500_000, 5 * SECOND, 0.9, 0.95)
    assert parse_slo("ttft=700us") == Slo(first_ns=700_000)


@pytest.mark.parametrize(
    "text",
    [
        *("", "ttft", "ttft=200", "ttft=-1ms", "ttft=0s", "itl=3ms", "share=0.9", "fluidity=1.1", "fluidity=nan"),
        *("ttft=1s,share=0", "ttft=1s,ttft=2s", "first_ns=1s", "ttft=1e3ms", "ttft=9999999999999999s"),
    ],
)
def test_a_bad_slo_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="expected"):
        parse_slo(text)


def test_windows_and_slack_are_checked() -> None:
    for begin, end in ((5, 5), (-1, 5)):
        with pytest.raises(SourceError):
            Window(begin, end)
    with pytest.raises(SourceError, match="ideal"):
        Targets(Deadlines(1, 1), slack_ns=5)


# --- latency
def test_latency_is_from_the_intended_send_and_from_the_actual_one() -> None:
    records = [answer(n, at_ms=100 * n, first_ms=200 + n, lag_ms=50) for n in range(5)]
    found = measure(records, WINDOW, TARGETS)["latency"]
    assert found["ttft_ms"]["p50"] == 202
    assert found["ttft_from_sent_ms"]["p50"] == 152
    assert found["e2e_ms"]["max"] == 204 + 180 + 1
    assert found["e2e_from_sent_ms"]["max"] == 204 + 180 + 1 - 50
    assert found["lag_ms"]["mean"] == 50
    assert found["normalised_ms"]["min"] == pytest.approx(38.1)
    assert found["tpot_ms"]["mean"] == pytest.approx(20)
    assert found["connect_ms"] is None  # all had a connection
    assert "corrected" not in found["ttft_ms"]


def test_a_piece_of_k_tokens_is_one_gap_and_k_minus_1_of_no_time() -> None:
    record = answer(gaps_ms=(60, 60), pieces=(2, 3, 3))
    assert arrivals(record) == [ms * MS for ms in (200, 200, 260, 260, 260, 320, 320, 320)]
    found = measure([record], WINDOW, TARGETS)["latency"]
    assert found["gap_ms"]["n"] == 7
    assert found["gap_ms"]["mean"] == pytest.approx(120 / 7) == found["tpot_ms"]["mean"]
    assert (found["gap_ms"]["p50"], found["gap_ms"]["curve"][0], found["gap_ms"]["curve"][100]) == (0, 0, 60)
    assert (found["piece_gap_ms"]["n"], found["piece_gap_ms"]["mean"]) == (2, 60)
    assert found["gap_variation"]["mean"] == 0


def test_what_has_no_value_is_missing_and_never_zero() -> None:
    found = measure([answer(gaps_ms=()), failure()], WINDOW, TARGETS)
    assert found["latency"]["ttft_ms"]["missing"] == 1
    for name in ("tpot_ms", "gap_ms", "piece_gap_ms", "gap_variation"):
        assert found["latency"][name] is None
    assert found["stalls"]["time_share"] is None
    assert found["stalls"]["longest_ms"] is None
    assert found["goodput"] is found["over_ideal"] is found["precision"] is found["cached_share"] is None
    assert found["throughput"]["prompt_tokens_per_s"] is None


def test_an_answer_that_came_whole_has_no_times_between_tokens() -> None:
    whole = answer(gaps_ms=(), pieces=(50,), streamed=False)
    found = measure([whole, answer(1)], WINDOW, TARGETS)["latency"]
    assert (found["tpot_ms"]["n"], found["tpot_ms"]["missing"]) == (1, 1)
    assert found["gap_ms"]["n"] == 9
    assert found["ttft_ms"]["n"] == 2


def test_a_client_stall_is_in_the_headline_and_not_in_the_corrected_figures() -> None:
    records = [answer(n, at_ms=10 * n) for n in range(95)]
    records += [answer(n, at_ms=10 * n, first_ms=2000, lag_ms=1800, stalled=True) for n in range(95, 100)]
    found = measure(records, WINDOW, TARGETS)
    assert found["latency"]["ttft_ms"]["p99"] == 2000
    assert found["latency"]["ttft_ms"]["corrected"]["p99"] == 200
    assert found["latency"]["lag_ms"]["corrected"]["max"] == 0
    assert found["fluidity"]["p1"] < 0.9 < found["fluidity"]["corrected"]["p1"] == 1
    assert found["stalls"]["corrected"]["count"] == 0
    assert found["requests"]["stalled_client"] == 5
    only = measure([answer(stalled=True)], WINDOW, TARGETS)
    assert (
        only["latency"]["ttft_ms"]["corrected"] is only["fluidity"]["corrected"] is only["stalls"]["corrected"] is None
    )


# --- who counts
def test_only_requests_due_in_the_window_count() -> None:
    records = [answer(n, at_ms=1000 * n, first_ms=100 + n) for n in range(10)]
    found = measure(records, Window(2 * SECOND, 5 * SECOND), TARGETS)
    counts = ("all", "due", "scored", "complete", "failed", "cancelled", "stalled_client")
    assert found["requests"] == dict(zip(counts, (10, 3, 3, 3, 0, 0, 0), strict=True))
    assert (found["latency"]["ttft_ms"]["min"], found["latency"]["ttft_ms"]["max"]) == (102, 104)


def test_failed_requests_count_against_and_cancelled_ones_not_at_all() -> None:
    records = [answer(), failure("busy"), failure("cut", times_ns=[MS], tokens=[1]), failure("cancelled")]
    targets = replace(TARGETS, slo=Slo(first_ns=SECOND, share=0.3))
    found = measure(records, WINDOW, targets)
    assert (found["fluidity"]["n"], found["fluidity"]["mean"], found["fluidity"]["without_gap"]) == (3, 1 / 3, 2)
    assert found["fluidity"]["fluid_token_rate_per_s"] == 0
    assert found["fluidity"]["least_gap_p99_ms"] is None
    assert (found["goodput"]["kept"], found["goodput"]["of"], found["goodput"]["met"]) == (1, 3, True)
    assert (found["requests"]["failed"], found["requests"]["cancelled"]) == (2, 1)


def test_nothing_complete_is_an_error_that_says_why() -> None:
    with pytest.raises(SourceError, match="3 requests, none complete: busy 2, cancelled 1"):
        measure([failure(), failure(), failure("cancelled")], WINDOW, TARGETS)
    with pytest.raises(SourceError, match="of 1 requests none was due"):
        measure([answer(at_ms=20_000)], WINDOW, TARGETS)


# --- the rest
def test_goodput_needs_every_part() -> None:
    records = [answer(), answer(first_ms=500), answer(gaps_ms=(80,) * 9), answer(gaps_ms=(20,) * 200), failure()]
    slo = parse_slo("ttft=400ms,tpot=50ms,e2e=3s,fluidity=0.9,share=0.5")
    found = measure(records, WINDOW, replace(TARGETS, slo=slo))["goodput"]
    assert found["parts"] == {"ttft": 3 / 5, "tpot": 3 / 5, "e2e": 3 / 5, "fluidity": 2 / 5}
    assert (found["kept"], found["share"], found["met"], found["requests_per_s"]) == (1, 0.2, False, 0.1)
    assert found["share_low"] < 0.2 < found["share_high"]


def test_an_old_run_scored_anew_under_another_target() -> None:
    records = [answer(n, gaps_ms=(20 + n,) * 50) for n in range(20)]
    loose = measure(records, WINDOW, Targets(Deadlines(300 * MS, 50 * MS)))["fluidity"]
    tight = measure(records, WINDOW, Targets(Deadlines(200 * MS, 30 * MS)))["fluidity"]
    assert loose["mean"] == 1 > tight["mean"]
    assert tight["smooth_share"] == 11 / 20
    assert loose["fluid_token_rate_per_s"] > tight["fluid_token_rate_per_s"] > 20


def test_a_short_answer_bounds_no_fluid_token_rate() -> None:
    for gaps in ((20,) * 4, (20,) * 6):  # all before the first deadline; and 20 ms after it, 300 tokens/s that were 50
        found = measure([answer(gaps_ms=gaps)], WINDOW, TARGETS)["fluidity"]
        assert (found["bounded_by"], found["fluid_token_rate_per_s"], found["least_gap_p99_ms"]) == (
            "first token", None, None,
        )  # fmt: skip
    pace = measure([answer(gaps_ms=(20,) * 4), answer(gaps_ms=(20,) * 50)], WINDOW, TARGETS)["fluidity"]
    assert pace["bounded_by"] is None  # the slowest decides
    assert 50 < pace["fluid_token_rate_per_s"] < 100
    late = measure([answer(first_ms=2000, gaps_ms=(0,) * 30)], WINDOW, TARGETS)["fluidity"]
    assert late["bounded_by"] is None  # its pace has no bound
    assert late["fluid_token_rate_per_s"] > 0


def test_a_short_time_has_no_rates() -> None:
    records = [answer(0), answer(1, at_ms=100, usage_prompt=5)]
    targets = replace(TARGETS, slo=Slo(first_ns=SECOND))
    short = measure(records, Window(0, 999 * MS), targets)
    rates = ("output_tokens_per_s", "prompt_tokens_per_s", "requests_per_s")
    assert [short["throughput"][name] for name in rates] == [None] * 3
    assert (short["goodput"]["kept"], short["goodput"]["requests_per_s"]) == (2, None)
    whole = measure(records, Window(0, SECOND), targets)
    assert [whole["throughput"][name] for name in rates] == [20, 5, 2]
    assert whole["goodput"]["requests_per_s"] == 2


def test_the_latencies_of_one_request() -> None:
    assert latencies(answer(at_ms=50, lag_ms=30)) == (200 * MS, 20 * MS, 381 * MS)
    assert latencies(answer(gaps_ms=())) == (200 * MS, None, 201 * MS)
    assert latencies(failure(times_ns=[MS], tokens=[1])) == (None, None, None)


def test_stalls_are_counted_and_placed() -> None:
    early = answer(gaps_ms=(20, 20, 400) + (20,) * 97)
    late = answer(gaps_ms=(20,) * 90 + (900,) + (20,) * 9)
    found = measure([early, late, answer(gaps_ms=(250,))], WINDOW, TARGETS)["stalls"]
    assert (found["count"], found["early"], found["longest_ms"]) == (2, 1, 900)
    assert found["per_1000_tokens"] == pytest.approx(2000 / 204)
    assert found["streams_share"] == pytest.approx(2 / 3)
    assert found["time_share"] == pytest.approx(1300 / (2 * 99 * 20 + 1300 + 250))
    assert stalls(early, 250 * MS) == [(240 * MS, 400 * MS, 3)]


def test_throughput_is_of_what_came_within_the_window() -> None:
    warm = answer(0, at_ms=0, first_ms=900, gaps_ms=(200,) * 4, usage_prompt=7)  # 1 token before 1 s, 4 after
    records = [warm, answer(1, at_ms=1500, first_ms=500, gaps_ms=(500, 500), usage_prompt=50, usage_cached=20)]
    found = measure(records, Window(SECOND, 3 * SECOND), TARGETS)
    assert found["throughput"]["output_tokens_per_s"] == (4 + 2) / 2
    assert found["throughput"]["prompt_tokens_per_s"] == 25
    assert found["throughput"]["requests_per_s"] == 0.5
    assert found["throughput"]["concurrency_mean"] == pytest.approx((0.701 + 1.5) / 2)
    assert found["throughput"]["concurrency_max"] == 2
    assert found["timeline"] == {"tokens": [4, 2], "complete": [1, 0], "failed": [0, 0]}
    assert found["cached_share"] == 0.4


def test_precision_may_be_bits_or_plans() -> None:
    switched = answer(0, at_ms=0, gaps_ms=(500, 500, 500), bits=[8, 8, 3, 3])
    planned = answer(1, at_ms=1000, gaps_ms=(20,), bits=["plan-a", 10])
    found = measure([switched, planned, answer(2, gaps_ms=(20,))], WINDOW, TARGETS)["precision"]
    assert found["levels"] == ["3", "8", "10", "plan-a"]
    assert found["tokens"] == {"3": 2, "8": 2, "10": 1, "plan-a": 1}
    assert found["mean_bits"] == (6 + 16 + 10) / 5
    assert (found["untold_tokens"], found["requests_told"], found["requests_with_switch"]) == (2, 2, 2)
    assert found["timeline"] == [[0, 2, 0, 0], [2, 0, 1, 1]]


# --- ideal
def alone(prompt: int, output: int, noise: float = 1.0, square: float = 0.0) -> Record:
    """50 ms + 0.1 ms a prompt token; each later token 10 ms + 1 us a token of context."""
    first = (50 + 0.1 * prompt + square * prompt * prompt) * noise
    gaps = tuple(10 + 0.001 * (prompt + i) for i in range(1, output))
    return answer(first_ms=first, gaps_ms=gaps, usage_prompt=prompt)


def test_ideal_finds_the_costs_in_spite_of_outliers() -> None:
    records = [alone(p, 32, 5.0 if i == 0 else 1.0) for p in (100, 1000, 4000, 8000, 16000) for i in range(3)]
    found = fit(records)
    assert found.first_base_ns == pytest.approx(50 * MS, rel=1e-3)
    assert found.first_token_ns == pytest.approx(0.1 * MS, rel=1e-3)
    assert found.first_square_ns == 0
    assert found.gap_context_ns == pytest.approx(1000, rel=0.02)
    assert found.end_ns(4000, 32) == pytest.approx(alone(4000, 32).times_ns[-1], rel=1e-3)
    assert found.first_error < 1e-3
    assert found.covers(4000)
    assert not found.covers(20_000)


def test_ideal_takes_a_square_only_where_it_helps() -> None:
    lengths = (100, 1000, 2000, 4000, 8000, 16000)
    curved = fit([alone(p, 8, square=1e-4) for p in lengths for _ in range(3)])
    assert curved.first_square_ns == pytest.approx(100, rel=0.01)
    source = random.Random(5)
    noisy = fit([alone(p, 8, source.uniform(0.98, 1.02)) for p in lengths for _ in range(5)])
    assert noisy.first_square_ns == 0
    assert 0 < noisy.first_error < 0.02


def test_ideal_never_predicts_that_more_work_takes_less_time() -> None:
    records = [answer(first_ms=400 - p / 100, usage_prompt=p) for p in (100, 1000, 10_000) for _ in range(3)]
    found = fit(records)
    assert found.first_token_ns == 0 == found.gap_context_ns
    assert found.first_ns(100) == found.first_ns(10_000)


def test_ideal_refuses_what_tells_nothing() -> None:
    for records in (
        [],
        [alone(100, 8)] * 9,
        [alone(100, 8)] * 5 + [alone(105, 8)] * 5,
        [alone(100, 1), alone(1000, 1)] * 5,
        [replace(alone(p, 8), usage_prompt=None) for p in (100, 1000)] * 5,
        [replace(alone(p, 8), error="cut") for p in (100, 1000)] * 5,
    ):
        with pytest.raises(SourceError, match="cannot be fitted"):
            fit(records)


def test_ideal_goes_through_json(tmp_path: Path) -> None:
    found = fit([alone(p, 8) for p in (100, 1000) for _ in range(3)])
    path = tmp_path / "ideal.json"
    path.write_text(json.dumps(found.document()))
    assert read_ideal(path) == found
    for bad in ([], {}, {**found.document(), "gap_base_ns": -1}, {**found.document(), "more": 1}):
        with pytest.raises(SourceError, match="expected"):
            parse_ideal(bad)
    path.write_text("{")
    with pytest.raises(SourceError, match="not an ideal"):
        read_ideal(path)
    with pytest.raises(SourceError):
        read_ideal(tmp_path / "none")


def test_over_ideal_and_deadlines_by_prompt_length() -> None:
    ideal = Ideal(50.0 * MS, 0.1 * MS, 0.0, 10.0 * MS, 0.0, 0.0, 0.0, 100, 2000, 9)
    short, long = (answer(first_ms=ms, usage_prompt=prompt) for ms, prompt in ((120, 500), (500, 3000)))
    found = measure([short, long, answer()], WINDOW, Targets(Deadlines(MS, 30 * MS), ideal=ideal, slack_ns=200 * MS))
    assert found["over_ideal"]["max"] == pytest.approx((120 + 180) / (100 + 90))
    assert found["over_ideal"]["min"] == pytest.approx((500 + 180) / (350 + 90))
    assert (found["over_ideal"]["missing"], found["over_ideal"]["extrapolated"]) == (1, 1)
    assert found["fluidity"]["unpredicted"] == 1
    assert found["fluidity"]["smooth_share"] == pytest.approx(2 / 3)  # 120 <= 300 and 500 <= 550; 200 > 1


def test_a_large_run_takes_seconds() -> None:
    source = random.Random(6)
    records = [
        answer(n, at_ms=source.uniform(0, 9000), gaps_ms=tuple(source.expovariate(0.05) for _ in range(299)))
        for n in range(200)
    ]
    begin = time.perf_counter()
    measure(records, WINDOW, replace(TARGETS, slo=Slo(fluidity=0.9)))
    assert time.perf_counter() - begin < 3  # a tenth of 2,000 requests, on a machine that may be busy
