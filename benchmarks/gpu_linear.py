"""The GPU kernels on the shapes of Llama-3.1-8B against cuBLAS, the copy bandwidth and the original's kernels.

    python benchmarks/gpu_linear.py [--original FOLDER] [--out FILE] [--only check,gemv,gemm]

Weights are random and rotate among copies larger than the L2 cache; launches are captured in a CUDA graph and the
median of its replays counts. FOLDER holds original.py, wrappers of the kernels of Any-Precision LLM that are no part of
this repository. Prints a card and writes one JSON line for each figure.
"""

# ruff: noqa: B023  (launches run within the loop that makes them)
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everybit.formats.codebooks import CODEBOOKS
from everybit.formats.compact import Compact
from everybit.gpu import launch
from everybit.gpu.layout import make_tables, tile_planes

SHAPES = {  # [N, K]
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "qkv": (6144, 4096),
    "gate, up": (14336, 4096),
    "gate+up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
BITS = (3, 4, 5, 6, 7, 8)
CACHE = 300e6  # bytes that rotate
records: list[dict[str, Any]] = []


def compact(rows: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.0005, 0.001, rows).astype(np.float32)
    luts = {b: rng.integers(-127, 128, (rows, 1 << b)).astype(np.int8) for b in (2, 3, 4)}
    centres = rng.integers(-127, 128, (rows, 16)).astype(np.int8)
    ladders = rng.integers(1, 9, (rows, 16)).astype(np.uint8)
    return Compact.pack(scale, luts, centres, ladders, (scale * rng.uniform(0.05, 0.3, rows)).astype(np.float32))


def timed(launches: list[Callable[[], Any]], repeats: int = 15) -> tuple[float, float]:
    """Median and spread (max - min of the middle half) in microseconds of one launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in launches[:2]:
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in launches:
                run()
        graph.replay()
        found = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / len(launches))
    found.sort()
    return statistics.median(found), found[3 * repeats // 4] - found[repeats // 4]


def note(**record: Any) -> None:
    records.append({"figure": "ours"} | record)


def copies(bytes_each: float) -> int:
    return max(2, min(64, int(-(-CACHE // bytes_each))))


def bandwidth() -> float:
    """Bytes read and written, the fastest of two kinds of copy, in GB/s."""
    a = torch.empty(1 << 29, dtype=torch.float16, device="cuda").normal_()
    b = torch.empty_like(a)
    found = [timed([run] * 3)[0] for run in (lambda: b.copy_(a), lambda: torch.neg(a, out=b))]
    return 4 * a.numel() / min(found) / 1e3


def check(args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    worst: dict[str, float] = {}
    for N, K in ((4096, 4096), (300, 1096), (129, 520)):
        codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, device="cuda")
        padded = torch.nn.functional.pad(codes, (0, -K % 8)).view(N, -1, 8)
        weights = 1 << torch.arange(8, device="cuda")
        planes = torch.stack([((padded >> (7 - k) & 1) * weights).sum(-1).to(torch.uint8) for k in range(8)])
        tiles, arrays = tile_planes(planes, K), compact(N)
        for dtype in (torch.float16, torch.bfloat16):
            for bits in (2, *BITS):
                tables = make_tables(CODEBOOKS["compact"], arrays, bits, dtype).to("cuda")
                table = torch.from_numpy(CODEBOOKS["compact"].expand(arrays, bits)).cuda()
                W = torch.gather(table, 1, (codes >> (8 - bits)).long()).double()
                for M in args.tokens:
                    x = torch.randn(M, K, device="cuda").to(dtype)
                    if M <= 16:
                        got = {"gemv": launch.gemv(launch.whole_tiles(x), tiles, tables, bits, N)}
                    else:
                        got = {
                            f"gemm {how}": launch.gemm(x, tiles, tables, bits, N, *how) for how in args.blocks or [[]]
                        }
                    want = x.double() @ W.T
                    for name, y in got.items():
                        error = ((y.double() - want).norm() / want.norm()).item()
                        limit = 1e-3 if dtype == torch.float16 else 6e-3
                        key = f"{name} {dtype}"
                        worst[key] = max(worst.get(key, 0), error if error == error else 9)
                        if not error < limit:
                            print("WRONG", name, dtype, bits, (N, K, M), error, flush=True)
    print("check:", {k: f"{v:.1e}" for k, v in worst.items()}, flush=True)
    note(figure="check", worst=worst)


class Ours:
    """Random weights of one shape, several copies."""

    def __init__(self, N: int, K: int, dtype: torch.dtype, amount: int) -> None:
        self.N, self.K = N, K
        self.planes = [
            torch.randint(0, 256, (8, -(-N // 16), -(-K // 256), 32, 16), dtype=torch.uint8, device="cuda")
            for _ in range(amount)
        ]
        arrays = compact(N)
        self.tables = {b: make_tables(CODEBOOKS["compact"], arrays, b, dtype).to("cuda") for b in BITS}

    def launches(self, x: torch.Tensor, bits: int, *how: int) -> list[Callable[[], Any]]:
        """One for each copy: by the kernel that everybit takes, or as `how` says."""
        tables = self.tables[bits]
        if not how:
            return [lambda p=p: launch.times(x, p, tables, bits, self.N) for p in self.planes]
        run = launch.gemv if len(x) <= 16 else launch.gemm
        return [lambda p=p: run(x, p, tables, bits, self.N, *how) for p in self.planes]


def gemv(args: argparse.Namespace, copy: float, original: Any) -> None:
    for name, (N, K) in SHAPES.items():
        if name not in args.shapes:
            continue
        amount = copies(3 / 8 * N * K)
        ours = Ours(N, K, args.dtype, amount)
        dense = [torch.randn(N, K, device="cuda", dtype=args.dtype) for _ in range(copies(2 * N * K))]
        for M in args.tokens:
            x = torch.randn(M, K, device="cuda", dtype=args.dtype)
            us, _ = timed([lambda w=w: torch.matmul(x, w.T) for w in dense])
            note(figure="cublas", dtype=str(args.dtype), shape=name, M=M, us=us)
            line = f"{name:9} M={M:<3} cublas {us:7.1f} us |"
            for bits in BITS:
                best = None
                for how in args.blocks or [[]]:
                    us, spread = timed(ours.launches(x, bits, *how))
                    note(shape=name, M=M, bits=bits, us=us, spread=spread, how=how, dtype=str(args.dtype))
                    best = us if best is None else min(best, us)
                share = N * K * bits / 8 / best / 1e3 / copy
                line += f" {bits}b {best:6.1f} ({share:.0%})"
            print(line, flush=True)
            if original is not None:
                line = f"{'':9}       original             |"
                for bits in BITS:
                    lut = torch.randn(N, 1 << bits, device="cuda", dtype=torch.float16)
                    out = torch.empty(M, N, device="cuda", dtype=torch.float16)
                    planes = [
                        p.view(8, -1)[:, : N * K // 8].contiguous().view(torch.int32).view(8, N, K // 32)
                        for p in ours.planes[: copies(bits / 8 * N * K)]
                    ]
                    scratch = torch.empty(N, K, device="cuda", dtype=torch.float16)
                    us, _ = timed(
                        [lambda p=p: original.linear(x, p, lut, bits, out=out, weight=scratch) for p in planes]
                    )
                    note(figure="original", shape=name, M=M, bits=bits, us=us)
                    line += f" {bits}b {us:6.1f}      "
                print(line, flush=True)
        del ours, dense


def gemm(args: argparse.Namespace) -> None:
    for name, (N, K) in SHAPES.items():
        if name not in args.shapes:
            continue
        for dtype in (torch.float16, torch.bfloat16):
            ours = Ours(N, K, dtype, 2)
            dense = [torch.randn(N, K, device="cuda", dtype=dtype) for _ in range(2)]
            for M in args.many:
                x = torch.randn(M, K, device="cuda", dtype=dtype)
                us, _ = timed([lambda w=w: torch.matmul(x, w.T) for w in dense], 7)
                note(figure="cublas", dtype=str(dtype), shape=name, M=M, us=us)
                line = (
                    f"{name:9} {str(dtype)[6:]:8} M={M:<5} cublas {us:7.1f} us {2 * M * N * K / us / 1e6:.0f} TFLOP/s |"
                )
                for bits in (3, 4, 6, 8):
                    for how in args.blocks or [[]]:
                        mine, _ = timed(ours.launches(x, bits, *how), 7)
                        note(dtype=str(dtype), shape=name, M=M, bits=bits, how=how, us=mine)
                        line += f" {bits}b{'/' if how else ''}{'x'.join(map(str, how))} {us / mine:.2f}x"
                print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="check,gemv,gemm")
    parser.add_argument("--shapes", type=lambda s: s.split("|"), default=list(SHAPES))
    parser.add_argument("--tokens", type=lambda s: [int(v) for v in s.split(",")], default=[1, 4, 8, 16, 64])
    parser.add_argument("--dtype", type=lambda s: getattr(torch, s), default=torch.float16, help="of the gemv part")
    parser.add_argument("--many", type=lambda s: [int(v) for v in s.split(",")], default=[512, 2048])
    parser.add_argument("--blocks", type=lambda s: [[int(v) for v in b.split("x")] for b in s.split(",")], default=[])
    args = parser.parse_args()
    begin = time.time()
    copy = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy:.0f} GB/s (reads + writes)", flush=True
    )
    note(figure="copy", gbs=copy, gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    original = None
    if args.original:
        sys.path.insert(0, str(args.original))
        from original import Original

        original = Original()
    steps = {"check": lambda: check(args), "gemv": lambda: gemv(args, copy, original), "gemm": lambda: gemm(args)}
    for step in args.only.split(","):
        steps[step]()
        print(f"{step}: {time.time() - begin:.0f} s", flush=True)
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in records))


if __name__ == "__main__":
    main()
