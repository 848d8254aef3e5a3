"""`everybit serve OVERLAY`: an OpenAI-compatible server for every precision of an overlay."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from everybit.errors import SourceError

_NEEDS = ("fastapi", "uvicorn", "httptools", "llguidance", "prometheus_client", "jinja2")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve every precision over HTTP, OpenAI-compatible",
        description="Serve models over HTTP: OpenAI-compatible, the precision chosen by request or by load.",
    )
    parser.add_argument("overlays", nargs="+", metavar="[NAME=]MODEL", help="folders made by everybit quantize")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    parser.add_argument(
        "--bits",
        default="auto",
        metavar="auto[:LOW-HIGH]|N|PLAN",
        help="precision of requests that name none (default auto)",
    )
    parser.add_argument(
        "--plan", action="append", default=[], metavar="NAME=FILE", help="a plan of everybit allocate, by name"
    )

    engine = parser.add_argument_group("engine")
    engine.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per processor")
    engine.add_argument(
        "--mode",
        choices=("fast", "exact", "default"),
        default="fast",
        help="arithmetic (default fast); default gives a request other last digits in other company",
    )
    engine.add_argument("--context", type=int, metavar="N", help="tokens a request may have (default: the model's)")
    engine.add_argument(
        "--sequences", type=int, default=8, metavar="N", help="room in the KV cache, in full contexts (default 8)"
    )
    engine.add_argument("--kv-dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    engine.add_argument("--budget", type=int, default=512, metavar="N", help="tokens a step may compute (default 512)")
    engine.add_argument("--queue", type=int, default=1024, metavar="N", help="sequences that may wait (default 1024)")
    engine.add_argument("--ttft-ms", type=float, default=1000, metavar="MS", help="first-token target (default 1000)")
    engine.add_argument("--tpot-ms", type=float, default=100, metavar="MS", help="target between tokens (default 100)")
    engine.add_argument("--no-speculation", action="store_true", help="never draft tokens at fewer bits")

    door = parser.add_argument_group("door")
    door.add_argument("--keys", type=Path, metavar="FILE", help="lines of NAME KEY [concurrency=N] [priority=N]")
    door.add_argument("--no-key", action="store_true", help="let everybody in on an address that is not local")
    door.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="names it is asked for under")
    door.add_argument("--strict", action="store_true", help="refuse fields that nobody knows")
    door.add_argument("--timeout-s", type=float, default=600, metavar="S", help="for a whole request (default 600)")
    door.add_argument("--drain-s", type=float, default=30, metavar="S", help="for what runs at SIGTERM (default 30)")
    door.add_argument("--body-mib", type=float, default=4, metavar="N", help="largest request (default 4)")
    door.add_argument("--log", type=Path, metavar="FILE", help="JSON lines go there (default: stderr)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise SourceError(f"serving needs {missing[0]}, which is not installed: pip install 'everybit[serve]'")
    from everybit.server.edge import is_loopback
    from everybit.server.keys import VARIABLE, Keys

    for name, lowest in (
        ("queue", 0),
        ("budget", 1),
        ("sequences", 1),
        ("timeout_s", 0.1),
        ("drain_s", 0),
        ("body_mib", 0.001),
        ("ttft_ms", 1),
        ("tpot_ms", 1),
    ):
        if not lowest <= getattr(args, name) <= 1e9:
            raise SourceError(f"--{name.replace('_', '-')} {getattr(args, name):g}: expected {lowest} or more")
    if not 0 <= args.port < 65536:
        raise SourceError(f"--port {args.port}: expected 0 to 65535")
    keys = Keys.read(args.keys)
    local = is_loopback(args.host)
    if not local and not keys and not args.no_key:
        raise SourceError(
            f"--host {args.host} can be reached from elsewhere and there are no API keys: give --keys FILE or "
            f"${VARIABLE}, or --no-key if everybody may come in"
        )
    models = _folders(args.overlays)
    plans = _pairs(args.plan)

    from everybit.batching.fluidity import Target
    from everybit.server.app import Server, Settings
    from everybit.server.edge import Limits
    from everybit.server.log import open_log
    from everybit.server.run import bind, serve
    from everybit.server.served import Served

    log = open_log(args.log)
    listener = bind(args.host, args.port)  # before the models: a port that is taken is known at once
    opened: dict[str, Served] = {}
    try:
        for name, folder in models.items():
            opened[name] = Served.open(
                name,
                folder,
                bits=args.bits,
                plans=plans,
                threads=args.threads,
                mode=args.mode,
                context=args.context,
                sequences=args.sequences,
                kv_dtype=args.kv_dtype,
                budget=args.budget,
                queue=args.queue,
                target=Target(int(args.ttft_ms * 1e6), int(args.tpot_ms * 1e6)),
                speculate=not args.no_speculation,
            )
        hosts = {"localhost", "127.0.0.1", "::1", args.host, *args.allow_host} if local or args.allow_host else ()
        server = Server(
            opened,
            Settings(
                queue=args.queue,
                timeout_s=args.timeout_s,
                strict=args.strict,
                keys=keys,
                limits=Limits(body_bytes=int(args.body_mib * (1 << 20)), hosts=hosts),
                lost_lines=lambda: log.lost,
            ),
        )
        for name, served in opened.items():
            bits = served.runtime.bits
            what = f"{min(bits)} to {max(bits)} bits" if bits else "float weights"
            threads = f"{served.runtime.threads} thread{'s' if served.runtime.threads > 1 else ''}"
            print(f"everybit: {name}: {what}, {served.runtime.isa}, {threads}, {args.mode} mode", file=sys.stderr)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        serve(server, listener, args.drain_s, f"everybit: ready on http://{shown}:{listener.getsockname()[1]}")
    finally:
        listener.close()
        for served in opened.values():
            served.runtime.close()
    return 0


def _folders(given: list[str]) -> dict[str, Path]:
    """Model folders by the names they are served under: the folder's own, or what stands before a =."""
    found: dict[str, Path] = {}
    for one in given:
        name, mark, folder = one.partition("=")
        path = Path(folder if mark and not Path(one).exists() else one).expanduser()
        name = name if mark and not Path(one).exists() else path.resolve().name
        if name in found:
            raise SourceError(f"two models are called {name}: give one another name with NAME={path}")
        found[name] = path
    return found


def _pairs(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in given:
        name, mark, path = one.partition("=")
        if not mark or not name or name == "auto" or name.isdecimal() or name in found:
            raise SourceError(f"--plan {one}: expected NAME=FILE with a name of its own that is no precision")
        found[name] = Path(path).expanduser()
    return found
