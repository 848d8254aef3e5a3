"""`everybit bench audit URL`: does the endpoint serve the precisions it claims?"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.bench.options import add_endpoint, add_output, command_line, known_of, limits_of
from everybit.errors import OutputError, RequestError, SourceError

if TYPE_CHECKING:
    from everybit.bench.audit import Ask
    from everybit.bench.http import Client, Limits
    from everybit.bench.preflight import Known

MISMATCH = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "audit",
        help="does the endpoint serve the precisions it claims?",
        description="Compares log-probabilities of fixed texts with those of a trusted endpoint. First --record there "
        "(everybit serve --mode exact), then audit another. Exit code 1: something is not what it claims.",
    )
    add_endpoint(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="write what this trusted endpoint answers")
    what.add_argument("--reference", type=Path, metavar="FILE", help="what --record wrote")
    parser.add_argument(
        "--claims", metavar="CLAIM=MODEL,...", help="such as 4=name@4bit,8=name@8bit (default: the names with @Nbit)"
    )
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.bench.audit import audit, load, record, save
    from everybit.bench.result import series_document
    from everybit.cli.bench.output import check_writable, finish

    created = datetime.now(UTC).isoformat(timespec="seconds")
    reference = load(args.reference) if args.reference else None
    if args.record and (args.json or args.output is not None):
        raise SourceError("--record writes FILE and nothing else: leave -o and --json out")
    if args.record and args.record.exists():
        raise OutputError(f"{args.record}: exists already; give another name, or remove it")
    if args.record:
        check_writable(args.record)
    claims = _parse_claims(args.claims) if args.claims is not None else {}
    known = known_of(args, model=args.model or next(iter(claims.values()), ""))
    claims = claims or _named(known.models)
    if reference is None:
        made = _asking(known, limits_of(args), lambda ask: record(ask, claims))
        save(made, args.record)
        print(f"{len(claims)} precisions recorded by {made.method}: {', '.join(claims)}\nwritten: {args.record}")
        return 0
    verdicts = _asking(known, limits_of(args), lambda ask: audit(ask, reference, claims))
    lines = [f"{one.claim:>8} {one.model}: {one.verdict}; {one.reason}" for one in verdicts]
    block = {"method": reference.method, "verdicts": [asdict(one) for one in verdicts], "lines": lines}
    code = finish(args, series_document("audit", command=command_line(), created=created, block=block))
    wrong = any(one.verdict in ("mismatch", "ignores the switch") for one in verdicts)
    return code or (MISMATCH if wrong else 0)


def _named(models: tuple[str, ...]) -> dict[str, str]:
    found = {match[1]: name for name in models if (match := re.search(r"@(\d)bit$", name))}
    if not found:
        raise SourceError("the server names no model with @Nbit: give --claims 4=NAME,8=NAME")
    return found


def _parse_claims(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        claim, mark, model = part.strip().partition("=")
        if not mark or not claim or not model or claim in found:
            raise SourceError(f"--claims {text}: expected CLAIM=MODEL with commas between, each claim once")
        found[claim] = model
    return found


def _asking(known: Known, limits: Limits, work: Any) -> Any:
    """`work(ask)`, with a client to ask by."""
    from everybit.bench.http import Client

    async def inner() -> Any:
        client = Client(known.endpoint, limits)
        reaper = asyncio.create_task(client.keep_reaping())
        try:
            return await work(_ask(client, known))
        finally:
            reaper.cancel()
            client.close()

    return asyncio.run(inner())


def _ask(client: Client, known: Known) -> Ask:
    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        exchange = await client.send("POST", path, json.dumps({**known.asking.extra, **body}).encode())
        if exchange.error:
            detail = f" ({exchange.detail})" if exchange.detail else ""
            raise SourceError(f"{known.endpoint.url}{path}: {exchange.error}{detail}")
        try:
            document = json.loads(exchange.body)
        except (ValueError, RecursionError):
            document = None
        if exchange.status != 200 or not isinstance(document, dict):
            said = known.endpoint.masked(exchange.body[:200].decode("utf-8", "replace"))
            raise RequestError(path, f"was answered with {exchange.status}: {' '.join(said.split())}")
        return document

    return ask
