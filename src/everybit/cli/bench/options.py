"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.bench.energy import Meter, Power
    from everybit.bench.http import Limits
    from everybit.bench.measuring import Settings
    from everybit.bench.preflight import Known
    from everybit.bench.targets import Targets


def add_endpoint(parser: argparse.ArgumentParser, url: bool = True) -> None:
    if url:
        parser.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    group = parser.add_argument_group("endpoint")
    group.add_argument("--model", default="", metavar="NAME", help="default: the first that the server names")
    group.add_argument(
        "--api",
        choices=("completions", "chat", "responses"),
        help="default: as the URL ends, or chat, or completions where chat is refused",
    )
    group.add_argument("--key-env", metavar="NAME", help="environment variable that holds the API key")
    group.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="may be repeated")
    group.add_argument("--ca", type=Path, metavar="FILE", help="certificates to trust, PEM")
    group.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    group.add_argument("--body", default="{}", metavar="JSON", help="fields to add to each request")
    group.add_argument("--ignore-eos", action="store_true", help="ask for answers of exactly the length wanted")
    group.add_argument(
        "--token-field", choices=("max_tokens", "max_completion_tokens"), help="of chat (default max_tokens)"
    )
    group.add_argument("--no-stream", action="store_true", help="ask for whole answers: only their ends can be timed")
    group.add_argument("--no-usage", action="store_true", help="do not ask for usage in the stream")
    group.add_argument("--timeout-s", type=float, default=120, metavar="S", help="for anything to arrive (default 120)")
    group.add_argument("--longest-s", type=float, default=600, metavar="S", help="for an answer (default 600)")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--slo", metavar="TEXT", help="such as ttft=200ms,tpot=50ms,e2e=5s,fluidity=0.9,share=0.99")
    group.add_argument(
        "--deadlines", metavar="FIRST,GAP", help="of the fluidity index, such as 500ms,100ms (default: the SLO's)"
    )
    group.add_argument("--ideal", type=Path, metavar="FILE", help="what everybit bench fit wrote: measured over ideal")
    group.add_argument("--slack-ms", type=float, metavar="MS", help="first token due at the ideal's time plus this")
    group.add_argument(
        "--stall-ms", type=float, default=250, metavar="MS", help="a longer gap is a stall (default 250)"
    )
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json: count tokens here")
    group.add_argument("--warmup", type=float, default=0, metavar="S", help="requests sent before are not scored")
    group.add_argument("--drain", type=float, default=60, metavar="S", help="single requests, at the end (default 60)")
    group.add_argument("--workers", type=int, metavar="N", help="processes that send (default: by the load)")
    group.add_argument("--no-reuse", action="store_true", help="a new connection for each request")
    group.add_argument("--idle", type=float, default=5, metavar="S", help="measure power at rest before (default 5)")
    group.add_argument("--carbon", metavar="G/KWH", help="grams of CO2e per kWh: 400, 400+-50 or 350-450")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: bench-DATE-TIME, here")
    group.add_argument("--json", action="store_true", help="print the result document, write nothing")
    group.add_argument("--quiet", action="store_true", help="no progress")


# What a preset says where the options do not.
_TALK = {"prompt": "lognormal:200,1:max=4000", "output": "lognormal:150,0.7:max=1000"}
_EVEN = {"prompt": "lognormal:260,0.6:max=1024", "output": "lognormal:260,0.4:max=1024"}
_BULK = {"prompt": "lognormal:500,0.6:max=4000", "output": "lognormal:200,0.5:max=1000"}
PRESETS: dict[str, dict[str, str | None]] = {
    # A chat that feels immediate.
    "chat": {"slo": "ttft=200ms,tpot=50ms", "gap": "50ms", **_TALK},
    # Somebody who reads along: ten tokens a second are faster than most people read.
    "reader": {"slo": "ttft=1s,fluidity=0.9", "gap": "100ms", **_TALK},
    # MLPerf Inference 5.0, Llama 2 70B interactive: p99 of the first token 450 ms, 40 ms a token.
    "mlperf-interactive": {"slo": "ttft=450ms,tpot=40ms,share=0.99", "gap": "40ms", **_EVEN},
    # A document and a question: long prefix, short answer.
    "rag": {"slo": "ttft=1s,tpot=100ms", "gap": "100ms", "prompt": "16-64", "output": "32-128", "prefixes": "20x2000"},
    # Nobody waits: throughput only.
    "batch": {"slo": None, "gap": "100ms", **_BULK},
}


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="chat", help="lengths, SLO and deadlines (default chat)"
    )


def known_of(args: argparse.Namespace, url: str | None = None, model: str | None = None) -> Known:
    """A look at the endpoint that the options name. Raises: SourceError"""
    from everybit.bench.asks import Asking
    from everybit.bench.endpoint import parse_url
    from everybit.bench.load.texts import random_words, read_pool
    from everybit.bench.preflight import look

    endpoint, api = parse_url(url or args.url)
    if args.api and api and args.api != api:
        raise SourceError(f"--api {args.api}, and the address ends as {api} does: give one of them")
    if not endpoint.tls and (args.ca or args.insecure):
        raise SourceError(f"{endpoint.url}: --ca and --insecure go with https")
    endpoint = replace(
        endpoint, key=_key(args.key_env), headers=_headers(args.header), ca_file=args.ca, insecure=args.insecure
    )
    found = args.api or api or "chat"
    if args.token_field and found != "chat":
        raise SourceError(f"--token-field goes with chat, not with {found}")
    extra = _body(args.body)
    if args.ignore_eos:
        extra["ignore_eos"] = True
    asking = Asking(
        found,
        args.model if model is None else model,
        stream=not args.no_stream,
        usage=not args.no_usage,
        token_field=args.token_field or "max_tokens",
        extra=extra,
    )
    texts = read_pool(args.text) if getattr(args, "text", None) else random_words()
    otherwise = None if args.api or api else "completions"
    return look(endpoint, asking, limits_of(args), partial(texts.text, "calibration"), otherwise)


