"""`everybit bench fit URL`: how long requests take on an idle endpoint, as a function of their lengths."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from everybit.cli.bench.options import add_endpoint, known_of, limits_of
from everybit.errors import OutputError, SourceError

_LENGTHS = 8
_EACH = 4
_MOST = 1_000_000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "fit",
        help="the endpoint's times when it is idle, for --ideal",
        description="Requests one at a time, of several lengths: the idealised runtime that --ideal compares with.",
    )
    add_endpoint(parser)
    parser.add_argument("--most-prompt", type=int, default=1024, metavar="N", help="longest prompt, tokens (1024)")
    parser.add_argument("--answer", type=int, default=16, metavar="N", help="tokens of each answer (16)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from everybit.bench.endpoint import PATHS
    from everybit.bench.ideal import fit
    from everybit.bench.load.arrivals import Users
    from everybit.bench.load.texts import Prompt, random_words
    from everybit.bench.load.workload import Written, closed_loop
    from everybit.bench.progress import Display
    from everybit.bench.runner import run as run_job
    from everybit.bench.worker import Job
    from everybit.cli.bench.output import check_writable

    if not 32 <= args.most_prompt <= _MOST or not 2 <= args.answer <= _MOST:
        raise SourceError(
            f"--most-prompt {args.most_prompt} --answer {args.answer}: expected 32 and 2 at least, {_MOST} at most"
        )
    if args.output.exists():
        raise OutputError(f"{args.output}: exists already; give another name, or remove it")
    check_writable(args.output)
    known = known_of(args)
    texts = replace(random_words(1), chars_per_token=known.chars_per_token or 4)
    ratio = (args.most_prompt / 16) ** (1 / (_LENGTHS - 1))
    lengths = [round(16 * ratio**place) for place in range(_LENGTHS)]
    prompts = [  # lengths interleaved, so that a drift of the machine does not look like a length; the first warms up
        Prompt((texts.text(f"{turn} {tokens}", tokens),), args.answer) for turn in range(_EACH) for tokens in lengths
    ]
    prompts = [prompts[0], *prompts]
    workload = closed_loop(Users(1), Written(tuple(prompts)), count=len(prompts))
    job = Job(known.endpoint, PATHS[known.asking.api], known.asking, workload, limits_of(args))
    with Display("fit", None, len(prompts), args.quiet) as display:
        outcome = run_job(job, 1, show=display)
    if outcome.interrupted:
        raise KeyboardInterrupt
    ideal = fit(outcome.records[1:])
    part = args.output.with_name(args.output.name + ".part")
    try:
        part.write_text(json.dumps(ideal.document(), indent=1) + "\n", encoding="utf-8")
        part.replace(args.output)
    except OSError as error:
        raise OutputError(f"{args.output}: cannot be written ({error.strerror})") from None
    print(
        f"first token {ideal.first_ns(lengths[0]) / 1e6:.1f} ms at {lengths[0]} tokens, "
        f"{ideal.first_ns(lengths[-1]) / 1e6:.1f} ms at {lengths[-1]} (fit within {ideal.first_error:.1%}); "
        f"{ideal.gap_base_ns / 1e6:.2f} ms a token (within {ideal.gap_error:.1%})"
    )
    print(f"written: {args.output}")
    return 0
