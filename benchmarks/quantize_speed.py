"""Weights per second of every solver beside the original's library, after checking their errors.

    python benchmarks/quantize_speed.py [--data DIR] [--threads 2] [--rounds 7] [--optimum-rows 24]

Matrices: GPT-2's attention matrices (768 x 768, DIR/weights/gpt2-124m-attention) with random sensitivities, and one
synthetic 256 x 4096. A round times each contender once, in turn, so that a busy machine slows all alike; timed is
all of it: sort, codes and codebooks of every precision. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from everybit.quantize.solvers import reference, solve
from library_pipeline import library_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = [f"layers.{layer}.{kind}_proj.weight" for layer in (0, 5, 11) for kind in "qkvo"]
TREE_BITS, UPSCALE_BITS = tuple(range(2, 9)), tuple(range(3, 9))


def load(folder: Path) -> dict[str, np.ndarray]:
    data = (folder / "weights" / "gpt2-124m-attention" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name in NAMES:
        begin, end = (8 + size + at for at in header[name]["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], np.float16).reshape(header[name]["shape"]).astype(np.float32)
    return found


def errors(weights: np.ndarray, s: np.ndarray, values: dict[int, np.ndarray]) -> dict[int, float]:
    return {b: float((s * (weights.astype(np.float64) - v) ** 2).sum()) for b, v in values.items()}


def library_errors(weights: np.ndarray, s: np.ndarray, state: int) -> dict[int, float]:
    codes, tables = library_pipeline(weights, s, UPSCALE_BITS[0], 8, state)
    full = dict(zip(UPSCALE_BITS, tables, strict=True))
    values = {b: np.take_along_axis(table, (codes >> (8 - b)).astype(np.intp), 1) for b, table in full.items()}
    return errors(weights, s, values)


def check(weights: np.ndarray, s: np.ndarray, optimum_rows: int) -> dict[str, dict[int, float]]:
    """Percent: upscale over the library (3 seeds each), tree over upscale, tree over the optimum of some rows."""
    seeds = range(3)
    library = [library_errors(weights, s, 10007 * seed) for seed in seeds]
    runs = [solve(weights, s, UPSCALE_BITS, "upscale", seed=seed) for seed in seeds]
    upscale = [errors(weights, s, {b: run.values_at(b) for b in UPSCALE_BITS}) for run in runs]
    tree_run = solve(weights, s, TREE_BITS)
    tree = errors(weights, s, {b: tree_run.values_at(b) for b in TREE_BITS})
    rows = np.linspace(0, len(weights) - 1, optimum_rows).astype(int)
    some = errors(weights[rows], s[rows], {b: tree_run.values_at(b)[rows] for b in (2, 3, 4)})
    best = dict.fromkeys((2, 3, 4), 0.0)
    for row in rows:
        for b, e in reference.optimal_errors(reference.Points.of(weights[row], s[row]), (2, 3, 4)).items():
            best[b] += e

    def mean(all_runs: list[dict[int, float]], b: int) -> float:
        return float(np.mean([run[b] for run in all_runs]))

    return {
        "upscale_over_library": {b: 100 * (mean(upscale, b) / mean(library, b) - 1) for b in UPSCALE_BITS},
        "tree_over_upscale": {b: 100 * (tree[b] / mean(upscale, b) - 1) for b in UPSCALE_BITS},
        "tree_over_optimum": {b: 100 * (some[b] / best[b] - 1) for b in best},
    }


def measure(weights: np.ndarray, s: np.ndarray, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by contender."""
    contenders: dict[str, Callable[[], object]] = {
        "library": lambda: library_pipeline(weights, s, 3, 8, 0),
        "upscale": lambda: solve(weights, s, UPSCALE_BITS, "upscale", threads=threads),
        "tree": lambda: solve(weights, s, TREE_BITS, "tree", threads=threads),
        "uniform": lambda: solve(weights, s, TREE_BITS, "uniform", threads=threads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ > 0:  # the first warms caches and threads up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--optimum-rows", type=int, default=24)
    parser.add_argument("--matrices", type=int, default=len(NAMES), help="only the first few")
    options = parser.parse_args()
    numba.set_num_threads(options.threads)

    rng = np.random.default_rng(1000)
    matrices = dict(list(load(options.data).items())[: options.matrices])
    matrices["gaussian 256 x 4096"] = rng.standard_normal((256, 4096)).astype(np.float32)
    quality: dict[str, dict[str, dict[int, float]]] = {}
    speed: dict[str, dict[str, list[float]]] = {}
    print("errors in %: upscale - library | tree - upscale (both 3..8 bits) | tree - optimum (2, 3, 4 bits)")
    for name, weights in matrices.items():
        s = rng.exponential(size=weights.shape).astype(np.float32)
        quality[name] = check(weights, s, options.optimum_rows if weights.shape[1] < 1024 else 1)
        print(f"  {name:24s}", *(" ".join(f"{x:6.2f}" for x in q.values()) + " |" for q in quality[name].values()))
    print("million weights per second: median (min .. max); times the library's median")
    for name, weights in matrices.items():
        s = rng.exponential(size=weights.shape).astype(np.float32)
        seconds = measure(weights, s, options.threads, options.rounds)
        speed[name] = {k: sorted(weights.size / t / 1e6 for t in v) for k, v in seconds.items()}
        middle = {k: float(np.median(v)) for k, v in speed[name].items()}
        cells = (f"{k} {middle[k]:6.1f} ({v[0]:.1f} .. {v[-1]:.1f}) {middle[k] / middle['library']:4.1f}x"
                 for k, v in speed[name].items())  # fmt: skip
        print(f"  {name:24s}", "  ".join(cells))
    card = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "machine": processor(),
        "threads": options.threads,
        "million_weights_per_s": speed,
        "excess_percent": quality,
    }
    print(json.dumps(card))


if __name__ == "__main__":
    main()