def limits_of(args: argparse.Namespace) -> Limits:
    from everybit.bench.http import Limits

    return Limits(positive(args.timeout_s, "--timeout-s"), positive(args.longest_s, "--longest-s"))


def settings_of(args: argparse.Namespace, known: Known) -> Settings:
    """Raises: SourceError"""
    from everybit.bench.energy import find_meter, parse_intensity
    from everybit.bench.measuring import Settings
    from everybit.bench.tokens import load_tokenizer

    if args.carbon is not None:
        parse_intensity(args.carbon)
    check_workers(args.workers)
    positive(args.idle, "--idle", zero=True)
    targets = targets_of(args)
    meter = find_meter()
    idle = _idle(meter, args.idle, args.quiet) if known.endpoint.local and meter.sources else None
    return Settings(
        known,
        targets,
        limits=limits_of(args),
        workers=args.workers,
        reuse=not args.no_reuse,
        warmup_ns=_ns(positive(args.warmup, "--warmup", zero=True)),
        drain_ns=_ns(positive(args.drain, "--drain", zero=True)),
        tokenize=load_tokenizer(args.tokenizer) if args.tokenizer else None,
        meter=meter,
        idle=idle,
        intensity=args.carbon,
        quiet=args.quiet,
        command=command_line(),
    )


def check_workers(workers: int | None) -> None:
    """Raises: SourceError"""
    if workers is not None and not 1 <= workers <= 256:
        raise SourceError(f"--workers {workers}: expected 1 to 256")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def command_line() -> list[str]:
    """As it was given: keys come by the environment, so none is in it; headers and bodies may hold one."""
    shown, before = [Path(sys.argv[0]).name], ""
    for one in sys.argv[1:]:
        option, mark, value = one.partition("=") if one.startswith("--") else (before, "", one)
        if option == "--header":
            one = option * bool(mark) + mark + value.partition(":")[0] + ": ..." if value else one
        elif option == "--body" and re.search(r"key|token|secret|password|auth", value, re.IGNORECASE):
            one = option * bool(mark) + mark + "..."
        before = option if option == one else ""
        shown.append(one)
    return shown


def targets_of(args: argparse.Namespace) -> Targets:
    """Raises: SourceError"""
    from everybit.bench.fluidity import Deadlines
    from everybit.bench.ideal import read_ideal
    from everybit.bench.targets import Targets, parse_slo, parse_time

    preset = PRESETS[args.preset]
    text = args.slo if args.slo is not None else preset["slo"]
    slo = None if text is None else parse_slo(text)
    if args.deadlines is not None:
        first, mark, gap = args.deadlines.partition(",")
        if not mark:
            raise SourceError(f"--deadlines {args.deadlines}: expected FIRST,GAP such as 500ms,100ms")
        deadlines = Deadlines(parse_time("--deadlines", first), parse_time("--deadlines", gap))
    else:
        gap_ns = (slo.gap_ns if slo else None) or parse_time("gap", str(preset["gap"]))
        deadlines = Deadlines((slo.first_ns if slo else None) or 1_000_000_000, gap_ns)
    return Targets(
        deadlines,
        slo,
        ideal=read_ideal(args.ideal) if args.ideal else None,
        slack_ns=None if args.slack_ms is None else round(positive(args.slack_ms, "--slack-ms", zero=True) * 1e6),
        stall_ns=round(positive(args.stall_ms, "--stall-ms") * 1e6),
    )


def _idle(meter: Meter, seconds: float, quiet: bool) -> Power | None:
    from everybit.bench.energy import idle_power

    if seconds <= 0:
        return None
    if not quiet:
        print(f"bench: power at rest, {seconds:g} s (--idle 0: leave it out)", file=sys.stderr)
    readings = []
    for _ in range(5):
        if (reading := meter.read()) is not None:
            readings.append(reading)
        time.sleep(seconds / 4)
    return idle_power(readings)


def positive(value: float, name: str, zero: bool = False) -> float:
    """Raises: SourceError"""
    if not (value > 0 or (zero and value == 0)) or not math.isfinite(value) or value > 1e9:
        raise SourceError(f"{name} {value:g}: expected {'0 or more' if zero else 'more than 0'}, at most 1e9")
    return value


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise SourceError(f"--key-env {name}: the variable is not set or empty")
    if not all(0x20 < ord(c) < 0x7F for c in key):
        raise SourceError(f"--key-env {name}: a key has letters, digits and signs only")
    return key


def _headers(given: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for one in given:
        name, mark, value = one.partition(":")
        name, value = name.strip(), value.strip()
        plain = all(0x20 <= ord(c) < 0x7F for c in value) and all(0x20 < ord(c) < 0x7F for c in name)
        if not mark or not name or not plain:
            raise SourceError(f"--header {name}: expected NAME: VALUE on one line")
        if name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
            raise SourceError(f"--header {name}: the bench sets it itself")
        found.append((name, value))
    return tuple(found)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # Python reads NaN and Infinity, which JSON does not have


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise SourceError(f'--body {text[:60]}: expected a JSON object such as {{"temperature": 0}}')
    return body
