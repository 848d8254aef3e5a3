"""`everybit bench sweep URL`: a run for each rate, number of users or model."""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from everybit.cli.bench.load import add_load, workload_of
from everybit.cli.bench.options import add_endpoint, add_measuring, add_output, add_preset, known_of, settings_of
from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="a run for each rate, number of users, or model (and so precision)",
        description="A run for each rate, number of users, or model: name@2bit,name@4bit,... gives a Pareto plot.",
    )
    add_endpoint(parser)
    over = parser.add_mutually_exclusive_group(required=True)
    over.add_argument("--rates", metavar="A,B,...", help="requests/s")
    over.add_argument("--crowds", metavar="A,B,...", help="numbers of users")
    over.add_argument("--models", metavar="A,B,...", help="names; with --rate or --users as the load of each")
    parser.add_argument("--rate", metavar="R", help="requests/s, with --models")
    parser.add_argument("--users", type=int, metavar="N", help="with --models")
    parser.add_argument("--quality", type=Path, metavar="FILE", help='JSON {"MODEL": {"value": ..., "unit": ...}}')
    add_preset(parser)
    add_load(parser, rate=False)
    add_measuring(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.measuring import measure_run
    from everybit.bench.result import series_document
    from everybit.bench.series import sweep_point
    from everybit.cli.bench.output import Runs, finish

    if args.models is None and (args.rate is not None or args.users is not None):
        raise SourceError("--rate and --users go with --models: what is swept is its own load")
    quality = _quality(args.quality)
    over, values = _values(args)
    if over == "model" and args.model:
        raise SourceError("--model and --models: give one of them")
    if over != "model" and quality:
        raise SourceError("--quality goes with --models")
    known = known_of(args, model=str(values[0]) if over == "model" else None)
    if over == "model" and (absent := [one for one in values if known.models and one not in known.models]):
        raise SourceError(f"--models {absent[0]}: the server has {', '.join(known.models[:10])}")
    settings = settings_of(args, known)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    workloads = [  # all of them first: one that cannot be made must not cost the runs before it
        workload_of(args, known, rate=value if over == "rate" else None, users=value if over == "users" else None)
        for value in values
    ]
    points: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    runs = Runs(args, settings.command)
    interrupted = False
    for value, workload in zip(values, workloads, strict=True):
        here = settings.at_model(str(value)) if over == "model" else settings
        measured = runs.measured(partial(measure_run, here, workload, f"{over} {value}"))
        documents.append(measured.document)
        points.append(sweep_point(value, measured.document))
        if interrupted := measured.interrupted:
            break
    document = series_document(
        "sweep", command=settings.command, created=created, block={"over": over, "points": points}, runs=documents
    )
    if quality:
        document["quality"] = quality
    return finish(args, document, interrupted=interrupted)


def _values(args: argparse.Namespace) -> tuple[str, list[Any]]:
    given = {"rate": args.rates, "users": args.crowds, "model": args.models}
    name, text = next((name, text) for name, text in given.items() if text is not None)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(set(parts)) != len(parts):
        raise SourceError(f"{text!r}: expected values with commas between, each once")
    if name == "model":
        return name, parts
    try:
        return name, [float(part) if name == "rate" else int(part) for part in parts]
    except ValueError:
        raise SourceError(f"{text!r}: expected numbers with commas between") from None


def _quality(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {name: one if isinstance(one, dict) else {"value": one} for name, one in document.items()}
        for one in found.values():
            one["value"] = float(one["value"])
            if not math.isfinite(one["value"]):
                raise ValueError(one["value"])
            one.setdefault("unit", "")
            one.setdefault("lower_is_better", True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f'{path}: expected {{"MODEL": NUMBER or {{"value": NUMBER}}, ...}} ({error})') from None
    return found
