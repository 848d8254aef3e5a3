"""`everybit serve OVERLAY`: an OpenAI-compatible server for every precision of an overlay."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from everybit.cli.device import add_device_options, backend_of
from everybit.errors import SourceError

_NEEDS = ("fastapi", "uvicorn", "httptools", "llguidance", "prometheus_client", "jinja2")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve every precision over HTTP, OpenAI-compatible",
        description="Serve models over HTTP: OpenAI-compatible, the precision chosen by request or by load.",
    )
    parser.add_argument(
        "overlays", nargs="+", metavar="[NAME=]MODEL", help="folders made by everybit quantize, or float models"
    )
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

    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter that PEFT saved, on every precision of one model"
    )

    engine = parser.add_argument_group("engine")
    engine.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per processor")
    engine.add_argument(
        "--mode",
        choices=("fast", "exact", "default"),
        default="fast",
        help="arithmetic (default fast); default gives a request other last digits in other company",
    )
    add_device_options(engine)
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
    door.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name to answer to; may be repeated",
    )
    door.add_argument("--strict", action="store_true", help="refuse fields that nobody knows")
    door.add_argument("--timeout-s", type=float, default=600, metavar="S", help="for a whole request (default 600)")
    door.add_argument("--drain-s", type=float, default=30, metavar="S", help="for what runs at SIGTERM (default 30)")
    door.add_argument("--send-s", type=float, default=60, metavar="S", help="for a client to read on (default 60)")
    door.add_argument("--body-mib", type=float, default=4, metavar="N", help="largest request (default 4)")
    door.add_argument("--log", type=Path, metavar="FILE", help="JSON lines go there (default: stderr)")

    scale = parser.add_argument_group("more processes (needs everybit[ray])")
    scale.add_argument("--ray", action="store_true", help="replicas of the server on this machine, on Ray Serve")
    scale.add_argument(
        "--replicas",
        metavar="N|LOW-HIGH",
        help="that many (default 1), or as many as the load needs; without --threads they share the processors",
    )
    parser.set_defaults(run=run)


def _fill_standard_files() -> None:
    """Where they are closed: what is opened next must not become file 2, where libraries write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode)  # noqa: SIM115 - stays open
            os.set_inheritable(file.fileno(), True)
            setattr(sys, name, file)


def run(args: argparse.Namespace) -> int:
    _fill_standard_files()
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise SourceError(f"serving needs {missing[0]}, which is not installed: pip install 'everybit[serve]'")
    if args.ray and importlib.util.find_spec("ray") is None:
        raise SourceError("--ray needs Ray Serve, which is not installed: pip install 'everybit[ray]'")
    from everybit.server.edge import is_loopback
    from everybit.server.keys import VARIABLE, Keys

    for name, lowest in (
        ("queue", 0),
        ("budget", 1),
        ("sequences", 1),
        ("timeout_s", 0.1),
        ("drain_s", 0),
        ("send_s", 0.1),
        ("body_mib", 0.001),
        ("ttft_ms", 1),
        ("tpot_ms", 1),
    ):
        if not lowest <= getattr(args, name) <= 1e9:
            raise SourceError(f"--{name.replace('_', '-')} {getattr(args, name):g}: expected {lowest} to 1e9")
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
    if args.adapter and len(models) > 1:
        raise SourceError(f"--adapter {args.adapter} is for one model, {len(models)} arrived: serve it by itself")

    from everybit.batching.fluidity import Target
    from everybit.server.app import Server, Settings
    from everybit.server.edge import Limits
    from everybit.server.log import open_log
    from everybit.server.opening import Opening, close
    from everybit.server.run import bind, serve

    fewest, most = _replicas(args)
    backend = backend_of(args, "fast")
    if backend and args.ray:
        raise SourceError(f"--device {args.device} and --ray: replicas run on processors, leave one out")
    opening = Opening(
        models,
        bits=args.bits,
        plans=plans,
        threads=args.threads,
        mode="default" if backend else args.mode,
        context=args.context,
        sequences=args.sequences,
        kv_dtype=args.kv_dtype,
        budget=args.budget,
        queue=args.queue,
        target=Target(int(args.ttft_ms * 1e6), int(args.tpot_ms * 1e6)),
        speculate=not args.no_speculation,
        backend=backend,
        adapter=args.adapter.expanduser() if args.adapter else None,
    )
    names = {"localhost", "127.0.0.1", "::1", args.host, *args.allow_host} if local or args.allow_host else set()
    hosts = {name.lower() for name in names}
    settings = Settings(
        queue=args.queue,
        timeout_s=args.timeout_s,
        strict=args.strict,
        keys=keys,
        limits=Limits(body_bytes=int(args.body_mib * (1 << 20)), send_s=args.send_s, hosts=hosts),
    )
    if args.ray:
        from everybit.integrations.ray_serve.driver import serve_on_ray

        here = {name: folder.resolve() for name, folder in models.items()}  # replicas start in another folder
        plans = {name: path.resolve() for name, path in plans.items()}
        adapter = opening.adapter.resolve() if opening.adapter else None
        threads = args.threads or max(1, len(os.sched_getaffinity(0)) // most)
        serve_on_ray(
            replace(opening, models=here, plans=plans, threads=threads, adapter=adapter),
            settings,
            host=args.host,
            port=args.port,
            replicas=(fewest, most),
            drain_s=args.drain_s,
            log=args.log,
        )
        return 0

    log = open_log(args.log)
    listener = bind(args.host, args.port)  # before the models: a port that is taken is known at once
    try:
        opened = opening.open()
        try:
            server = Server(opened, replace(settings, lost_lines=lambda: log.lost))
            print(opening.about(opened), file=sys.stderr)
            shown = f"[{args.host}]" if ":" in args.host else args.host
            serve(server, listener, args.drain_s, f"everybit: ready on http://{shown}:{listener.getsockname()[1]}")
        finally:
            close(opened)
    finally:
        listener.close()
    return 0


def _replicas(args: argparse.Namespace) -> tuple[int, int]:
    """Fewest and most of --replicas. Raises: SourceError"""
    if args.replicas is None:
        return 1, 1
    if not args.ray:
        raise SourceError(f"--replicas {args.replicas} goes with --ray: without it there is one process")
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", args.replicas)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise SourceError(f"--replicas {args.replicas}: expected N or LOW-HIGH, 1 to 999, such as 2 or 1-4")
    return fewest, most


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
        if not mark or name in found or not re.fullmatch(r"(?!auto$|\d*$|\dbit$)[^@]+", name):
            raise SourceError(f"--plan {one}: expected NAME=FILE with a name of its own, no precision, no @")
        found[name] = Path(path).expanduser()
    return found
