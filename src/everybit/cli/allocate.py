"""`everybit allocate OVERLAY --budget 3.4bpw`: a precision for each weight, within a budget."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.options import add_machine_options, positive_int
from everybit.errors import OutputError

if TYPE_CHECKING:
    from everybit.allocate import Allocation


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "allocate",
        help="choose a precision for each weight, within a budget",
        description="Measure how much each weight minds each precision (once; kept beside the overlay), and write the "
        "plan of least summed cost within a budget. No weights are copied: everybit generate --bits PLAN.json runs it.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="folder made by everybit quantize")
    parser.add_argument(
        "--budget", required=True, help="bits per weight (3.4bpw), bytes read (1.2GB, 900MiB) or time (25ms/token)"
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: text the model writes)")
    parser.add_argument("--out", metavar="PLAN.json", help="file to write (default: OVERLAY.BUDGET.plan.json)")
    parser.add_argument(
        "--method", choices=("ilp", "greedy"), default="ilp", help="exact (default; needs scipy) or step by step"
    )
    parser.add_argument(
        "--group",
        choices=("weight", "layer"),
        default="weight",
        help="what shares a precision: a weight (default) or a transformer layer's weights, with fewer measurements",
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, default=4096, metavar="N", help="tokens to measure on (default 4096)"
    )
    parser.add_argument("--cache", metavar="FILE", help="measurements (default: OVERLAY.sensitivities.json)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_machine_options(parser, "default", "default: default")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.allocate import Budget, allocate, beside
    from everybit.engine.plan import is_plan

    budget = Budget.parse(args.budget)
    name = budget.text.replace(" ", "").replace("/", "-per-")
    out = Path(args.out) if args.out else beside(args.overlay, f"{name}.plan.json")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: its folder does not exist; make it, or choose another name with --out")
    if out.exists() and not is_plan(out):  # before the measuring
        raise OutputError(f"{out} exists and is not a plan: choose another name with --out, or remove it")
    found = allocate(
        args.overlay,
        budget,
        text=args.text,
        group=args.group,
        method=args.method,
        max_tokens=args.max_tokens,
        mode=args.mode,
        threads=args.threads,
        cache=args.cache,
    )
    found.plan.save(out)
    document = describe(found, args.method)
    print(json.dumps({"plan": str(out), **document}) if args.json else table(found, document))
    print(f"everybit: wrote {out}", file=sys.stderr)
    return 0


def describe(found: Allocation, method: str) -> dict[str, Any]:
    """Everything that is printed, as one JSON object."""
    plan = found.plan
    return {
        "budget": plan.budget,
        "method": method,
        "bpw": plan.bpw,
        "bytes": plan.bytes,
        "predicted_kl": plan.predicted_kl,
        "totals": {name: {"predicted_kl": one.cost, "gap": one.gap} for name, one in sorted(found.solutions.items())},
        "predicted_ms": found.predicted_ms,
        "measured_ms": found.measured_ms,
        "units": {unit.name: found.solutions[method].choices[unit.name] for unit in found.units},  # type: ignore[index]
    }


def table(found: Allocation, document: dict[str, Any]) -> str:
    """The document for people."""
    plan = found.plan
    lines = [f"{unit:<56} {bits}" for unit, bits in document["units"].items()]
    lines += ["", f"{plan.bpw:.3f} bits per weight, {plan.bytes:,} bytes read, for a budget of {plan.budget}"]
    for name, total in document["totals"].items():
        gap = f", at most {total['gap']:.1%} above the least" if total["gap"] > 1e-6 else ""
        chosen = " (chosen)" if name == document["method"] and len(document["totals"]) > 1 else ""
        lines.append(f"sum of costs by {name}: KL {total['predicted_kl']:.4g} nats per token{gap}{chosen}")
    if found.measured_ms is not None:
        predicted = "unknown" if found.predicted_ms is None else f"{found.predicted_ms:.3f}"
        lines.append(f"milliseconds per token: predicted {predicted}, measured {found.measured_ms:.3f}")
    return "\n".join(lines)
