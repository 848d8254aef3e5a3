"""Traces: every format, what is wrong in them, and what is chosen of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everybit.bench.load.traces import Trace, TraceRequest, read_trace, select
from everybit.bench.records import MS, SECOND, Record, write_records
from everybit.errors import SourceError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def read(file: Path, text: str) -> Trace:
    file.write_text(text, encoding="utf-8")
    return read_trace(file)


def test_azure_2023_is_exact_to_its_100_ns(file: Path) -> None:
    trace = read(file, AZURE + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951691,396,109\r\n")
    assert trace == Trace(
        [TraceRequest(0, 374, 44), TraceRequest(4_314_579_100, 396, 109)], notes=[], format="azure", block_tokens=512
    )


def test_azure_2024_has_zones_and_whole_seconds(file: Path) -> None:
    trace = read(
        file,
        AZURE + "2024-05-10 23:59:59.500000+00:00,5,6\n2024-05-11 00:00:00+00:00,7,8\n2024-05-11T02:00:01+02:00,9,10\n",
    )
    assert [one.at_ns for one in trace.requests] == [0, SECOND // 2, 3 * SECOND // 2]


def test_burstgpt_leaves_failures_out_and_keeps_conversations(file: Path) -> None:
    rows = (
        "19440110.5,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log\n"
        "19440111.0,,2,ChatGPT,36,0,36,API log\n"
        "19440112.25,,2,ChatGPT,36,29,65,API log\n"
        "19440113.0,1722ac82-0a46,2,GPT-4,1400,5,1405,Conversation log\n"
    )
    trace = read(file, BURST + rows)
    assert trace.format == "burstgpt"
    assert [(one.at_ns, one.session) for one in trace.requests] == [(0, 0), (1750 * MS, None), (2500 * MS, 0)]
    assert trace.notes == ["1 requests without prompt or output tokens were left out"]


def test_the_older_burstgpt_has_no_sessions(file: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace = read(file, header + "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,230,1317,Conversation log\n")
    assert trace.requests == [TraceRequest(0, 472, 18), TraceRequest(40 * SECOND, 1087, 230)]


def test_mooncake(file: Path) -> None:
    lines = [
        {"timestamp": 10, "input_length": 513, "output_length": 3, "hash_ids": [0, 4]},
        {"timestamp": 12.5, "input_length": 512, "output_length": 4, "hash_ids": [0]},
        {"timestamp": 13, "input_length": 9, "output_length": 4},
    ]
    trace = read(file, "\n".join(map(json.dumps, lines)) + "\n\n")
    assert trace.format == "mooncake"
    assert [(one.at_ns, one.blocks) for one in trace.requests] == [(0, (0, 4)), (2_500_000, (0,)), (3 * MS, ())]


def test_our_own_records(file: Path) -> None:
    records = [
        Record(0, 7, 0, 0, intended_ns=5 * MS, times_ns=[1, 2], tokens=[1, 2], wanted_prompt=20, usage_prompt=25),
        Record(1, 7, 1, 0, intended_ns=9 * MS, tokens=[1], usage_output=4, usage_prompt=50, wanted_output=90),
        Record(2, 8, 0, 0, intended_ns=9 * MS, error="timeout", wanted_output=90, wanted_prompt=30),
        Record(3, 9, 0, 0, intended_ns=9 * MS, error="connect", wanted_output=90),
    ]
    with file.open("w", encoding="utf-8") as out:
        write_records(out, records, {})
    trace = read_trace(file)
    assert trace.format == "everybit"
    assert trace.requests == [
        TraceRequest(0, 20, 3, session=7),
        TraceRequest(4 * MS, 50, 4, session=7),
        TraceRequest(4 * MS, 30, 90, session=8),
    ]
    assert len(trace.notes) == 2


def test_requests_out_of_order_are_sorted_and_counted(file: Path) -> None:
    times = ("00:03", "00:01", "00:02", "00:02")
    trace = read(file, AZURE + "".join(f"2024-05-10 00:{time},{n},9\n" for n, time in enumerate(times, 1)))
    assert [(one.at_ns // SECOND, one.prompt_tokens) for one in trace.requests] == [(0, 2), (1, 3), (1, 4), (2, 1)]
    assert trace.notes == ["1 requests were out of order in time and were sorted"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "an empty file"),
        (" \n\n", "an empty file"),
        ("time,tokens\n1,2\n", "starts with 'time,tokens"),
        ("num_prefill_tokens,num_decode_tokens\n3,4\n", "lengths without times; draw lengths from it with file:"),
        (AZURE, "no requests with prompt and output tokens among 0"),
        (AZURE + "2024-05-10 00:00:00,0,5\n2024-05-10 00:00:00,5,-1\n", "tokens among 2"),
        (AZURE + "2024-05-10 00:00:00,1,5\n\n2024-13-10 00:00:00,1,5\n", "line 4: TIMESTAMP '2024-13-10"),
        (AZURE + "yesterday,1,5\n", "line 2: TIMESTAMP 'yesterday'"),
        (AZURE + "2024-05-10 00:00:00,1.5,5\n", "line 2: ContextTokens '1.5'"),
        (AZURE + "2024-05-10 00:00:00,99999999,5\n", "line 2: ContextTokens '99999999'"),
        (AZURE + "2024-05-10 00:00:00,1\n", "line 2: 2 columns; expected 3"),
        (BURST + "nan,,1,GPT-4,1,1,2,x\n", "line 2: timestamp 'nan'"),
        (BURST + "1e999999,,1,GPT-4,1,1,2,x\n", "line 2: timestamp '1e999999'"),
        ('{"timestamp": 0, "input_length": 1}\n', "line 1: no output_length"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"tim', "line 2: '{\"tim'; expected a JSON object"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', "line 1: input_length 'True'"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "line 1: hash_ids ['a']"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "1 hash_ids, 513 tokens"),
        ('{"timestamp": NaN, "input_length": 513, "output_length": 1}', "line 1: timestamp 'nan'"),
        ('{"format": "everybit-bench-records", "version": 1}\n', "no requests"),
        ('{"format": "everybit-bench-records", "version": 1}\n{"number": 1}', "a record without what it needs"),
    ],
)
def test_what_cannot_be_read_is_named(file: Path, text: str, told: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(file, text)
    assert told in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(file: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_trace(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="not UTF-8"):
        read_trace(file)


TEN = Trace([TraceRequest(n * SECOND, 10 * n + 1, n + 1, (n,), session=n) for n in range(10)], ["a note"], "azure")


@pytest.mark.parametrize(
    ("part", "chosen"),
    [
        ("2:4", [2, 3]),
        (":2", [0, 1]),
        ("8:", [8, 9]),
        ("8:99", [8, 9]),
        ("2s:4s", [2, 3]),
        ("7.5s:", [8, 9]),
        (":1.5s", [0, 1]),
    ],
)
def test_a_part_starts_at_0(part: str, chosen: list[int]) -> None:
    requests = select(TEN, part=part).requests
    assert [one.blocks[0] for one in requests] == chosen
    assert [one.at_ns for one in requests] == [(n - chosen[0]) * SECOND for n in chosen]


def test_lengths_are_scaled_then_cut() -> None:
    found = select(TEN, scale_prompt=2, scale_output=0.01, most_prompt=100)
    assert [one.prompt_tokens for one in found.requests] == [2, 22, 42, 62, 82, 100, 100, 100, 100, 100]
    assert {one.output_tokens for one in found.requests} == {1}
    assert found.block_tokens == 1024
    assert found.notes == ["a note", "5 requests were longer than allowed and were cut"]


def test_speed() -> None:
    assert [one.at_ns for one in select(TEN, speed=20).requests] == [n * SECOND // 20 for n in range(10)]


def test_a_loop_goes_on_after_a_mean_gap_with_text_of_its_own() -> None:
    requests = select(TEN, part="1:4", speed=2, loop=3).requests
    assert [one.at_ns for one in requests] == [n * SECOND // 2 for n in range(9)]
    assert len({one.blocks for one in requests}) == len({one.session for one in requests}) == 9


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"part": "5"}, "expected requests like 100:200"),
        ({"part": "-2:"}, "expected requests like"),
        ({"part": "20:30"}, "no requests there; the trace has 10 in 9.0 s"),
        ({"part": "4:4"}, "no requests there"),
        ({"speed": 0.0}, "speed 0.0: expected"),
        ({"speed": float("nan")}, "speed nan: expected"),
        ({"scale_output": float("inf")}, "scale_output inf: expected"),
        ({"most_prompt": 0}, "most_prompt 0: expected"),
        ({"loop": 0}, "loop 0: expected"),
        ({"loop": 2, "part": "1:2"}, "two or more for a loop"),
    ],
)
def test_what_cannot_be_chosen_is_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(SourceError) as caught:
        select(TEN, **options)  # type: ignore[arg-type]
    assert told in str(caught.value)


def test_the_real_traces(shared_data: Path) -> None:
    azure = read_trace(shared_data / "traces" / "azure_llm_2023_conv.csv")
    assert (azure.format, len(azure.requests), azure.notes) == ("azure", 19_366, [])
    assert azure.requests[-1].at_ns == (58 * 60 + 21) * SECOND + 721_937_000
    assert sum(one.prompt_tokens for one in azure.requests) // len(azure.requests) == 1154
    mooncake = read_trace(shared_data / "traces" / "mooncake_conversation_head.jsonl")
    assert (mooncake.format, len(mooncake.requests), mooncake.notes) == ("mooncake", 4_000, [])
    with pytest.raises(SourceError, match="lengths without times"):
        read_trace(shared_data / "traces" / "arxiv_summarization_lengths.csv")
