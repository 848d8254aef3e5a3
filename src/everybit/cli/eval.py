"""`everybit eval`: the quality of an overlay at every precision, next to the float model."""

from __future__ import annotations

import argparse
import contextlib
import sys

from everybit.cli.options import parse_bits, positive_int


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure the quality of an overlay at every precision",
        description="Score a text with an overlay at every precision: perplexity, bits per byte and, with --reference, "
        "the KL divergence from the float model (mean and 99th percentile, nats per token) and how often both rank the "
        "same token first.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="a folder written by everybit quantize")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="UTF-8 text; lines of <|endoftext|> separate documents"
    )
    parser.add_argument("--bits", default="all", help="precisions: all, 3, 2-8 or 2,4,8 (default: all)")
    parser.add_argument("--reference", metavar="MODEL", help="the float model that was quantized, for KL and top-1")
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="tokens per window (default: the model's own, up to 2048)"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, metavar="N", help="stop after N scored tokens (default: the whole text)"
    )
    parser.add_argument(
        "--truncate", action="store_true", help="score only the first window of each document, not all of it"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw quality against bits per weight, as .png or .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit import evaluate
    from everybit.formats import Overlay

    parse_bits(args.bits)  # everything that can be refused is refused before a model is loaded
    documents = evaluate.read_documents(args.text)
    if args.plot:
        evaluate.check_plot(args.plot)
    with Overlay.open(args.overlay) as overlay:
        bits = parse_bits(args.bits, overlay.bits)

    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the report and nothing a library says
        import torch

        import everybit
        from everybit.quantize.source import load_float, load_tokenizer, resolve

        # float32 activations: what differs from the float model is then the quantized weights alone.
        model = everybit.load(args.overlay, dtype=torch.float32)
        context = evaluate.context_length(model.config, args.context)
        windows = evaluate.windows(
            load_tokenizer(args.overlay), documents, context, truncate=args.truncate, max_tokens=args.max_tokens
        )
        sizes = model.overlay.sizes()
        reference = load_float(resolve(args.reference)) if args.reference else None
        report = evaluate.evaluate(
            model,
            bits,
            windows,
            reference,
            set_precision=model.set_precision,
            size=sizes.rows.__getitem__,
            reference_size=sizes.original,
        )
    print(report.json() if args.json else report.table())
    if args.plot:
        evaluate.plot(report, args.plot)
        print(f"everybit: wrote {args.plot}", file=sys.stderr)
    return 0
