"""`everybit probe`: its figures are plausible, its JSON is whole, its refusals are one line."""

from __future__ import annotations

import json

import pytest

from everybit import _native
from everybit.cli.main import main
from everybit.cli.probe import thread_counts


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--json", "--array-mb", "8", "--runs", "3", "--threads", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["isa"] in document["isas"] == _native.isas()
    assert document["isas"][-1] == "scalar"
    assert [(entry["kernel"], entry["threads"]) for entry in document["bandwidth"]] == [
        ("read", 2),
        ("copy", 2),
        ("triad", 2),
    ]
    for entry in document["bandwidth"]:
        assert 0.05 < entry["median_gbps"] <= entry["best_gbps"] < 10_000


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--array-mb", "1", "--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{_native.isas()[0]} (used)" in lines[3]
    assert lines[6].split() == ["threads", "read", "copy", "triad"]
    assert [int(line.split()[0]) for line in lines[7:]] == thread_counts(_native.usable_processors())


def test_bandwidth_grows_where_a_cache_holds_the_array() -> None:
    """A measurement that did not read its array would not know the difference; both are medians of many runs."""
    cached, _ = _native.measure_bandwidth("read", 1, 256 << 10, 200)
    memory, _ = _native.measure_bandwidth("read", 1, 256 << 20, 3)
    assert cached > 1.5 * memory


@pytest.mark.parametrize(("processors", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_thread_counts(processors: int, counts: list[int]) -> None:
    assert thread_counts(processors) == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--array-mb", "100000000"], "three such arrays do not fit into the"),
        (["--threads", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "100000"], "threads"),
        (["--runs", "x"], "'x' is not a whole number of at least 1"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_unknown_instruction_set_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERYBIT_ISA", "foo")
    assert main(["probe", "--array-mb", "1"]) == 2
    assert "EVERYBIT_ISA 'foo': expected one of " in capsys.readouterr().err
