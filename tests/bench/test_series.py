"""Commands of several runs, against mocks whose capacity, speed and precision are known."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from everybit.bench import selftest
from everybit.bench.fluidity import Deadlines
from everybit.bench.load.workload import Workload
from everybit.bench.measuring import Measured
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.result import read_result
from everybit.bench.search import Limits
from everybit.bench.series import capacity, compare, sustain, sweep_point
from everybit.bench.targets import Targets
from everybit.cli.main import main
from everybit.errors import SourceError

QUICK = ("--prompt", "8", "--output-tokens", "4", "--quiet")
TARGETS = Targets(Deadlines(100 * MS, 50 * MS))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(Script(ttft_ms=5, gap_ms=2, models=("m",))) as found:
        yield found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder; and workers of a server that has imported what they need, since there are many runs here."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "everybit.bench.worker"])
    monkeypatch.setattr("everybit.bench.runner.multiprocessing.get_context", lambda method: context)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine that tests makes runs invalid; what is tested here is not that."""
    monkeypatch.setattr("everybit.bench.result._LAG_P99_NS", SECOND)
    monkeypatch.setattr("everybit.bench.result._STALLED_SHARE", 1)


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Measure:
    def inner(*args: object, code: int = 0) -> dict[str, Any]:
        found = main(["bench", *map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out)

    return inner


# --- sweep
def test_a_sweep_of_rates_and_of_crowds(url, measure):
    document = measure("sweep", url, *QUICK, "--rates", "20,40", "--burstiness", "constant", "--duration", 1)
    assert document["sweep"]["over"] == "rate"
    assert [len(run["requests"]["rows"]) for run in document["runs"]] == [20, 40]
    points = document["sweep"]["points"]
    assert [point["value"] for point in points] == [20, 40]
    assert points[1]["requests_per_s"] > 1.5 * points[0]["requests_per_s"]
    document = measure("sweep", url, *QUICK, "--crowds", "1,3", "--duration", 0.2)
    assert [run["load"]["starts"]["users"] for run in document["runs"]] == [1, 3]


def test_a_sweep_of_models_has_their_quality(url, measure, tmp_path):
    (tmp_path / "quality.json").write_text('{"m@2bit": 20, "m@4bit": {"value": 10, "unit": "perplexity"}}')
    document = measure(
        *("sweep", url, *QUICK, "--models", "m@2bit,m@4bit", "--quality", "quality.json"),
        *("--rate", "10", "--burstiness", "constant", "--duration", 0.4),
    )
    assert [run["endpoint"]["model"] for run in document["runs"]] == ["m@2bit", "m@4bit"]
    assert [run["load"]["starts"]["stages"][0]["first"] for run in document["runs"]] == [10, 10]
    assert document["quality"] == {
        "m@2bit": {"value": 20, "unit": "", "lower_is_better": True},
        "m@4bit": {"value": 10, "unit": "perplexity", "lower_is_better": True},
    }


def test_what_failed_in_a_run_is_on_the_card(capsys):
    with running(Script(ttft_ms=5, gap_ms=2, status=429)) as busy:
        assert main(["bench", "sweep", busy, *QUICK, "--crowds", "1", "--duration", "0.3", "-o", "found"]) == 0
    out = capsys.readouterr().out
    assert "nothing to measure" in out
    assert "failed, busy" in out


def test_a_point_of_a_run_without_answers_says_why():
    assert sweep_point(3, {"metrics": None, "validity": {"reasons": ["one", "two"]}}) == {
        "value": 3,
        "failed": "one; two",
    }


# --- capacity
def test_capacity_of_a_server_of_known_capacity(measure, patient):
    """2 slots of 50 ms: 40 requests/s, evenly spaced; what is slower waits longer and longer."""
    with running(Script(ttft_ms=50, gap_ms=0, tokens=1, slots=2)) as server:
        document = measure(
            *("capacity", server, *QUICK, "--slo", "ttft=80ms,share=0.9", "--burstiness", "constant"),
            *("--first-rate", 20, "--most-probes", 10, "--most-runs", 1, "--tolerance", 0.04),
            *("--duration", 1.2, "--workers", 1),
        )
    found = document["capacity"]
    assert found["verdict"] == "found", found
    assert len({point["rate"] for point in found["points"]}) <= 10
    assert found["rate"] == pytest.approx(40, rel=0.05)
    assert found["bracket"][1] <= 1.04 * found["rate"] * (1 + 1e-6)
    assert len(document["runs"]) == len(found["points"])


def test_bounds_of_the_search(url, measure, patient):
    load = (*QUICK, "--duration", 1, "--burstiness", "constant", "--slo", "ttft=2s", "--first-rate", 10)
    found = measure("capacity", url, *load, "--most-rate", 20, "--most-runs", 1)["capacity"]
    assert (found["verdict"], found["rate"]) == ("at least", 20)
    found = measure("capacity", url, *load, "--most-probes", 1, "--most-runs", 2)["capacity"]
    assert [(point["rate"], point["runs"]) for point in found["points"]] == [(10, 2)]  # 10 requests prove nothing
    assert found["reason"] == "1 rates were tried"


def run_of(rate: float, *, good: bool = True, interrupted: bool = False, complete: bool = True) -> Measured:
    goodput = {"kept": 100 if good else 0, "of": 100}
    metrics = {"goodput": goodput, "throughput": {"requests_per_s": rate}} if complete else None
    rows = [[0, 0, 0, True]] * 100
    document = {"metrics": metrics, "validity": {"valid": True}, "requests": {"rows": rows}, "rate": rate}
    return Measured(document, [], interrupted)


def test_an_interrupted_search_keeps_what_it_knows():
    calls = count()

    def measure(rate: float, seed: int) -> Measured:
        return run_of(rate, interrupted=next(calls) == 2)

    block, runs = capacity(measure, 1.0, Limits(most_runs=1), 0)
    assert (block["verdict"], block["rate"], block["reason"]) == ("at least", 4, "it was interrupted")
    assert [run["rate"] for run in runs] == [1, 4, 16]


def test_a_rate_at_which_nothing_was_answered_fails():
    block, _ = capacity(lambda rate, seed: run_of(rate, complete=rate < 3), 2.0, Limits(most_runs=1, most_probes=3), 0)
    assert block["bracket"][0] == 2
    assert block["bracket"][1] < 8
    assert block["points"][-1]["share"] == 0
    block, _ = capacity(lambda rate, seed: run_of(rate, good=False), 2.0, Limits(most_runs=1, most_probes=2), 0)
    assert (block["verdict"], block["bracket"][0]) == ("unsure", None)  # lower rates were not tried


# --- compare
def request(at_ms: float, ttft_ms: float, gap_ms: float = 10, error: str = "") -> Record:
    times = [round((at_ms + ttft_ms + place * gap_ms) * MS) for place in range(5)]
    return Record(
        0, 0, 0, 0, round(at_ms * MS), sent_ns=0, end_ns=times[-1], times_ns=times, tokens=[1] * 5, error=error
    )


def rounds(ttfts: list[float], speed: float = 100, **more: Any) -> list[Measured]:
    window = {"begin_ms": 100, "end_ms": 1000}
    document = {"window": window, "metrics": {"throughput": {"output_tokens_per_s": speed}}}
    early = request(0, 5000)  # warm-up
    return [
        Measured(document, [early, *(request(100 + n, ttft + n, **more) for n in range(5))], False) for ttft in ttfts
    ]


def test_compare_has_the_warm_up_left_out_and_says_which_is_better():
    rows = {row["name"]: row for row in compare(rounds([10, 11, 12]), rounds([20, 22, 24], speed=50), TARGETS)}
    assert (rows["ttft p50 ms"]["a"], rows["ttft p50 ms"]["b"]) == (13, 24)
    assert rows["ttft p50 ms"]["ratio"]["value"] == pytest.approx(24 / 13)
    assert rows["ttft p99 ms"]["b"] < 30
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "ttft p50 ms": "A is better",
        "ttft p99 ms": "A is better",
        "tpot p50 ms": "indistinguishable",
        "tpot p99 ms": "indistinguishable",
        "e2e p50 ms": "A is better",
        "e2e p99 ms": "A is better",
        "tokens/s": "A is better",
        "fluidity": "indistinguishable",
    }
    other = {row["name"]: row for row in compare(rounds([10, 11, 12], error="cut"), rounds([9, 11, 13]), TARGETS)}
    assert (other["fluidity"]["verdict"], other["fluidity"]["a"], other["fluidity"]["b"]) == ("B is better", 0, 1)
    assert "ttft p50 ms" not in other


