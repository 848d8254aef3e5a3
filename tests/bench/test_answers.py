"""From the bytes of an answer to its record: event streams, the three interfaces, token counts. No network."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from everybit.bench.answers import read_answer
from everybit.bench.http import Exchange
from everybit.bench.records import Record
from everybit.bench.sse import events
from everybit.bench.tokens import attribute, load_tokenizer
from everybit.errors import SourceError

BEGIN = 1_000_000
DEEP = b"[" * 100_000


def parsed(*pieces: bytes) -> list[tuple[int, str, bytes]]:
    """Events of pieces that came at 0, 1, 2, ..."""
    return list(events(enumerate(pieces)))


def read(
    pieces: Sequence[bytes], api: str = "chat", kind: str = "text/event-stream", tokenize: Any = None, **exchange: Any
) -> Record:
    """Piece k comes at 10 (k + 1) ns of the run, the end 5 ns after the last."""
    timed = [(BEGIN + 10 * (k + 1), data) for k, data in enumerate(pieces)]
    given = {"status": 200, "headers": {"content-type": kind}, "end_ns": BEGIN + 10 * len(pieces) + 5, **exchange}
    record = Record(0, 0, 0, 0, 0)
    read_answer(record, Exchange(BEGIN, pieces=timed, **given), api, tokenize, BEGIN)
    json.dumps(record.text), record.detail.encode()
    return record


def event(document: Any, name: str = "") -> bytes:
    data = document if isinstance(document, bytes) else json.dumps(document, ensure_ascii=False).encode()
    return (f"event: {name}\n" if name else "").encode() + b"data: " + data + b"\n\n"


def said(text: Any, **more: Any) -> bytes:
    return event({"choices": [{"delta": {"content": text}}], **more})


def finish(reason: str = "stop", **more: Any) -> bytes:
    return event({"choices": [{"delta": {}, "finish_reason": reason}], **more})


def usage(output: Any, prompt: Any = 7) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})


DONE = event(b"[DONE]")


# ---- event streams


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_lines_may_end_in_three_ways(end: bytes) -> None:
    body = b"event: a" + end + b"data: 1" + end + b"data: 2" + end * 2 + b"data:3" + end * 2
    assert [found[1:] for found in parsed(body)] == [("a", b"1\n2"), ("", b"3")]


@pytest.mark.parametrize("blank", [b"\n\r\n", b"\r\n\n", b"\r\r\n", b"\n\r"])
def test_line_ends_may_be_mixed(blank: bytes) -> None:
    assert [data for _, _, data in parsed(b"data: 1" + blank + b"data: 2\n\n")] == [b"1", b"2"]


def test_a_line_end_may_be_cut_in_two() -> None:
    assert parsed(b"data: 1\r", b"\ndata: 2\r\n\r", b"\ndata: 3\r\n\r\n") == [(1, "", b"1\n2"), (2, "", b"3")]


def test_an_event_is_there_with_its_last_byte() -> None:
    assert parsed(b"da", b"ta: 1\n", b"\ndata: 2\n\ndata: 3", b"\n\n") == [(2, "", b"1"), (2, "", b"2"), (3, "", b"3")]


def test_a_last_blank_line_may_be_missing() -> None:
    assert parsed(b"data: 1\n\n", b"data: 2\n") == [(0, "", b"1"), (1, "", b"2")]
    assert parsed(b"data: 1") == [(0, "", b"1")]


def test_marks_comments_and_other_fields_are_no_data() -> None:
    assert parsed(b"\xef", b"\xbb\xbfdata: 1\n\n") == [(1, "", b"1")]
    assert parsed(b": ping\n\nid: 7\nretry: 10\n\ndata:\n\ndata: \n\nevent: only\n\ndata\n\n") == []
    assert parsed(b": ping\ndata: 1\n\n") == [(0, "", b"1")]


def test_what_is_no_event_stream_is_given_to_be_refused() -> None:
    assert parsed(b"<html>\n\n") == [(0, "", b"<html>")]


def test_a_body_without_end_is_read_in_time_that_grows_with_its_length() -> None:
    pieces = [b"data: x\n" * 8] * 40_000  # one event of 2.5 MB; searched anew with each piece it took minutes
    begin = time.perf_counter()
    assert len(parsed(*pieces)) == 1
    assert time.perf_counter() - begin < 10


# ---- chat and completions


def test_a_chat_is_read() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    record = read([role, said("one"), said(" two") + said(" three"), finish() + usage(3) + DONE])
    assert (record.error, record.text, record.finish, record.malformed) == ("", "one two three", "stop", 0)
    assert (record.times_ns, record.tokens, record.source) == ([20, 30, 30], [1, 1, 1], "usage")
    assert (record.usage_prompt, record.usage_output, record.counted) == (7, 3, None)
    assert (record.sent_ns, record.end_ns) == (0, 45)


def test_a_completion_is_read() -> None:
    chunks = [event({"choices": [{"text": text, "finish_reason": None}]}) for text in ("a", "", "b")]
    record = read([*chunks, event({"choices": [{"text": "", "finish_reason": "length"}]}), DONE], "completions")
    assert (record.error, record.text, record.finish) == ("", "ab", "length")
    assert (record.times_ns, record.tokens, record.source) == ([10, 30], [1, 1], "pieces")


def test_reasoning_and_tool_calls_are_output() -> None:
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "hm"},
        {"reasoning": "so"},
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"function": {"arguments": '{"a"'}}, {"function": {"name": None, "arguments": ":1}"}}]},
    ]
    record = read([*(event({"choices": [{"delta": delta}]}) for delta in deltas), finish("tool_calls"), DONE])
    assert (record.error, record.tokens, record.text) == ("", [1, 1, 1, 1], 'hmsof{"a":1}')


@pytest.mark.parametrize("given", [None, [], "many", 5, {"completion_tokens": None}, {"completion_tokens": "2"}])
def test_usage_that_says_nothing_loses_no_text(given: Any) -> None:
    record = read([said("a", usage=given), said("b", usage=given), finish(usage=given) + DONE])
    assert (record.error, record.text, record.malformed) == ("", "ab", 0)
    assert (record.source, record.usage_output, record.counted) == ("pieces", None, None)


@pytest.mark.parametrize("value", [-1, True, 1.5, 1 << 60, "3"])
def test_usage_that_is_no_count_is_none(value: Any) -> None:
    record = read([said("a"), finish() + usage(value, value) + DONE])
    assert (record.error, record.usage_output, record.usage_prompt) == ("", None, None)


def test_a_huge_usage_makes_no_tokens() -> None:
    record = read([said("a"), said("b"), finish() + usage(10**12) + DONE])
    assert (record.tokens, record.source, record.counted, record.usage_output) == ([1, 1], "pieces", 2, 10**12)


def test_usage_in_every_chunk_counts_once() -> None:
    chunks = [said(text, usage={"completion_tokens": k + 1, "prompt_tokens": 7}) for k, text in enumerate("abc")]
    record = read([*chunks, finish(), DONE])
    assert (record.tokens, record.source, record.usage_output) == ([1, 1, 1], "usage", 3)


def test_cached_tokens() -> None:
    given = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read([said("a"), finish(usage=given), DONE]).usage_cached == 4
    assert read([said("a"), finish(usage={**given, "prompt_tokens_details": [4]}), DONE]).usage_cached is None


def test_several_tokens_in_a_chunk_are_spread_and_the_difference_is_told() -> None:
    record = read([said("aaaa"), said("bb"), finish() + usage(6) + DONE])
    assert (record.tokens, record.source, record.counted) == ([4, 2], "spread", 2)


def test_bits_count_tokens_and_silent_ones_too() -> None:
    record = read([said("ab", bits=[8, 4]), said("", bits=[4]), said("c", bits=["fp16"]), finish() + usage(4), DONE])
    assert (record.bits, record.tokens, record.source, record.counted) == (
        [8, 4, 4, "fp16"],
        [2, 1, 1],
        "server",
        None,
    )
    assert record.times_ns == [10, 20, 30]


def test_log_probabilities_count_tokens() -> None:
    chat = event({"choices": [{"delta": {"content": "ab"}, "logprobs": {"content": [{}, {}]}}]})
    assert read([chat, finish(), DONE]).tokens == [2]
    text = event({"choices": [{"text": "abc", "logprobs": {"tokens": ["a", "b", "c"]}}]})
    record = read([text, DONE], "completions")
    assert (record.tokens, record.source) == ([3], "server")
    wrong = event({"choices": [{"text": "abc", "logprobs": {"tokens": 3}}]})
    assert read([wrong, DONE], "completions").source == "pieces"


# ---- responses


def response(kind: str, **more: Any) -> bytes:
    return event({"type": kind, **more}, kind)


DELTAS = [response("response.output_text.delta", delta=text) for text in ("a", "b")]


def test_a_response_is_read() -> None:
    end = {"status": "completed", "usage": {"input_tokens": 5, "output_tokens": 2}}
    record = read([response("response.created", response={}), *DELTAS, response("response.completed", response=end)],
                  "responses")  # fmt: skip
    assert (record.error, record.text, record.finish, record.times_ns) == ("", "ab", "stop", [20, 30])
    assert (record.usage_prompt, record.usage_output, record.source) == (5, 2, "usage")


def test_a_response_may_be_incomplete_or_fail() -> None:
    record = read([*DELTAS, response("response.incomplete", response={"usage": None})], "responses")
    assert (record.error, record.finish) == ("", "length")
    failed = response("response.failed", response={"error": {"message": "out of memory"}})
    record = read([*DELTAS, failed], "responses")
    assert (record.error, record.detail, record.tokens) == ("frame", "out of memory", [1, 1])
    assert read([*DELTAS, response("error", message="gone")], "responses").detail == "gone"
    assert read(DELTAS, "responses").error == "cut"


# ---- whole answers


@pytest.mark.parametrize(
    ("api", "document"),
    [
        ("chat", {"choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}]}),
        ("completions", {"choices": [{"text": "a b", "finish_reason": "stop"}]}),
        ("responses", {"status": "completed", "output": [{"type": "reasoning"}, {"content": [{"text": "a b"}]}]}),
    ],
)
def test_an_answer_may_come_whole(api: str, document: dict[str, Any]) -> None:
    names = ("input_tokens", "output_tokens") if api == "responses" else ("prompt_tokens", "completion_tokens")
    body = json.dumps({**document, "usage": dict(zip(names, (7, 3), strict=True))}).encode()
    record = read([body[:9], body[9:]], api, "application/json")
    assert (record.error, record.streamed, record.text, record.finish) == ("", False, "a b", "stop")
    assert (record.times_ns, record.tokens, record.source) == ([20], [3], "usage")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"5",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": []}',
        DEEP,
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"message": {"content": [{"text": "a"}]}}]}',
    ],
)
def test_a_whole_answer_that_cannot_be_read(body: bytes) -> None:
    record = read([body], kind="application/json")
    assert (record.error, record.malformed, record.tokens) == ("malformed", 1, [])


def test_a_whole_answer_may_be_empty_or_an_error() -> None:
    empty = b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}], "usage": {"completion_tokens": 0}}'
    assert read([empty], kind="application/json").error == "empty"
    assert read([b'{"error": {"message": "no"}}'], kind="application/json").error == "frame"


# ---- faults


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe", b"5", b'"a"', b"[]", b"null", b"NaN", DEEP, b'{"choices": 5}',
                                 b'{"choices": [{"delta": {"content": 5}}]}', b'{"choices": [5]}',
                                 b'{"choices": [{"text": 5}]}'])  # fmt: skip
def test_events_that_cannot_be_read_are_counted(bad: bytes) -> None:
    record = read([said("a"), event(bad), said("b"), finish() + DONE])
    assert (record.error, record.malformed, record.text) == ("", 1, "ab")
    assert read([event(bad), DONE]).error == "malformed"
    assert read([said("a"), event(bad)]).error == "malformed"


@pytest.mark.parametrize(
    "frame",
    [
        event({"error": {"message": "out of\nmemory", "code": 500}}),
        event({"error": "out of memory"}),
        event({"message": "out of memory"}, "error"),
        event({"type": "error", "message": "out of memory"}),
    ],
)
def test_an_error_in_the_stream(frame: bytes) -> None:
    record = read([said("a"), frame, DONE])
    assert (record.error, record.detail, record.tokens) == ("frame", "out of memory", [1])


def test_a_quoted_error_moves_no_cursor_and_can_be_written() -> None:
    assert read([event(rb'{"error": "a\u001b[2Jb\ud800"}')]).detail == "a?[2Jb?"
    refused = read([b"\x1b[31mno\x00"], status=400)
    assert (refused.error, refused.detail) == ("refused", "400: ?[31mno?")


def test_the_end_may_be_said_in_two_ways_or_not_at_all() -> None:
    assert read([said("a"), DONE]).error == ""
    assert read([said("a"), finish()]).error == ""
    assert read([said("a"), said("b")]).error == "cut"


def test_an_answer_without_a_token_is_an_error() -> None:
    for pieces in ([finish(), DONE], [DONE], [finish() + usage(5) + DONE]):
        assert read(pieces).error == "empty"
        assert read(pieces, error="cut").error == "empty"
    assert read([b": ping\n\n"] * 2).error == "empty"
    assert read([]).error == "empty"


@pytest.mark.parametrize("error", ["cut", "timeout", "endless"])
def test_a_connection_that_was_not_let_go_of_adds_no_time(error: str) -> None:
    record = read([said("a"), finish()], error=error, detail="late", end_ns=BEGIN + 10**12)
    assert (record.error, record.detail, record.end_ns) == ("", "", 20)
    record = read([said("a")], error=error, detail="late", end_ns=BEGIN + 10**12)
    assert (record.error, record.detail, record.end_ns, record.tokens) == (error, "late", 10**12, [1])


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"{}", "key"),
        (403, b"", "key"),
        (404, b"[]", "missing"),
        (400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}', "context"),
        (400, b'{"error": "the maximum Context is 10"}', "context"),
        (422, DEEP, "refused"),
        (429, b'{"error": {"message": null}}', "busy"),
        (500, b"\xff", "server"),
        (503, b"", "unavailable"),
        (302, b"", "redirect"),
        (204, b"", "empty"),
    ],
)
def test_what_a_status_means(status: int, body: bytes, kind: str) -> None:
    record = read([body], status=status)
    assert (record.error, record.status, record.tokens) == (kind, status, [])
    assert record.detail.startswith(f"{status}:")


@pytest.mark.parametrize(("value", "wanted"), [("2", 2.0), ("0.5", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_retry_after(value: str, wanted: float | None) -> None:
    assert read([b""], status=429, headers={"retry-after": value}).retry_after_s == wanted
    assert read([b""], status=503, headers={}).retry_after_s is None


# ---- any bytes, any cuts

STREAM = (
    b"\xef\xbb\xbf: ping\r\n\r\n"
    + said("").replace(b"\n", b"\r\n")
    + said("t\u00f6k \U0001f600")
    + event({"choices": [{"text": "ab"}]}).replace(b"\n", b"\r")
    + said(" x", bits=[4, 8])
    + event(b"{")
    + finish()
    + usage(4)
    + DONE
)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
@example(list(range(len(STREAM))))
def test_the_way_a_stream_is_cut_changes_nothing_but_times(places: list[int]) -> None:
    whole, record = read([STREAM]), read(cut(STREAM, places))
    assert whole.text == "t\u00f6k \U0001f600ab x"
    for name in ("text", "tokens", "bits", "source", "counted", "usage_output", "finish", "malformed", "error"):
        assert getattr(record, name) == getattr(whole, name), name
    assert record.times_ns == sorted(record.times_ns)


WORDS = [b"data:", b"data: ", b"event: error", b"\n", b"\r\n", b"\n\n", b'{"choices":[{"delta":{"content":"a"}}]}']
WORDS += [b"[DONE]", b'{"error":', b'{"type":"response.output_text.delta","delta":[1]}', b"null", b'{"usage":[1]}']
WORDS += [b'{"choices":[{"text":{}}]}', b'{"type":"response.completed","response":{"usage":1}}', b'{"type":7}']


@given(
    st.lists(st.one_of(st.sampled_from(WORDS), st.binary(max_size=20)), max_size=12),
    st.sampled_from(["chat", "completions", "responses"]),
    st.sampled_from(["text/event-stream", "application/json"]),
    st.sampled_from([200, 200, 400, 500]),
)
def test_no_bytes_break_the_reader(pieces: list[bytes], api: str, kind: str, status: int) -> None:
    record = read(pieces, api, kind, status=status)
    assert len(record.times_ns) == len(record.tokens)
    assert record.error or record.output_tokens  # never complete without a token


# ---- counting tokens


def test_a_text_that_the_model_ended_may_have_one_silent_token() -> None:
    assert attribute(["a", "b"], [None, None], 3, None, "stop") == ([1, 1], "usage", None)
    assert attribute(["a", "b"], [None, None], 3, None, "length") == ([2, 1], "spread", 2)


def test_counts_of_some_pieces_only_are_not_believed() -> None:
    assert attribute(["ab", "c"], [2, None], None, None) == ([1, 1], "pieces", None)


def test_a_tokenizer_gives_each_token_to_the_piece_of_its_last_character() -> None:
    assert attribute(["ab", "c", "de"], [None] * 3, 3, lambda text: [1, 3, 5]) == ([1, 1, 1], "tokenizer", None)
    assert attribute(["ab", "c"], [None] * 2, 5, lambda text: [1, 3]) == ([1, 1], "tokenizer", 2)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8), st.integers(0, 10**20))
def test_tokens_add_up_to_a_total_that_somebody_gave(texts: list[str], total: int) -> None:
    tokens, source, counted = attribute(texts, [None] * len(texts), total, None)
    assert min(tokens) >= 0
    assert sum(tokens) == (total if source in ("usage", "spread") else len(texts))
    assert (counted is None) == (source == "usage")


def test_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "?": 2}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    made.save(str(tmp_path / "tokenizer.json"))
    tokenize = load_tokenizer(tmp_path)
    assert tokenize("aba") == [1, 2, 3]
    half = read([event(rb'{"choices": [{"delta": {"content": "a\ud800"}}]}'), DONE], tokenize=tokenize)
    assert (half.error, half.tokens, half.source) == ("", [2], "tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
