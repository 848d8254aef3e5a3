"""What `everybit bench`, GuideLLM and AIPerf say of a server whose timing is exactly known, side by side.

    python benchmarks/instruments.py --everybit EXECUTABLE --guidellm EXECUTABLE --aiperf EXECUTABLE --tokenizer FOLDER

Each tool is in an environment of its own (ours: pip install ./packaging/bench, executable everybit-bench).
One mock server (first token after 100 ms, then one every 20 ms, 32 in all), each tool in turn, in rounds whose order
goes round. Arrivals are constant: GuideLLM 0.8.1 draws the same "Poisson" gaps in each of its processes, so it sends
clumps, and at another rate. Figures are those of each tool's own exported result. The truth of a run is what the mock
did in it: arrival to first write, and the times between writes. Our time to first token counts from the intended send
(`sent`: from the actual one), theirs from the actual one. AIPerf runs twice: as it comes, when it counts the answer's
tokens with the tokenizer it is given, which need not be the server's, and with --use-server-token-count. `start_s`:
the help of the command that measures, median of 5. `size_mb`: site-packages of the tool's environment, pip included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from cpu_decode import machine
from everybit.bench.mock.run import running
from everybit.bench.mock.script import Script
from everybit.bench.mock.truth import TRUTH, fetch_truth
from everybit.bench.statistics import percentile
from peers.served import commit, write_line

SCRIPT = Script(ttft_ms=100, gap_ms=20, tokens=32)
PROMPT = 64


class ToolError(Exception):
    """With what the tool said."""


@dataclass
class Figures:
    """Of a tool's own result, in ms and requests/s."""

    first: dict[str, float]
    between: float
    requests: int
    rate: float
    more: dict[str, Any]


@dataclass(frozen=True)
class Ask:
    url: str
    rate: float
    count: int
    tokenizer: Path


Tool = Callable[[str, Ask, Path], Figures]


def everybit(executable: str, ask: Ask, folder: Path) -> Figures:
    options = ["--rate", f"{ask.rate:g}", "--burstiness", "constant", "--requests", str(ask.count), "--idle", "0"]
    options += ["--api", "completions", "--prompt", str(PROMPT), "--output-tokens", str(SCRIPT.tokens), "--quiet"]
    _run([executable, "run", ask.url, *options, "-o", "out"], folder)
    result = json.loads((folder / "out/result.json").read_text())
    metrics = result["metrics"]
    latency = metrics["latency"]
    more = {
        "sent": _three(latency["ttft_from_sent_ms"]),
        "lag_p99_ms": latency["lag_ms"]["p99"],
        "valid": result["validity"]["valid"],
    }
    complete, rate = metrics["requests"]["complete"], metrics["throughput"]["requests_per_s"]
    return Figures(_three(latency["ttft_ms"]), latency["gap_ms"]["mean"], complete, rate, more)


def guidellm(executable: str, ask: Ask, folder: Path) -> Figures:
    base = ask.url.removesuffix("/v1")
    options = ["--backend", f"kind=openai_http,target={base},model=mock,request_format=/v1/completions"]
    options += ["--profile", f"kind=constant,rate={ask.rate:g}", "--constraint", f"kind=max_requests,count={ask.count}"]
    options += ["--tokenizer", f"kind=huggingface_auto,model={ask.tokenizer}", "--disable-console"]
    options += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={SCRIPT.tokens}"]
    _run([executable, "run", *options, "--output", "kind=json,path=out.json"], folder)
    metrics = json.loads((folder / "out.json").read_text())["benchmarks"][0]["metrics"]
    first = metrics["time_to_first_token_ms"]["successful"]
    between = metrics["inter_token_latency_ms"]["successful"]["mean"]
    rate = metrics["requests_per_second"]["successful"]["mean"]
    return Figures(_three(first | first["percentiles"]), between, metrics["request_totals"]["successful"], rate, {})


