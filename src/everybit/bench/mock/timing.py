"""Which bytes of an answer are written when."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from everybit.bench.mock.forms import FAILURE, Form
from everybit.bench.mock.refusals import head, whole
from everybit.bench.mock.script import Script
from everybit.bench.records import MS

# ns after the request's begin, what is written then, how many tokens that completes. No more writes: the answer's end.
Write = tuple[int, bytes, int]
_LAST_CHUNK = b"0\r\n\r\n"
_SPLIT_NS = MS
_NEVER_NS = 1 << 62


def beats(script: Script, number: int, prompt_tokens: int) -> Iterator[int]:
    """When each token of request `number` is due, for ever: ns after its begin, never falling."""
    at = round((script.ttft_ms + script.prefill_ms_per_token * prompt_tokens) * MS)
    gap, jitter = round(script.gap_ms * MS), round(script.jitter_ms * MS)
    stall = round(script.stall_ms * MS) if number % script.stall_every == 0 else 0
    random = Random(script.seed * 1_000_003 + number)
    last = token = 0
    while True:
        if token == script.stall_at_token:
            at += stall
        last = max(last, at + (random.randint(0, jitter) if jitter else 0))
        yield last
        at += gap
        token += 1


def stream(script: Script, form: Form, times: Iterator[int], headers: dict[str, str]) -> Iterator[Write]:
    """An event stream in chunks of HTTP/1.1. Cut, it ends without the last chunk."""
    events = _events(script, form, times)
    if script.pings:
        events = _pinged(events, form.comment())
    if script.events_per_write > 1:
        events = _joined(events, script.events_per_write)
    if script.split_frames:
        events = _split(events)
    headers = {"content-type": "text/event-stream", "cache-control": "no-store", **headers}
    before, at = head(200, {**headers, "transfer-encoding": "chunked"}), 0
    if script.head_ms is not None:
        opening = form.opening()
        yield round(script.head_ms * MS), before + (_chunk(opening) if opening else b""), 0
        before = b""
    for at, data, tokens in events:
        yield at, before + _chunk(data), tokens
        before = b""
    if script.end != "cut":
        yield at, _LAST_CHUNK, 0


def piece(script: Script, form: Form, times: Iterator[int], headers: dict[str, str]) -> Iterator[Write]:
    """The whole answer when its last token is due. Never: no answer; cut: half of it; garbage: its end is missing."""
    tokens = form.ask.tokens
    at = [next(times) for _ in range(max(tokens, 1))][-1]
    if script.end == "never":
        at = _NEVER_NS
    if script.end == "error":
        yield at, whole(FAILURE.status, FAILURE.document(), headers), 0
        return
    data = whole(200, form.whole(), headers)
    if script.end == "cut":
        yield at, data[: len(data) * 3 // 4], 0
    else:
        yield at, data[:-8] + b" " * 8 if script.end == "garbage" else data, tokens


def _events(script: Script, form: Form, times: Iterator[int]) -> Iterator[Write]:
    floor = round((script.head_ms or 0) * MS)
    before = form.opening() if script.head_ms is None else b""
    most = form.ask.tokens
    if script.end in ("cut", "error"):
        most = min(most, script.end_at)
    garbage, sent, at = script.end == "garbage", 0, 0
    while sent < most or script.end == "never":
        count = script.bundle_first if sent == 0 and script.bundle_first else script.tokens_per_chunk
        if script.end != "never":
            count = min(count, most - sent)
        for _ in range(count):
            at = next(times)
        at = max(at, floor)
        if garbage and sent >= script.end_at:
            before, garbage = before + form.garbage(), False
        yield at, before + form.delta(sent, count), count
        before, sent = b"", sent + count
    if not sent:
        at = max(next(times), floor)
    if garbage:
        before += form.garbage()
    if script.end == "error":
        yield at, before + form.failure(), 0
    elif script.end != "cut":
        yield at, before + form.closing(), 0


def _pinged(events: Iterator[Write], comment: bytes) -> Iterator[Write]:
    last = 0
    for at, data, tokens in events:
        if tokens:
            yield (last + at) // 2, comment, 0
        yield at, data, tokens
        last = at


def _joined(events: Iterator[Write], most: int) -> Iterator[Write]:
    at, held, tokens = 0, list[bytes](), 0
    for at, data, count in events:
        held.append(data)
        tokens += count
        if len(held) == most:
            yield at, b"".join(held), tokens
            held, tokens = [], 0
    if held:
        yield at, b"".join(held), tokens


def _split(events: Iterator[Write]) -> Iterator[Write]:
    """Tokens are there with the second half, which is on time."""
    last = 0
    for at, data, tokens in events:
        cut = data.rfind(b"\xc3") + 1 or len(data) // 2
        yield max(last, at - _SPLIT_NS), data[:cut], 0
        yield at, data[cut:], tokens
        last = at


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
