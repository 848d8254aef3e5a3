"""How long the solver guided takes, how that grows with K, and what an 8B model would take.

    python benchmarks/guided_speed.py [--columns 1024,2048,4096,14336] [--threads 0]

Rows are Gaussian, Hessians those of correlated inputs (one group). Time per row does not depend on the number of rows,
so a few rows of each width stand for a layer. Times are processor time, summed over threads. Prints a card, then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from everybit.quantize.solvers.guided import solve_guided

BITS = (2, 3, 4, 5, 6, 7, 8)
# Llama-3.1-8B: (rows, K) of the matrices of one of 32 layers.
LAYERS, LAYER = (
    32,
    ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", default="1024,2048,4096,14336")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    threads = args.threads or os.cpu_count() or 1
    rng = np.random.default_rng(0)
    core_ms = {}
    for columns in (int(k) for k in args.columns.split(",")):
        rows = max(2 * threads, 1 << 17 >> (columns.bit_length()))
        inputs = rng.standard_normal((columns, columns // 8), dtype=np.float32)
        hessian = inputs @ inputs.T
        hessian[np.arange(columns), np.arange(columns)] += hessian.trace() / columns / 4
        weights = (0.02 * rng.standard_normal((rows, columns))).astype(np.float32)
        took = []
        for _ in range(args.rounds):
            began = time.process_time()
            solve_guided(weights, hessian[None], None, BITS, threads)
            took.append((time.process_time() - began) / rows * 1e3)
        core_ms[columns] = statistics.median(took)
        memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        spread = f"{min(took):.1f}-{max(took):.1f}"
        print(f"K {columns:6d}: {core_ms[columns]:8.1f} core-ms a row ({spread}), peak {memory_gb:.2f} GB", flush=True)
    result: dict[str, object] = {"core_ms_per_row": core_ms, "threads": threads}
    if {k for _, k in LAYER} <= set(core_ms):
        core_h = LAYERS * sum(rows * core_ms[k] for rows, k in LAYER) / 3.6e6
        result["llama_8b_core_hours"] = core_h
        print(f"Llama-3.1-8B: {core_h:.0f} core-hours, {core_h / 16:.1f} h on 16 such cores, {core_h / 2:.0f} h on 2")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({**result, "command": " ".join(sys.argv), "commit": commit}))


if __name__ == "__main__":
    main()