def test_compare_of_a_server_with_itself_and_with_a_slower_one(url, measure):
    args = (*QUICK, "--output-tokens", 16, "--rounds", 3, "--rate", 30, "--burstiness", "constant", "--duration", 0.2)
    document = measure("compare", url, f"{url}#m@4bit", *args)
    assert (document["compare"]["labels"], document["compare"]["rounds"]) == ([url, f"{url}#m@4bit"], 3)
    assert [run["endpoint"]["model"] for run in document["runs"]] == ["m", "m@4bit"] * 3
    rows = {row["name"]: row for row in document["compare"]["rows"]}
    assert rows["fluidity"]["verdict"] == "indistinguishable"  # of the others one in twenty is not, by chance
    assert rows["tpot p50 ms"]["ratio"]["value"] == pytest.approx(1, abs=0.1)
    with running(Script(ttft_ms=5, gap_ms=2 * 1.3 * 5)) as slower, running(Script(ttft_ms=5, gap_ms=10)) as faster:
        rows = {row["name"]: row for row in measure("compare", faster, slower, *args)["compare"]["rows"]}
    assert rows["tpot p50 ms"]["verdict"] == "A is better"
    assert rows["tpot p50 ms"]["ratio"]["value"] == pytest.approx(1.3, rel=0.05)
    assert rows["fluidity"]["verdict"] == "indistinguishable"


