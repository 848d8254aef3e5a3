"""`everybit compare MODEL`: one table of quantization methods, ours and other people's, on the same tokens."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.cli.options import add_machine_options, parse_bits, positive_int
from everybit.errors import OutputError, SourceError

if TYPE_CHECKING:
    from everybit.cli.comparison import Comparison


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="compare quantization methods on one model",
        description="Quantize one float model with several methods, ours and other people's, from the same calibration "
        "text, and score the same held-out text: bits per weight with everything counted, perplexity, KL to the float "
        "model with a 95 % interval, and top-1, grouped by bits.",
    )
    parser.add_argument("model", metavar="MODEL", help="float model folder or hub id")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score, held out")
    parser.add_argument(
        "--calibration", required=True, metavar="FILE", help="UTF-8 text for every method that needs one"
    )
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="OVERLAY",
        help="an overlay of this model (repeatable); without any, one is made: everybit quantize with its defaults",
    )
    parser.add_argument(
        "--methods", default="all", metavar="NAMES", help="such as rtn,gptq,gguf:Q4_K; all (default), or none"
    )
    parser.add_argument("--bits", default="2-6,8", help="precisions, such as 2-8 or 2,4 (default 2-6,8)")
    parser.add_argument("--context", type=positive_int, metavar="N", help="tokens per window (default: up to 2048)")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="scored tokens at most (default: all)")
    parser.add_argument(
        "--seeds", type=positive_int, default=3, metavar="N", help="that methods with random starts average (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of them, and of calibration (default 0)")
    parser.add_argument("--calibration-sequences", type=positive_int, default=128, metavar="N", help="default 128")
    parser.add_argument("--calibration-length", type=positive_int, default=512, metavar="TOKENS", help="default 512")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well, as one JSON document")
    add_machine_options(parser, "exact", "default: exact, because the weights are judged, not the kernels")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    bits = parse_bits(args.bits)  # everything that can be refused is refused before anything is measured
    if not 0 <= args.seed < 2**31:
        raise SourceError(f"--seed {args.seed}: expected 0 to 2^31 - 1")
    out = Path(args.json).expanduser() if args.json is not None else None
    if out is not None and (not out.absolute().parent.is_dir() or out.is_dir()):
        raise OutputError(f"--json {out}: cannot be written there; expected a file name in a folder that exists")

    from transformers.utils import logging

    from everybit.cli.comparison import Comparer
    from everybit.quantize import peers

    logging.disable_progress_bar()  # one bar is enough
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    methods = [] if names in ([], ["none"]) else peers.find(peers.DEFAULT if names == ["all"] else names)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="everybit-compare-") as scratch:
        found = Comparer(args, bits, Path(scratch)).run(methods)
    print(table(found))
    if out is not None:
        out.write_text(json.dumps(found.document(), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        print(f"everybit: wrote {out}", file=sys.stderr)
    return 0


def table(found: Comparison) -> str:
    """Rows grouped by bits, the least KL of each group first; then what was measured, and what was left out and why."""
    from everybit.evaluate.intervals import plus_minus
    from everybit.evaluate.report import align

    reference = found.reference
    lines = [["method", "bits", "bpw", "perplexity", "ppl / float", "KL to float", "top-1", "seconds"]]
    lines.append(["float", "", f"{reference.bpw or 0:.2f}", f"{reference.ppl:.4f}", *[""] * 4])
    breaks = []
    for i, (entry, row) in enumerate(rows := found.sorted()):
        if i == 0 or row.bits != rows[i - 1][1].bits:
            breaks.append(len(lines))
        lines.append(
            [
                entry.method,
                str(row.bits),
                f"{row.bpw or 0:.2f}",
                f"{row.ppl:.4f}" if row.ppl < 1e5 else f"{row.ppl:.3g}",
                f"{row.ppl_ratio:.4f}{plus_minus(row.ppl_ratio_interval)}",
                f"{row.kl_mean:.3g}{plus_minus(row.kl_interval)}",
                f"{row.top1:.2%}",
                f"{entry.seconds:.1f}" if entry.seconds is not None else "",
            ]
        )
    drawn = align(lines).splitlines()
    for at in reversed(breaks):
        drawn.insert(at, "")
    return "\n".join([*drawn, "", *found.notes])
