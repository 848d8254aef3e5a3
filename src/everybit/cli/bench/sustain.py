"""`everybit bench sustain URL 10m`: does the speed last?"""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime

from everybit.cli.bench.load import add_load, workload_of
from everybit.cli.bench.options import add_endpoint, add_measuring, add_output, add_preset, known_of, settings_of
from everybit.errors import SourceError

_SLICES = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sustain",
        help="does the speed last?",
        description="One long run in slices, and the trend of its throughput: machines slow down as they get warm.",
    )
    add_endpoint(parser)
    parser.add_argument("length", metavar="TIME", help="such as 90s, 10m or 2h")
    parser.add_argument("--rate", metavar="R", help="open loop: requests/s (default: a closed loop)")
    parser.add_argument("--users", type=int, metavar="N", help="closed loop (default 4)")
    add_preset(parser)
    add_load(parser, rate=False)
    add_measuring(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.measuring import measure_run
    from everybit.bench.result import series_document
    from everybit.bench.series import sustain
    from everybit.cli.bench.output import finish

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", args.length)
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0
    if seconds < 1:
        raise SourceError(f"{args.length!r}: expected a time such as 90s, 10m or 2h, 1s at least")
    if args.duration is not None:
        raise SourceError("--duration: the time to sustain stands after the address")
    args.duration = seconds
    known = known_of(args)
    settings = settings_of(args, known)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    measured = measure_run(settings, workload_of(args, known), f"{args.length} of {known.asking.model}")
    if measured.document["metrics"] is None:
        raise SourceError("; ".join(measured.document["validity"]["reasons"]))
    window = measured.document["window"]
    block = sustain(measured.records, int(window["begin_ms"] * 1e6), int(window["end_ms"] * 1e6), _SLICES)
    document = series_document(
        "sustain", command=settings.command, created=created, block=block, runs=[measured.document]
    )
    return finish(args, document, interrupted=measured.interrupted)
