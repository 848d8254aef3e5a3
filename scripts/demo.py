"""The demo: quantize the shipped model once, judge every precision, and say what each one writes.

    python scripts/demo.py [--model DIR] [--out DIR] [--tune-steps 24] [--max-tokens 12288]

Writes OUT/overlay, OUT/quality.svg, OUT/quality.png and OUT/report.json; an older OUT of the demo is replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SPOKEN = 64  # tokens of each continuation
OWN = {"overlay", "overlay.partial", "quality.svg", "quality.png", "report.json"}


def only_model() -> Path:
    """The one model folder in examples/models."""
    folders = [path.parent for path in sorted(EXAMPLES.glob("models/*/config.json"))]
    if len(folders) != 1:
        raise SystemExit(f"demo: {len(folders)} models in examples/models, expected one; choose with --model DIR")
    return folders[0]


def clear(out: Path) -> None:
    """Remove an older demo output, and nothing that is not one."""
    if out.exists():
        if not out.is_dir() or any(path.name not in OWN for path in out.iterdir()):
            raise SystemExit(f"demo: {out} holds something else than a demo's output; choose another with --out DIR")
        shutil.rmtree(out)
    out.mkdir(parents=True)


def speak(runtime: Any, tokenizer: Any, prompt: str, tokens: int, bits: int | None) -> tuple[str, float]:
    """A continuation of `prompt`, sampled with one fixed seed (small models repeat themselves when greedy), and its
    tokens per second, the prompt not counted."""
    from everybit.engine.generate import generate
    from everybit.engine.sampling import Sampling

    ids = tokenizer.encode(prompt)
    generation = generate(runtime, ids, Sampling(temperature=0.7, seed=1), tokens, bits)
    stream = tokenizer.stream(ids)
    text = "".join(stream.add(token) for token in generation) + stream.finish()
    return text, generation.tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float model folder (default: the only one in examples/models)")
    parser.add_argument("--calibration", type=Path, default=EXAMPLES / "text" / "calibration.txt")
    parser.add_argument("--heldout", type=Path, default=EXAMPLES / "text" / "heldout.txt")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--solver", default="guided")
    parser.add_argument("--calibration-sequences", type=int, default=64, help="of 512 tokens")
    parser.add_argument("--tune-steps", type=int, default=24, help="a fifth of the default, for a demo's patience")
    parser.add_argument("--max-tokens", type=int, default=12_288, help="tokens of held-out text to score")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()

    began = time.perf_counter()
    print("importing torch and transformers, which quantizing needs ...", flush=True)
    from transformers.utils import logging

    import everybit
    from everybit import evaluate
    from everybit.engine.runtime import Runtime
    from everybit.evaluate.report import align
    from everybit.tokenizer import Tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = args.model or only_model()
    clear(args.out)
    overlay_folder = args.out / "overlay"

    print(f"quantizing {folder.name} once, for 2 to 8 bits (solver {args.solver}) ...", flush=True)
    everybit.quantize(
        folder,
        overlay_folder,
        bits=(2, 3, 4, 5, 6, 7, 8),
        calibration=args.calibration,
        solver=args.solver,
        tune_steps=args.tune_steps,
        calibration_sequences=args.calibration_sequences,
    )
    quantized_s = time.perf_counter() - began

    print("scoring held-out text at every precision, beside the float model ...", flush=True)
    tokenizer = Tokenizer.open(overlay_folder)
    config = json.loads((overlay_folder / "config.json").read_text())
    context = evaluate.context_length(config)
    documents = evaluate.read_documents(args.heldout)
    windows = evaluate.windows(tokenizer, documents, context, max_tokens=args.max_tokens)
    with (
        evaluate.EngineModel.open(overlay_folder, context) as model,
        evaluate.EngineModel.open(folder, context) as reference,
    ):
        sizes = model.sizes()
        report = evaluate.evaluate(
            model,
            model.bits,
            windows,
            reference,
            set_precision=model.set_precision,
            size=sizes.rows.__getitem__,
            reference_size=sizes.original,
            threads=model.runtime.threads,
        )

    lines = [["bits", "bpw", "bytes", "perplexity", "KL", "tokens/s"]]
    said: list[tuple[str, str]] = []
    document = report.document()
    with Runtime.open(overlay_folder) as quantized, Runtime.open(folder) as whole:
        machine = f"{quantized.isa}, {quantized.threads} thread{'s' if quantized.threads > 1 else ''}"
        for row, entry in zip([report.reference, *report.rows], [document["float"], *document["rows"]], strict=True):
            bits = getattr(row, "bits", None)
            runtime = whole if bits is None else quantized
            text, tokens_per_s = max(
                (speak(runtime, tokenizer, args.prompt, SPOKEN, bits) for _ in range(3)), key=lambda said: said[1]
            )
            entry["tokens_per_s"], entry["text"] = round(tokens_per_s, 1), text
            name, kl = ("float", "") if bits is None else (str(bits), f"{row.kl_mean:.3g}")
            lines.append([name, f"{row.bpw:.2f}", f"{row.bytes:,}", f"{row.ppl:.3f}", kl, f"{tokens_per_s:,.0f}"])
            said.append((name, " ".join(text.split())))

    evaluate.plot(report, args.out / "quality.svg")
    evaluate.plot(report, args.out / "quality.png")
    document["command"] = " ".join(["python", "scripts/demo.py", *sys.argv[1:]])
    (args.out / "report.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    print()
    print(align(lines))
    print(f"""
{report.tokens:,} held-out tokens; bytes are all that a deployment at that precision reads (embeddings included), KL is
in nats per token from the float model. Tokens/s is generation of one text by the native engine ({machine}),
the best of three times {SPOKEN} tokens.""")
    largest = max(sizes.rows, key=lambda bits: sizes.rows[bits].bytes)
    if sizes.rows[largest].bytes > sizes.original.bytes:
        print(f"(At {largest} bits the codebooks make a model as narrow as this one larger than the float file.)")
    print(f'\n"{args.prompt}" goes on, sampled at temperature 0.7 with one seed:')
    for name, text in said:
        print(f"  {name:>5}  {text[:100]}")
    command = Path(sys.executable).with_name("everybit")
    if command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    print(f"""
{time.perf_counter() - began:.0f} s in all, {quantized_s:.0f} s of them to import and quantize.
Plot: {args.out / "quality.svg"} (and .png); numbers: {args.out / "report.json"}
Next: {command} generate {overlay_folder} --prompt "{args.prompt}" --bits 3""")


if __name__ == "__main__":
    main()
