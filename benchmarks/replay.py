"""Do replays of traces hold their schedule? `everybit bench run --trace` against its mock server, at 1x and 20x.

    python benchmarks/replay.py --azure azure_llm_2023_conv.csv --mooncake mooncake_conversation_head.jsonl

The mock answers after 50 ms with 16 tokens, so that the schedule is tested and not the server. Each run takes --seconds
(60): at 20x it replays the first 20 minutes of the trace. Lag is sent - intended, of each request. `transit_ms`: from
sending to the arrival of the last byte at the mock, the difference of the means of what the bench saw and what the mock
did. Bytes are those of the prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_decode import machine
from everybit.bench.mock.asks import CHARACTERS_PER_TOKEN
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.bench.mock.truth import fetch_truth
from everybit.bench.statistics import percentile
from peers.served import commit, write_line

SCRIPT = Script(ttft_ms=50, tokens=16)
MOST_LAG_MS = 10.0


def replay(trace: Path, speed: float, workers: int | None, seconds: float) -> dict[str, Any]:
    """One run's figures."""
    command = [sys.executable, "-m", "everybit.cli.main", "bench", "run"]
    options = ["--api", "completions", "--trace", str(trace), "--slice", f":{seconds * speed:.9g}s"]
    options += ["--speed", f"{speed:g}", "--idle", "0", "--quiet", "--json"]
    options += ["--workers", str(workers)] if workers else []
    with running(SCRIPT) as url:
        run = subprocess.run([*command, url, *options], capture_output=True, text=True)
        if not run.stdout:
            raise SystemExit(run.stderr)
        truth = [one for one in fetch_truth(url) if len(one.written_ns) == SCRIPT.tokens]
    result = json.loads(run.stdout)
    columns = result["requests"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in result["requests"]["rows"]]
    lags = sorted(row["sent_ms"] - row["intended_ms"] for row in rows if row["sent_ms"] is not None)
    took = rows[-1]["intended_ms"] / 1000
    waited = [(one.written_ns[0] - one.arrived_ns) / 1e6 for one in truth]
    late = sorted((one.written_ns[0] - one.due_ns[0]) / 1e6 for one in truth)
    return {
        "workers": result["load"]["workers"],
        "requests": len(rows),
        "failed": sum(bool(row["error"]) for row in rows),
        "requests_per_s": round(len(rows) / took, 1),
        "megabytes_per_s": round(CHARACTERS_PER_TOKEN * sum(row["prompt"] or 0 for row in rows) / took / 1e6, 2),
        "lag_ms": {
            "mean": round(sum(lags) / len(lags), 3),
            **{f"p{q}": round(percentile(lags, q), 3) for q in (50, 99)},
            "max": round(lags[-1], 3),
        },
        "held": percentile(lags, 99) <= MOST_LAG_MS,
        "valid": result["validity"]["valid"],
        "reasons": result["validity"]["reasons"],
        "transit_ms": round(result["metrics"]["latency"]["ttft_from_sent_ms"]["mean"] - sum(waited) / len(waited), 3),
        "mock_late_p99_ms": round(percentile(late, 99), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--azure", type=Path, required=True)
    parser.add_argument("--mooncake", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60, help="of each run (default 60)")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1, 20])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4], help="0: what the bench chooses itself")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shown = " ".join(Path(one).name if one.startswith("/") else one for one in sys.argv)
    common = {"benchmark": "replay", "seconds": args.seconds, "commit": commit(), "machine": machine()}
    common["command"] = f"python {shown}"
    lines = []
    for trace in (args.azure, args.mooncake):
        for speed in args.speeds:
            for workers in args.workers:
                figures = replay(trace, speed, workers or None, args.seconds)
                line = {**common, "trace": trace.name, "speed": speed, "chosen": not workers, **figures}
                write_line(args.out, line)
                lines.append(line)
    for line in lines:
        lag = line["lag_ms"]
        print(
            f"{line['trace'][:8]} {line['speed']:g}x, {line['workers']} workers{' (its choice)' * line['chosen']}:"
            f" {line['requests_per_s']} requests/s, {line['megabytes_per_s']} MB/s,"
            f" sent late by {lag['mean']} ms, p99 {lag['p99']}, max {lag['max']}:"
            f" {'held' if line['held'] else 'NOT HELD'}{'' if line['valid'] else ', run invalid'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
