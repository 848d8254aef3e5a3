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
        description="Draws results as one HTML file. With --slo or --deadlines an old run is scored anew.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FOLDER", help="what a bench has written")
    parser.add_argument("--names", metavar="A,B,...", help="of the results (default: their folders')")
    parser.add_argument("--slo", metavar="TEXT", help="score a run anew")
    parser.add_argument("--deadlines", metavar="FIRST,GAP", help="score a run anew")
    parser.add_argument("--ideal", type=Path, metavar="FILE", help="score a run anew")
    parser.add_argument("--slack-ms", type=float, metavar="MS")
    parser.add_argument("--stall-ms", type=float, default=250, metavar="MS")
    add_preset(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.card import card
    from everybit.bench.report import render, render_many, write_text
    from everybit.bench.result import read_result, rescored

    documents = [read_result(one) for one in args.results]
    if args.slo or args.deadlines or args.ideal:
        targets = targets_of(args)
        documents = [rescored(folder, one, targets) for folder, one in zip(args.results, documents, strict=True)]
    names = args.names.split(",") if args.names else [one.resolve().name for one in args.results]
    if len(names) != len(documents):
        raise SourceError(f"--names: {len(names)} names of {len(documents)} results")
    if args.output.suffix not in (".html", ".htm"):
        raise OutputError(f"{args.output}: expected a name that ends in .html")
    write_text(args.output, render(documents[0]) if len(documents) == 1 else render_many(documents, names))
    for name, document in zip(names, documents, strict=True):
        print(f"== {name}\n{card(document)}")
    print(f"written: {args.output}")
    return 0
