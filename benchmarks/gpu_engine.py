"""Decoding and prompts of the engine on a GPU, with and without CUDA graphs, at every precision.

    python benchmarks/peers/synthetic_overlay.py llama3-8b FOLDER --codebook compact
    python benchmarks/gpu_engine.py FOLDER [--device cuda] [--bits 2-8] [--batches 1,8,16] [--out FILE]

Rounds go through all cells in turn; a line has the median tokens/s of a cell, the slowest and fastest, and the
bytes of weights that a second of decoding reads. Logits come back to the processor at each step, as the sampler needs
them. Random weights: what is written does not matter, only how fast.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from everybit.cli.options import parse_bits
from everybit.engine.runtime import Runtime
from everybit.gpu.engine import Device
from peers.served import commit, write_line

Cell = tuple[bool, str, int, int]  # graphs, phase, sequences or tokens, bits
PROMPT, STEPS = 64, 32


def seconds(runtime: Runtime, phase: str, size: int, bits: int) -> float:
    """Of `STEPS` decoding steps of `size` sequences, or of one prompt of `size` tokens."""
    runtime.reset()
    tokens = np.arange(size if phase == "prompt" else PROMPT) * 7919 % runtime.vocabulary
    if phase == "decode":
        for sequence in range(size):
            runtime.prefill(sequence, tokens, bits)
    begin = time.perf_counter()
    if phase == "prompt":
        runtime.prefill(0, tokens, bits)
    else:
        for step in range(STEPS):
            runtime.decode([step + s for s in range(size)], bits)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--bits", type=parse_bits, default=parse_bits("2-8"))
    parser.add_argument("--batches", type=parse_numbers, default=[1, 8, 16])
    parser.add_argument("--prompts", type=parse_numbers, default=[512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    most = max([*args.prompts, PROMPT + STEPS])
    found: dict[Cell, list[float]] = defaultdict(list)
    for graphs in (True, False):
        make = partial(Device, device=args.device, dtype=args.dtype, graphs=graphs)
        options = {"context": most, "sequences": max(args.batches), "most_tokens": most}
        with Runtime.open(args.overlay, backend=make, **options) as runtime:
            cells = [("decode", size, bits) for size in args.batches for bits in args.bits]
            cells += [("prompt", size, bits) for size in args.prompts for bits in args.bits if not graphs]
            for phase, size, bits in cells:
                seconds(runtime, phase, size, bits)  # kernels are compiled, graphs captured
            for _ in range(args.rounds):
                for phase, size, bits in cells:
                    found[graphs, phase, size, bits].append(seconds(runtime, phase, size, bits))
            name, sizes = runtime.isa, runtime.checkpoint.overlay.sizes()
    for (graphs, phase, size, bits), took in found.items():
        tokens = size if phase == "prompt" else size * STEPS
        line = {"benchmark": "gpu_engine", "commit": commit(), "device": name, "overlay": args.overlay.name}
        line |= {"phase": phase, "size": size, "bits": bits, "graphs": graphs, "rounds": len(took)}
        line |= {key: round(tokens / of(took), 1) for key, of in (("tps", median), ("least", max), ("most", min))}
        if phase == "decode":
            line["weight_gb_per_s"] = round(sizes.rows[bits].bytes * STEPS / median(took) / 1e9, 1)
        write_line(args.out, line)
    return 0


def parse_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
