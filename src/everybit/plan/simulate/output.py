"""A simulation as files: records that `everybit bench` scores and draws like measured ones, and a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from everybit.errors import OutputError, SourceError
from everybit.plan.simulate.replica import Ran, Replica
from everybit.plan.simulate.requests import Outcome
from everybit.plan.simulate.run import Simulated

MOST_EVENTS = 100_000
_NS = 1_000_000_000


def write_records(path: Path, done: Simulated) -> None:
    """JSON lines, format everybit-bench-records 1. Raises: OutputError"""
    header = {"format": "everybit-bench-records", "version": 1, "simulated": True}
    lines = [header, *(_record(number, one) for number, one in enumerate(done.outcomes))]
    _write(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def write_chrome(path: Path, done: Simulated, most: int = MOST_EVENTS) -> None:
    """For chrome://tracing or Perfetto: steps and counters of each replica, transfers, and the life of each request.

    Where `most` events do not hold all steps, as many as needed become one; requests beyond the rest are left out.
    Raises: OutputError, SourceError
    """
    if most < 100:
        raise SourceError(f"{most} events: expected 100 or more")
    fixed = 3 * len(done.replicas) + len(done.transfers_s)
    steps = sum(len(one.ran) for one in done.replicas)
    room = max(most - fixed, 2) // 2
    together = max(1, -(-2 * steps // room))  # two events a step, of half the room
    events = [event for pid, one in enumerate(done.replicas, 1) for event in _steps(pid, one, together)]
    for id, begin_s, seconds in done.transfers_s[: max(0, most - len(events))]:
        events.append(_span("KV cache", 0, 0, begin_s, seconds, request=id))
    for outcome in done.outcomes[: max(0, most - len(events)) // 6]:
        events += _life(outcome)
    _write(path, json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; choose a place that can be written") from None


def _record(number: int, one: Outcome) -> dict[str, Any]:
    request, times = one.request, [round(at * _NS) for at in one.times_s]
    at = round(one.at_s * _NS)
    told = all(bits is not None for bits in one.bits)
    return {
        "number": number,
        "session": number if request.session is None else request.session,
        "turn": 0,
        "worker": 0,
        "intended_ns": at,
        "sent_ns": at,
        "end_ns": times[-1] if times else at,
        "status": 400 if one.refused else 200,
        "error": "refused" if one.refused else "",
        "detail": one.refused,
        "finish": "" if one.refused else "length",
        "times_ns": times,
        "tokens": [1] * len(times),
        "bits": one.bits if told else [],
        "source": "simulated",
        "wanted_prompt": request.prompt_tokens,
        "wanted_output": request.output_tokens,
        "usage_prompt": request.prompt_tokens,
        "usage_output": len(times),
        "usage_cached": one.cached_tokens,
    }


def _span(name: str, pid: int, tid: int, begin_s: float, seconds: float, **args: object) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": begin_s * 1e6, "dur": seconds * 1e6, "args": args}


def _steps(pid: int, replica: Replica, together: int) -> Iterator[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": replica.name}}
    for begin in range(0, len(replica.ran), together):
        steps = replica.ran[begin : begin + together]
        first, last = steps[0], steps[-1]
        prompt, decodes = sum(one.prompt_tokens for one in steps), sum(one.decodes for one in steps)
        seconds = last.begin_s + last.took_s - first.begin_s
        args = {"steps": len(steps), "prompt_tokens": prompt, "decodes": decodes, "bits": first.bits}
        yield _span(_kind(steps), pid, 0, first.begin_s, seconds, **args)
        counters = {"running": first.running, "waiting": first.waiting, "kv_percent": 100 * first.blocks_used}
        yield {"name": "load", "ph": "C", "pid": pid, "ts": first.begin_s * 1e6, "args": counters}


def _kind(steps: Sequence[Ran]) -> str:
    prompts, decodes = any(one.prompt_tokens for one in steps), any(one.decodes for one in steps)
    return "mixed" if prompts and decodes else "prompts" if prompts else "decode"


def _life(one: Outcome) -> Iterator[dict[str, Any]]:
    """Its queue, prompt and answer, one after another in a row of its own."""
    if not one.complete or one.begin_s is None:
        return
    marks = (one.at_s, one.begin_s, one.times_s[0], one.times_s[-1])
    for name, begin_s, end_s in zip(("queue", "prompt", "answer"), marks, marks[1:], strict=False):
        for phase, at_s in (("b", begin_s), ("e", end_s)):
            yield {"name": name, "cat": "request", "id": one.request.id, "ph": phase, "pid": 0, "ts": at_s * 1e6}
