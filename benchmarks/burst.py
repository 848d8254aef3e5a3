"""A burst at twice the capacity: deadlines missed with `auto` precision and with 8 bits, over HTTP, in real time.

    python benchmarks/burst.py OVERLAY [--trace azure_llm_2023_conv.csv] [--seconds 60] [--modes 8,auto:3-8]

First, the capacity: the highest rate, of rates a factor 1.25 apart, at which the mean fluidity index of the requests
is still 0.9 (Etalon's deadlines; TTFT and TPOT targets below). Then, for each mode, a calm time at half the capacity
of 8 bits, the burst at twice of it, and a calm time again. Arrivals have the gaps of the trace, stretched to the rate;
prompts and answers its lengths, divided (--shrink, --shrink-answers) so that a CPU can serve them at all: it reads
prompts at some 300 tokens/s at every precision, so precision helps where answers are most of the work. A request that
is refused or fails counts as one whose every token missed. One JSON line a run.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cpu_decode import machine
from everybit.batching.fluidity import Pace, Target
from peers.served import Served, commit, serving, write_line
from peers.streams import Stream, stream

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT.parent / "shared" / "data" / "traces" / "azure_llm_2023_conv.csv"
ENOUGH = 0.9  # of deadlines met


def read_trace(path: Path, shrink: int, start: int, shrink_answers: int) -> tuple[list[float], list[tuple[int, int]]]:
    """Gaps between arrivals divided by their mean, and (prompt, answer) lengths in tokens."""
    with path.open() as file:
        rows = list(csv.DictReader(file))[start : start + 4000]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    gaps = [max(0.0, b - a) for a, b in itertools.pairwise(times)]
    mean = statistics.fmean(gaps)
    lengths = [
        (max(8, int(row["ContextTokens"]) // shrink), max(4, int(row["GeneratedTokens"]) // shrink_answers))
        for row in rows
    ]
    return [gap / mean for gap in gaps], lengths


async def load(
    server: Served, precision: dict[str, Any], phases: Sequence[tuple[float, float]], trace: Any, salt: str
) -> list[tuple[int, Stream, int]]:
    """Requests at the rates of `phases` (requests/s, seconds): (phase, stream, tokens asked for) of each."""
    gaps, lengths = trace
    begin, at, number, tasks = asyncio.get_running_loop().time(), 0.0, 0, []
    for phase, (rate, _) in enumerate(phases):
        end = sum(s for _, s in phases[: phase + 1])
        while at < end:
            at += gaps[number % len(gaps)] / rate
            prompt, answer = lengths[number % len(lengths)]
            number += 1
            await asyncio.sleep(max(0.0, begin + at - asyncio.get_running_loop().time()))
            ids = [2 + (number * 7919 + 31 * i) % 256 for i in range(prompt)]
            body = {"model": server.name, "prompt": ids, "max_tokens": answer, "temperature": 0, "cache_salt": salt}
            tasks.append(
                (phase, asyncio.create_task(stream(server.port, {**body, "ignore_eos": True, **precision})), answer)
            )
    return [(phase, await task, answer) for phase, task, answer in tasks]


def judge(found: Sequence[tuple[int, Stream, int]], target: Target, phases: int) -> dict[str, Any]:
    """Misses, fluidity and bits of each phase, and of all."""
    rows: dict[str, Any] = {}
    for phase in [*range(phases), None]:
        fluidities, misses, tokens, refused = [], 0, Counter[int](), 0
        firsts = []
        for at, one, answer in found:
            if phase is not None and at != phase:
                continue
            pace = Pace(target, one.sent_ns)
            for now in one.tokens_ns:
                pace.token(now)
            lost = answer - len(one.tokens_ns)
            refused += lost > 0
            misses += pace.misses + lost
            fluidities.append(pace.hits / (pace.hits + pace.misses + lost))
            tokens.update(one.bits)
            if one.tokens_ns:
                firsts.append((one.tokens_ns[0] - one.sent_ns) / 1e6)
        rows["all" if phase is None else str(phase)] = {
            "requests": len(fluidities),
            "unfinished": refused,
            "misses": misses,
            "fluidity": round(statistics.fmean(fluidities), 4) if fluidities else None,
            "ttft_ms_median": round(statistics.median(firsts), 1) if firsts else None,
            "tokens_by_bits": {str(bits): n for bits, n in sorted(tokens.items())},
            "last_bits": [one.bits[-1] for at, one, _ in found if at == phase and one.bits][-1:],
        }
    return rows


def precision_of(mode: str) -> dict[str, Any]:
    if not mode.startswith("auto"):
        return {"precision": int(mode)}
    low, high = mode.removeprefix("auto:").split("-")
    return {"precision": "auto", "precision_floor": int(low), "precision_ceiling": int(high)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--modes", default="8,auto:3-8")
    parser.add_argument("--shrink", type=int, default=64, help="divides the trace's prompts (default 64)")
    parser.add_argument("--shrink-answers", type=int, default=4, help="divides its answers (default 4)")
    parser.add_argument("--seconds", type=float, default=60, help="of the burst (default 60)")
    parser.add_argument("--probe-s", type=float, default=25, help="of each rate in the capacity search (default 25)")
    parser.add_argument("--calm-s", type=float, default=20)
    parser.add_argument("--first-rate", type=float, default=0.4, help="requests/s at which the search begins")
    parser.add_argument("--ttft-ms", type=float, default=2000)
    parser.add_argument("--tpot-ms", type=float, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--speculation", action="store_true", help="let the server draft; random weights repeat themselves"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = Target(int(args.ttft_ms * 1e6), int(args.tpot_ms * 1e6))
    options = ["--threads", str(args.threads), "--ttft-ms", str(args.ttft_ms), "--tpot-ms", str(args.tpot_ms)]
    options += [] if args.speculation else ["--no-speculation"]
    trace = read_trace(args.trace, args.shrink, 1000, args.shrink_answers)
    about = {
        "overlay": args.overlay.name,
        "shrink": [args.shrink, args.shrink_answers],
        "ttft_ms": args.ttft_ms,
        "tpot_ms": args.tpot_ms,
    }
    about |= {"commit": commit(), "machine": machine(), "command": "python " + " ".join(sys.argv)}
    capacity: dict[str, float] = {}
    modes = args.modes.split(",")
    with serving(args.overlay, *options) as server:
        for mode in modes:
            asyncio.run(load(server, precision_of(mode), [(0.5, 6)], trace, "warm"))
            rate, good, fell = args.first_rate, 0.0, False
            while True:
                found = asyncio.run(load(server, precision_of(mode), [(rate, args.probe_s)], trace, f"{mode}{rate}"))
                row = judge(found, target, 1)["all"]
                write_line(args.out, {"benchmark": "capacity", "mode": mode, "rate": round(rate, 3), **row, **about})
                if row["fluidity"] >= ENOUGH:
                    good = rate
                    if fell:
                        break
                    rate *= 1.25
                elif good:
                    break
                else:
                    fell, rate = True, rate / 1.25
            capacity[mode] = good
        print("capacity, requests/s:", json.dumps(capacity))
        base = capacity[modes[0]]
        phases = [(base / 2, args.calm_s), (2 * base, args.seconds), (base / 2, args.calm_s)]
        rows = {}
        for mode in modes:
            found = asyncio.run(load(server, precision_of(mode), phases, trace, f"burst{mode}"))
            rows[mode] = judge(found, target, 3)
            write_line(args.out, {"benchmark": "burst", "mode": mode, "base_rate": base, "phases": rows[mode], **about})
    if len(modes) == 2:
        fixed, auto = (rows[mode]["all"]["misses"] for mode in modes)
        print(f"misses {fixed} -> {auto}: {100 * (1 - auto / max(fixed, 1)):.1f} % fewer")
        print(f"capacity {capacity[modes[1]] / base:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
