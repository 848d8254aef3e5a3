"""`everybit generate OVERLAY --prompt TEXT`: text at a chosen precision."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from everybit.cli.options import parse_bits
from everybit.errors import PrecisionError, SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "generate", help="write text at a chosen precision", description="Continue a prompt at a chosen precision."
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="folder made by everybit quantize")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--bits", help="precision (default: the highest it has)")
    parser.add_argument("--max-tokens", type=int, default=100, help="new tokens at most (default 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, help="needs a temperature above 0 (default 1)")
    parser.add_argument("--seed", type=int, help="needs a temperature above 0 (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of streaming text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for option, value, good, expected in (
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "1 or more"),
        (
            "--temperature",
            args.temperature,
            args.temperature == 0 or 0.01 <= args.temperature <= 100,
            "0, or 0.01 to 100",
        ),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0, at most 1"),
        ("--seed", args.seed, args.seed is None or 0 <= args.seed < 2**63, "0 or more"),
    ):
        if not good:
            raise SourceError(f"{option} {value}: expected {expected}")
        if option in ("--top-p", "--seed") and value is not None and args.temperature == 0:
            raise SourceError(f"{option} has no effect at temperature 0: give --temperature as well")
    if not args.prompt.isascii() and not args.prompt.encode(errors="replace").decode() == args.prompt:
        raise SourceError("--prompt is not valid text in this locale: expected UTF-8")
    bits = parse_bits(args.bits) if args.bits is not None else None
    if bits is not None and len(bits) != 1:
        raise PrecisionError(f"--bits {args.bits}: expected one precision")

    import everybit

    model = everybit.load(args.overlay, bits=bits[0] if bits else None)
    import torch
    from transformers import TextStreamer

    from everybit.quantize.source import load_tokenizer

    tokenizer = load_tokenizer(args.overlay)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    count = int(inputs["input_ids"].shape[1])
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or count + args.max_tokens
    if not 0 < count < context:
        raise SourceError(
            f"--prompt has {count} tokens, expected 1 to {context - 1} (the model's context is {context})"
        )
    new = min(args.max_tokens, context - count)
    if new < args.max_tokens:
        print(f"stopping after {new} tokens: the model's context is {context}", file=sys.stderr)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if args.temperature > 0:
        torch.manual_seed(args.seed or 0)
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p or 1.0, "top_k": 0}
    streamer = None if args.json else TextStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = model.generate(
        **inputs, max_new_tokens=new, streamer=streamer, num_beams=1, pad_token_id=padding, **sampling
    )[0]
    seconds = time.perf_counter() - start
    if args.json:
        document = {
            "prompt": args.prompt,
            "text": tokenizer.decode(ids[count:], skip_special_tokens=True),
            "bits": model.precision,
            "prompt_tokens": count,
            "new_tokens": int(ids.shape[0]) - count,
            "seconds": seconds,
        }
        print(json.dumps(document))
    return 0
