"""`everybit generate MODEL --prompt TEXT`: text at a chosen precision, from the native engine."""

from __future__ import annotations

import argparse
import json
import sys

from everybit.cli.device import add_device_options, backend_of
from everybit.cli.options import add_machine_options, parse_bits, plan_file, processors
from everybit.errors import PrecisionError, RequestError, SourceError

_SAMPLED = ("top_k", "top_p", "min_p", "seed")  # without effect where the likeliest token is taken
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "generate", help="write text at a chosen precision", description="Continue a prompt at a chosen precision."
    )
    parser.add_argument("overlay", metavar="MODEL", help="folder made by everybit quantize, or a float model folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--bits", metavar="N|PLAN.json", help="precision, or a plan of everybit allocate (default: the highest it has)"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="put a LoRA adapter that PEFT saved on every precision")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="new tokens at most (default 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of streaming text")

    sampling = parser.add_argument_group("sampling", "in this order: penalties, temperature, top-k, top-p, min-p")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", help="from the likeliest that together reach P")
    sampling.add_argument("--min-p", type=float, metavar="P", help="from those at least P times the likeliest")
    sampling.add_argument("--seed", type=int, help="of the draws (default 0)")
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="of tokens in prompt and output (off: 1)"
    )
    sampling.add_argument("--presence-penalty", type=float, metavar="X", help="of tokens in the output (off: 0)")
    sampling.add_argument("--frequency-penalty", type=float, metavar="X", help="for each time in the output (off: 0)")

    machine = parser.add_argument_group("machine")
    add_machine_options(machine, "default", "default: default")
    machine.add_argument("--pin", type=processors, default=(), metavar="LIST", help="processors for the threads: 0,2-3")
    machine.add_argument("--isa", help="instruction set (default: $EVERYBIT_ISA, or the best here; see everybit probe)")
    add_device_options(machine)
    machine.add_argument("--context", type=int, metavar="N", help="room for so many tokens (default: the model's own)")
    machine.add_argument(
        "--kv-dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="numbers of the KV cache (default float16)",
    )
    machine.add_argument(
        "--debug-numerics", action="store_true", help="check every layer's output; a number that is not finite is named"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.max_tokens < 1:
        raise SourceError(f"--max-tokens {args.max_tokens}: expected 1 or more")
    if not args.prompt.isascii() and not args.prompt.encode(errors="replace").decode() == args.prompt:
        raise SourceError("--prompt is not valid text in this locale: expected UTF-8")
    plan_path = plan_file(args.bits) if args.bits is not None else None
    bits = parse_bits(args.bits) if args.bits is not None and plan_path is None else None
    if bits is not None and len(bits) != 1:
        raise PrecisionError(f"--bits {args.bits}: expected one precision")

    from everybit.engine.generate import generate
    from everybit.engine.plan import Plan, Precision
    from everybit.engine.runtime import Runtime
    from everybit.engine.sampling import Sampling
    from everybit.tokenizer import Tokenizer

    asked = {name: getattr(args, name) for name in (*_SAMPLED, *_PENALTIES) if getattr(args, name) is not None}
    try:
        sampling = Sampling(temperature=args.temperature, **asked)
    except RequestError as error:
        raise RequestError(_option(error.parameter), error.problem) from None
    if without := [name for name in _SAMPLED if name in asked and args.temperature == 0]:
        raise SourceError(f"{_option(without[0])} has no effect at temperature 0: give --temperature as well")

    backend = backend_of(args, "default")
    runtime = Runtime.open(
        args.overlay,
        threads=args.threads,
        pin=args.pin,
        isa=args.isa,
        mode=args.mode,
        context=args.context,
        kv_dtype=args.kv_dtype,
        debug=args.debug_numerics,
        adapter=args.adapter,
        backend=backend,
    )
    with runtime:
        tokenizer = Tokenizer.open(args.overlay)
        prompt = tokenizer.encode(args.prompt)
        precision: Precision | None = bits[0] if bits else None
        if plan_path is not None:
            precision = Plan.open(plan_path, runtime.checkpoint.overlay)
        generation = generate(runtime, prompt, sampling, args.max_tokens, precision, stop_ids=tokenizer.eos_ids)
        plan = generation.bits if isinstance(generation.bits, Plan) else None
        weights = str(plan) if plan else f"{generation.bits} bits" if generation.bits else "float weights"
        weights += f" with the adapter {args.adapter}" if args.adapter else ""
        threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}, {args.mode} mode"
        how = runtime.isa if backend else f"{runtime.isa}, {threads}"

        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if piece and not args.json:
                print(piece, end="", flush=True)

        stream = tokenizer.stream(prompt)
        shown = False
        for token in generation:
            if not shown:  # not before the first token: a refusal is one line on stderr and nothing else
                print(f"everybit: {how}, {weights}", file=sys.stderr, flush=True)
                if not args.json:
                    print(args.prompt, end="")
                shown = True
            show(stream.add(token))
        show(stream.finish())
    if not args.json:
        print("" if shown else args.prompt)
    if generation.reason == "context":
        print(f"everybit: stopped where the context of {runtime.context} tokens is full", file=sys.stderr)
    if args.json:
        document = {
            "prompt": args.prompt,
            "text": "".join(pieces),
            "reason": generation.reason,
            "bits": None if plan else generation.bits or None,
            "plan": str(plan_path) if plan else None,
            "bpw": plan.bpw if plan else None,
            "adapter": args.adapter,
            "prompt_tokens": len(prompt),
            "new_tokens": len(generation.tokens),
            "mode": args.mode,
            "isa": runtime.isa,
            "threads": None if backend else runtime.threads,
            "prepare_s": generation.prepare_s,
            "prefill_s": generation.prefill_s,
            "decode_s": generation.decode_s,
            "tokens_per_s": generation.tokens_per_s,
        }
        print(json.dumps(document))
    return 0


def _option(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"
