"""`everybit bench capacity URL`: the highest rate at which enough requests keep the SLO."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from everybit.cli.bench.load import add_load, workload_of
from everybit.cli.bench.options import (
    add_endpoint,
    add_measuring,
    add_output,
    add_preset,
    known_of,
    positive,
    settings_of,
)
from everybit.errors import SourceError

_LEAST_REQUESTS = 10  # of a run: fewer say nothing of a share


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "capacity",
        help="the highest rate that keeps the SLO",
        description="Search the highest request rate at which the SLO's share of requests keeps it.",
    )
    add_endpoint(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--first-rate", type=float, default=1, metavar="R", help="where to begin (default 1)")
    group.add_argument("--tolerance", type=float, default=0.03, metavar="X", help="of the bracket (default 0.03)")
    group.add_argument("--most-probes", type=int, default=10, metavar="N", help="rates to try (default 10)")
    group.add_argument("--most-runs", type=int, default=5, metavar="N", help="runs at a rate in doubt (default 5)")
    group.add_argument("--most-rate", type=float, metavar="R", help="do not go higher")
    add_preset(parser)
    add_load(parser, rate=False)
    add_measuring(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.measuring import Measured, measure_run
    from everybit.bench.result import series_document
    from everybit.bench.search import Limits
    from everybit.bench.series import capacity
    from everybit.cli.bench.output import Runs, finish

    positive(args.first_rate, "--first-rate")
    if not 0 < args.tolerance < 1:
        raise SourceError(f"--tolerance {args.tolerance:g}: expected more than 0, less than 1")
    if args.most_rate is not None:
        positive(args.most_rate, "--most-rate")
    known = known_of(args)
    settings = settings_of(args, known)
    slo = settings.targets.slo
    if slo is None:
        raise SourceError("a capacity is that of an SLO: give --slo, or another preset than batch")
    if args.duration is not None and args.duration < 1:
        raise SourceError(f"--duration {args.duration:g}: a rate needs 1 s or more")
    least = _LEAST_REQUESTS / (args.duration or 30)
    if args.first_rate < least:
        raise SourceError(
            f"--first-rate {args.first_rate:g}: runs of {args.duration or 30:g} s can judge {least:.3g} requests/s and"
            " more; make --duration longer"
        )
    limits = Limits(slo.share, args.tolerance, args.most_probes, args.most_runs, least, args.most_rate)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted = False
    runs = Runs(args, settings.command)

    def measure(rate: float, seed: int) -> Measured:
        nonlocal interrupted
        workload = workload_of(args, known, rate=rate, seed=seed)
        measured = runs.measured(lambda: measure_run(settings, workload, f"{rate:.3g} requests/s"))
        interrupted = measured.interrupted
        return measured

    block, documents = capacity(measure, args.first_rate, limits, args.seed)
    document = series_document("capacity", command=settings.command, created=created, block=block, runs=documents)
    return finish(args, document, interrupted=interrupted)
