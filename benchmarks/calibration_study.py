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
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import everybit
from everybit import evaluate
from everybit.formats.files import read_inside
from everybit.tokenizer import Tokenizer
from solver_quality import BITS, overlays, score, show

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
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="scored")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--documents", type=Path, help="one text for both, instead of the two above")
    parser.add_argument("--sources", default=SOURCES)
    parser.add_argument("--bits", type=lambda text: tuple(int(b) for b in text.split(",")), default=BITS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="of each, in tokens")
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=24_000)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        calibration, scored = args.calibration, args.text
        if args.documents:
            documents = evaluate.read_documents(args.documents)
            calibration, scored = work / "calibration.txt", work / "scored.txt"
            calibration.write_text("\n<|endoftext|>\n".join(documents[: len(documents) * 6 // 10]))
            scored.write_text("\n<|endoftext|>\n".join(documents[len(documents) * 8 // 10 :]))
        context = min(512, evaluate.context_length(json.loads(read_inside(args.model, "config.json"))))
        windows = evaluate.windows(
            Tokenizer.open(args.model), evaluate.read_documents(scored), context, max_tokens=args.max_tokens
        )
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"model": args.model.name, "tokens": windows.tokens, "command": " ".join(sys.argv), "commit": commit}
    print(json.dumps({**found, "rows": rows}))


if __name__ == "__main__":
    main()
