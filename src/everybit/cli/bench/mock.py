"""`everybit bench mock`: a server of exactly known timing with scripted behaviour, to test clients with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "mock",
        help="a server of exactly known timing and scripted faults",
        description="A mock OpenAI-compatible server. GET /mock/truth tells when each token was really written.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="default 8001; 0: any that is free")
    parser.add_argument("--script", type=Path, metavar="FILE", help="what it does, as JSON (docs/bench.md)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one line of a script, such as ttft_ms=250"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from everybit.bench.mock.run import serve
    from everybit.bench.mock.script import Script, parse_script, read_script

    script = read_script(args.script) if args.script else Script()
    changes = {}
    for one in args.set:
        name, mark, value = one.partition("=")
        if not mark:
            raise SourceError(f"--set {one}: expected NAME=VALUE")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    if not 0 <= args.port < 65536:
        raise SourceError(f"--port {args.port}: expected 0 to 65535")
    serve(parse_script({**asdict(script), **changes}), args.host, args.port)
    return 0
