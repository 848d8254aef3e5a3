"""`everybit quantize MODEL OUT`: a float model to an overlay."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from everybit.cli.options import parse_bits
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.quantize.build import QuantizeReport


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a model once, for every precision",
        description="Quantize a float model (folder or hub id) once into an overlay that holds every precision.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder or hub id, float safetensors")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument("--bits", default="2-8", help="precisions to hold, such as 2-8, 3 or 2,4,8 (default 2-8)")
    parser.add_argument(
        "--calibration",
        default="none",
        metavar="FILE|self|random|none",
        help="which weights matter: a UTF-8 text file, text the model writes itself, random tokens, or none (default)",
    )
    parser.add_argument(
        "--solver",
        choices=("guided", "tree", "upscale", "uniform"),
        help="guided (the default with calibration) corrects each weight's error in the others; the rest do not",
    )
    parser.add_argument("--no-tune", action="store_true", help="leave tables as the solver made them")
    parser.add_argument("--tune-steps", type=int, metavar="N", help="for each precision, at most (default 120)")
    parser.add_argument("--statistics", metavar="FOLDER", help="keep what calibration measured, for the next run")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="REGEX", help="leave matching modules as they are (repeatable)"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="REGEX=BITS",
        help="give matching modules their own bits; also brings in an untied head (repeatable, the last match wins)",
    )
    parser.add_argument("--calibration-sequences", type=int, metavar="N", help="at most (default 128)")
    parser.add_argument("--calibration-length", type=int, metavar="TOKENS", help="of each (default 512)")
    parser.add_argument(
        "--codebook",
        choices=("compact", "table"),
        help="58 bytes a row for 2 to 8 bits together (compact, the default) or 2^bits free numbers for each (table)",
    )
    parser.add_argument(
        "--table-dtype",
        choices=("float16", "float32"),
        help="of the tables of --codebook table (default float16)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 (default): all cores")
    parser.add_argument("--dry-run", action="store_true", help="print the size report and write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run (or start)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.quantize.build import quantize

    override: dict[str, tuple[int, ...]] = {}
    for item in args.override:
        pattern, separator, bits = item.rpartition("=")
        if not separator or not pattern:
            raise SourceError(f"--override {item!r}: expected REGEX=BITS, such as 'down_proj=4-8'")
        override.pop(pattern, None)  # given twice, it counts where it stands last
        override[pattern] = parse_bits(bits)
    given = {
        "calibration_sequences": args.calibration_sequences,
        "calibration_length": args.calibration_length,
        "codebook": args.codebook,
        "table_dtype": args.table_dtype,
        "tune_steps": args.tune_steps,
        "statistics": args.statistics,
    }
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        option = "--" + name.replace("_", "-")
        of_codebooks = name in ("codebook", "table_dtype")
        if not of_codebooks and args.calibration == "none":
            raise SourceError(f"{option} has no effect without calibration: give --calibration FILE or self as well")
        if of_codebooks and args.solver == "uniform":
            raise SourceError(f"{option} has no effect with --solver uniform, which stores no tables: drop it")
    if args.no_tune and args.tune_steps is not None:
        raise SourceError("--tune-steps has no effect with --no-tune: drop one of them")
    report = quantize(
        args.model,
        args.out,
        parse_bits(args.bits),
        args.calibration,
        args.solver,
        args.ignore,
        override,
        seed=args.seed,
        threads=args.threads,
        tune=False if args.no_tune else None,
        dry_run=args.dry_run,
        resume=args.resume,
        **options,
    )
    print(json.dumps(report.to_dict()) if args.json else describe(report))
    if args.calibration == "none" and not args.json:
        print("no calibration: pass --calibration FILE for better low precisions", file=sys.stderr)
    return 0


def describe(report: QuantizeReport) -> str:
    """The size table, what was left alone, and the next command."""
    lines = [str(report.sizes)]
    reasons: dict[str, int] = {}
    for reason in report.left.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    lines += [f"left as they are: {count} x {reason}" for reason, count in reasons.items()]
    for what, names in (
        ("no calibration token reached", report.unreached),
        ("single weights above 20 times their row's mean, which --codebook table serves better:", report.outliers),
        ("no Hessian was seen (solved as by tree):", report.unguided),
        ("all zeros (kept exactly):", report.zeros),
    ):
        if names:
            lines.append(f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    for bits, tuned in report.tuned.items():
        gain = f"KL {tuned.before:.3g} -> {tuned.after:.3g} on calibration text held out of it, {tuned.steps} steps"
        gain += "" if tuned.blocks is None else f" at most for each block, {tuned.blocks} of which gained"
        lines.append(f"tuned {bits} bits: {gain}")
    if report.untuned not in (None, "switched off", "no calibration"):
        lines.append(f"tables are not tuned: {report.untuned}")
    if report.dry_run:
        lines.append(f"dry run: nothing was written to {report.out}")
    else:
        bits = 4 if 4 in report.sizes.rows else max(report.sizes.rows)
        lines.append(f'next: everybit generate {report.out} --prompt "Once upon a time" --bits {bits}')
    return "\n".join(lines)
