"""The simulator: both engines, routers, split pools, what is measured, and a real server's replay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from everybit.batching.fluidity import Target
from everybit.batching.precision import Auto
from everybit.batching.scheduler import Scheduler
from everybit.bench.fluidity import Deadlines
from everybit.bench.metrics import measure as measure_records
from everybit.bench.records import read_records
from everybit.bench.targets import Slo as BenchSlo
from everybit.bench.targets import Targets, Window
from everybit.cli.main import main
from everybit.errors import EverybitError, SourceError
from everybit.plan.cost import SINGLE, Cost, Parallel
from everybit.plan.deployment import Deployment
from everybit.plan.efficiency import IDEAL, prior
from everybit.plan.estimate import estimate, place
from everybit.plan.hardware import read_hardware
from everybit.plan.model import read_model
from everybit.plan.operators import Model
from everybit.plan.simulate.engines import make_engine
from everybit.plan.simulate.fit import Linear, Parameter, fit
from everybit.plan.simulate.lockstep import Lockstep
from everybit.plan.simulate.metrics import Slo, measure, table
from everybit.plan.simulate.ours import Ours
from everybit.plan.simulate.output import write_chrome, write_records
from everybit.plan.simulate.profile import Factors, ProfileTime, Shape, read_profile
from everybit.plan.simulate.replica import Pipeline, Replica
from everybit.plan.simulate.requests import Outcome, Request, draw, speed_up
from everybit.plan.simulate.router import ROUTERS, make_router
from everybit.plan.simulate.run import Link, Pool, Simulated, simulate
from everybit.plan.simulate.traces import Timing, load_trace, read_timings, read_trace
from everybit.plan.simulate.vllm import Vllm
from everybit.plan.speculation import Speculation, speculation_of
from everybit.plan.step import Step

TARGET = Target(first_ns=1_000_000_000, gap_ns=100_000_000)
NAMES = ("everybit", "vllm")


@dataclass(frozen=True)
class Fixed:
    """1 s a step and a tenth a token; at b bits in proportion to b / 8."""

    step_s: float = 1.0
    token_s: float = 0.1

    def seconds(self, step: Step, bits: int | None = None) -> float:
        return (self.step_s + self.token_s * step.tokens) * (bits or 8) / 8


def replica(engine: str = "vllm", name: str = "r", time: object = Fixed(), **options: object) -> Replica:
    sizes = {"blocks": 1000, "context": 10_000, **options}
    return Replica(name, [make_engine(engine, **sizes)], time)  # type: ignore[arg-type]


def vllm(name: str = "r", **options: object) -> Replica:
    return Replica(name, [Vllm(**{"blocks": 1000, "context": 10_000, **options})], Fixed())  # type: ignore[arg-type]


def times(done: Simulated) -> list[list[float]]:
    return [pytest.approx(one.times_s) for one in done.outcomes]


def mixed(count: int, seed: int = 0) -> list[Request]:
    random = Random(seed)
    lengths = [(random.randint(1, 300), random.randint(1, 60)) for _ in range(40)]
    return draw(0.05, count, lengths, burstiness=0.5, seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_one_request_by_hand(name: str) -> None:
    done = simulate([Request(0, 2.0, 20, 3)], replica(name, budget=16, most=8))
    assert times(done) == [[2 + 2.6 + 1.4, 2 + 4.0 + 1.1, 2 + 4.0 + 2.2]]  # 16 and 4 tokens, then one at a time
    assert done.outcomes[0].begin_s == 2
    assert [(one.prompt_tokens, one.decodes) for one in done.replicas[0].ran] == [(16, 0), (4, 0), (0, 1), (0, 1)]


def test_decodes_come_before_prompts_and_prompts_are_cut() -> None:
    requests = [Request(0, 0.0, 10, 4), Request(1, 0.1, 30, 1)]
    for engine in ("everybit", "vllm"):
        one = replica(engine, budget=16, most=8) if engine == "everybit" else vllm(budget=16, overlaps=False)
        simulate(requests, one)
        assert [(step.prompt_tokens, step.decodes) for step in one.ran] == [(10, 0), (15, 1), (15, 1), (0, 1)]


def test_a_batch_chosen_ahead_leaves_out_who_comes_while_the_one_before_runs() -> None:
    requests = [Request(0, 0.0, 10, 4), Request(1, 0.1, 5, 1)]
    ahead, waits = (simulate(requests, vllm(overlaps=overlaps)) for overlaps in (True, False))
    assert waits.outcomes[1].times_s == pytest.approx([2 + 1.6])
    assert ahead.outcomes[1].times_s == pytest.approx([2 + 1.1 + 1.6])
    assert [one.seen_s for one in waits.outcomes] == [one.seen_s for one in ahead.outcomes] == [0, 2]
    assert ahead.outcomes[1].engine_ttft_s == pytest.approx(1.1 + 1.6)
    assert ahead.outcomes[1].engine_e2e_s == pytest.approx(1.1 + 1.6)
    assert ahead.outcomes[1].ttft_s == pytest.approx(1.9 + 1.1 + 1.6)


@pytest.mark.parametrize("name", NAMES)
def test_no_block_is_lost_where_they_run_out(name: str) -> None:
    requests = mixed(120)
    one = replica(name, blocks=40, context=600, budget=64, most=16)
    done = simulate(requests, one)
    assert one.preempted > 0
    assert all(outcome.complete for outcome in done.outcomes)
    assert all(a < b for outcome in done.outcomes for a, b in zip(outcome.times_s, outcome.times_s[1:], strict=False))
    load = one.engines[0].load()
    assert (load.waiting, load.running, load.blocks_used) == (0, 0, 0)
    assert max(step.blocks_used for step in one.ran) <= 1
    assert max(step.prompt_tokens + step.decodes for step in one.ran) <= 64
    assert 4 < max(step.running for step in one.ran) <= 16


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_times(name: str) -> None:
    first, second = (simulate(mixed(60), replica(name, blocks=60, context=600, budget=64, most=16)) for _ in "ab")
    assert [one.times_s for one in first.outcomes] == [one.times_s for one in second.outcomes]


@pytest.mark.parametrize("name", NAMES)
def test_equal_beginnings_are_computed_once(name: str) -> None:
    requests = [
        Request(0, 0.0, 1024, 1, (1, 2)),
        Request(1, 500.0, 1100, 1, (1, 2, 3)),
        Request(2, 900.0, 600, 1, (1, 4)),
    ]
    done = simulate(requests, replica(name))
    assert [one.cached_tokens for one in done.outcomes] == [0, 1024, 512]
    assert sum(step.prompt_tokens for step in done.replicas[0].ran) == 1024 + 76 + 88
    without = [replace(one, blocks=()) for one in requests]
    assert [one.cached_tokens for one in simulate(without, replica(name)).outcomes] == [0, 0, 0]


def test_cached_blocks_go_when_others_need_them() -> None:
    requests = [Request(0, 0, 512, 1, (1,)), Request(1, 100, 512, 1, (2,)), Request(2, 200, 520, 1, (1, 9))]
    assert simulate(requests, vllm(blocks=80)).outcomes[2].cached_tokens == 512
    assert simulate(requests, vllm(blocks=40)).outcomes[2].cached_tokens < 512
    assert simulate(requests, vllm(caching=False)).outcomes[2].cached_tokens == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_can_never_fit_is_refused_with_the_arithmetic(name: str) -> None:
    done = simulate([Request(0, 0, 100, 61), Request(1, 0, 8, 2)], replica(name, blocks=9))
    assert "161 tokens in 10 KV blocks of 16" in done.outcomes[0].refused
    assert "9 blocks" in done.outcomes[0].refused
    figures = measure(done, TARGET, Slo(first_s=1e9))
    assert figures["requests"] == {"all": 2, "scored": 2, "complete": 1, "failed": 1}
    assert figures["goodput"]["share"] == 0.5
    with pytest.raises(SourceError, match=r"none complete.*161 tokens"):
        measure(simulate([Request(0, 0, 100, 61)], replica(name, blocks=9)), TARGET)


def test_ours_is_the_real_scheduler_under_its_own_rules() -> None:
    scheduler = Scheduler(blocks=40, block_tokens=16, context=600, budget=64, most=16)
    simulate(mixed(60), Replica("r", [Ours(scheduler)], Fixed()))
    scheduler.check()
    assert scheduler.counts().blocks_available == 40


def test_auto_takes_fewer_bits_under_load_and_more_when_it_is_over() -> None:
    burst = [Request(n, 0.0, 50, 200) for n in range(24)] + [Request(99, 500.0, 50, 200)]
    time = Fixed(step_s=0.08, token_s=0.004)  # one stream in 84 ms at 8 bits, 24 in 176
    engine = {"rungs": (3, 4, 6, 8), "budget": 256, "most": 64}
    auto = simulate(burst, replica("everybit", time=time, bits=Auto(3, 8), **engine))
    fixed = simulate(burst, replica("everybit", time=time, bits=8, budget=256, most=64))
    a, b = (measure(done, TARGET) for done in (auto, fixed))
    assert a["fluidity"]["mean"] > b["fluidity"]["mean"] + 0.1
    assert 3 <= a["precision"]["mean_bits"] < 8 == b["precision"]["mean_bits"]
    assert auto.outcomes[-1].bits[-1] == 8


def test_split_pools_send_caches_one_after_another() -> None:
    link = Link(gbps=1, token_bytes=1e8, latency_s=0.5)  # 0.1 s a token
    requests = [Request(0, 0.0, 10, 3), Request(1, 0.0, 20, 2), Request(2, 0.0, 5, 1)]
    prefill, decode = vllm("p", holds=True, overlaps=False), vllm("d", overlaps=False)
    done = simulate(requests, Pool((prefill,), make_router("round-robin")), link=link,
                    decode=Pool((decode,), make_router("round-robin")))  # fmt: skip
    first = 1 + 3.5
    assert done.transfers_s == ((0, first, 1.5), (1, first + 1.5, 2.5))
    assert times(done) == [[first, first + 1.5 + 1.1, first + 1.5 + 2.2], [first, first + 4 + 1.1], [first]]
    assert sum(step.prompt_tokens for step in decode.ran) == 0
    assert prefill.engines[0].load().blocks_used == decode.engines[0].load().blocks_used == 0


def test_a_prefill_replica_keeps_blocks_until_they_are_sent() -> None:
    link = Link(gbps=1, token_bytes=1e9)
    requests = [Request(0, 0.0, 32, 2), Request(1, 0.0, 32, 2)]
    done = simulate(requests, Pool((vllm("p", blocks=3, holds=True),), make_router("round-robin")), link=link,
                    decode=Pool((vllm("d"),), make_router("round-robin")))  # fmt: skip
    assert done.outcomes[1].begin_s == pytest.approx(done.outcomes[0].times_s[0] + 32)


def test_users_wait_for_their_answers() -> None:
    requests = [Request(n, 0.0, 10, 2) for n in range(5)]
    done = simulate(requests, vllm(overlaps=False), users=1, think_s=3.0)
    assert [one.at_s for one in done.outcomes] == pytest.approx([n * (2 + 1.1 + 3) for n in range(5)])
    assert max(step.running for step in simulate(requests, vllm(), users=2).replicas[0].ran) == 2


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_use_all_replicas(name: str) -> None:
    pool = Pool(tuple(vllm(f"r{n}") for n in range(3)), make_router(name))
    done = simulate([Request(n, n / 100, 100, 20) for n in range(30)], pool)
    assert {one.replica for one in done.outcomes} == {"r0", "r1", "r2"}


def test_affinity_finds_caches_that_turns_miss() -> None:
    requests = [Request(n, 200.0 * n, 1100, 2, (n % 2, 10 + n % 2, 100 + n)) for n in range(12)]
    shares = {}
    for name in ("round-robin", "prefix-affinity"):
        pool = Pool(tuple(vllm(f"r{n}") for n in range(3)), make_router(name))
        shares[name] = measure(simulate(requests, pool), TARGET)["cached_share"]
    assert shares["prefix-affinity"] == pytest.approx(1024 / 1100 * 10 / 12)
    assert shares["round-robin"] < shares["prefix-affinity"] / 1.5


def test_lockstep_waits_for_the_slowest() -> None:
    engines = [Vllm(blocks=100, context=1000, overlaps=False) for _ in "ab"]
    pool = Pool((Replica("r", engines, Fixed()),), make_router("round-robin"))
    done = simulate([Request(0, 0, 30, 2), Request(1, 0, 10, 2)], pool)
    assert times(done) == [[4.0, 5.1], [4.0, 5.1]]


def test_who_is_idle_in_a_lockstep_draws_idle_power() -> None:
    engines = [Vllm(blocks=100, context=1000, overlaps=False) for _ in "ab"]
    one = Replica("r", engines, Fixed(), lambda step, seconds, bits: 100.0, 20.0)
    done = simulate([Request(0, 0.0, 10, 1)], one)
    assert measure(done, TARGET)["replicas"]["r"]["joules"] == pytest.approx(2 * (100 + 10))


def test_stages_overlap_the_batches_of_their_replicas() -> None:
    stages = Pipeline(2)
    assert [stages.end_s(0, took) for took in (2, 2, 4)] == [2, 3, 6]
    stages = Pipeline(2)
    pool = Pool(tuple(Replica(n, [Vllm(blocks=9, context=99)], Fixed(), pipeline=stages) for n in "ab"),
                make_router("round-robin"))  # fmt: skip
    done = simulate([Request(0, 0.0, 10, 2), Request(1, 0.0, 10, 1)], pool)
    assert times(done) == [[2.0, 3.55], [3.0]]  # the second stage is free at 3


def test_a_request_reaches_its_engine_after_the_server() -> None:
    requests = [Request(0, 1.0, 10, 2), Request(1, 9.0, 10, 2)]
    pool = Pool((vllm(overlaps=False),), make_router("round-robin"), first_s=0.5)
    done = simulate(requests, pool)
    assert times(done) == [[3.5, 4.6], [11.5, 12.6]]
    assert [one.ttft_s for one in done.outcomes] == pytest.approx([2.5, 2.5])
    assert done.outcomes[0].engine_ttft_s == pytest.approx(2.0)
    again = simulate(requests, Pool((vllm(overlaps=False),), make_router("round-robin"), 0.5), users=1, think_s=1.0)
    assert [one.at_s for one in again.outcomes] == pytest.approx([0, 4.6])


def ours(acceptance: float, seed: int = 0, bits: int | Auto = 8, drafts: int = 3, **options: object) -> Replica:
    scheduler = Scheduler(blocks=1000, block_tokens=16, context=10_000, budget=64, most=8)
    one = Ours(scheduler, bits, speculation=Speculation(drafts, acceptance, 4), seed=seed, **options)  # type: ignore[arg-type]
    return Replica("r", [one], Fixed())


def test_drafts_cost_their_passes_and_bring_what_is_right() -> None:
    done = simulate([Request(0, 0.0, 10, 9)], ours(1.0))
    draft_s, last = 3 * 1.1 / 2, 2.0
    ends = [last + draft_s + 1.4, last + 2 * (draft_s + 1.4)]  # three drafts at 4 bits, four tokens verified at 8
    assert times(done) == [[last, *[ends[0]] * 4, *[ends[1]] * 4]]
    assert set(done.outcomes[0].bits) == {8}
    wrong = simulate([Request(0, 0.0, 10, 9)], ours(0.0)).replicas[0]
    assert len(wrong.ran) == 9
    assert wrong.engines[0].load().blocks_used == 0


def test_as_many_guesses_are_right_as_are_accepted() -> None:
    first, again, other = (simulate(mixed(60), ours(0.7, seed)) for seed in (1, 1, 2))
    assert [one.times_s for one in first.outcomes] == [one.times_s for one in again.outcomes]
    assert [one.times_s for one in first.outcomes] != [one.times_s for one in other.outcomes]
    assert all(one.complete for one in first.outcomes)
    long = simulate([Request(0, 0.0, 10, 3000)], ours(0.7, drafts=4)).replicas[0]
    assert 3000 / len(long.ran) == pytest.approx(Speculation(4, 0.7, 4).tokens, rel=0.05)


def test_rungs_at_or_below_the_draft_are_not_speculated() -> None:
    slow = Target(first_ns=1, gap_ns=1)  # always late: the lowest rung
    one = ours(1.0, bits=Auto(4, 8), rungs=(4, 8), target=slow)
    done = simulate([Request(0, 0.0, 10, 9)], one)
    assert done.outcomes[0].bits[-1] == 4
    assert len(set(done.outcomes[0].times_s)) > 5


def test_energy_is_the_integral_of_power() -> None:
    one = Replica("r", [Vllm(blocks=100, context=1000)], Fixed(), lambda step, seconds, bits: 100.0 + step.tokens, 20.0)
    done = simulate([Request(0, 1.0, 10, 2)], one)
    assert measure(done, TARGET)["replicas"]["r"]["joules"] == pytest.approx(2 * 110 + 1.1 * 101 + 20 * 1)


def test_figures_are_those_of_the_bench(tmp_path: Path) -> None:
    done = simulate(
        mixed(80), replica("everybit", time=Fixed(0.05, 0.002), bits=4, blocks=60, context=600, budget=64, most=9)
    )
    write_records(tmp_path / "records", done)
    _, records = read_records(tmp_path / "records")
    end = round(done.ends_s * 1e9) + 1
    slo = BenchSlo(first_ns=400_000_000, gap_ns=60_000_000, fluidity=0.9)
    theirs = measure_records(records, Window(0, end), Targets(Deadlines(TARGET.first_ns, TARGET.gap_ns), slo))
    ours = measure(done, TARGET, Slo(first_s=0.4, gap_s=0.06, fluidity=0.9))
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "normalised_ms", "gap_ms", "gap_variation"):
        for key in ("n", "mean", "std", "min", "p50", "p90", "p95", "p99", "max", "missing", "few"):
            assert ours["latency"][name][key] == pytest.approx(theirs["latency"][name][key], rel=1e-6), (name, key)
    for name in ("kept", "of", "share", "met", "parts"):
        assert ours["goodput"][name] == theirs["goodput"][name]
    for name in ("n", "mean", "p1", "p10", "p50", "smooth_share"):
        assert ours["fluidity"][name] == pytest.approx(theirs["fluidity"][name])
    for name in ("output_tokens_per_s", "prompt_tokens_per_s", "requests_per_s"):
        assert ours["throughput"][name] == pytest.approx(theirs["throughput"][name])
    assert ours["precision"]["tokens"] == theirs["precision"]["tokens"]
    assert 0 < ours["goodput"]["share"] < 1


def test_the_table_has_a_row_for_each_request() -> None:
    rows = table(simulate([Request(3, 0, 10, 1), Request(5, 0, 10, 3)], vllm(most=1, overlaps=False)), TARGET)
    assert [(row["id"], row["queue_ms"], row["tpot_ms"]) for row in rows] == [
        (3, 0.0, None),
        (5, pytest.approx(2000), pytest.approx(1100)),
    ]


@pytest.mark.parametrize("most", [300, 100_000])
def test_a_chrome_trace_is_bounded_and_complete(tmp_path: Path, most: int) -> None:
    done = simulate(mixed(100), vllm(blocks=60))
    write_chrome(tmp_path / "trace.json", done, most)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) <= most
    steps = [one for one in events if one["ph"] == "X"]
    assert sum(one["args"]["steps"] for one in steps) == len(done.replicas[0].ran)
    assert sum(one["args"]["decodes"] for one in steps) == sum(one.decodes for one in done.replicas[0].ran)
    begins, ends = (sum(one["ph"] == phase for one in events) for phase in "be")
    assert begins == ends == (300 if most > 300 else begins)


def test_fit_finds_the_parameters_that_made_the_times() -> None:
    requests = draw(4.0, 60, [(400, 40), (900, 80), (100, 120)], seed=1)
    true = {"step_s": 0.004, "least_s": 0.012, "token_s": 6e-5, "read_s": 4e-8, "pair_s": 2e-9}

    def run(values: dict[str, float]) -> Sequence[Outcome]:
        return simulate(requests, replica(time=Linear(**{**true, **values}), most=64)).outcomes

    truth = {one.request.id: Timing(one.ttft_s, one.tpot_s, one.e2e_s) for one in run({})[:20]}
    parameters = [Parameter("least_s", 1e-3, 8e-3, 1e-1, 3), Parameter("token_s", 1e-6, 1e-4, 1e-3, 3)]
    found = fit(parameters, run, truth)
    assert found.values["least_s"] == pytest.approx(true["least_s"], rel=0.05)
    assert found.values["token_s"] == pytest.approx(true["token_s"], rel=0.1)
    assert not found.at_bound


def test_traces_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    texts = {
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,39,9\n": 4,
        "Timestamp,Session ID,Request tokens,Response tokens\n7.5,a,374,44\n7.6,,36,0\n8,a,39,9\n": 0.5,
        "request_id,input_tokens,output_tokens,queued_s\nx,39,9,3.5\ny,374,44,1\n": 2.5,
        '{"timestamp":10,"input_length":374,"output_length":44,"hash_ids":[5]}\n'
        '{"timestamp":30,"input_length":39,"output_length":9}\n': 0.02,
    }
    for text, gap in texts.items():
        path.write_text(text)
        found = read_trace(path)
        assert [(one.id, one.prompt_tokens, one.output_tokens) for one in found] == [(0, 374, 44), (1, 39, 9)]
        assert [one.at_s for one in found] == pytest.approx([0, gap])
    assert found[0].blocks == (5,)


def test_rows_that_are_no_requests_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    head = "Timestamp,Request tokens,Response tokens\n"
    path.write_text(head + "1,5,7\n2,0,7\n3,5,0\n4,0,0\n5,5,7\n")
    found = load_trace(path)
    assert (len(found.requests), found.rows, found.skipped) == (2, 5, {"no prompt tokens": 2, "no output tokens": 1})
    path.write_text(head + "1,5,0\n2,0,7\n")
    with pytest.raises(SourceError, match=r"no requests \(2 rows, 1 with no output tokens, 1 with no prompt tokens\)"):
        load_trace(path)


def test_a_simulation_is_a_trace_again(tmp_path: Path) -> None:
    requests = [Request(0, 0.0, 10, 3), Request(1, 0.25, 20, 5)]
    write_records(tmp_path / "records", simulate(requests, vllm()))
    assert [replace(one, session=None) for one in read_trace(tmp_path / "records")] == requests


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "an empty file"),
        ("a,b\n1,2\n", "columns a, b; expected"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", "line 2: TIMESTAMP 'noon'"),
        ("Timestamp,Request tokens,Response tokens\n1,1.5,1\n", "line 2: Request tokens '1.5'"),
        ("Timestamp,Request tokens,Response tokens\nnan,1,1\n", "line 2: Timestamp 'nan'"),
        ("Timestamp,Request tokens,Response tokens\n1,1\n", "line 2: 2 columns"),
        ('{"timestamp":0,"input_length":1}\n', "output_length 'None'"),
        ('{"timestamp":0,"input_length":600,"output_length":1,"hash_ids":[1]}\n', "hash_ids [1] for 600 tokens"),
        ('{"timestamp":0,"input_length":1,"output_length":1}\n[]\n', "line 2: '[]'; expected a JSON object"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(SourceError) as caught:
        read_trace(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


ONE = [Request(0, 0.0, 1, 1)]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: simulate([], vllm()), "an empty trace"),
        (lambda: simulate([Request(0, 0, 0, 1)], vllm()), "0 prompt and 1 output"),
        (lambda: simulate([Request(0, -1.0, 1, 1)], vllm()), "arrives at -1.0 s"),
        (lambda: simulate(ONE * 2, vllm()), "two requests with one id"),
        (lambda: simulate(ONE, vllm(), users=0), "0 users"),
        (lambda: simulate(ONE, vllm(), think_s=1.0), "without users"),
        (lambda: simulate(ONE, vllm(), link=Link(1, 1)), "belong together"),
        (lambda: simulate(ONE, vllm(holds=True)), "engines with holds in a pool that keeps"),
        (lambda: simulate(ONE, Pool((), make_router("round-robin"))), "a pool of replicas none"),
        (lambda: simulate(ONE, replica(time=Fixed(float("nan")))), "a step of nan s"),
        (lambda: Link(0, 1), "a bandwidth above 0"),
        (lambda: Pool((vllm(),), make_router("round-robin"), -1.0), "after -1.0 s"),
        (lambda: ours(0.5, bits=4), "drafts at 4 bits for 4"),
        (lambda: speculation_of(3, None, 4), "belong together"),
        (lambda: make_router("luck"), "router 'luck': expected one of round-robin"),
        (lambda: make_engine("sglang", blocks=1, context=1), "engine 'sglang'"),
        (lambda: make_engine("vllm", blocks=1, context=1, bits=4), "vllm has no bits"),
        (lambda: Vllm(blocks=0, context=1), "0 blocks"),
        (lambda: draw(0, 1, [(1, 1)]), "rate 0"),
        (lambda: draw(1, 1, []), "0 lengths"),
        (lambda: speed_up(ONE, 0), "speed 0"),
        (lambda: Slo(), "one part or more"),
        (lambda: measure(simulate(ONE, vllm()), TARGET, begin_s=5), "a window from 5"),
        (lambda: fit([], lambda values: [], {}), "no timings to fit"),
        (lambda: fit([Parameter("a", 1, 1, 2)], lambda values: [], {0: Timing(1, 1, 1)}), "1 timings, 0 of whose"),
        (lambda: fit([Parameter("a", 0, 1, 2)], lambda values: [], {0: Timing(1, 1, 1)}), "expected 0 < low"),
    ],
)
def test_bad_input_is_named(call: object, told: str) -> None:
    with pytest.raises(EverybitError) as caught:
        call()  # type: ignore[operator]
    assert told in str(caught.value)


# --- deployments
LLAMA, MIXTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mixtral-8x7B-v0.1"


def deployed(name: str, bits: tuple[int, ...] = (8,), split: Parallel = SINGLE, **options: Any) -> Deployment:
    models = {one: read_model(name, weight_bits=f"everybit{one}") for one in bits}
    options = {"card": read_hardware("h100-sxm"), "engine": "everybit", **options}
    return Deployment(models, split=split, efficiency=IDEAL, **options)


def names(deployment: Deployment, context: int = 2048) -> list[str]:
    return [one.name for one in deployment.pool(2, context, TARGET, "round-robin").replicas]


def test_groups_and_micro_batches_are_replicas() -> None:
    one, both = deployed(LLAMA), deployed(LLAMA, split=Parallel(pp=2, dp=2))
    assert names(one) == ["replica 1", "replica 2"]
    assert names(both)[2:5] == [
        "replica 1, group 2, batch 1",
        "replica 1, group 2, batch 2",
        "replica 2, group 1, batch 1",
    ]
    first, second, third, *_ = both.pool(1, 2048, TARGET, "round-robin").replicas
    assert first.pipeline is second.pipeline is not third.pipeline
    alone = one.pool(1, 2048, TARGET, "round-robin").replicas[0]
    assert first.idle_w == alone.idle_w > 0
    assert 4 * first.blocks > 2 * alone.blocks  # half the weights on each device leave more room
    with pytest.raises(SourceError, match="pass fewer stages or a shorter context"):
        deployed(LLAMA, card=read_hardware("l4"), split=Parallel(pp=4)).pool(1, 400_000, TARGET, "round-robin")


def test_a_pipeline_serves_more_and_no_request_faster() -> None:
    alone, many = [Request(0, 0.0, 500, 50)], [Request(n, 0.0, 500, 50) for n in range(64)]
    ends = {}
    for pp in (1, 2):
        for requests in (alone, many):
            pool = deployed(LLAMA, split=Parallel(pp=pp)).pool(1, 2048, TARGET, "shortest-queue")
            ends[pp, len(requests)] = simulate(requests, pool).ends_s
    assert ends[1, 1] < ends[2, 1] < 1.02 * ends[1, 1]
    assert ends[2, 64] < 0.8 * ends[1, 64]


def test_experts_in_lockstep_see_all_tokens() -> None:
    split = Parallel(tp=2, dp=2)
    model: Model = read_model(MIXTRAL, weight_bits=8)
    cost = Cost(model, read_hardware("h100-sxm"), split)
    time = Lockstep(cost)
    few, more = Step(decodes=(100,) * 2), Step(((512, 0),), (100,) * 30)
    for step in (few, more):
        assert time.seconds_together([step, step]) == pytest.approx(cost.seconds(step))
    assert cost.seconds(few) < time.seconds_together([few, more]) < cost.seconds(more)
    assert time.seconds_together([few, Step()]) < cost.seconds(few)
    assert Lockstep(cost, stream_s=9.0).seconds(few) == 9.0
    replicas = deployed(MIXTRAL, split=split).pool(1, 2048, TARGET, "shortest-queue").replicas
    assert [len(one.engines) for one in replicas] == [2]
    done = simulate([Request(n, 0.0, 100, 20) for n in range(9)], Pool(replicas, make_router("shortest-queue")))
    assert all(one.complete for one in done.outcomes)


def test_offloaded_rungs_stream_what_lies_below_the_planes_that_stay() -> None:
    options: dict[str, Any] = {"card": read_hardware("gh200"), "most": 2}
    with pytest.raises(SourceError, match="nearest that fits"):
        deployed("meta-llama/Llama-3.1-405B", (2, 3), **options).pool(1, 2048, TARGET, "round-robin")
    deployment = deployed("meta-llama/Llama-3.1-405B", (2, 3), offload=True, **options)
    replica = deployment.pool(1, 2048, TARGET, "round-robin").replicas[0]
    low, high = (replica.time.seconds(Step(decodes=(100,)), bits) for bits in (2, 3))
    more_bytes = deployment.rungs[3].weight_bytes - deployment.rungs[2].weight_bytes
    assert low > 0
    assert high - low == pytest.approx(more_bytes / deployment.card.memory[1].bytes_per_s)
    assert replica.blocks >= 2048 / 16


@pytest.mark.parametrize("users", [1, 4])
def test_offloading_is_as_in_an_estimate(users: int) -> None:
    """A step streams the same weights; contexts are no multiple of a block."""
    card, name = read_hardware("h100-sxm"), "meta-llama/Llama-3.1-70B"
    model = read_model(name)
    deployment = Deployment({0: model}, card, SINGLE, prior(card), "everybit", offload=True, users=users)
    (replica,) = deployment.pool(1, 1085, TARGET, "round-robin").replicas
    assert replica.blocks * 16 >= 1085 * users
    placed = place(model, card, SINGLE, 1085, users, prior(card))  # as an estimate does
    assert placed
    assert replica.time.seconds(Step(decodes=(1000,))) == pytest.approx(placed.stream_s, rel=1e-3)
    if users == 1:
        found = estimate(model, card, prompt=1000, output=85, offload=True).tpot_s.value
        assert found == pytest.approx(placed.stream_s)


def test_what_is_not_simulated_is_refused() -> None:
    for make, told in (
        (lambda: deployed(LLAMA, engine="vllm", speculation=Speculation(3, 0.5, 3)), "only everybit drafts"),
        (lambda: deployed(LLAMA, speculation=Speculation(3, 0.5, 8)), "drafts at 8 bits for 8"),
        (lambda: deployed(LLAMA, speculation=Speculation(3, 0.5, 2.5)), "whole bits"),
        (lambda: deployed(MIXTRAL, (3, 8), Parallel(dp=2)), "one precision and without drafts"),
    ):
        with pytest.raises(SourceError) as caught:
            make()
        assert told in str(caught.value)


def test_the_command_counts_rows_and_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n" + "1,50,40\n" * 3 + "2,0,7\n")
    command = ["plan", "simulate", LLAMA, "--on", "a10g", "--bits", "8", "--trace", str(path)]
    assert main(command, ("plan",)) == 0
    assert "trace: 4 rows read, skipped 1 with no prompt tokens" in capsys.readouterr().out
    drafts = ["--draft-bits", "2", "--drafts", "4", "--acceptance"]
    rates = []
    for more in ([], [*drafts, "0.9"], [*drafts, "0"]):
        assert main([*command, "--json", "--requests", "1", *more], ("plan",)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["trace"] == {"rows": 4, "taken": 1, "skipped": {"no prompt tokens": 1}}
        rates.append(found["expected"]["latency"]["tpot_ms"]["mean"])
    plain, right, wrong = rates
    assert right < plain < wrong
    assert found["expected"]["latency"]["ttft_ms"]["mean"] > 30  # HTTP and tokenizing, of the prior


# --- a real server
def test_a_profile_is_read_between_its_rows(shared_data: Path) -> None:
    folder = shared_data / "planner" / "vllm_layer_profile" / "rtxpro6000_llama31_8b_tp1"
    time = ProfileTime(read_profile(folder, Shape(layers=32)))
    alone = time.seconds(Step((), (1024,) * 64)), time.seconds(Step(((1024, 0),), ()))
    both = time.seconds(Step(((1024, 0),), (1024,) * 64))
    only = ProfileTime(time.profile, Factors(dense=1e-9))
    assert only.seconds(Step((), (1024,) * 64)) == pytest.approx(32 * 221.237e-6, rel=1e-4)
    assert only.seconds(Step(((1024, 0),), (1024,) * 64)) == pytest.approx(32 * 408.022e-6, rel=1e-4)
    assert max(alone) < both
    errors = []  # rows of the other grid are not in the table
    for line in (folder / "attention.csv").read_text().splitlines()[1:]:
        chunk, past, n, kv, took = map(float, line.split(","))
        if chunk in (54, 182, 615, 1384) and kv > 100 and n > 0 and past in (768, 1728, 3888):
            step = Step(((int(chunk), int(past)),), (int(kv),) * int(n))
            errors.append(abs(only.seconds(step) / (32 * took / 1e6) - 1))
    assert len(errors) > 300
    assert sorted(errors)[len(errors) // 2] < 0.05


def test_a_replay_of_a_real_server_without_calibration(shared_data: Path) -> None:
    """Kernel times alone, and 1 ms for each step; benchmarks/plan_replay.py calibrates and reports all figures."""
    folder = shared_data / "planner"
    trace = folder / "vllm_replay" / "rtxpro6000_llama31_8b_tp1_requests.csv"
    profile = read_profile(folder / "vllm_layer_profile" / "rtxpro6000_llama31_8b_tp1", Shape(layers=32))
    engine = Vllm(blocks=35_000, context=131_072, budget=2048, most=128)
    done = simulate(read_trace(trace), Replica("r", [engine], ProfileTime(profile, Factors(step_s=0.001))))
    real = read_timings(trace)
    for name, most in (("ttft_s", 0.15), ("tpot_s", 0.1), ("e2e_s", 0.1)):
        simulated, measured = (sum(getattr(one, name) for one in many) for many in (done.outcomes, real))
        assert simulated == pytest.approx(measured, rel=most), name


def test_an_hour_of_azure_begins_as_recorded(shared_data: Path) -> None:
    requests = read_trace(shared_data / "traces" / "azure_llm_2023_conv.csv")
    assert len(requests) == 19_366
    assert requests[-1].at_s == pytest.approx(58 * 60 + 21.721937)
    mooncake = read_trace(shared_data / "traces" / "mooncake_conversation_head.jsonl")
    assert len(mooncake) == 4_000
    assert mooncake[1].blocks
