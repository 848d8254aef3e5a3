"""Quality of solvers at every precision on one model: KL to the float model and bits per weight, over several seeds.

    python benchmarks/solver_quality.py MODEL --text FILE --calibration FILE [--methods guided,tree:plain] [--seeds 3]
    python benchmarks/solver_quality.py MODEL --documents FILE     (the first 60 % calibrate, the last 20 % are scored)

A method is a solver and its options, joined by colons:

    guided              the default: Hessians, then tables tuned      guided:plain   not tuned
    tree                tables tuned, no Hessian                      tree:plain     not tuned
    tree:table:plain    float16 tables at every precision             upscale, uniform (never tuned)
    ...:each            one overlay for each precision alone, what a method made for that precision reaches
    original            upscale with float16 tables, its seed 2 bits at 2 bits and 3 above, as Any-Precision LLM

A seed draws other calibration windows (and, for upscale, other clusterings). The scored text is used for no choice.
Prints a card of medians (and spreads), then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import everybit
from everybit import evaluate
from everybit.formats.files import read_inside
from everybit.tokenizer import Tokenizer

BITS = (2, 3, 4, 5, 6, 7, 8)
METHODS = "original,uniform,tree:table:plain,tree:plain,guided:plain,tree,guided"


def overlays(method: str, args: argparse.Namespace) -> list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """(bits to quantize to, bits to score, options) of each overlay that a method needs."""
    solver, *words = method.split(":")
    options: dict[str, Any] = {"solver": solver, "tune_steps": args.tune_steps}
    if solver == "original":
        options = {"solver": "upscale", "codebook": "table"}
        words.append("plain")
    if solver in ("upscale", "uniform") or "plain" in words:
        options["tune"] = False
    if "table" in words:
        options["codebook"] = "table"
    if unknown := set(words) - {"plain", "table", "each"}:
        raise SystemExit(f"{method}: unknown word {sorted(unknown)[0]!r}, expected plain, table or each")
    if "each" in words:
        return [((b,), (b,), options) for b in args.bits]
    if solver == "original":
        low, high = tuple(b for b in args.bits if b == 2), tuple(b for b in args.bits if b > 2)
        found = [((2, *high), low, options)] if low else []
        return found + ([(tuple(sorted({3, *high})), high, options)] if high else [])
    return [(BITS, args.bits, options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    add_arguments(parser, tune_steps=120)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        calibration, windows, context = texts(args, work)
        rows: list[dict[str, Any]] = []
        with evaluate.EngineModel.open(args.model, context, threads=args.threads) as reference:
            for method in args.methods.split(","):
                for seed in range(args.seeds):
                    for quantized, bits, options in overlays(method, args):
                        out = work / "overlay"
                        began = time.perf_counter()
                        everybit.quantize(
                            args.model, out, quantized, calibration, seed=seed, threads=args.threads, progress=False,
                            calibration_sequences=args.sequences, calibration_length=args.length,
                            statistics=work / "statistics", **options,
                        )  # fmt: skip
                        took_s = time.perf_counter() - began
                        rows += score(out, bits, windows, reference, context, args.threads, method, seed, took_s)
                        subprocess.run(["rm", "-r", str(out)], check=True)
                show(method, rows)
    print(as_json(args, windows, rows))


def add_arguments(parser: argparse.ArgumentParser, tune_steps: int) -> None:
    """What a study of solvers is told: the model, its texts, how much of them."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="scored")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--documents", type=Path, help="one text for both, instead of the two above")
    parser.add_argument("--bits", type=lambda text: tuple(int(b) for b in text.split(",")), default=BITS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="of each, in tokens")
    parser.add_argument("--tune-steps", type=int, default=tune_steps)
    parser.add_argument("--max-tokens", type=int, default=24_000)
    parser.add_argument("--threads", type=int, default=0)


def texts(args: argparse.Namespace, work: Path) -> tuple[Path, evaluate.Windows, int]:
    """The calibration text, the windows to score and their length; of --documents the two parts lie in `work`."""
    calibration, scored = args.calibration, args.text
    if args.documents:
        documents = evaluate.read_documents(args.documents)
        calibration, scored = work / "calibration.txt", work / "scored.txt"
        calibration.write_text("\n<|endoftext|>\n".join(documents[: len(documents) * 6 // 10]))
        scored.write_text("\n<|endoftext|>\n".join(documents[len(documents) * 8 // 10 :]))
    context = min(512, evaluate.context_length(json.loads(read_inside(args.model, "config.json"))))
    documents = evaluate.read_documents(scored)
    windows = evaluate.windows(Tokenizer.open(args.model), documents, context, max_tokens=args.max_tokens)
    return calibration, windows, context


def as_json(args: argparse.Namespace, windows: evaluate.Windows, rows: list[dict[str, Any]]) -> str:
    """One line: what was measured, by which command, at which commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"model": args.model.name, "tokens": windows.tokens, "command": " ".join(sys.argv), "commit": commit}
    return json.dumps({**found, "rows": rows})


def score(
    out: Path, bits: tuple[int, ...], windows: evaluate.Windows, reference: evaluate.EngineModel, context: int,
    threads: int, method: str, seed: int, took_s: float,
) -> list[dict[str, Any]]:  # fmt: skip
    with evaluate.EngineModel.open(out, context, threads=threads) as model:
        sizes = model.sizes()
        report = evaluate.evaluate(
            model,
            bits,
            windows,
            reference,
            set_precision=model.set_precision,
            size=sizes.rows.__getitem__,
            progress=False,
            threads=model.runtime.threads,
        )
    found = [("kl", "kl_mean"), ("ppl", "ppl"), ("top1", "top1"), ("bpw", "bpw"), ("bits", "bits")]
    return [
        {"method": method, "seed": seed, "seconds": round(took_s, 1), "stored_bpw": round(sizes.stored_bpw, 3)}
        | {name: getattr(row, key) for name, key in found}
        for row in report.rows
    ]


def show(method: str, rows: list[dict[str, Any]]) -> None:
    own = [r for r in rows if r["method"] == method]
    cells = []
    for b in sorted({r["bits"] for r in own}):
        kl = [r["kl"] for r in own if r["bits"] == b]
        spread = f" ({min(kl):.3g}-{max(kl):.3g})" if len(kl) > 1 else ""
        cells.append(f"{b}: {statistics.median(kl):.3g}{spread}")
    seconds = statistics.median(r["seconds"] for r in own)
    print(f"{method:18s} {'  '.join(cells)}  [{own[0]['stored_bpw']} bpw stored, {seconds:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