def test_rounds_are_interleaved_and_an_interrupted_one_is_left_out(url, measure, monkeypatch):
    seen: list[tuple[str, int]] = []

    def measure_run(settings: object, workload: Workload, title: str) -> Measured:
        seen.append((title[-1], workload.seed))
        (made,) = rounds([10.0 + len(seen)])
        return Measured(made.document, made.records, interrupted=len(seen) == 9)

    monkeypatch.setattr("everybit.bench.measuring.measure_run", measure_run)
    document = measure("compare", url, url, *QUICK, "--rounds", 9, code=130)
    assert "".join(side for side, _ in seen) == "ABBAABBAA"
    assert [seed for _, seed in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert (document["compare"]["rounds"], len(document["runs"])) == (4, 8)


# --- sustain
def test_sustain_finds_a_trend():
    def decay(gaps: list[int]) -> dict[str, Any]:
        found, now = [], 0
        for gap in gaps:
            begin = now
            while now < begin + SECOND:
                found.append(Record(0, 0, 0, 0, now, end_ns=now, times_ns=[now], tokens=[1]))
                now += gap * MS
            now = begin + SECOND
        return sustain(found, 0, len(gaps) * SECOND, len(gaps))["decay"]

    slower = decay([10, 11, 12, 13, 15, 17, 20, 25])
    assert slower["verdict"] == "it slows down"
    assert slower["low"] <= slower["per_hour"] <= slower["high"] < 0
    assert slower["last_over_first"] == pytest.approx(0.4)
    assert decay([25, 20, 17, 15, 13, 12])["verdict"] == "it speeds up"
    assert decay([10, 11, 10, 11, 10, 11])["verdict"] == "no trend"
    with pytest.raises(SourceError, match="4 or more"):
        decay([10, 10, 10])


def test_sustain(url, measure):
    document = measure("sustain", url, "1s", *QUICK, "--users", 2)
    found = document["sustain"]
    assert (len(found["slices"]), found["slices"][-1]["end_s"]) == (20, pytest.approx(1))
    assert sum(one["requests"] for one in found["slices"]) == len(document["runs"][0]["requests"]["rows"])
    assert document["runs"][0]["load"]["starts"]["users"] == 2
    with running(Script(ttft_ms=5, gap_ms=2, status=503)) as bad:
        assert main(["bench", "sustain", bad, "1s", *QUICK, "--rate", "10"]) == 2


# --- fit
def test_what_was_fitted_is_what_runs_are_compared_with(measure, capsys):
    with running(Script(ttft_ms=10, prefill_ms_per_token=0.1, gap_ms=5)) as server:
        args = ["bench", "fit", server, "-o", "ideal.json", "--most-prompt", "200", "--answer", "4", "--quiet"]
        assert main(args) == 0
        assert "written: ideal.json" in capsys.readouterr().out
        found = json.loads(Path("ideal.json").read_text())
        assert found["first_base_ns"] / MS == pytest.approx(10, abs=3)
        assert found["first_token_ns"] / MS == pytest.approx(0.1, rel=0.2)
        assert found["gap_base_ns"] / MS == pytest.approx(5, rel=0.1)
        assert (found["requests"], found["longest"]) == (32, pytest.approx(200, rel=0.1))
        metrics = measure("run", server, *QUICK, "--users", 1, "--requests", 3, "--ideal", "ideal.json")["metrics"]
    assert metrics["over_ideal"]["p50"] == pytest.approx(1, abs=0.25)


# --- audit
def test_audit(url, measure, capsys):
    assert main(["bench", "audit", url, "--record", "reference.json"]) == 0
    assert "7 precisions recorded by echo" in capsys.readouterr().out

    def verdicts(at: str, *more: str, code: int) -> dict[str, str]:
        found = measure("audit", at, "--reference", "reference.json", *more, code=code)
        return {one["claim"]: one["verdict"] for one in found["audit"]["verdicts"]}

    assert verdicts(url, code=0) == dict.fromkeys("2345678", "confirmed")
    assert verdicts(url, "--claims", "4=m@4bit,8=m@3bit", code=1) == {"4": "confirmed", "8": "mismatch"}
    with running(Script(ttft_ms=1, models=("m",), always_bits=4)) as one:
        assert verdicts(one, "--claims", "4=m@4bit,8=m@8bit", code=1) == dict.fromkeys("48", "ignores the switch")
    with running(Script(ttft_ms=1, models=("m",), identity="another")) as other:
        assert verdicts(other, "--claims", "4=m@4bit", code=0) == {"4": "unknown"}


def test_audit_obeys_the_time_limits(capsys):
    with running(Script(ttft_ms=5, gap_ms=2, models=("m",))) as server:
        assert main(["bench", "audit", server, "--record", "reference.json", "--claims", "4=m@4bit,8=m@8bit"]) == 0
    with running(Script(ttft_ms=900, gap_ms=2, models=("m",))) as slow:
        args = ["bench", "audit", slow, "--reference", "reference.json", "--claims", "4=m@4bit", "--timeout-s", "0.3"]
        assert main(args) == 2
    assert "timeout" in capsys.readouterr().err


# --- selftest
def test_rows_of_the_selftest(monkeypatch, capsys):
    late = selftest.Row("first token", 100.0, 104.5, 4.0, "ms")
    assert (late.error, late.ok, selftest.Row("x", 100.0, 96.0, 4.0, "ms").ok) == (4.5, False, True)
    latency = {"ttft_ms": {"mean": 101, "p99": 113}, "gap_ms": {"mean": 20.05}, "lag_ms": {"p99": 3}}
    measured = Measured({"metrics": {"latency": latency}}, [], False)
    assert [row.ok for row in selftest._timing(measured, "20/s", 4, 12)] == [True, False, True, True]
    for ok, code in ((True, 0), (False, 1)):
        block = {"rows": [], "ok": ok, "lines": ["a line"]}
        monkeypatch.setattr(selftest, "selftest", lambda seconds, workers, quiet, block=block: {**block, "s": seconds})
        assert main(["bench", "selftest", "--seconds", "8", "--workers", "2", "--json", "--quiet"]) == code
        assert json.loads(capsys.readouterr().out)["selftest"] == {**block, "s": 8}


def test_a_series_that_was_killed_goes_on_from_the_runs_it_has(tmp_path: Path) -> None:
    with running(Script(ttft_ms=5, gap_ms=2)) as url:
        command = ["everybit", "bench", "sweep", url, "--rates", "20,30,40", "--duration", "1"]
        command += ["-o", str(tmp_path / "s")]
        command += ["--prompt", "8", "--output-tokens", "4", "--quiet"]
        process = subprocess.Popen([sys.executable, "-m", "everybit.cli.main", *command[1:]])
        while not (tmp_path / "s" / "run-02" / "result.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not (tmp_path / "s" / "result.json").exists()
        kept = read_result(tmp_path / "s" / "run-01")
        again = subprocess.run(
            [sys.executable, "-m", "everybit.cli.main", *command[1:]], capture_output=True, text=True, check=True
        )
        assert again.stderr.count("was there") == 2
        document = read_result(tmp_path / "s")
        assert document["runs"][0] == kept
        assert [point["value"] for point in document["sweep"]["points"]] == [20, 30, 40]
        (tmp_path / "s" / "result.json").unlink()
        other = subprocess.run(
            [sys.executable, "-m", "everybit.cli.main", *command[1:], "--seed", "1"], capture_output=True, text=True
        )
        assert other.returncode == 2
        assert "another command" in other.stderr
