"""What `everybit plan probe` predicts of our own engine on this machine, beside what the engine does.

    python benchmarks/plan_cpu.py [--rounds 3] [--seconds 10] [--threads 2] [--out FILE] [--work FOLDER]

The probe sees products of random planes and layers without products, no model. Its calibration then predicts steps of
overlays of random planes at real shapes (`--shapes`): decoding with `--batches` sequences, and prompts of `--prefill`
tokens. Rounds alternate a probe and a pass over all measured cells; both sides keep their best, for other programs can
only slow them down. With one thread, what it waited for a processor does not count (Linux).

Measured are whole steps, tokens in to logits in memory. `error` is predicted over measured tokens per second, minus 1.
Printed as a table, written as JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

from everybit_peer import Ours  # noqa: E402
from protocol import PROMPT, token  # noqa: E402
from served import commit  # noqa: E402

from cpu_decode import numbers  # noqa: E402
from everybit.cli.plan.probe import measure  # noqa: E402
from everybit.errors import SourceError  # noqa: E402
from everybit.plan.cost import Cost  # noqa: E402
from everybit.plan.model import read_model  # noqa: E402
from everybit.plan.probe import calibration_of, card_of  # noqa: E402
from everybit.plan.step import Step  # noqa: E402

STEPS = 8  # decoded in a cell of a round
LIMIT = 0.15
Cell = tuple[str, str, int, int]  # shape, phase, size (sequences or tokens), bits


def overlay(work: Path, shape: str) -> Path:
    """The folder of a shape, made on first use."""
    folder = work / f"{shape}-compact"
    if not (folder / "config.json").exists():
        command = [sys.executable, str(PEERS / "synthetic_overlay.py"), shape, str(folder), "--codebook", "compact"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def step_of(phase: str, size: int) -> Step:
    return Step(chunks=((size, 0),)) if phase == "prefill" else Step(decodes=(PROMPT + STEPS // 2,) * size)


def waited_s() -> float:
    """How long threads of this process have waited for a processor so far (Linux)."""
    return sum(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat")) / 1e9


def timed(ours: Ours, step: Callable[[], object]) -> float:
    """Seconds of a step; of one thread, less what it waited."""
    before, start = waited_s(), time.perf_counter()
    step()
    took = time.perf_counter() - start
    return took - (waited_s() - before) * (ours.threads == 1)


def measured(ours: Ours, phase: str, size: int, bits: int) -> float:
    """Seconds of a prompt, or of the best of `STEPS` decoding steps."""
    runtime = ours.empty(1 if phase == "prefill" else size)
    ids = [token(i, 0, ours.vocabulary) for i in range(size)]
    if phase == "prefill":
        return timed(ours, lambda: runtime.prefill(0, ids, bits))
    for sequence in range(size):
        runtime.prefill(sequence, [token(i, sequence, ours.vocabulary) for i in range(PROMPT)], bits)
    return min(timed(ours, lambda: runtime.decode(ids, bits)) for _ in range(STEPS))


def line(cell: Cell, predictions: list[float], times: list[float]) -> dict[str, Any]:
    shape, phase, size, bits = cell
    predicted, took = min(predictions), min(times)
    return {
        "shape": shape,
        "phase": phase,
        "size": size,
        "bits": bits,
        "predicted_tps": round(size / predicted, 2),
        "measured_tps": round(size / took, 2),
        "measured_slowest_tps": round(size / max(times), 2),
        "predicted_spread": [round(size / max(predictions), 2), round(size / predicted, 2)],
        "error": round(took / predicted - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["tinyllama-1.1b", "qwen2.5-0.5b"])
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 8])
    parser.add_argument("--prefill", type=numbers, default=[128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of a probe")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "everybit-plan-cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    phases = [("decode", batch) for batch in args.batches] + [("prefill", tokens) for tokens in args.prefill]
    folders = {shape: overlay(args.work, shape) for shape in args.shapes}
    models = {
        (shape, bits): read_model(folder, weight_bits=bits)
        for (shape, folder), bits in itertools.product(folders.items(), args.bits)
    }
    predictions: defaultdict[Cell, list[float]] = defaultdict(list)
    times: defaultdict[Cell, list[float]] = defaultdict(list)
    for index in range(args.rounds):
        try:
            found = measure(args.threads, args.seconds)
        except SourceError as error:  # too busy: the round is dropped
            print(f"probe {index + 1}: {error}", file=sys.stderr)
            continue
        card, efficiency = card_of(found), calibration_of(found).efficiency
        print(f"probe {index + 1}: {card.name}, {card.main_memory.bytes_per_s / 1e9:.1f} GB/s", file=sys.stderr)
        for shape, folder in folders.items():
            ours = Ours(folder, args.threads, "default")
            for (phase, size), bits in itertools.product(phases, args.bits):
                cell = shape, phase, size, bits
                cost = Cost(models[shape, bits], card, efficiency=efficiency)
                predictions[cell].append(cost.seconds(step_of(phase, size)))
                times[cell].append(measured(ours, phase, size, bits))
    lines = [line(cell, predictions[cell], times[cell]) for cell in times]
    print(f"{'shape':15s} phase    size bits predicted measured  error")
    for one in lines:
        print(f"{one['shape']:15s} {one['phase']:7s} {one['size']:5d} {one['bits']:4d} {one['predicted_tps']:9.1f} "
              f"{one['measured_tps']:8.1f} {one['error']:+7.1%}" + " miss" * (abs(one["error"]) > LIMIT))  # fmt: skip
    errors = [abs(one["error"]) for one in lines]
    summary = {
        "commit": commit(),
        "card": card.name,
        "load": os.getloadavg()[0],
        "bytes_per_s": card.main_memory.bytes_per_s,
        "rounds": len(next(iter(times.values()))),
        "cells": len(errors),
        "within_limit": sum(error <= LIMIT for error in errors),
        "median_error": round(median(errors), 4),
        "worst_error": round(max(errors), 4),
    }
    print(summary)
    if args.out:
        args.out.write_text("".join(json.dumps(one) + "\n" for one in [*lines, summary]), "utf-8")


if __name__ == "__main__":
    main()
