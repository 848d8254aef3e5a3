"""Options of the load, and the workload that they make."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.cli.bench.options import PRESETS, positive
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.bench.load.arrivals import Arrivals
    from everybit.bench.load.texts import Texts
    from everybit.bench.load.workload import Prefixes, Source, Workload
    from everybit.bench.preflight import Known


def add_load(parser: argparse.ArgumentParser, rate: bool = True) -> None:
    """`rate`: whether the options say how much comes; some commands find that themselves."""
    group = parser.add_argument_group("load")
    if rate:
        group.add_argument("--users", type=int, metavar="N", help="closed loop: N users, each asks when answered")
        group.add_argument("--rate", metavar="R", help="open loop: R requests/s, or FROM-TO for a ramp")
        group.add_argument("--trace", type=Path, metavar="FILE", help="replay: Azure, BurstGPT, Mooncake, our records")
        group.add_argument(
            "--requests", type=int, metavar="N", help="end after N requests (with --rate --turns: N conversations)"
        )
        group.add_argument("--ramp", type=float, metavar="S", help="users start over so many seconds")
        group.add_argument("--speed", type=float, default=1, metavar="X", help="of a trace (default 1)")
        group.add_argument("--loop", type=int, default=1, metavar="N", help="a trace N times over")
        group.add_argument("--slice", default="", metavar="A:B", help="of a trace: requests 100:200 or time 60s:120s")
        group.add_argument("--scale-prompt", type=float, default=1, metavar="X", help="lengths of a trace")
        group.add_argument("--scale-output", type=float, default=1, metavar="X")
        group.add_argument("--most-prompt", type=int, metavar="N", help="cut longer prompts of a trace")
        group.add_argument("--most-output", type=int, metavar="N")
        group.add_argument("--turns", metavar="LENGTH", help="conversations of so many turns, with their history")
        group.add_argument("--think", metavar="SECONDS", help="pause between turns: 2, 1-5, exp:3")
    group.add_argument("--duration", type=float, metavar="S", help="how long requests are sent (default 30)")
    group.add_argument("--burstiness", metavar="X", help="arrivals: 1 is Poisson, below it bursts; or constant")
    group.add_argument("--prompt", metavar="LENGTH", help="tokens: 128, 64-256, lognormal:200,1, file:x.csv, ...")
    group.add_argument("--output-tokens", metavar="LENGTH", help="most tokens of an answer, in the same forms")
    group.add_argument("--text", type=Path, metavar="FILE", help="text to take prompts from (default: random words)")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of your own: lines, or JSON lines")
    group.add_argument(
        "--shuffle", action="store_true", default=None, help="of --prompts: in an order drawn from the seed"
    )
    group.add_argument("--prefixes", metavar="NxLENGTH", help="N shared beginnings, or own x LENGTH: ownx2000")
    group.add_argument("--seed", type=int, default=0, metavar="N")


def texts_of(args: argparse.Namespace, known: Known, seed: int) -> Texts:
    """Raises: SourceError"""
    from everybit.bench.load.texts import random_words, read_pool

    texts = read_pool(args.text, seed) if args.text else random_words(seed)
    return replace(texts, chars_per_token=known.chars_per_token or texts.chars_per_token)


def workload_of(
    args: argparse.Namespace,
    known: Known,
    *,
    rate: float | None = None,
    users: int | None = None,
    seed: int | None = None,
) -> Workload:
    """What the options ask for, with another rate, number of users or seed where one is given. Raises: SourceError"""
    from everybit.bench.load import workload
    from everybit.bench.load.arrivals import Users
    from everybit.bench.load.lengths import parse_length, parse_seconds
    from everybit.bench.load.traces import read_trace, select

    seed = args.seed if seed is None else seed
    given = {name: getattr(args, name, None) for name in ("users", "rate", "trace", "turns", "think", "requests")}
    if rate is not None or users is not None:
        given |= {"rate": None if rate is None else f"{rate!r}", "users": users}
    if (given["users"] is not None) + (given["rate"] is not None) + (given["trace"] is not None) > 1:
        raise SourceError("--users, --rate and --trace are three loads: give one")
    texts = texts_of(args, known, seed)
    if given["requests"] is not None and given["requests"] < 1:
        raise SourceError(f"--requests {given['requests']}: expected 1 or more")
    if given["trace"] is not None:
        says = ("prompt", "output_tokens", "prompts", "shuffle", "prefixes", "turns", "think", "duration", "ramp")
        if unused := [name for name in (*says, "burstiness") if getattr(args, name) is not None]:
            name = unused[0].replace("_", "-")
            raise SourceError(f"--{name} with --trace: the trace says it; cut the trace with --slice")
        trace = select(
            read_trace(args.trace),
            part=args.slice,
            speed=args.speed,
            loop=args.loop,
            scale_prompt=args.scale_prompt,
            scale_output=args.scale_output,
            **{name: getattr(args, name) for name in ("most_prompt", "most_output") if getattr(args, name) is not None},
        )
        if given["requests"] is not None:
            trace = replace(trace, requests=trace.requests[: given["requests"]])
        return workload.replay(trace, texts)
    _only_for_traces(args)
    source = _source(args, texts, seed)
    prefixes = _prefixes(args, texts)
    think = parse_seconds(given["think"]) if given["think"] is not None else workload.NO_PAUSE
    turns = parse_length(given["turns"]) if given["turns"] is not None else None
    duration = positive(args.duration, "--duration") if args.duration is not None else None
    if duration is None and given["requests"] is None:
        duration = 30.0
    if given["rate"] is None:
        if args.burstiness is not None:
            raise SourceError("--burstiness goes with a rate: users ask when they are answered")
        crowd = Users(given["users"] if given["users"] is not None else 4, getattr(args, "ramp", None) or 0)
        if given["turns"] is not None or _talks(source):
            if args.duration is not None or given["requests"] is not None:
                raise SourceError("conversations of --users end with their turns: leave --duration and --requests out")
            return workload.conversations(crowd, source, turns=turns, think=think, seed=seed, prefixes=prefixes)
        return workload.closed_loop(
            crowd, source, duration_s=duration, count=given["requests"], think=think, seed=seed, prefixes=prefixes
        )
    if getattr(args, "ramp", None) is not None:
        raise SourceError("--ramp goes with --users; with --rate give FROM-TO")
    starts = _arrivals(given["rate"], args.burstiness, duration, given["requests"], seed)
    if given["turns"] is not None or _talks(source):
        return workload.conversations(starts, source, turns=turns, think=think, seed=seed, prefixes=prefixes)
    if given["think"] is not None:
        raise SourceError("--think goes with --users or --turns: in an open loop of single requests nobody waits")
    return workload.open_loop(starts, source, seed=seed, prefixes=prefixes)


def _only_for_traces(args: argparse.Namespace) -> None:
    plain = {"speed": 1, "loop": 1, "slice": "", "scale_prompt": 1, "scale_output": 1, "most_prompt": None,
             "most_output": None}  # fmt: skip
    for name, value in plain.items():
        if getattr(args, name, value) != value:
            raise SourceError(f"--{name.replace('_', '-')} goes with --trace")


def _talks(source: Source) -> bool:
    from everybit.bench.load.workload import Written

    return isinstance(source, Written) and any(len(one.texts) > 1 for one in source.prompts)


def _arrivals(rate: str, burstiness: str | None, duration: float | None, count: int | None, seed: int) -> Arrivals:
    from everybit.bench.load.arrivals import CONSTANT, Arrivals, Stage

    # A minus after an e is the exponent's, every other one stands between two rates.
    ends = re.split(r"(?<=[\d.])-", rate)
    try:
        first, last = float(ends[0]), float(ends[-1])
        if len(ends) > 2:
            raise ValueError
    except ValueError:
        raise SourceError(f"--rate {rate}: expected requests/s such as 2.5, or 1-10 for a ramp") from None
    try:
        shape = CONSTANT if burstiness == "constant" else positive(float(burstiness or 1), "--burstiness")
    except ValueError:
        raise SourceError(f"--burstiness {burstiness}: expected a number, or constant") from None
    seconds = float("inf") if duration is None else duration
    return Arrivals((Stage(first, last, seconds),), shape, count, seed)


def _source(args: argparse.Namespace, texts: Texts, seed: int) -> Source:
    from everybit.bench.load.lengths import parse_length, parse_lengths
    from everybit.bench.load.texts import read_prompts
    from everybit.bench.load.workload import Drawn, Written

    preset = PRESETS[args.preset]
    output = str(preset["output"]) if args.output_tokens is None else args.output_tokens
    if args.prompts is not None:
        if args.prompt is not None or args.text:
            raise SourceError("--prompt and --text make prompts; with --prompts give neither")
        prompts = read_prompts(args.prompts, seed if args.shuffle else None)
        return Written(prompts, parse_length(output, "output"))
    if args.shuffle:
        raise SourceError("--shuffle goes with --prompts")
    prompt = str(preset["prompt"]) if args.prompt is None else args.prompt
    return Drawn(texts, parse_lengths(prompt, output))


def _prefixes(args: argparse.Namespace, texts: Texts) -> Prefixes | None:
    from everybit.bench.load.lengths import parse_length
    from everybit.bench.load.workload import Prefixes

    text = args.prefixes if args.prefixes is not None else PRESETS[args.preset].get("prefixes")
    if text is None:
        return None
    count, mark, length = text.partition("x")
    if not mark or not (count == "own" or count.isdecimal()):
        raise SourceError(f"--prefixes {text}: expected a count and a length, 4x500, or ownx2000")
    return Prefixes(texts, parse_length(length), None if count == "own" else int(count))
