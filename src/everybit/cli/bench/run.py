"""`everybit bench run URL`: one load, measured."""

from __future__ import annotations

import argparse

from everybit.cli.bench.load import add_load, workload_of
from everybit.cli.bench.options import add_endpoint, add_measuring, add_output, add_preset, known_of, settings_of

NOTHING = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="one load, measured",
        description="Send a load to an endpoint and measure what its users feel. Exit code 1: nothing was answered.",
    )
    add_endpoint(parser)
    add_preset(parser)
    add_load(parser)
    add_measuring(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.measuring import measure_run
    from everybit.cli.bench.output import finish

    known = known_of(args)
    settings = settings_of(args, known)
    measured = measure_run(settings, workload_of(args, known), known.asking.model)
    code = finish(args, measured.document, measured.records, measured.interrupted)
    return code or (0 if measured.document["metrics"] else NOTHING)
