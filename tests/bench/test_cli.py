"""The command line against a mock: what every option does, and what is refused, in one line."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from everybit.bench.energy import Meter, Source
from everybit.bench.load.workload import Workload
from everybit.bench.measuring import Settings
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.cli.bench import with_command
from everybit.cli.main import build_parser, main

SECOND = 1_000_000_000
MOCK = Script(ttft_ms=5, gap_ms=2, models=("m", "other"))
QUICK = ("--prompt", "8", "--output-tokens", "4", "--quiet")
FEW = (*QUICK, "--users", "2", "--requests", "4")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(MOCK) as found:
        yield found


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`everybit bench ...` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def inner(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *map(str, args)])
        return code, *capsys.readouterr()

    return inner


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(call: Call) -> Measure:
    def inner(*args: object, code: int = 0) -> dict[str, Any]:
        found, out, err = call(*args, "--json")
        assert found == code, err
        return json.loads(out)

    return inner


@pytest.fixture
def refuse(call: Call) -> Callable[..., str]:
    """The one line of an error."""

    def inner(*args: object) -> str:
        code, out, err = call(*args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("everybit: error: ")
        return err

    return inner


class AskedError(Exception):
    """What was to be measured."""

    def __init__(self, settings: Settings, workload: Workload, title: str) -> None:
        self.settings, self.workload = settings, workload


Ask = Callable[..., AskedError]


@pytest.fixture
def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """What `bench URL ...` would measure, without doing it."""

    def measure_run(*args: Any) -> None:
        raise AskedError(*args)

    monkeypatch.setattr("everybit.bench.measuring.measure_run", measure_run)

    def inner(*args: object, at: str = url) -> AskedError:
        with pytest.raises(AskedError) as caught:
            main(["bench", "run", at, *map(str, args)])
        return caught.value

    return inner


def bodies(asked: AskedError, count: int = 3) -> list[dict[str, Any]]:
    """Of the first turns of some sessions."""
    sessions = list(islice(asked.workload.sessions(), count))
    return [json.loads(asked.settings.known.asking.body(one, next(iter(one.turns)))) for one in sessions]


def texts(asked: AskedError, count: int = 3) -> list[str]:
    return [one["messages"][-1]["content"] for one in bodies(asked, count)]


def turns(asked: AskedError, session: int = 0) -> list[Any]:
    return list(islice(list(islice(asked.workload.sessions(), session + 1))[session].turns, 20))


# --- whole runs
def test_a_run_leaves_its_files_and_refuses_to_write_over_them(url, call, tmp_path):
    code, out, err = call(url, *FEW, "-o", "found", "--seed", "5")
    assert (code, err) == (0, "")
    assert "4 complete, 0 failed" in out
    assert {one.name for one in (tmp_path / "found").iterdir()} == {
        *("result.json", "report.html", "requests.csv", "records.jsonl")
    }
    document = json.loads((tmp_path / "found" / "result.json").read_text())
    assert (document["kind"], document["load"]["seed"]) == ("run", 5)
    code, out, err = call(url, *FEW, "-o", "found")
    assert (code, out) == (2, "")
    assert "holds a result already" in err


def test_without_o_a_new_folder_is_made(url, call, tmp_path):
    for _ in range(2):
        assert call("run", url, *FEW)[0] == 0
    assert len([one for one in tmp_path.iterdir() if one.name.startswith("bench-")]) == 2


@pytest.mark.parametrize("api", ["completions", "chat", "responses"])
def test_each_api(url, measure, tmp_path, api):
    document = measure(url, *FEW, "--api", api)
    assert document["endpoint"]["api"] == api
    assert document["metrics"]["requests"]["complete"] == 4
    assert document["tokens"]["sources"] == {"usage": 4}
    assert {row[9] for row in document["requests"]["rows"]} == {4}
    assert list(tmp_path.iterdir()) == []  # --json writes nothing


def test_the_address_names_the_api(ask, url):
    asked = ask(at=f"{url}/completions")
    assert asked.settings.known.asking.api == "completions"
    assert asked.settings.known.endpoint.url == url


def test_an_open_loop_is_sent_at_its_times(url, measure):
    document = measure(url, *QUICK, "--rate", 20, "--burstiness", "constant", "--duration", 0.5)
    intended = [row[4] for row in document["requests"]["rows"]]
    assert intended == [50.0 * place for place in range(10)]
    assert document["metrics"]["requests"]["complete"] == 10


def test_conversations_hold_their_history(url, measure):
    document = measure(url, *QUICK, "--users", 2, "--turns", 3, "--think", 0.05)
    rows = document["requests"]["rows"]
    assert sorted((row[1], row[2]) for row in rows) == [(user, turn) for user in (0, 1) for turn in range(3)]
    first, second = (next(row for row in rows if row[1:3] == [0, turn]) for turn in (0, 1))
    assert second[8] > first[8]
    assert second[4] == pytest.approx(first[7] + 50, abs=1)


def test_nothing_answered_is_no_success(measure):
    with running(Script(ttft_ms=5, gap_ms=2, status=503)) as bad:
        document = measure(bad, *FEW, code=1)
    assert document["metrics"] is None
    assert document["errors"]["unavailable"]["count"] == 4
    assert "none complete" in document["validity"]["reasons"][0]


def test_warmup_and_drain(url, measure):
    with running(Script(ttft_ms=5, gap_ms=2, prefill_ms_per_token=1)) as slow:
        for load in (("--users", 2), ("--rate", 20, "--burstiness", "constant")):
            document = measure(slow, "--prompt", 2000, *load, "--duration", 0.2, "--drain", 0.1, "--quiet", code=1)
            assert {row[13] for row in document["requests"]["rows"]} == {"cancelled"}, load
    document = measure(url, *QUICK, "--rate", 20, "--burstiness", "constant", "--duration", 0.5, "--warmup", 0.25)
    assert [row[3] for row in document["requests"]["rows"]] == [False] * 5 + [True] * 5


def test_timeouts(measure):
    with running(Script(ttft_ms=5, gap_ms=20, stall_at_token=1, stall_ms=3000)) as stalls:
        document = measure(stalls, *QUICK, "--requests", 4, "--timeout-s", 0.3, code=1)
        assert set(document["errors"]) == {"timeout"}
    with running(Script(ttft_ms=5, gap_ms=20, end="never")) as endless:
        document = measure(endless, *QUICK, "--requests", 4, "--longest-s", 0.3, code=1)
        assert set(document["errors"]) == {"endless"}


def test_connections_and_workers(url, measure):
    document = measure(url, *FEW, "--workers", 2)
    assert (document["load"]["workers"], document["load"]["connections"]) == (2, "kept")
    assert document["metrics"]["latency"]["connect_ms"]["n"] == 2  # one for each user
    document = measure(url, *FEW, "--workers", 1, "--no-reuse")
    assert (document["load"]["workers"], document["load"]["connections"]) == (1, "new each")
    assert document["metrics"]["latency"]["connect_ms"]["n"] == 4


def test_whole_answers_and_no_usage(url, measure):
    document = measure(url, *FEW, "--no-stream")
    assert document["metrics"]["latency"]["tpot_ms"] is None
    document = measure(url, *FEW, "--no-usage")
    assert document["tokens"]["sources"] == {"pieces": 4}


def test_a_tokenizer_counts(url, measure, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # each character is a token
    made.save(str(tmp_path / "tokenizer.json"))
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        document = measure(url, *FEW, "--tokenizer", given)
        assert document["tokens"]["sources"] == {"tokenizer": 4}
        assert document["tokens"]["mismatch"]["usage"] == 16
        assert document["tokens"]["mismatch"]["counted"] > 16
        assert any("TOKEN COUNTS DIFFER" in one for one in document["validity"]["warnings"])


def test_energy_and_carbon(url, measure, monkeypatch):
    joules = iter(range(10, 10_000, 10))
    monkeypatch.setattr("everybit.bench.energy.find_meter", lambda: Meter([Source("s", lambda: next(joules) * 10**6)]))
    document = measure(url, *FEW, "--idle", 0.2, "--carbon", "350-450")
    assert document["energy"]["status"] == "measured"
    assert document["energy"]["idle_w"] == pytest.approx(200, rel=0.2)  # 10 J each 50 ms
    assert document["energy"]["carbon"]["intensity"] == "350-450"
    value, low, high = document["energy"]["carbon"]["grams"]
    assert value == pytest.approx(document["energy"]["joules"] * 400 / 3.6e6)
    assert low < value < high
    document = measure(url, *FEW, "--idle", 0)
    assert (document["energy"]["idle_w"], document["energy"]["carbon"]) == (None, None)


def test_secrets_stay_secret(call, monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_KEY", "sk-secret")
    given = ["--key-env", "BENCH_KEY", "--header", "X-One: hidden1", "--header=X-Two: hidden2"]
    with running(Script(ttft_ms=5, gap_ms=2, key="sk-secret")) as locked:
        args = ["run", locked, *FEW, *given, "-o", "found"]
        monkeypatch.setattr(sys, "argv", ["everybit", "bench", *args])
        code, out, err = call(*args)
    assert code == 0, err
    written = [out, err, *(one.read_text() for one in (tmp_path / "found").iterdir())]
    assert len(written) == 6
    for text in written:
        assert not any(secret in text for secret in ("sk-secret", "hidden1", "hidden2"))
    command = json.loads((tmp_path / "found" / "result.json").read_text())["command"]
    assert command[:3] == ["everybit", "bench", "run"]
    assert {"BENCH_KEY", "X-One: ...", "--header=X-Two: ..."} <= set(command)


def test_progress_is_shown_unless_quiet(url, call, monkeypatch):
    monkeypatch.setattr("everybit.bench.progress._LINE_S", 0.05)
    args = (url, "--json", "--prompt", 8, "--output-tokens", 4, "--users", 2, "--duration", 0.4)
    assert "bench: m: " in call(*args)[2]
    assert call(*args, "--quiet")[2] == ""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(measure, refuse, tmp_path):
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*new, *named, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with running(Script(ttft_ms=5, gap_ms=2, tls_certificate=certificate, tls_key=key)) as safe:
        assert "TLS failed" in refuse(safe, *FEW)
        assert measure(safe, *FEW, "--ca", certificate)["metrics"]["requests"]["complete"] == 4
        assert measure(safe, *FEW, "--insecure")["metrics"]["requests"]["complete"] == 4


# --- the load that options make
def test_users_and_their_ends(ask):
    starts = ask("--users", 3, "--ramp", 6, "--duration", 7, "--think", "exp:3").workload
    assert list(starts.starts) == [0, 2 * SECOND, 4 * SECOND]
    assert (starts.duration_ns, starts.count, starts.talk.think.kind) == (7 * SECOND, None, "exp")
    counted = ask("--users", 3, "--requests", 9).workload
    assert (counted.duration_ns, counted.count) == (None, 9)
    assert ask().workload.describe()["starts"] == {"users": 4, "ramp_s": 0}
    assert ask().workload.duration_ns == 30 * SECOND


RATES = {
    "2.5": (2.5, 2.5),
    "5.": (5, 5),
    "1-10": (1, 10),
    "10-0.5": (10, 0.5),
    "1e-1": (0.1, 0.1),
    "1e-1-2e0": (0.1, 2),
}


@pytest.mark.parametrize(("rate", "ends"), RATES.items())
def test_rates(ask, rate, ends):
    (stage,) = ask("--rate", rate, "--duration", 60).workload.starts.stages
    assert (stage.first, stage.last, stage.duration_s) == (*ends, 60)


def test_arrivals(ask):
    def times(*more: object) -> list[int]:
        return list(ask("--rate", 50, "--requests", 400, *more).workload.starts)

    def variation(found: list[int]) -> float:
        gaps = [b - a for a, b in pairwise(found)]
        mean = sum(gaps) / len(gaps)
        return (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean

    assert len(times()) == 400
    assert variation(times()) == pytest.approx(1, abs=0.15)
    assert variation(times("--burstiness", 0.25)) > 1.6
    assert variation(times("--burstiness", "constant")) < 1e-6
    assert times("--seed", 1) != times() == times("--seed", 0)


def test_lengths_and_texts(ask, tmp_path):
    assert {(one.prompt_tokens, one.output_tokens) for one in turns(ask("--prompt", 40, "--output-tokens", 7))} == {
        (40, 7)
    }
    assert len({text for seed in (0, 1) for text in texts(ask("--seed", seed))}) == 6
    own = tmp_path / "own.txt"
    own.write_text("zebra " * 2000)
    (text, *_) = texts(ask("--text", own, "--prompt", 200))
    assert text.count("zebra") > 50
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"line {n}\n" for n in range(9)))
    assert texts(ask("--prompts", lines, "--rate", 1)) == ["line 0", "line 1", "line 2"]
    shuffled = texts(ask("--prompts", lines, "--rate", 1, "--shuffle"), 9)
    assert sorted(shuffled) == [f"line {n}" for n in range(9)] != shuffled
    assert {one.output_tokens for one in turns(ask("--prompts", lines, "--output-tokens", 7))} == {7}


def test_prefixes(ask):
    def starts(*given: str) -> set[str]:
        return {one["messages"][0]["content"] for one in bodies(ask("--rate", 5, *given), 20)}

    assert len(starts("--prefixes", "2x16")) == 2
    assert len(starts("--prefixes", "ownx16")) == 20
    assert {len(one["messages"]) for one in bodies(ask("--rate", 5))} == {1}


def test_turns(ask):
    asked = ask("--rate", 1, "--turns", "3", "--think", "2", "--requests", 4)
    assert [one.think_ns for one in turns(asked)] == [0, 2 * SECOND, 2 * SECOND]
    assert (len(list(asked.workload.sessions())), asked.workload.count) == (4, 12)
    assert all(one.history for one in asked.workload.sessions())


TRACES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.0,600,5\n2023-11-16 18:15:47.0,40,6\n2023-11-16 18:15:49.0,50,7\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "0,a,600,5,605,x\n1,a,40,6,46,x\n3,a,50,7,57,x\n",
    "mooncake": '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 1000, "input_length": 40, "output_length": 6, "hash_ids": [0]}\n'
    '{"timestamp": 3000, "input_length": 50, "output_length": 7, "hash_ids": [2]}\n',
}


@pytest.mark.parametrize("format", TRACES)
def test_traces(ask, tmp_path, format):
    file = tmp_path / "trace"
    file.write_text(TRACES[format])

    def found(*more: object) -> list[tuple[float, int, int]]:
        asked = ask("--trace", file, *more)
        assert asked.workload.describe()["trace"] == format
        sessions = list(asked.workload.sessions())
        return [(one.at_ns / SECOND, turn.prompt_tokens, turn.output_tokens) for one in sessions for turn in one.turns]

    assert found() == [(0, 600, 5), (1, 40, 6), (3, 50, 7)]
    assert found("--speed", 2)[2] == (1.5, 50, 7)
    assert [at for at, *_ in found("--loop", 2)] == [0, 1, 3, 4.5, 5.5, 7.5]
    assert found("--slice", "1:3") == [(0, 40, 6), (2, 50, 7)]
    assert found("--slice", "0s:2s") == [(0, 600, 5), (1, 40, 6)]
    assert found("--scale-prompt", 0.5, "--scale-output", 2)[0] == (0, 300, 10)
    assert found("--most-prompt", 45, "--most-output", 6) == [(0, 45, 5), (1, 40, 6), (3, 45, 6)]
    assert len(found("--requests", 2)) == 2


def test_a_run_is_replayed_at_its_times(url, measure, call, tmp_path):
    (tmp_path / "trace.csv").write_text(TRACES["azure"])
    first = ("--trace", "trace.csv", "--speed", 10, "--most-prompt", 20)
    assert call(url, *first, "--quiet", "-o", "first")[0] == 0
    again = measure(url, "--trace", "first/records.jsonl", "--quiet")
    assert [(row[4], row[9]) for row in again["requests"]["rows"]] == [(0, 5), (100, 6), (300, 7)]


def test_a_trace_out_of_order_is_noted(url, call, tmp_path):
    head, *rows = TRACES["azure"].splitlines()
    (tmp_path / "trace.csv").write_text("\n".join([head, *reversed(rows)]))
    code, out, _ = call(url, "--trace", "trace.csv", "--speed", 20, "--quiet")
    assert code == 0
    assert "note: 2 requests were out of order in time and were sorted" in out


# --- what requests look like
def test_bodies(ask):
    (plain, *_) = bodies(ask("--output-tokens", 9))
    assert plain | {"messages": []} == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [],
        "max_tokens": 9,
    }
    (other, *_) = bodies(
        ask("--model", "other", "--body", '{"temperature": 0}', "--ignore-eos", "--no-usage", "--output-tokens", 9,
            "--token-field", "max_completion_tokens")
    )  # fmt: skip
    assert other | {"messages": []} == {
        "model": "other",
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "messages": [],
        "max_completion_tokens": 9,
    }
    (whole, *_) = bodies(ask("--no-stream"))
    assert whole["stream"] is False


def test_the_head(ask, monkeypatch):
    monkeypatch.setenv("BENCH_KEY", "sk-1")
    endpoint = ask("--header", "X-A: 1", "--header", "X-B:2", "--key-env", "BENCH_KEY").settings.known.endpoint
    lines = endpoint.head("POST", "/x", 1).decode().split("\r\n")
    assert {"X-A: 1", "X-B: 2", "Authorization: Bearer sk-1"} <= set(lines)


def test_measuring_options(ask):
    found = ask("--timeout-s", 3, "--longest-s", 4, "--warmup", 1, "--drain", 2, "--workers", 3, "--no-reuse").settings
    assert (found.limits.idle_s, found.limits.longest_s) == (3, 4)
    assert (found.warmup_ns, found.drain_ns, found.workers, found.reuse) == (SECOND, 2 * SECOND, 3, False)


# --- targets
def ideal(folder: Path) -> Path:
    names = ("first_token_ns", "first_square_ns", "gap_context_ns", "first_error", "gap_error")
    known = {"first_base_ns": 5e6, "gap_base_ns": 2e6, "shortest": 1, "longest": 100, "requests": 9}
    (folder / "ideal.json").write_text(json.dumps({**dict.fromkeys(names, 0), **known}))
    return folder / "ideal.json"


def test_targets(ask, tmp_path):
    def targets(*args: object) -> dict[str, Any]:
        return ask(*args).settings.targets.document()

    assert targets() == targets("--preset", "chat")
    assert (targets()["first_ms"], targets()["gap_ms"], targets()["stall_ms"]) == (200, 50, 250)
    found = targets("--slo", "ttft=300ms,e2e=5s,share=0.9", "--stall-ms", 100)
    assert found["slo"] == {"ttft_ms": 300, "tpot_ms": None, "e2e_ms": 5000, "fluidity": None, "share": 0.9}
    assert (found["first_ms"], found["gap_ms"], found["stall_ms"]) == (300, 50, 100)
    found = targets("--slo", "ttft=300ms", "--deadlines", "1s,30ms")
    assert (found["first_ms"], found["gap_ms"], found["slo"]["ttft_ms"]) == (1000, 30, 300)
    found = targets("--ideal", ideal(tmp_path), "--slack-ms", 40)
    assert (found["slack_ms"], found["ideal"]["gap_base_ns"]) == (40, 2e6)


def test_the_ideal_is_compared_with(url, measure, tmp_path):
    metrics = measure(url, *FEW, "--ideal", ideal(tmp_path), "--slack-ms", 0)["metrics"]
    assert metrics["over_ideal"]["p50"] > 1
    assert metrics["fluidity"]["unpredicted"] == 0


@pytest.mark.parametrize(
    ("preset", "slo", "gap", "prompt"),
    [
        ("chat", (200, 50), 50, "lognormal:200,1:max=4000"),
        ("reader", (1000, None), 100, "lognormal:200,1:max=4000"),
        ("mlperf-interactive", (450, 40), 40, "lognormal:260,0.6:max=1024"),
        ("rag", (1000, 100), 100, "16-64"),
        ("batch", None, 100, "lognormal:500,0.6:max=4000"),
    ],
)
def test_presets(ask, preset, slo, gap, prompt):
    asked = ask("--preset", preset)
    found = asked.settings.targets.document()
    assert (found["slo"] and (found["slo"]["ttft_ms"], found["slo"]["tpot_ms"])) == slo
    assert found["gap_ms"] == gap
    assert asked.workload.describe()["prompt"] == prompt
    assert (asked.workload.describe()["prefixes"] is not None) == (preset == "rag")
    given = ask("--preset", preset, "--prompt", 5, "--output-tokens", 6, "--prefixes", "1x9").workload.describe()
    assert (given["prompt"], given["output"], given["prefixes"]) == ("5", "6", {"count": 1, "tokens": "9"})


# --- other commands
def test_mock_is_served_as_it_was_set(call, monkeypatch, tmp_path):
    served: list[tuple[Script, str, int]] = []
    monkeypatch.setattr("everybit.bench.mock.run.serve", lambda *args: served.append(args))
    (tmp_path / "script.json").write_text('{"ttft_ms": 7, "gap_ms": 3}')
    assert call("mock", "--script", "script.json", "--set", "ttft_ms=250", "--set", "models=[\"a\", \"b\"]",
                "--set", "usage=none", "--set", "freeze=[5, 2]", "--host", "::1", "--port", 0)[0] == 0  # fmt: skip
    wanted = Script(ttft_ms=250, gap_ms=3, models=("a", "b"), usage="none", freeze=(5, 2))
    assert served == [(wanted, "::1", 0)]


def test_a_report_of_one_of_several_and_anew(url, call, tmp_path):
    for name in ("one", "two"):
        assert call(url, *FEW, "--slo", "ttft=9s", "-o", name)[0] == 0
    code, out, _ = call("report", "one", "-o", "one.html")
    assert (code, bool(re.search("SLO +kept: 4 of 4", out))) == (0, True)
    code, out, _ = call("report", "one", "two/result.json", "-o", "both.html", "--names", "first,second")
    assert (code, "== first\n" in out) == (0, True)
    assert "second" in (tmp_path / "both.html").read_text()
    anew = {
        ("--slo", "ttft=1us"): "SLO          NOT KEPT",
        ("--deadlines", "1s,33ms"): "deadlines of 1000 ms and 33 ms",
        ("--preset", "mlperf-interactive"): "deadlines of 450 ms and 40 ms",
        ("--stall-ms", "1"): "over 1 ms",
        ("--ideal", ideal(tmp_path)): "over ideal",
        ("--ideal", ideal(tmp_path), "--slack-ms", "1"): "deadlines of",
    }
    for given, told in anew.items():
        code, out, err = call("report", "one", "-o", "anew.html", *given)
        assert (code, told in out) == (0, True), (given, out, err)


def test_the_short_form() -> None:
    assert with_command(["bench", "http://u"]) == ["bench", "run", "http://u"]
    assert with_command(["--debug", "bench", "--json", "u"]) == ["--debug", "bench", "run", "--json", "u"]
    for same in (
        ["bench"],
        ["bench", "runn", "http://u"],
        ["bench", "-h"],
        ["bench", "sweep", "u"],
        ["inspect", "bench"],
        ["chat", "bench", "x"],
        [],
    ):
        assert with_command(same) == same


# --- bad input
BAD = [
    # addresses
    ("", "expected an address"),
    ("ftp://h/v1", "expected an address"),
    ("http://", "expected an address"),
    ("http://[::1", "not an address"),
    ("http://h:99999/v1", "not an address"),
    ("http://h:0/v1", "1 to 65535"),
    ("http://name:word@h/v1", "--key-env"),
    ("http://h/v1?key=1", "without a ?"),
    ("http://127.0.0.1:1/v1", "no connection"),
    ("http://no-such-host.invalid/v1", "has no address"),
    ("{url}/completions --api chat", "give one of them"),
    ("{url}/nowhere", "--model NAME"),
    ("{url}/nowhere --model m", "404"),
    ("{url} --model nobody", "it has m, "),
    # the endpoint
    ("{url} --key-env NO_SUCH_VARIABLE", "not set or empty"),
    ("{url} --header nocolon", "NAME: VALUE"),
    ("{url} --header Host:x", "sets it itself"),
    ("{url} --header X:\u20ac", "NAME: VALUE"),
    ("{url} --ca none.pem", "go with https"),
    ("{url} --insecure", "go with https"),
    ("https://127.0.0.1:1 --ca none.pem", "no certificates"),
    ("{url} --body not-json", "expected a JSON object"),
    ("{url} --body [1]", "expected a JSON object"),
    ('{url} --body {"temperature":NaN}', "expected a JSON object"),
    ("{url} --body " + "[" * 100_000, "expected a JSON object"),
    *((f'{{url}} --body {{"{name}":1}}', f"--body sets {name}")
      for name in ("model", "messages", "prompt", "input", "stream", "stream_options", "max_tokens")),
    ("{url} --token-field n", "invalid choice"),
    ("{url}/completions --token-field max_tokens", "goes with chat"),
    ("{url} --api smoke", "invalid choice"),
    # loads
    ("{url} --users 2 --rate 1", "give one"),
    ("{url} --users 2 --trace t.csv", "give one"),
    ("{url} --rate 2 --trace t.csv", "give one"),
    ("{url} --users 0", "0 users"),
    ("{url} --users 999999999", "999999999 users"),
    ("{url} --users 4 --requests 3", "one of each user"),
    ("{url} --users x", "invalid int"),
    ("{url} --rate x", "--rate x"),
    ("{url} --rate 1-2-3", "--rate 1-2-3"),
    ("{url} --rate 1-", "--rate 1-"),
    ("{url} --rate 0", "rate 0"),
    ("{url} --rate 1e-300 --requests 5", "rate 1e-300"),
    ("{url} --rate 1e5 --duration 1e4", "arrivals"),
    ("{url} --rate 1-5 --requests 5", "duration"),
    ("{url} --rate 0.001 --duration 1", "no arrival"),
    ("{url} --rate 1 --burstiness x", "--burstiness x"),
    ("{url} --rate 1 --burstiness 1e9", "burstiness"),
    ("{url} --burstiness 2", "goes with a rate"),
    ("{url} --rate 1 --ramp 2", "--ramp goes with --users"),
    ("{url} --rate 1 --think 2", "--think goes with"),
    ("{url} --think x", "seconds 'x'"),
    ("{url} --think=", "seconds ''"),
    ("{url} --turns x", "length 'x'"),
    ("{url} --turns 2 --duration 5", "leave --duration"),
    ("{url} --prompt=", "length ''"),
    ("{url} --prompt 0", "length '0'"),
    ("{url} --output-tokens=", "length ''"),
    ("{url} --output-tokens file:none.csv", "none.csv"),
    ("{url} --text none.txt", "none.txt: No such file"),
    ("{url} --text empty", "without words"),
    ("{url} --prompts empty", "no prompts"),
    ("{url} --prompts lines --prompt 5", "give neither"),
    ("{url} --prompts lines --text lines", "give neither"),
    ("{url} --prompts lines --turns 2", "leave it out"),
    ("{url} --shuffle", "--shuffle goes with --prompts"),
    ("{url} --prefixes 5", "--prefixes 5"),
    ("{url} --prefixes 0x5", "0 prefixes"),
    ("{url} --preset none", "invalid choice"),
    ("{url} --speed 2", "--speed goes with --trace"),
    ("{url} --loop 2", "--loop goes with --trace"),
    ("{url} --slice 1:2", "--slice goes with --trace"),
    ("{url} --scale-output 2", "--scale-output goes with --trace"),
    ("{url} --most-prompt 2", "--most-prompt goes with --trace"),
    ("{url} --trace none.csv", "none.csv: No such file"),
    ("{url} --trace empty", "an empty file"),
    ("{url} --trace lines", "expected an Azure csv"),
    ("{url} --trace t.csv --slice x", "part 'x'"),
    ("{url} --trace t.csv --slice 9:", "no requests there"),
    ("{url} --trace t.csv --loop 99999999", "at most"),
    ("{url} --trace t.csv --requests 0", "--requests 0"),
    ("{url} --trace t.csv --most-output 0", "most_output 0"),
    *((f"{{url}} --trace t.csv --{name}", f"--{name.split()[0]} with --trace")
      for name in ("prompt 5", "output-tokens 5", "prompts lines", "prefixes 2x5", "turns 2", "think 1", "duration 5",
                   "shuffle", "burstiness 1", "ramp 1")),
    # measuring
    ("{url} --slo=", "SLO ''"),
    ("{url} --slo ttft=5", "expected a time"),
    ("{url} --slo ttft=0ms", "expected a time"),
    ("{url} --slo speed=5ms", "at most once"),
    ("{url} --slo share=0.9", "asks for nothing"),
    ("{url} --slo ttft=5ms,share=1.1", "at most 1"),
    ("{url} --deadlines 5ms", "expected FIRST,GAP"),
    ("{url} --deadlines=", "expected FIRST,GAP"),
    ("{url} --deadlines 5ms,x", "expected a time"),
    ("{url} --ideal none.json", "none.json: No such file"),
    ("{url} --ideal t.csv", "not an ideal"),
    ("{url} --slack-ms 5", "an ideal to add it to"),
    ("{url} --tokenizer none.json", "not a tokenizer.json"),
    ("{url} --workers 0", "expected 1 to 256"),
    ("{url} --carbon x", "carbon intensity"),
    ("{url} --carbon=", "carbon intensity"),
    ("{url} --warmup 60 --duration 30", "expected a longer run"),
    # output
    ("{url} --json -o found", "leave -o out"),
    ("{url} -o lines", "a file"),
    ("{url} -o lines/found", "cannot be written"),
    ("{url} --no-such-option", "unrecognized"),
    ("{url} --pro 5", "unrecognized"),  # no abbreviations
    # other commands
    ("sweep {url}", "required"),
    ("sweep {url} --rates=", "expected values"),
    ("sweep {url} --rates 1,1", "each once"),
    ("sweep {url} --rates 1,x", "expected numbers"),
    ("sweep {url} --rates 1,nan", "rate nan"),
    ("sweep {url} --rates 5,1e-3 --duration 1", "no arrival"),
    ("sweep {url} --crowds 1,0", "0 users"),
    ("sweep {url} --crowds 1 --rates 1", "not allowed with"),
    ("sweep {url} --crowds 1 --users 0", "go with --models"),
    ("sweep {url} --models m,x", "--models x"),
    ("sweep {url} --models m --model m", "give one of them"),
    ("sweep {url} --models m --rate x", "--rate x"),
    ("sweep {url} --models m --rate 1 --users 1", "give one"),
    ("sweep {url} --crowds 1 --quality q.json", "goes with --models"),
    ("sweep {url} --models m --quality none.json", "none.json: No such file"),
    ("sweep {url} --models m --quality lines", "lines: expected"),
    ("sweep {url} --models m --quality nan.json", "nan.json: expected"),
    ("capacity {url} --preset batch", "give --slo"),
    ("capacity {url} --slo ttft=5ms,share=1", "less than 1"),
    ("capacity {url} --first-rate 5 --most-rate 1", "first rate 5"),
    ("capacity {url} --users 5", "unrecognized"),
    ("sustain {url}", "required"),
    ("sustain {url} 5", "expected a time"),
    ("sustain {url} 0s", "expected a time"),
    ("sustain {url} 0.000000001s", "expected a time"),
    ("sustain {url} nanm", "expected a time"),
    ("sustain {url} 1s --duration 5", "stands after the address"),
    ("sustain {url} 1s --rate 1 --users 2", "give one"),
    ("compare {url}", "required"),
    ("compare {url} {url} --rounds 2", "3 or more"),
    ("compare {url} {url}#nobody", "404"),
    ("compare {url} {url} --rate 1 --users 1", "give one"),
    ("fit {url}", "required"),
    ("fit {url} -o lines/x", "cannot be written"),
    ("fit {url} -o x --answer 1", "expected 32 and 2"),
    ("fit {url} -o x --most-prompt 5", "expected 32 and 2"),
    ("fit {url} -o x --most-prompt 9999999999", "at most"),
    ("audit {url}", "required"),
    ("audit {url} --record a --reference b", "not allowed"),
    ("audit {url} --record lines", "exists already"),
    ("audit {url} --record lines/x", "cannot be written"),
    ("audit {url} --record new --json", "leave -o and --json out"),
    ("audit {url} --record new -o found", "leave -o and --json out"),
    ("audit {url} --record new --claims 8=m@8bit", "two or more"),
    ("audit {url} --record new --claims x", "CLAIM=MODEL"),
    ("audit {url} --reference none.json", "none.json: "),
    ("audit {url} --reference lines", "expected a reference"),
    ("report none -o x.html", "none: No such file"),
    ("report lines -o x.html", "not JSON"),
    ("report lines", "required"),
    ("selftest --seconds 1", "8 to 3600"),
    ("selftest --workers 0", "1 to 256"),
    ("mock --port 99999", "0 to 65535"),
    ("mock --set x", "NAME=VALUE"),
    ("mock --set x=1", "unknown"),
    ("mock --set ttft_ms=NaN", "ttft_ms nan"),
    ("mock --script none.json", "none.json: No such file"),
    ("mock --host no-such-host.invalid", "cannot listen"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), BAD, ids=[f"{line[:60]}" for line, _ in BAD])
def test_bad_input_is_refused_in_one_line(url, refuse, tmp_path, line, told):
    (tmp_path / "t.csv").write_text(TRACES["azure"])
    (tmp_path / "lines").write_text("line 1\nline 2\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "q.json").write_text('{"m": 1}')
    (tmp_path / "nan.json").write_text('{"m": NaN}')
    there = set(tmp_path.iterdir())
    assert told in refuse(*line.replace("{url}", url).split(" "))
    assert set(tmp_path.iterdir()) == there  # nothing is left


# What has to stand beside an option, so that it alone can be what is refused; after the URL, unless told otherwise.
BESIDE = {
    **dict.fromkeys(("--speed", "--loop", "--scale-prompt", "--scale-output"), ("--trace", "t.csv")),
    **dict.fromkeys(("--most-prompt", "--most-output"), ("--trace", "t.csv")),
    "--burstiness": ("--rate", "1"),
    "--slack-ms": ("--ideal", "ideal.json"),
}
FIRST = {"compare": ("{url}", "{url}"), "fit": ("{url}", "-o", "x"), "selftest": (), "mock": ()}


def commands() -> dict[str, argparse.ArgumentParser]:
    def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        return next(one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))

    return choices(choices(build_parser(["bench"]))["bench"])


def numeric() -> list[tuple[str, str]]:
    """(command, option): where commands share one, the first of them."""
    found: dict[str, str] = {}
    for name, parser in commands().items():
        for action in parser._actions:
            if action.type in (int, float) or action.dest in ("rate", "burstiness"):
                found.setdefault(action.option_strings[-1], name)
    del found["--seed"]  # any will do
    return [(name, option) for option, name in found.items()]


@pytest.mark.parametrize(("command", "option"), [*numeric(), ("fit", "--most-prompt")])
def test_numbers_that_are_none(url, refuse, tmp_path, command, option):
    (tmp_path / "t.csv").write_text(TRACES["azure"])
    ideal(tmp_path)
    first = [one.replace("{url}", url) for one in FIRST.get(command, ("{url}",))]
    beside = BESIDE.get(option, ()) if command == "run" else ()
    for bad in ("nan", "inf", "-1"):
        told = refuse(command, *first, *beside, f"{option}={bad}")
        assert option.strip("-").rpartition("-")[2].removesuffix("s") in told.replace(url, "")


def test_every_option_is_tried_here():
    here = "".join(Path(__file__).with_name(name).read_text() for name in ("test_cli.py", "test_series.py"))
    assert all(one.format_help() for one in commands().values())
    options = {text for one in commands().values() for action in one._actions for text in action.option_strings}
    assert [one for one in options - {"--help"} if one.startswith("--") and one not in here] == []
