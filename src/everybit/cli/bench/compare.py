"""`everybit bench compare A B`: which of two endpoints, or models, is better, and is that more than chance?"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from functools import partial

from everybit.cli.bench.load import add_load, workload_of
from everybit.cli.bench.options import add_endpoint, add_measuring, add_output, add_preset, known_of, settings_of
from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="two endpoints or models, interleaved, with intervals",
        description="Runs A B B A A B B A ... with the same requests in each round, so that a machine that drifts "
        "treats both alike; says indistinguishable where it cannot tell.",
    )
    parser.add_argument("a", metavar="A", help="URL, or URL#MODEL")
    parser.add_argument("b", metavar="B", help="URL, or URL#MODEL")
    add_endpoint(parser, url=False)
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="runs of each (default 6, 3 or more)")
    parser.add_argument("--rate", metavar="R", help="open loop: requests/s (default: a closed loop)")
    parser.add_argument("--users", type=int, metavar="N", help="closed loop (default 4)")
    add_preset(parser)
    add_load(parser, rate=False)
    add_measuring(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.measuring import Measured, measure_run
    from everybit.bench.result import series_document
    from everybit.bench.series import compare
    from everybit.cli.bench.output import INTERRUPTED, Runs, finish

    if args.rounds < 3:
        raise SourceError(f"--rounds {args.rounds}: an interval needs 3 or more")
    if args.duration is None:
        args.duration = 10.0
    sides = []
    for name in (args.a, args.b):
        url, _, model = name.partition("#")
        sides.append(settings_of(args, known_of(args, url, model or None)))
        args.idle = 0  # measured once
    created = datetime.now(UTC).isoformat(timespec="seconds")
    rounds: tuple[list[Measured], list[Measured]] = ([], [])
    interrupted = False
    runs = Runs(args, sides[0].command)
    for number in range(args.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            workload = workload_of(args, sides[side].known, seed=args.seed + number)
            title = f"round {number + 1} of {args.rounds}, {'AB'[side]}"
            measured = runs.measured(partial(measure_run, sides[side], workload, title))
            rounds[side].append(measured)
            if interrupted := measured.interrupted:
                break
        if interrupted:
            break
    whole = number if interrupted else args.rounds
    if whole < 3:
        where = "" if args.json else f"; the runs are in {args.folder}, and the same command goes on from there"
        print(f"everybit: interrupted after {whole} whole rounds, an interval needs 3{where}", file=sys.stderr)
        return INTERRUPTED
    a, b = rounds[0][:whole], rounds[1][:whole]
    block = {"labels": [args.a, args.b], "rounds": whole, "rows": compare(a, b, sides[0].targets)}
    documents = [one.document for pair in zip(a, b, strict=True) for one in pair]
    document = series_document("compare", command=sides[0].command, created=created, block=block, runs=documents)
    return finish(args, document, interrupted=interrupted)
