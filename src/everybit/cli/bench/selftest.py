"""`everybit bench selftest`: the instrument's own error on this machine."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from everybit.cli.bench.options import add_output, check_workers, command_line
from everybit.errors import SourceError

INEXACT = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "selftest",
        help="the instrument's own error on this machine",
        description="Measures a mock server of exactly known timing. Exit code 1: the machine is too busy.",
    )
    parser.add_argument("--seconds", type=float, default=12, metavar="S", help="of each of four runs (default 12)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that send (default: by the load)")
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.result import series_document
    from everybit.bench.selftest import selftest
    from everybit.cli.bench.output import finish

    if not 8 <= args.seconds <= 3600:
        raise SourceError(f"--seconds {args.seconds:g}: expected 8 to 3600")
    check_workers(args.workers)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    block = selftest(args.seconds, args.workers, args.quiet)
    code = finish(args, series_document("selftest", command=command_line(), created=created, block=block))
    return code or (0 if block["ok"] else INEXACT)