def aiperf(executable: str, ask: Ask, folder: Path, extra: Sequence[str] = ()) -> Figures:
    options = ["-m", "mock", "-u", ask.url.removesuffix("/v1"), "--endpoint-type", "completions", "--streaming"]
    options += ["--tokenizer", str(ask.tokenizer), "--isl", str(PROMPT), "--osl", str(SCRIPT.tokens), "--ui", "none"]
    options += ["--request-rate", f"{ask.rate:g}", "--arrival-pattern", "constant", "--request-count", str(ask.count)]
    options += ["--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(folder), *extra]
    _run([executable, "profile", *options], folder)
    result = json.loads((folder / "profile_export_aiperf.json").read_text())
    first, done, rate = (result[name] for name in ("time_to_first_token", "request_count", "request_throughput"))
    more = {"tokens_an_answer": result["output_sequence_length"]["avg"]}
    between = result["inter_token_latency"]["avg"]
    return Figures(_three(first | {"mean": first["avg"]}), between, round(done["avg"]), rate["avg"], more)


def _three(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary[name] for name in ("mean", "p50", "p99")}


def _run(command: list[str], folder: Path) -> None:
    """Raises: ToolError"""
    # AIPerf 0.13 takes no local tokenizer where this variable is set.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise ToolError("not done after 300 s") from None
    if run.returncode:
        raise ToolError(f"ended with {run.returncode}: {(run.stderr or run.stdout).strip()[-300:]}")


def truth(url: str, count: int) -> dict[str, Any]:
    """Of the last `count` requests: a tool may look at the server before it measures."""
    done = [one for one in fetch_truth(url) if len(one.written_ns) == SCRIPT.tokens][-count:]
    first = sorted((one.written_ns[0] - one.arrived_ns) / 1e6 for one in done)
    gaps = [(b - a) / 1e6 for one in done for a, b in pairwise(one.written_ns)]
    seconds = (done[-1].arrived_ns - done[0].arrived_ns) / 1e9
    return {
        "first": {"mean": statistics.fmean(first), "p50": percentile(first, 50), "p99": percentile(first, 99)},
        "between": statistics.fmean(gaps),
        "requests": len(done),
        "rate": (len(done) - 1) / seconds,
    }


def measure(tool: Tool, executable: str, ask: Ask) -> dict[str, Any]:
    """A run's figures beside the truth, or why there are none."""
    urlopen(Request(ask.url.removesuffix("/v1") + TRUTH, method="DELETE")).close()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = tool(executable, ask, Path(folder))
        except (
            ToolError,
            OSError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:  # the last ones: its result is not whole
            return {"failed": f"{type(error).__name__}: {error}"}
    real = truth(ask.url, ask.count)
    line = {
        "said": {"first": found.first, "between": found.between, "requests": found.requests, "rate": found.rate},
        "more": found.more,
        "truth": real,
        "error_ms": {name: value - real["first"][name] for name, value in found.first.items()},
        "error_between_percent": 100 * (found.between / real["between"] - 1),
    }
    return json.loads(json.dumps(line), parse_float=lambda digits: round(float(digits), 3))  # type: ignore[no-any-return]


def install(executable: str, package: str, command: str) -> dict[str, Any]:
    """Version, size and start of a tool."""
    bin = Path(executable).parent
    ask = [str(bin / "python"), "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    size = ["du", "-skc", *map(str, bin.parent.glob("lib/python*/site-packages"))]
    version, sizes = (subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in (ask, size))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([executable, command, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    return {
        "version": version.strip(),
        "size_mb": round(int(sizes.splitlines()[-1].split()[0]) / 1024),
        "start_s": round(statistics.median(times), 2),
    }


def card(lines: list[dict[str, Any]]) -> str:
    """Means over the rounds."""
    rows = [f"{'':30} {'first token: error of':^26}   between tokens   done   rate"]
    rows.append(f"{'':30} {'mean':>8} {'p50':>8} {'p99':>8} ms {'said':>7} {'error':>7}")
    for rate, name in dict.fromkeys((line["asked_rate"], line["tool"]) for line in lines):
        mine = [line for line in lines if (line["asked_rate"], line["tool"]) == (rate, name)]
        rows += [f"{rate:3g}/s {name:24} {line['failed']}" for line in mine if "failed" in line]
        if done := [line for line in mine if "failed" not in line]:
            errors = [statistics.fmean(line["error_ms"][one] for line in done) for one in ("mean", "p50", "p99")]
            between, requests, rate_said = (
                statistics.fmean(line["said"][one] for line in done) for one in ("between", "requests", "rate")
            )
            percent = statistics.fmean(line["error_between_percent"] for line in done)
            rows.append(
                f"{rate:3g}/s {name:24}{errors[0]:+8.2f} {errors[1]:+8.2f} {errors[2]:+8.2f}    {between:7.2f}"
                f" {percent:+6.1f} % {requests:6g} {rate_said:6.1f}"
            )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everybit", required=True, help="everybit-bench")
    parser.add_argument("--guidellm", required=True)
    parser.add_argument("--aiperf", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder, for the tools that need one")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 100])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tools: list[tuple[str, Tool, str]] = [
        ("everybit", everybit, args.everybit),
        ("guidellm", guidellm, args.guidellm),
        ("aiperf", aiperf, args.aiperf),
        ("aiperf, server's counts", partial(aiperf, extra=["--use-server-token-count"]), args.aiperf),
    ]
    shown = " ".join(Path(one).name if one.startswith("/") else one for one in sys.argv)
    common = {"benchmark": "instruments", "commit": commit(), "machine": machine(), "command": f"python {shown}"}
    for executable, package, command in (
        (args.everybit, "everybit-bench", "run"),
        (args.guidellm, "guidellm", "run"),
        (args.aiperf, "aiperf", "profile"),
    ):
        write_line(args.out, {**common, "tool": package, **install(executable, package, command)})
    lines = []
    with running(SCRIPT) as url:
        for number in range(args.rounds):
            for rate in args.rates:
                ask = Ask(url, rate, round(rate * args.seconds), args.tokenizer.resolve())
                for name, tool, executable in tools[number % len(tools) :] + tools[: number % len(tools)]:
                    line = {**common, "tool": name, "asked_rate": rate, "round": number + 1}
                    line |= measure(tool, executable, ask)
                    write_line(args.out, line)
                    lines.append(line)
    print(card(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
