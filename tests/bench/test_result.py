"""The result document: its schema, what makes a run invalid, and its files."""

from __future__ import annotations

import copy
import csv
import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everybit.bench.card import card
from everybit.bench.fluidity import Deadlines
from everybit.bench.ideal import Ideal
from everybit.bench.metrics import measure
from everybit.bench.records import MS, SECOND, Record, read_records
from everybit.bench.result import (
    COLUMNS,
    RUN_PARTS,
    errors,
    read_result,
    run_document,
    series_document,
    table,
    token_sources,
    validity,
    write_result,
)
from everybit.bench.series import sweep_point
from everybit.bench.targets import Targets, Window, parse_slo
from everybit.errors import OutputError, SourceError

WINDOW = Window(0, 10 * SECOND)
IDEAL = Ideal(50.0 * MS, 0.1 * MS, 0.0, 10.0 * MS, 0.0, 0.01, 0.01, 100, 2000, 9)
TARGETS = Targets(Deadlines(300 * MS, 30 * MS), parse_slo("ttft=1s,tpot=50ms,e2e=5s,fluidity=0.9"), IDEAL, 200 * MS)
MADE = {"created": "2026-11-20T10:00:00Z", "command": ["bench", "http://127.0.0.1:1/v1"]}


def answer(number: int = 0, at_ms: int = 0, lag_ms: int = 0, **more: Any) -> Record:
    times = [(at_ms + ms) * MS for ms in (200, 220, 640, 660)]
    known: dict[str, Any] = {
        "sent_ns": (at_ms + lag_ms) * MS,
        "end_ns": times[-1],
        "status": 200,
        "times_ns": times,
        "tokens": [1, 1, 2, 1],
        "source": "usage",
        "usage_prompt": 40,
        "usage_output": 5,
    }
    return Record(number, number, 0, 0, at_ms * MS, **{"finish": "stop", **known, **more})


def failure(number: int, error: str, detail: str = "") -> Record:
    return Record(number, number, 0, 0, number * MS, sent_ns=number * MS, end_ns=SECOND, error=error, detail=detail)


RECORDS = [
    answer(0, connected_ns=MS),
    answer(1, at_ms=100, bits=[8, 8, 4, 4, "plan"], usage_cached=10),
    answer(2, at_ms=200, stalled=True),
    answer(3, at_ms=300, counted=4, source="spread"),
    answer(4, at_ms=400, streamed=False, times_ns=[900 * MS], tokens=[5]),
    failure(5, "busy", "429: queue is full"),
    failure(6, "busy"),
    failure(7, "cancelled"),
    answer(8, at_ms=20_000),
]


def made(records: list[Record] = RECORDS, targets: Targets = TARGETS) -> dict[str, Any]:
    return run_document(
        **MADE,
        endpoint={"url": "http://127.0.0.1:1/v1", "model": "m", "api": "chat"},
        load={"kind": "poisson", "rate": 2.0},
        targets=targets,
        window=WINDOW,
        records=records,
        metrics=measure(records, WINDOW, targets),
        validity=validity(records, WINDOW),
        energy=None,
    )


def schema_of_results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((importlib.resources.files("everybit.bench") / "schema.json").read_text())
    return found


def check(document: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = schema_of_results()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(document, allow_nan=False)))


def test_a_run_follows_the_schema() -> None:
    check(made())
    check(made([answer()], Targets(Deadlines(300 * MS, 30 * MS))))
    check({**made(), "metrics": None})


def test_the_schema_names_what_a_run_has() -> None:
    schema, document = schema_of_results(), made()
    parts = schema["$defs"]["metrics"]["properties"]
    assert set(document) == {*schema["required"], *RUN_PARTS}
    assert set(document) <= set(schema["properties"])
    assert set(document["metrics"]) == set(parts)
    assert set(document["metrics"]["latency"]) == set(parts["latency"]["required"])
    assert set(document["targets"]) == set(schema["$defs"]["targets"]["required"])


