"""`everybit eval`: the quality of an overlay at every precision, next to the float model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from everybit import __version__
from everybit.cli.eval_tasks import load, score, table
from everybit.cli.options import add_machine_options, parse_bits, plan_file, positive_int
from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure the quality of an overlay at every precision",
        description="Score a text with an overlay at every precision: perplexity, bits per byte and, with --reference, "
        "the KL divergence from the float model (mean with a 95 % interval, 99th percentile; nats per token) and how "
        "often both rank the same token first. With --tasks, run the task suites of lm-eval as well, or instead.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="a folder written by everybit quantize")
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text; lines of <|endoftext|> separate documents (or give --tasks)"
    )
    parser.add_argument(
        "--bits", default="all", help="precisions: all, 3, 2-8 or 2,4,8; or a plan, PLAN.json (default: all)"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="put a LoRA adapter that PEFT saved on every precision")
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
    parser.add_argument("--card", action="store_true", help="write the table into the overlay's README.md as well")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    tasks = parser.add_argument_group("tasks", 'these need lm-eval: pip install "everybit[tasks]"')
    tasks.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, such as piqa,arc_easy")
    tasks.add_argument("--tasks-data", metavar="DIR", help="take each task from DIR/NAME.jsonl; nothing is downloaded")
    tasks.add_argument("--limit", type=positive_int, metavar="N", help="samples of each task (default: all)")
    add_machine_options(
        parser,
        "exact",
        "default: exact, because what is judged here is the weights, not the rounding of this machine's kernels",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit import evaluate
    from everybit.engine.plan import Plan
    from everybit.formats import Overlay
    from everybit.formats.sizes import Size
    from everybit.tokenizer import Tokenizer

    file = plan_file(args.bits)
    if file is None:
        parse_bits(args.bits)  # everything that can be refused is refused before a text is scored
    _refuse_what_has_no_effect(args)
    if args.card:
        from everybit.quantize.card import plain, read_card, write_quality

        read_card(Path(args.overlay).expanduser())  # or it is refused now
    documents = evaluate.read_documents(args.text) if args.text else []
    tasks = load(args.tasks, args.tasks_data) if args.tasks else None
    if args.plot:
        evaluate.check_plot(args.plot)
    reference_folder = _find_reference(args.reference) if args.reference else None
    with Overlay.open(args.overlay) as overlay:
        plan = Plan.open(file, overlay) if file else None
        bits = (0,) if plan else parse_bits(args.bits, overlay.bits)  # one precision without a number
        context = evaluate.context_length(overlay.config, args.context)
        sizes = overlay.sizes()

    report, scores = None, None
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.redirect_stdout(sys.stderr))  # stdout carries the report alone
        how = {"threads": args.threads, "mode": args.mode}
        model = opened.enter_context(evaluate.EngineModel.open(args.overlay, context, adapter=args.adapter, **how))
        reference = (
            opened.enter_context(evaluate.EngineModel.open(reference_folder, context, **how))
            if reference_folder
            else None
        )
        if reference is not None and reference.bits:
            raise SourceError(
                f"--reference {args.reference} is an overlay, expected the float model that was quantized: "
                "leave the option out, or give that model's folder"
            )
        threads = model.runtime.threads
        adapter = f", adapter {args.adapter}" if args.adapter else ""
        print(f"everybit: {model.runtime.isa}, {threads} thread{'s' if threads > 1 else ''}, {args.mode} mode{adapter}")
        tokenizer = Tokenizer.open(args.overlay)
        more = model.runtime.adapter.nbytes if model.runtime.adapter else 0

        def size(at: int) -> Size:
            found = Size(plan.bpw, plan.bytes) if plan else sizes.rows[at]
            return Size(found.bpw, found.bytes + more)

        if documents:
            report = evaluate.evaluate(
                model,
                bits,
                evaluate.windows(tokenizer, documents, context, truncate=args.truncate, max_tokens=args.max_tokens),
                reference,
                set_precision=(lambda _: model.set_precision(plan)) if plan else model.set_precision,
                size=size,
                reference_size=sizes.original,
                threads=threads,
            )
            if plan and file:
                report = replace(report, rows=[replace(row, bits=file.stem) for row in report.rows])
        if tasks:
            scores = score(tasks, tokenizer, model.runtime, bits, reference.runtime if reference else None, args.limit)
    if args.json:
        made = {"mode": args.mode, **({"adapter": args.adapter} if args.adapter else {})}
        print(json.dumps({**(report.document() if report else {}), **({"tasks": scores} if scores else {}), **made}))
    else:
        if args.adapter:
            print(f"with the adapter {args.adapter}, whose bytes are counted")
        print("\n\n".join([*([report.table()] if report else []), *([table(scores)] if scores else [])]))
    if args.plot and report:
        evaluate.plot(report, args.plot)
        print(f"everybit: wrote {args.plot}", file=sys.stderr)
    if args.card and report:
        by = f", beside `{plain(Path(args.reference).name)}`" if args.reference else ""
        most = f", {args.max_tokens} tokens of it" if args.max_tokens else ""
        text = f"`{plain(Path(args.text).name)}`{most} in windows of {context}"
        measured = f"Measured by everybit {__version__} on {text}, mode {args.mode}{by}:"
        write_quality(Path(args.overlay).expanduser(), report.table(), measured)
    return 0


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    if not args.text and not args.tasks:
        raise SourceError("nothing to score: give --text FILE, --tasks NAMES or both (see everybit eval --help)")
    for option, given, needs in (
        ("--plot", args.plot and not args.text, "--text"),
        ("--card", args.card and not args.text, "--text"),
        ("--max-tokens", args.max_tokens and not args.text, "--text"),
        ("--truncate", args.truncate and not args.text, "--text"),
        ("--tasks-data", args.tasks_data and not args.tasks, "--tasks"),
        ("--limit", args.limit and not args.tasks, "--tasks"),
    ):
        if given:
            raise SourceError(f"{option} has no effect without {needs}: give {needs} as well, or drop it")
    if args.card and args.adapter:
        raise SourceError(f"--card writes into the overlay, which has no adapter {args.adapter}: drop one of them")
    for option, given in (("--plot", args.plot), ("--tasks", args.tasks)):
        if given and plan_file(args.bits):
            raise SourceError(f"{option} works with precisions, not with the plan {args.bits}: drop one of them")


def _find_reference(name: str) -> Path:
    """The folder of the float model. A hub id is looked up too, where the quantize extra is installed."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        from everybit.quantize.source import resolve
    except ImportError:
        raise SourceError(f"no folder {name}: pass a model folder") from None
    return resolve(name)
