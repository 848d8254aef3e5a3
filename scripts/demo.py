"""The demo: quantize the shipped model once, judge every precision, and say what each one writes.

    python scripts/demo.py [--model DIR] [--out DIR] [--solver tree] [--max-tokens 12288]

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


def speak(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, float]:
    """A continuation of `prompt`, sampled with one fixed seed (small models repeat themselves when greedy), and its
    tokens per second."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt")
    arguments = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    arguments |= {"do_sample": True, "temperature": 0.7, "top_k": 0, "pad_token_id": tokenizer.eos_token_id}
    with torch.inference_mode():
        model.generate(**arguments, max_new_tokens=2)  # the first call at a precision builds its weights
        torch.manual_seed(1)
        began = time.perf_counter()
        written = model.generate(**arguments, max_new_tokens=tokens, min_new_tokens=tokens)
        spent_s = time.perf_counter() - began
    new = written[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new) / spent_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float model folder (default: the only one in examples/models)")
    parser.add_argument("--calibration", type=Path, default=EXAMPLES / "text" / "calibration.txt")
    parser.add_argument("--heldout", type=Path, default=EXAMPLES / "text" / "heldout.txt")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--solver", default="tree")
    parser.add_argument("--calibration-sequences", type=int, default=32, help="of 512 tokens, for the sensitivities")
    parser.add_argument("--max-tokens", type=int, default=12_288, help="tokens of held-out text to score")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()

    began = time.perf_counter()
    print("importing torch and transformers ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import everybit
    from everybit import evaluate
    from everybit.evaluate.report import align

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
        calibration_sequences=args.calibration_sequences,
    )
    quantized_s = time.perf_counter() - began

    print("scoring held-out text at every precision, beside the float model ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = everybit.load(overlay_folder, dtype=torch.float32)
    documents = evaluate.read_documents(args.heldout)
    windows = evaluate.windows(tokenizer, documents, evaluate.context_length(model.config), max_tokens=args.max_tokens)
    sizes = model.overlay.sizes()
    report = evaluate.evaluate(
        model,
        model.overlay.bits,
        windows,
        reference,
        set_precision=model.set_precision,
        size=sizes.rows.__getitem__,
        reference_size=sizes.original,
    )

    speak(reference, tokenizer, args.prompt, tokens=48)  # the first generation of a process is slower than the rest
    lines = [["bits", "bpw", "bytes", "perplexity", "KL", "tokens/s"]]
    said: list[tuple[str, str]] = []
    document = report.document()
    for row, entry in zip([report.reference, *report.rows], [document["float"], *document["rows"]], strict=True):
        bits = getattr(row, "bits", None)
        if bits is not None:
            model.set_precision(bits)
        text, tokens_per_s = speak(reference if bits is None else model, tokenizer, args.prompt, tokens=48)
        entry["tokens_per_s"], entry["text"] = round(tokens_per_s, 1), text
        name, kl = ("float", "") if bits is None else (str(bits), f"{row.kl_mean:.3g}")
        lines.append([name, f"{row.bpw:.2f}", f"{row.bytes:,}", f"{row.ppl:.3f}", kl, f"{tokens_per_s:.0f}"])
        said.append((name, " ".join(text.split())))

    evaluate.plot(report, args.out / "quality.svg")
    evaluate.plot(report, args.out / "quality.png")
    document["command"] = " ".join(["python", "scripts/demo.py", *sys.argv[1:]])
    (args.out / "report.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    print()
    print(align(lines))
    print(f"""
{report.tokens:,} held-out tokens; bytes are all that a deployment at that precision reads (embeddings included), KL is
in nats per token from the float model. Tokens/s is generation through transformers with dense weights: this
path does not get faster with fewer bits; only what is read and kept on disk shrinks.""")
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
