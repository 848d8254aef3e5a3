"""What the source of calibration is worth: KL to the float model of the default solver, by source, tuned and untuned.

    python benchmarks/calibration_study.py MODEL --text FILE --calibration FILE [--sources none,text,self,random]
    python benchmarks/calibration_study.py MODEL --documents FILE   (the first 60 % calibrate, the last 20 % are scored)

A source is `text` (the calibration file), `self` (written by the model), `random` (tokens), `none` (the solver tree,
never tuned) or another text file. All have at most --sequences windows of --length tokens, for Hessians and for tuning;
the scored text is used for no choice. First, for comparison, `original` on `text` (see solver_quality.py). Prints a
card of medians over seeds, `:plain` where tables are not tuned, then one JSON line.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import everybit
from everybit import evaluate
from solver_quality import BITS, add_arguments, as_json, overlays, score, show, texts

SOURCES = "none,text,self,random"


def runs(args: argparse.Namespace, calibration: Path) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, bits to score and options of `everybit.quantize` of each overlay."""
    for bits, scored, options in overlays("original", args):
        yield "original", scored, {"bits": bits, "calibration": calibration, **options}
    for source in args.sources.split(","):
        options = {"bits": BITS, "calibration": calibration if source == "text" else source}
        yield f"{source}:plain", args.bits, {**options, "tune": False}
        if source != "none":
            yield source, args.bits, {**options, "tune": True, "tune_steps": args.tune_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default=SOURCES)
    add_arguments(parser, tune_steps=60)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        calibration, windows, context = texts(args, work)
        with evaluate.EngineModel.open(args.model, context, threads=args.threads) as reference:
            for name, bits, options in runs(args, calibration):
                kept = {} if options["calibration"] == "none" else {"statistics": work / "statistics"}
                for seed in range(args.seeds):
                    out = work / "overlay"
                    began = time.perf_counter()
                    everybit.quantize(
                        args.model, out, seed=seed, threads=args.threads, progress=False,
                        calibration_sequences=args.sequences, calibration_length=args.length, **kept, **options,
                    )  # fmt: skip
                    took_s = time.perf_counter() - began
                    rows += score(out, bits, windows, reference, context, args.threads, name, seed, took_s)
                    shutil.rmtree(out)
                if {row["bits"] for row in rows if row["method"] == name} == set(args.bits):
                    show(name, rows)
    print(as_json(args, windows, rows))


if __name__ == "__main__":
    main()
