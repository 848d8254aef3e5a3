"""Quality of every solver and codebook at every precision on one model: KL to the float model, perplexity.

    python benchmarks/solver_quality.py MODEL --text FILE --calibration FILE [--solvers tree,upscale,uniform]
        [--codebooks compact,table]

The calibration text is one file and the scored text another part: the last documents of --text. Prints a card, then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import everybit
from everybit import evaluate
from everybit.formats.files import read_inside
from everybit.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--solvers", default="tree,upscale,uniform")
    parser.add_argument("--codebooks", default="compact,table", help="of the solvers that have a choice")
    parser.add_argument("--documents", type=int, default=150, help="score the last N documents of the text")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--truncate", action="store_true", help="only the first window of each document")
    parser.add_argument("--max-tokens", type=int, default=30_000)
    args = parser.parse_args()

    documents = evaluate.read_documents(args.text)[-args.documents :]
    context = min(512, evaluate.context_length(json.loads(read_inside(args.model, "config.json"))))
    reference = evaluate.EngineModel.open(args.model, context)
    windows = evaluate.windows(
        Tokenizer.open(args.model), documents, context, truncate=args.truncate, max_tokens=args.max_tokens
    )
    result: dict[str, object] = {"model": args.model.name, "tokens": windows.tokens, "rows": []}
    lines = [["solver", "codebook", "bits", "bpw", "ppl", "KL mean", "KL p99", "top-1"]]
    choices = [
        (solver, codebook)
        for solver in args.solvers.split(",")
        for codebook in ([None] if solver == "uniform" else args.codebooks.split(","))
    ]
    for solver, codebook in choices:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "overlay"
            everybit.quantize(
                args.model,
                out,
                calibration=args.calibration,
                calibration_sequences=args.sequences,
                calibration_length=256,
                solver=solver,
                codebook=codebook,
                progress=False,
            )
            with evaluate.EngineModel.open(out, context) as model:
                report = evaluate.evaluate(
                    model,
                    model.bits,
                    windows,
                    reference,
                    set_precision=model.set_precision,
                    size=model.sizes().rows.__getitem__,
                    progress=False,
                    threads=model.runtime.threads,
                )
        document = report.document()
        result["float_ppl"] = document["float"]["ppl"]
        result["rows"] += [{"solver": solver, "codebook": codebook, **row} for row in document["rows"]]  # type: ignore[operator]
        for row in report.rows:
            kl = [f"{row.kl_mean:.3g}", f"{row.kl_p99:.3g}"]
            lines.append(
                [
                    solver,
                    codebook or "affine",
                    str(row.bits),
                    f"{row.bpw:.2f}",
                    f"{row.ppl:.4f}",
                    *kl,
                    f"{row.top1:.2%}",
                ]
            )
    print(f"{args.model.name}: float perplexity {result['float_ppl']:.4f}, {windows.tokens:,} tokens")
    print(evaluate.report.align(lines))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({**result, "command": " ".join(sys.argv), "commit": commit}))


if __name__ == "__main__":
    main()
