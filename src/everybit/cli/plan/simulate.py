"""`everybit plan simulate MODEL --on CARD`: a deployment step by step under a trace, a rate or a number of users."""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.options import positive_int
from everybit.cli.plan.options import (
    add_cards,
    add_json,
    add_model,
    add_money,
    add_split,
    carbon_of,
    card_of,
    efficiency_of,
    models_of,
    number,
    slo_of,
    split_of,
    tell_price,
    usd_per_h_of,
    widths,
)
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.batching.fluidity import Target
    from everybit.plan.deployment import Deployment
    from everybit.plan.efficiency import Efficiency
    from everybit.plan.hardware import Hardware
    from everybit.plan.operators import Model
    from everybit.plan.simulate.metrics import Slo
    from everybit.plan.simulate.requests import Request
    from everybit.plan.simulate.run import Link, Simulated
    from everybit.plan.simulate.traces import Trace

_LENGTHS = 64  # pairs that lengths are drawn from
_LIMITS = (("rate", 1e-6, 1e6), ("speed", 1e-6, 1e6), ("burstiness", 1e-3, 1e3), ("think", 0, 1e6), ("warmup", 0, 1e9))
_SURE = 1.645  # standard deviations on either side of the middle of nine tenths


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="a deployment step by step: queues, preemption, precision, fluidity",
        description="Run the scheduler (everybit's own code, or one like vLLM's v1) against step times of the "
        "roofline. Several --bits: everybit's ladder serves the highest precision at which tokens are in time.",
    )
    add_model(parser, several=False)
    add_cards(parser, several=False)
    load = parser.add_argument_group("load: one of --trace, --rate, --users")
    load.add_argument("--trace", type=Path, metavar="FILE", help="Azure or BurstGPT csv, Mooncake jsonl, bench records")
    load.add_argument("--rate", type=number, metavar="R", help="requests/s, drawn")
    load.add_argument("--users", type=positive_int, metavar="N", help="who each ask anew; also with --trace's lengths")
    load.add_argument("--speed", type=number, metavar="X", help="of the trace, times its own")
    load.add_argument("--requests", type=positive_int, metavar="N", help="so many (default: 300, or the whole trace)")
    load.add_argument("--prompt", metavar="N", help="tokens, 1024 or 512-1536 (default 1024)")
    load.add_argument("--output", metavar="N", help="tokens, 256 or 128-384 (default 256)")
    load.add_argument("--burstiness", type=number, metavar="X", help="1: Poisson (default); less comes in bursts")
    load.add_argument("--think", type=number, metavar="S", help="of a user between answer and question")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    load.add_argument("--warmup", type=number, default=0.0, metavar="S", help="requests before are not scored")
    how = parser.add_argument_group("deployment")
    how.add_argument("--engine", choices=("everybit", "vllm"), default="everybit", help="(default everybit)")
    how.add_argument("--calibration", action="append", default=[], metavar="FILE", help="of everybit plan calibrate")
    how.add_argument("--replicas", type=positive_int, default=1, metavar="N", help="(default 1)")
    how.add_argument(
        "--router",
        default="shortest-queue",
        metavar="NAME",
        help="round-robin, shortest-queue (default), least-work, prefix-affinity",
    )
    how.add_argument("--budget", type=positive_int, default=2048, metavar="N", help="tokens a step (default 2048)")
    how.add_argument("--most", type=positive_int, default=128, metavar="N", help="sequences a step (default 128)")
    how.add_argument("--decode-replicas", type=positive_int, metavar="N", help="vllm: --replicas only read prompts, "
        "these decode")  # fmt: skip
    how.add_argument("--link-gbps", type=number, metavar="G", help="1e9 bytes/s from prompts to decoding (default: the "
        "card's link between nodes)")  # fmt: skip
    how.add_argument("--offload", action="store_true", help="stream the weights that do not fit from slower memory")
    how.add_argument("--drafts", type=positive_int, metavar="N", help="everybit: tokens drafted a step, at most")
    how.add_argument("--acceptance", type=number, metavar="X", help="chance that a draft is right, drawn with --seed")
    how.add_argument("--draft-bits", type=positive_int, metavar="BITS", help="that draft, fewer than --bits")
    add_split(parser)
    add_money(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--slo", metavar="TEXT", help="such as ttft=1s,tpot=50ms,fluidity=0.9,share=0.99")
    group.add_argument(
        "--deadlines", metavar="FIRST,GAP", help="of tokens, such as 1s,50ms (default: the SLO's, else 1 s and 100 ms)"
    )
    group.add_argument("--bounds", action="store_true", help="also at both ends of the step times' 90 %% interval")
    group.add_argument("--records", type=Path, metavar="FILE", help="write records that everybit bench reads")
    group.add_argument("--chrome", type=Path, metavar="FILE", help="write a trace for chrome://tracing")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import print_json
    from everybit.plan.deployment import Deployment
    from everybit.plan.hardware import weakest
    from everybit.plan.simulate.metrics import measure
    from everybit.plan.simulate.output import write_chrome, write_records
    from everybit.plan.speculation import speculation_of

    if args.seed < 0:
        raise SourceError(f"--seed {args.seed}: expected 0 or more")
    card = card_of(args)
    rungs = _rungs(args, card)
    efficiency, usd = efficiency_of(args, card, rungs[max(rungs)]), usd_per_h_of(args.price, card)
    carbon, pue = carbon_of(args)
    slo = slo_of(args.slo) if args.slo else None
    target = _target(args.deadlines, slo)
    deployment = Deployment(
        rungs,
        card,
        split_of(args),
        efficiency,
        args.engine,
        budget=args.budget,
        most=args.most,
        speculation=speculation_of(args.drafts, args.acceptance, args.draft_bits),
        offload=args.offload,
        seed=args.seed,
        users=args.users,
    )
    requests, trace = requests_of(args)
    documents: dict[str, dict[str, Any]] = {}
    for name, pace in _paces(args, efficiency).items():
        done = _simulate(args, deployment, requests, target, pace)
        document = measure(done, target, slo, begin_s=args.warmup)
        documents[name] = {
            **document,
            "precision": None if 0 in deployment.rungs else document["precision"],
            "bill": _bill(args, deployment, document, usd, carbon.value * pue if carbon else None),
        }
        if name == "expected":
            if args.records:
                write_records(args.records, done)
            if args.chrome:
                write_chrome(args.chrome, done)
    rests = {"efficiencies": efficiency.source, "card": weakest(card), "price": tell_price(args.price, card)}
    if args.json:
        told = {"rows": trace.rows, "taken": len(requests), "skipped": trace.skipped} if trace else None
        print_json({**documents, "trace": told, "rests_on": rests})
    else:
        print("\n".join([*_text(args, deployment, documents, rests), *([_tell(trace)] if trace else [])]))
    return 0


# --- what is simulated
def _rungs(args: argparse.Namespace, card: Hardware) -> dict[int, Model]:
    """By precision; 0: a width that is none. Raises: SourceError for several of which one is none"""
    from everybit.plan.widths import check_multiplied

    found = {}
    for width, (label, model) in zip(widths(args.bits), models_of(args).items(), strict=True):
        check_multiplied(label, model, card)
        match = re.fullmatch(r"(?:everybit)?(\d)", str(width))
        if match is None and len(widths(args.bits)) > 1:
            raise SourceError(f"--bits {args.bits}: several are an overlay's precisions, such as 3-8 or everybit3-8")
        found[int(match[1]) if match else 0] = model
    return found


def _target(text: str | None, slo: Slo | None) -> Target:
    """When tokens are due, to the ladder and to the fluidity index. Raises: SourceError"""
    from everybit.batching.fluidity import Target
    from everybit.bench.targets import parse_time

    if text is None:
        first_s, gap_s = (slo.first_s, slo.gap_s) if slo else (None, None)
        return Target(round(1e9 * (first_s or 1.0)), round(1e9 * (gap_s or 0.1)))
    first, mark, gap = text.partition(",")
    if not mark:
        raise SourceError(f"--deadlines {text}: expected FIRST,GAP such as 1s,50ms")
    return Target(parse_time("--deadlines", first), parse_time("--deadlines", gap))


def requests_of(args: argparse.Namespace) -> tuple[list[Request], Trace | None]:
    """Raises: SourceError"""
    from everybit.plan.simulate.requests import draw, speed_up
    from everybit.plan.simulate.traces import load_trace

    if (args.rate is None) == (args.users is None and args.trace is None):
        raise SourceError("expected one load: --trace FILE, --rate R, or --users N (also with a trace's lengths)")
    for option, needs in (("speed", "trace"), ("think", "users"), ("burstiness", "rate")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            raise SourceError(f"--{option} goes with --{needs}")
    for option, low, high in _LIMITS:
        if (value := getattr(args, option)) is not None and not low <= value <= high:
            raise SourceError(f"--{option} {value:g}: expected {low:g} to {high:g}")
    if args.trace and (args.prompt or args.output):
        raise SourceError("--prompt and --output are drawn lengths; a trace has its own: leave them out")
    if args.trace:
        trace = load_trace(args.trace)
        found = trace.requests[: args.requests]
        return found if args.speed is None else speed_up(found, args.speed), trace
    randomly = random.Random(args.seed)
    prompt, output = _range("--prompt", args.prompt or "1024"), _range("--output", args.output or "256")
    lengths = [(randomly.randint(*prompt), randomly.randint(*output)) for _ in range(_LENGTHS)]
    burstiness = 1.0 if args.burstiness is None else args.burstiness
    rate = 1.0 if args.rate is None else args.rate
    return draw(rate, args.requests or 300, lengths, burstiness=burstiness, seed=args.seed), None


def _range(name: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,8})(?:-(\d{1,8}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise SourceError(f"{name} {text}: expected tokens such as 1024 or 512-1536")
    return low, high


def _paces(args: argparse.Namespace, efficiency: Efficiency) -> dict[str, float]:
    """Step times at both ends of their interval."""
    ratio = math.exp(_SURE * efficiency.spread)
    return {"expected": 1.0, **({"fast": 1 / ratio, "slow": ratio} if args.bounds else {})}


def _simulate(
    args: argparse.Namespace, deployment: Deployment, requests: Sequence[Request], target: Target, pace: float
) -> Simulated:
    from dataclasses import replace

    from everybit.plan.simulate.run import simulate

    context = max(one.prompt_tokens + one.output_tokens for one in requests)
    if context > deployment.model.context:
        raise SourceError(
            f"a request of {context} tokens, but {deployment.model.name} has a context of {deployment.model.context}"
        )
    paced, split = replace(deployment, pace=pace), args.decode_replicas is not None
    if args.link_gbps is not None and not split:
        raise SourceError("--link-gbps goes with --decode-replicas")
    if split and args.engine != "vllm":
        raise SourceError("--decode-replicas goes with --engine vllm: everybit's own engine does not pass caches on")
    if split and deployment.split.pp * deployment.split.dp > 1:
        raise SourceError("--decode-replicas splits phases between whole replicas: leave --pp and --dp out")
    return simulate(
        requests,
        paced.pool(args.replicas, context, target, args.router, name="prompts" if split else "replica", holds=split),
        decode=paced.pool(args.decode_replicas, context, target, args.router, name="decode") if split else None,
        link=_link(args, deployment, context) if split else None,
        users=args.users,
        think_s=args.think or 0.0,
    )


def _link(args: argparse.Namespace, deployment: Deployment, context: int) -> Link:
    from everybit.plan.simulate.run import Link

    gbps = args.link_gbps
    if gbps is None:
        between = deployment.card.link(deployment.card.devices_per_node + 1)
        gbps = between.bytes_per_s * deployment.split.devices / 1e9
    return Link(gbps, deployment.model.cache_bytes(context) / context)


def _bill(
    args: argparse.Namespace,
    deployment: Deployment,
    document: dict[str, Any],
    usd: float | None,
    g_per_kwh: float | None,
) -> dict[str, float | None]:
    """Of the whole run: what is idle at the end of a trace is paid as well."""
    devices = deployment.split.devices * (args.replicas + (args.decode_replicas or 0))
    tokens_per_s = document["throughput"]["output_tokens_per_s"]
    joules = [one["joules"] for one in document["replicas"].values()]
    seconds = document["throughput"]["seconds"] + args.warmup
    watts = None if None in joules else sum(joules) / seconds
    return {
        "devices": devices,
        "usd_per_h": None if usd is None else usd * devices,
        "usd_per_mtok": None if usd is None else usd * devices / 3600 / tokens_per_s * 1e6,
        "watts": watts,
        "joules_per_token": None if watts is None else watts / tokens_per_s,
        "gco2e_per_h": None if watts is None or g_per_kwh is None else watts / 1e3 * g_per_kwh,
    }


# --- what is said
def _text(
    args: argparse.Namespace, deployment: Deployment, documents: dict[str, dict[str, Any]], rests: dict[str, str]
) -> list[str]:
    from everybit.cli.plan.output import figure, table

    rows = []
    for label, path in _ROWS.items():
        values = [_at(one, path) for one in documents.values()]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else figure(value) for value in values)])
    first = next(iter(documents.values()))
    replicas = f"{args.replicas} + {args.decode_replicas}" if args.decode_replicas else str(args.replicas)
    tokens = [one["precision"]["tokens"] for one in documents.values() if one["precision"]]
    for bits in sorted({bits for one in tokens for bits in one}):
        shares = (100 * one.get(bits, 0) / sum(one.values()) for one in tokens)
        rows.append([f"tokens at {bits} bits, %", *map(figure, shares)])
    lines = [
        f"{args.model} on {replicas} replicas of {deployment.split.devices} x {deployment.card.name}, {args.engine}: "
        f"{first['requests']['scored']} requests scored, {first['requests']['failed']} failed",
        table(["", *documents], rows),
        f"rests on: {rests['efficiencies']}; figures of the card: {rests['card']}",
        rests["price"],
    ]
    refused = first["requests"]["failed"]
    return [*lines, *(["failed requests count as outside the SLO"] if refused else [])]


def _tell(trace: Trace) -> str:
    from everybit.plan.simulate.traces import tell_skipped

    return f"trace: {trace.rows:,} rows read, skipped {tell_skipped(trace.skipped) or 'none'}"


_ROWS = {
    "TTFT p50, ms": "latency.ttft_ms.p50",
    "TTFT p99, ms": "latency.ttft_ms.p99",
    "TPOT p50, ms": "latency.tpot_ms.p50",
    "TPOT p99, ms": "latency.tpot_ms.p99",
    "E2E p50, ms": "latency.e2e_ms.p50",
    "output tokens/s": "throughput.output_tokens_per_s",
    "requests/s": "throughput.requests_per_s",
    "inside the SLO": "goodput.share",
    "fluidity, mean": "fluidity.mean",
    "smooth streams": "fluidity.smooth_share",
    "mean bits": "precision.mean_bits",
    "$/h": "bill.usd_per_h",
    "$/Mtok": "bill.usd_per_mtok",
    "J/token": "bill.joules_per_token",
    "gCO2e/h": "bill.gco2e_per_h",
}


def _at(document: dict[str, Any], path: str) -> float | None:
    found: Any = document
    for name in path.split("."):
        found = None if found is None else found[name]
    return None if found is None else float(found)