def test_the_other_kinds_follow_the_schema() -> None:
    for kind in ("sweep", "capacity", "compare", "sustain"):
        check(series_document(kind, **MADE, block={"rate_per_s": 3.5}, runs=[made(), made()]))
    for kind in ("audit", "selftest"):
        check(series_document(kind, **MADE, block={}))
    with pytest.raises(SourceError, match="kind 'run'"):
        series_document("run", **MADE, block={})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(more=1),
        lambda d: d.update(version=2),
        lambda d: d.update(runs=[]),
        lambda d: d.pop("validity"),
        lambda d: d["validity"].update(more=1),
        lambda d: d["metrics"]["latency"].pop("ttft_ms"),
        lambda d: d["metrics"]["latency"]["ttft_ms"].update(p50="fast"),
        lambda d: d["metrics"]["fluidity"].update(mean=1.5),
        lambda d: d["tokens"]["mismatch"].pop("usage"),
        lambda d: d["errors"]["busy"].update(count=0),
    ],
)
def test_the_schema_refuses(spoil: Callable[[dict[str, Any]], object]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = copy.deepcopy(made())
    spoil(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_the_table_has_a_row_for_every_request() -> None:
    found = table(list(reversed(RECORDS)), WINDOW, TARGETS)
    assert found["columns"] == list(COLUMNS)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found["rows"]]
    assert [row["number"] for row in rows] == [0, 5, 6, 7, 1, 2, 3, 4, 8]
    by_number = {row["number"]: row for row in rows}
    assert by_number[0]["first_ms"] == 200.0
    assert by_number[0]["stalls"] == [[220.0, 420.0]]
    assert by_number[1]["bits"] == {"8": 2, "4": 2, "plan": 1}
    assert (by_number[5]["error"], by_number[5]["fluidity"], by_number[5]["first_ms"]) == ("busy", 0.0, None)
    assert [n for n, row in by_number.items() if not row["scored"]] == [7, 8]
    assert by_number[8]["fluidity"] is None
    assert by_number[2]["client_stalled"] is True
    assert [by_number[1][name] for name in ("ttft_ms", "tpot_ms", "e2e_ms", "detail")] == [200.0, 115.0, 660.0, ""]
    assert [by_number[5][name] for name in ("ttft_ms", "tpot_ms", "e2e_ms")] == [None] * 3
    assert by_number[5]["detail"] == "429: queue is full"


def test_token_counts_that_differ_are_loud() -> None:
    found = token_sources([answer(0), answer(1, counted=9), answer(2, counted=3, usage_output=4), failure(3, "cut")])
    assert found["sources"] == {"usage": 3}
    mismatch = found["mismatch"]
    assert (mismatch["requests"], mismatch["of"], mismatch["counted"], mismatch["usage"]) == (2, 3, 12, 9)
    assert mismatch["largest"] == {"number": 1, "counted": 9, "usage": 5}
    assert "TOKEN COUNTS DIFFER in 2 of 3" in mismatch["message"]
    assert token_sources([answer(0), answer(1, counted=5)])["mismatch"] is None


def test_errors_are_counted_by_kind_with_an_example() -> None:
    found = errors(RECORDS)
    assert found["busy"] == {"count": 2, "meaning": "429: too many requests", "example": "429: queue is full"}
    assert list(found) == ["busy", "cancelled"]


def test_a_run_is_invalid_when_the_client_lagged() -> None:
    good = [answer(n, lag_ms=9) for n in range(100)]
    assert validity(good, WINDOW) == {"valid": True, "reasons": [], "warnings": []}
    late = validity([*good[:90], *(answer(n, lag_ms=40) for n in range(10))], WINDOW)
    assert not late["valid"]
    assert "lag p99 40.0 ms" in late["reasons"][0]
    warm_up = [answer(n, at_ms=0, lag_ms=500) for n in range(10)]
    assert validity([*warm_up, *(answer(n, at_ms=2000) for n in range(100))], Window(SECOND, 9 * SECOND))["valid"]


def test_a_run_is_invalid_when_the_client_stood_still_or_the_clock_jumped() -> None:
    many = [answer(n, stalled=n < 2) for n in range(199)]
    assert "stood still during 2 of 199" in validity(many, WINDOW)["reasons"][0]
    one = validity([answer(n, stalled=n < 1) for n in range(199)], WINDOW)
    assert one["valid"]
    assert "corrected" in one["warnings"][0]
    assert "slept" in validity(many[2:], WINDOW, clock_jump_ns=-2 * SECOND)["reasons"][0]
    assert "500 ms" in validity(many[2:], WINDOW, clock_jump_ns=500 * MS)["warnings"][0]
    assert validity(many[2:], WINDOW, reasons=["a worker died"])["valid"] is False


def test_doubts_are_told() -> None:
    records = [*RECORDS, answer(9, usage_output=None, malformed=2)]
    told = "\n".join(validity(records, WINDOW)["warnings"])
    for part in (
        *("1 of 9 requests were ended by this bench", "2 of 9 requests failed", "1 of 9 answers came whole"),
        *("1 of 9 answers without usage", "events that could not be read", "TOKEN COUNTS DIFFER", "6 complete"),
    ):
        assert part in told


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    document, folder = made(), tmp_path / "new" / "run"
    write_result(folder, document, RECORDS)
    assert sorted(path.name for path in folder.iterdir()) == ["records.jsonl", "requests.csv", "result.json"]
    assert read_result(folder) == read_result(folder / "result.json") == json.loads(json.dumps(document))
    header, records = read_records(folder / "records.jsonl")
    assert records == RECORDS
    assert (header["window"], header["load"]) == ({"begin_ms": 0, "end_ms": 10_000}, document["load"])
    assert measure(records, WINDOW, TARGETS) == document["metrics"]
    with (folder / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == [str(row[0]) for row in document["requests"]["rows"]]
    assert json.loads(rows[4]["bits"]) == {"8": 2, "4": 2, "plan": 1}
    half = [*RECORDS, failure(9, "frame", "\ud800,\n")]
    write_result(folder, made(half), half)
    with (folder / "requests.csv").open(newline="") as file:
        assert [row["detail"] for row in csv.DictReader(file) if row["number"] == "9"] == ["\\ud800,\n"]


def test_the_card_says_who_ended_a_request_and_prints_no_empty_words() -> None:
    said = card(made())
    assert "  failed: 2 busy, 429: too many requests (429: queue is full)\n" in said
    assert "\n  1 ended by this bench (Ctrl-C" in said
    assert "()" not in card(made([answer(), failure(1, "cut")]))
    assert "requests/s of those due in that time" in said


def test_the_card_of_a_short_time_has_no_rates() -> None:
    window = Window(0, 5 * MS)
    document = {**made(), "metrics": measure(RECORDS, window, TARGETS), "validity": validity(RECORDS, window)}
    check(document)
    said = card(document)
    assert "warning: the measured time is 0.005 s: no rates" in said
    assert "-/s, - tokens/s" in said
    assert "goodput - requests/s" in said


def test_a_sweep_marks_what_was_interrupted() -> None:
    runs = [made(), made()]
    runs[1]["validity"]["warnings"].append("interrupted: measured until then")
    points = [sweep_point(value, run) for value, run in zip((5, 10), runs, strict=True)]
    points.append({"value": 20, "failed": "nothing to measure"})
    block = {"over": "rate", "points": points}
    lines = card(series_document("sweep", **MADE, block=block, runs=[*runs, runs[1]])).splitlines()
    assert [line.endswith("  interrupted") for line in lines[1:4]] == [False, True, True]
    assert "  run 1: 2 failed, busy" in lines
    assert "  run 1: 1 ended by this bench (Ctrl-C or the end of the drain); not scored" in lines


@pytest.mark.parametrize(("length", "second"), [(0.15, "0.15"), (4.5, "4.5"), (30.0, "30")])
def test_slices_begin_at_different_times(length: float, second: str) -> None:
    figures = {"tokens_per_s": 50.0, "tpot_p50_ms": None, "ttft_p50_ms": 4.0}
    slices = [{"begin_s": i * length, "end_s": (i + 1) * length, **figures} for i in range(4)]
    decay = {"per_hour": -0.5, "low": -1.4, "high": 0.4, "verdict": "no trend"}
    lines = card(series_document("sustain", **MADE, block={"slices": slices, "decay": decay})).splitlines()
    assert lines[2].split() == [second, "50.0", "-", "4.0"]
    assert lines[5] == "throughput changes by -50.0% an hour (-140.0% to +40.0%): no trend"
    decay["high"] = 0.7
    assert card(series_document("sustain", **MADE, block={"slices": slices, "decay": decay})).endswith(
        "throughput: too short to tell a trend"
    )


def test_a_series_has_one_file(tmp_path: Path) -> None:
    write_result(tmp_path, series_document("sweep", **MADE, block={"points": []}, runs=[made()]))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert read_result(tmp_path)["runs"][0]["kind"] == "run"


def test_what_cannot_be_written_is_an_output_error_and_leaves_the_old(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_result(tmp_path / "file", made(), RECORDS)
    folder = tmp_path / "run"
    write_result(folder, made(), RECORDS)
    with pytest.raises(OutputError, match="no finite number"):
        write_result(folder, {**made(), "energy": {"joules": float("nan")}}, RECORDS)
    assert read_result(folder)["energy"] is None
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a result"),
        ('{"schema":"other"}', "expected a result"),
        ('{"schema":"everybit-bench-result","version":9}', "version 9"),
        ('{"schema":"everybit-bench-result","version":1,"kind":"nap"}', "kind 'nap'"),
        ('{"schema":"everybit-bench-result","version":1,"kind":"run"}', "without endpoint"),
        ('{"schema":"everybit-bench-result","version":1,"kind":"sweep","sweep":{},"runs":3}', "no list"),
        ('{"schema":"everybit-bench-result","version":1,"kind":"sweep","sweep":{},"runs":[1]}', "not of kind run"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=problem):
        read_result(path)


def test_a_result_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_result(tmp_path)
