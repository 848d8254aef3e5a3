"""`everybit bench report RESULT ...`: the report anew, several results side by side, or an old run under a new SLO."""

from __future__ import annotations

import argparse
from pathlib import Path

from everybit.cli.bench.options import add_preset, targets_of
from everybit.errors import OutputError, SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="HTML of results, side by side; old runs under a new SLO",
        description="Draws results as one HTML file. With --slo, --preset, --deadlines, --ideal, "
        "--slack-ms or --stall-ms old runs are scored anew, by these and the preset's others.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FOLDER", help="what a bench has written")
    parser.add_argument("--names", metavar="A,B,...", help="of the results (default: their folders')")
    parser.add_argument("--slo", metavar="TEXT", help="score a run anew")
    parser.add_argument("--deadlines", metavar="FIRST,GAP", help="score a run anew")
    parser.add_argument("--ideal", type=Path, metavar="FILE", help="score a run anew")
    parser.add_argument("--slack-ms", type=float, metavar="MS", help="score a run anew")
    parser.add_argument("--stall-ms", type=float, metavar="MS", help="score a run anew (default then 250)")
    add_preset(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    parser.set_defaults(run=run, preset=None)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.card import card
    from everybit.bench.report import render, render_many, write_text
    from everybit.bench.result import read_result, rescored

    documents = [read_result(one) for one in args.results]
    anew = (args.preset, args.slo, args.deadlines, args.ideal, args.slack_ms, args.stall_ms)
    if any(value is not None for value in anew):
        args.preset, args.stall_ms = args.preset or "chat", 250 if args.stall_ms is None else args.stall_ms
        targets = targets_of(args)
        documents = [rescored(folder, one, targets) for folder, one in zip(args.results, documents, strict=True)]
    names = args.names.split(",") if args.names is not None else [one.resolve().name for one in args.results]
    if len(names) != len(documents):
        raise SourceError(f"--names: {len(names)} names of {len(documents)} results")
    if args.output.suffix not in (".html", ".htm"):
        raise OutputError(f"{args.output}: expected a name that ends in .html")
    write_text(args.output, render(documents[0]) if len(documents) == 1 else render_many(documents, names))
    for name, document in zip(names, documents, strict=True):
        print(f"== {name}\n{card(document)}")
    print(f"written: {args.output}")
    return 0
