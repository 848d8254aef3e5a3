"""Solvers on real weights without text: GPT-2's attention matrices under Hessians of a known spectrum.

    python benchmarks/real_weights.py FOLDER [--alphas 0,0.5,1] [--seed 0] [--rows 0] [--threads 0]

FOLDER holds a model.safetensors (../shared/data/weights/gpt2-124m-attention: 12 matrices of 768 x 768). A Hessian
has eigenvalues k^-alpha (alpha 0: the identity, where nothing can be made up for) in a random orthogonal basis, another
one for each matrix. For each precision the ratio of e' H e, summed over a matrix, of `guided` and `tree` (compact
codebooks, one overlay for 2 to 8 bits) to that of `original`: upscale with float16 tables, its seed 2 bits at 2 bits
and 3 above. Tree and upscale are given the Hessian's diagonal. Prints a card of geometric means over matrices (and the
extremes), then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from everybit.quantize.solvers import solve
from everybit.quantize.solvers.guided import solve_guided

BITS = (2, 3, 4, 5, 6, 7, 8)
METHODS = ("guided", "tree")
F32 = NDArray[np.float32]


def spectral_hessian(columns: int, alpha: float, seed: int) -> F32:
    """Eigenvalues k^-alpha, k = 1 to `columns`, in a random orthogonal basis; f32[columns, columns]."""
    basis, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((columns, columns)))
    basis *= np.sign(np.diag(triangle))  # uniform over all bases
    found = (basis * np.arange(1, columns + 1) ** -alpha) @ basis.T
    symmetric: F32 = ((found + found.T) / 2).astype(np.float32)
    return symmetric


def original(weights: F32, sensitivity: F32, seed: int, threads: int) -> dict[int, F32]:
    """Values at each precision, as the original stores them."""
    values = {}
    for bits, scored in ((BITS, BITS[:1]), (BITS[1:], BITS[1:])):
        solution = solve(weights, sensitivity, bits, "upscale", seed, threads)
        for b in scored:
            table = solution.table_at(b).astype(np.float16).astype(np.float32)
            values[b] = np.take_along_axis(table, solution.codes_at(b).astype(np.intp), axis=1)
    return values


def errors(weights: F32, values: Mapping[int, F32], hessian: F32) -> dict[int, float]:
    found = {}
    for bits, own in values.items():
        error = weights.astype(np.float64) - own
        found[bits] = float(np.einsum("rk,rk->", error @ hessian.astype(np.float64), error))
    return found


def ratios(weights: F32, hessian: F32, seed: int, threads: int) -> tuple[dict[str, dict[int, float]], float]:
    """Error of each method over that of the original, by precision; and seconds that guided took."""
    sensitivity = np.ascontiguousarray(np.broadcast_to(np.diagonal(hessian), weights.shape))
    base = errors(weights, original(weights, sensitivity, seed, threads), hessian)
    began = time.perf_counter()
    solutions = {"guided": solve_guided(weights, hessian[None], sensitivity, BITS, threads)}
    took_s = time.perf_counter() - began
    solutions["tree"] = solve(weights, sensitivity, BITS, "tree", threads=threads, codebook="compact")
    found = {}
    for method, solution in solutions.items():
        own = errors(weights, {b: solution.values_at(b) for b in BITS}, hessian)
        found[method] = {b: own[b] / base[b] for b in BITS}
    return found, took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--alphas", default="0,0.5,1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=0, help="of each matrix, evenly spread; 0: all")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    tensors = load_file(args.folder / "model.safetensors")
    matrices = {n: t.astype(np.float32) for n, t in sorted(tensors.items()) if t.ndim == 2}
    rows: list[dict[str, Any]] = []
    for alpha in (float(a) for a in args.alphas.split(",")):
        seconds = 0.0
        for i, (name, whole) in enumerate(matrices.items()):
            weights = np.ascontiguousarray(whole[:: max(1, len(whole) // args.rows)] if args.rows else whole)
            hessian = spectral_hessian(weights.shape[1], alpha, 1000 * args.seed + i)
            found, took_s = ratios(weights, hessian, args.seed, args.threads)
            seconds += took_s
            rows += [{"alpha": alpha, "matrix": name, "method": m, "ratio": r} for m, r in found.items()]
        for method in METHODS:
            print(f"alpha {alpha:g}  {method:7s} {card(rows, alpha, method)}", flush=True)
        print(f"alpha {alpha:g}  guided took {seconds:.0f} s for {len(matrices)} matrices", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({"weights": args.folder.name, "command": " ".join(sys.argv), "commit": commit, "rows": rows}))


def card(rows: list[dict[str, Any]], alpha: float, method: str) -> str:
    cells = []
    for b in BITS:
        own = [r["ratio"][b] for r in rows if r["alpha"] == alpha and r["method"] == method]
        cells.append(f"{b}: {np.exp(np.mean(np.log(own))):.3g} ({min(own):.3g}-{max(own):.3g})")
    return "  ".join(cells)


if __name__ == "__main__":
    main()
