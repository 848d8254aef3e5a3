"""What a plan buys: KL to the float model of plans against uniform precisions, at equal bits per weight.

    python benchmarks/bit_plans.py OVERLAY --reference MODEL --text HELDOUT --calibration TEXT
        [--budgets 2.5,3,3.5,4] [--group weight]

A budget of 3 is the size of 3 bits everywhere, codebooks counted; 3.5 lies halfway between those of 3 and 4. There a
plan stands against the uniform precisions on both sides, interpolated in (bpw, log KL), and against the mean of random
mixes of the two of the same size. Prints a card, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everybit import evaluate
from everybit.allocate import GROUPS, MAX_TOKENS, allocate
from everybit.engine.plan import Plan, Precision, read_bytes
from everybit.evaluate.report import align
from everybit.formats import Overlay
from everybit.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="the float model")
    parser.add_argument("--text", type=Path, required=True, help="to judge on")
    parser.add_argument("--calibration", type=Path, required=True, help="to choose plans on")
    parser.add_argument("--budgets", default="2.5,3,3.5,4", help="mean bits, between two of the overlay's")
    parser.add_argument("--group", choices=GROUPS, default="weight")
    parser.add_argument("--random", type=int, default=5, help="random mixes a budget")
    parser.add_argument("--max-tokens", type=int, default=12_288, help="of the text to judge on")
    parser.add_argument("--allocate-tokens", type=int, default=MAX_TOKENS)
    args = parser.parse_args()

    with Overlay.open(args.overlay) as overlay:
        sizes = {bits: size.bpw for bits, size in overlay.sizes().rows.items()}
        rows = []
        for text in args.budgets.split(","):
            low, high = neighbours(float(text), overlay.bits)
            part = 0.0 if low == high else (float(text) - low) / (high - low)
            bpw = sizes[low] + part * (sizes[high] - sizes[low])
            found = allocate(
                args.overlay,
                f"{bpw:.12f}bpw",
                text=args.calibration,
                group=args.group,
                max_tokens=args.allocate_tokens,
            )
            greedy = found.solutions["greedy"].cost / found.solutions["ilp"].cost
            mixes = [random_mix(overlay, low, high, bpw, seed) for seed in range(args.random if low != high else 0)]
            rows.append((text, low, high, bpw, found.plan, greedy, mixes))

    precisions: list[Precision] = [*sizes, *(plan for row in rows for plan in (row[4], *row[6]))]
    kl = dict(zip(map(id, precisions), judge(args, precisions), strict=True))
    uniform = {bits: kl[id(bits)] for bits in sizes}
    lines = [["budget", "bpw", "KL plan", "KL uniform", "plan / uniform", "KL random", "sum of costs", "greedy / ilp"]]
    results = []
    for text, low, high, bpw, plan, greedy, mixes in rows:
        flat = uniform[low]
        if low != high:
            at = (bpw - sizes[low]) / (sizes[high] - sizes[low])
            flat = math.exp((1 - at) * math.log(uniform[low]) + at * math.log(uniform[high]))
        mixed = float(np.mean([kl[id(mix)] for mix in mixes])) if mixes else None
        own = kl[id(plan)]
        figures = [f"{plan.bpw:.3f}", f"{own:.4g}", f"{flat:.4g}", f"{own / flat:.3f}", f"{mixed:.4g}" if mixed else ""]
        lines.append([text, *figures, f"{plan.predicted_kl:.4g}", f"{greedy:.4f}"])
        results.append(
            {"budget": text, "bpw": plan.bpw, "kl": own, "kl_uniform": flat, "kl_random": mixed}
            | {"predicted_kl": plan.predicted_kl, "greedy_over_ilp": greedy, "bits": list(plan.bits.values())}
        )
    print(align(lines))
    print(
        "uniform: " + ", ".join(f"{bits} bits {sizes[bits]:.2f} bpw KL {value:.4g}" for bits, value in uniform.items())
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {"overlay": args.overlay.name, "uniform": uniform, "rows": results, "command": " ".join(sys.argv)}
    print(json.dumps({**document, "commit": commit}))


def neighbours(mean: float, bits: Sequence[int]) -> tuple[int, int]:
    """The precisions on both sides of a mean; twice the same where it is one of them."""
    low = max((b for b in bits if b <= mean), default=None)
    high = min((b for b in bits if b >= mean), default=None)
    if low is None or high is None:
        raise SystemExit(f"bit_plans: budget {mean} arrived, expected {bits[0]} to {bits[-1]}")
    return low, high


def random_mix(overlay: Overlay, low: int, high: int, bpw: float, seed: int) -> Plan:
    """Weights in random order go from `low` to `high` while the budget lasts."""
    bits = {name: spec.served_bits(low) for name, spec in overlay.weights.items()}
    left = bpw * overlay.sizes().parameters / 8
    left -= sum(read_bytes(overlay, overlay.weights[name], own) for name, own in bits.items())
    for name in np.random.default_rng(seed).permutation(list(bits)).tolist():
        spec = overlay.weights[name]
        more = read_bytes(overlay, spec, spec.served_bits(high)) - read_bytes(overlay, spec, bits[name])
        if more <= left:
            bits[name] = spec.served_bits(high)
            left -= more
    return Plan.of(overlay, bits)


def judge(args: argparse.Namespace, precisions: Sequence[Precision]) -> list[float]:
    """KL to the float model at each precision, exact arithmetic, nats per token."""
    context = 512
    windows = evaluate.windows(
        Tokenizer.open(args.overlay), evaluate.read_documents(args.text), context, max_tokens=args.max_tokens
    )
    with (
        evaluate.EngineModel.open(args.overlay, context) as model,
        evaluate.EngineModel.open(args.reference, context) as reference,
    ):
        report = evaluate.evaluate(
            model,
            range(len(precisions)),
            windows,
            reference,
            set_precision=lambda index: model.set_precision(precisions[index]),
            threads=model.runtime.threads,
        )
    return [float(row.kl_mean or 0.0) for row in report.rows]


if __name__ == "__main__":
    main()
