"""Tokens per second of everybit and llama.cpp on this CPU: decode, batches and prefill, in interleaved rounds.

    python benchmarks/cpu_decode.py --peer-python /tmp/peer/bin/python [--shapes tinyllama-1.1b] [--bits 2,3,4] ...

Both sides are processes that stay loaded (benchmarks/peers/) and work one at a time: a round asks ours, then each
peer, then measures the read bandwidth, so that a busy machine slows all alike. Weights are random, at real shapes, the
head is quantized on both sides. Times are whole steps, tokens in to logits in memory; a round's figure is the median
of its steps, a row's the median of its rounds, `ratio` the median of the rounds' own ratios, spreads are [min, max].
`batch` is the number of sequences, and in prefill rows the prompt's tokens; `gbps` is what a token reads (planes and
codebook at these bits, norms, no embedding rows) over its time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

from protocol import SHAPES  # noqa: E402

PAIRS = {2: ["Q2_K"], 3: ["Q3_K", "Q2_K"], 4: ["Q4_K", "Q4_0"], 5: ["Q5_K"], 6: ["Q6_K"], 7: ["Q8_0"], 8: ["Q8_0"]}
HOW_TO = """no --peer-python: measuring everybit alone. To make one (some minutes, needs a C++ compiler):
    python3 -m venv /tmp/peer
    CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON" \\
        /tmp/peer/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf numpy
    (AVX2 only: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON ...")"""


class Server:
    """A process that speaks the line protocol of peers/protocol.py."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.name = " ".join(command)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        if (line := self._read()) != "ready":
            raise SystemExit(f"{self.name}: {line!r} arrived, expected 'ready': run it by hand to see what is wrong")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *words: object) -> Any:
        """One command's answer. Raises: SystemExit with what the server said."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self._read()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if isinstance(answer, dict) and "error" in answer:
            raise SystemExit(f"{self.name}: {' '.join(map(str, words))}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.communicate("quit\n")


def bandwidth(threads: int) -> float | None:
    """Measured read bandwidth in GB/s, None where this build cannot measure it."""
    from everybit import _native

    measure = getattr(_native, "read_bandwidth", None)
    return None if measure is None else float(measure(threads))


def overlay(args: argparse.Namespace, shape: str) -> Path:
    """The folder of our side's model, made on first use."""
    folder: Path = args.work / f"{shape}-{args.codebook}"
    if not (folder / "config.json").exists():
        command = [sys.executable, str(PEERS / "synthetic_overlay.py"), shape, str(folder), "--codebook", args.codebook]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def start_peers(args: argparse.Namespace, shape: str, bits: int, threads: int) -> dict[str, Server]:
    """The peers of one precision, loaded; their files are made on first use."""
    found = {}
    if args.peer_python:
        script = [args.peer_python, str(PEERS / "llama_cpp_peer.py")]
        for kind in PAIRS[bits]:
            file = args.work / f"{shape}-{kind}.gguf"
            if not file.exists():
                command = [*script, "make", shape, str(file), "--type", kind]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
            plain = ["--no-repack"] if args.peer_no_repack else []
            found[kind] = Server([*script, "serve", str(file), "--threads", str(threads), *plain])
    if args.torch:
        command = [sys.executable, str(PEERS / "torch_peer.py"), shape, "--threads", str(threads)]
        found["torch"] = Server(command)
    return found


def measure(
    args: argparse.Namespace, ours: Server, peers: dict[str, Server], case: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one case, one for each peer (or one without)."""
    phase, batch, bits = case["phase"], case["batch"], case["bits"]
    words = ["decode", args.steps, batch] if phase == "decode" else ["prefill", batch]
    peers = {name: peer for name, peer in peers.items() if phase == "decode" or not name.startswith("torch")}
    rounds: dict[str, list[float]] = {name: [] for name in ["ours", *peers]}
    bandwidths = []
    for index in range(args.rounds + 1):  # the first warms up and is dropped
        found = {"ours": batch / median(ours.ask(*words, bits))}
        found |= {name: batch / median(peer.ask(*words)) for name, peer in peers.items()}
        speed = bandwidth(case["threads"])
        if index:
            for name, tps in found.items():
                rounds[name].append(tps)
            bandwidths += [speed] if speed else []
    info, mine = ours.ask("info", bits), rounds["ours"]
    base = {
        **case,
        "ours_tps": median(mine),
        "ours_spread": [min(mine), max(mine)],
        "ours_bpw": info["bpw"],
        "ours_isa": info["isa"],
        "gbps": info["read_bytes"] * median(mine) / batch / 1e9,
        "bandwidth_gbps": median(bandwidths) if bandwidths else None,
    }
    rows = []
    for name, peer in peers.items():
        its, about = rounds[name], peer.ask("info")
        rows.append({
            **base,
            "peer": name,
            "peer_bpw": about["bpw"],
            "peer_tps": median(its),
            "peer_spread": [min(its), max(its)],
            "peer_gbps": about["read_bytes"] * median(its) / batch / 1e9,
            "ratio": median(a / b for a, b in zip(mine, its, strict=True)),
            "peer_system": about.get("system", about.get("version")),
        })  # fmt: skip
    empty = dict.fromkeys(("peer", "peer_bpw", "peer_tps", "peer_spread", "peer_gbps", "ratio", "peer_system"))
    return rows or [{**base, **empty}]


HEAD = (
    f"{'shape':15s} phase   bits thr batch tokens/s {'(min..max)':17s}   bpw   GB/s     of"
    f" | peer       bpw tokens/s {'(min..max)':17s}  ratio"
)


def card(row: dict[str, Any]) -> str:
    """A row for people, under HEAD."""
    low, high = row["ours_spread"]
    text = f"{row['shape']:15s} {row['phase']:7s} {row['bits']:4d} {row['threads']:3d} {row['batch']:5d} "
    text += f"{row['ours_tps']:8.1f} {f'({low:.1f}..{high:.1f})':17s} {row['ours_bpw']:5.2f} {row['gbps']:6.1f} "
    text += f"{row['bandwidth_gbps'] or float('nan'):6.1f}"
    if row["peer"]:
        low, high = row["peer_spread"]
        text += f" | {row['peer']:8s} {row['peer_bpw']:5.2f} {row['peer_tps']:8.1f} {f'({low:.1f}..{high:.1f})':17s} "
        text += f"{row['ratio']:5.2f}x"
    return text


def machine() -> str:
    """The processor's name and how many of it this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a python with llama-cpp-python and gguf; without it, ours alone")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["tinyllama-1.1b"])
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--phases", type=lambda text: text.split(","), default=["decode", "prefill"])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 8], help="sequences decoded together")
    parser.add_argument("--prefill", type=numbers, default=[128, 512], help="prompt lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a round")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "everybit-cpu-decode",
                        help="where made models are kept and found again")  # fmt: skip
    parser.add_argument("--codebook", default="table", help="kind of our synthetic overlay")
    parser.add_argument("--mode", default="default", help="mode of our runtime")
    parser.add_argument("--isa", help="EVERYBIT_ISA for our side (the peer's is fixed when it is built)")
    parser.add_argument("--peer-no-repack", action="store_true", help="llama.cpp without its repacked weight layouts")
    parser.add_argument("--torch", action="store_true", help="also a plain stack of bf16 torch.nn.functional.linear")
    args = parser.parse_args()
    for name, found, known in (("shapes", args.shapes, SHAPES), ("bits", args.bits, PAIRS),
                               ("phases", args.phases, ("decode", "prefill"))):  # fmt: skip
        if unknown := [one for one in found if one not in known]:
            parser.error(f"--{name} {unknown[0]} arrived, expected some of {', '.join(map(str, known))}")
    if args.rounds < 1 or args.steps < 1:
        parser.error(f"--rounds {args.rounds} and --steps {args.steps} arrived, expected at least 1 each")
    return args


def main() -> None:
    args = options()
    if not args.peer_python:
        print(HOW_TO, file=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"load average {load:.1f} before the start, expected an idle machine: a busy core slows two threads more "
              "than twice, stop other jobs", file=sys.stderr)  # fmt: skip
    cases = [("decode", b) for b in args.batches if "decode" in args.phases]
    cases += [("prefill", t) for t in args.prefill if "prefill" in args.phases]
    for shape in args.shapes:
        folder = overlay(args, shape)
        for threads in args.threads:
            command = [sys.executable, str(PEERS / "everybit_peer.py"), str(folder), "--threads", str(threads)]
            ours = Server([*command, "--mode", args.mode], **({"EVERYBIT_ISA": args.isa} if args.isa else {}))
            for bits in args.bits:
                peers = start_peers(args, shape, bits, threads)
                for phase, batch in cases:
                    case = {"shape": shape, "phase": phase, "bits": bits, "threads": threads, "batch": batch}
                    found = measure(args, ours, peers, case)
                    rows += found
                    print(*map(card, found), sep="\n", flush=True)
                for peer in peers.values():
                    peer.close()
            ours.close()
    git = ["git", "-C", str(PEERS), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "machine": machine(), "load": load, "isa": args.isa, "mode": args.mode}
    print(json.dumps({"rows": rows, **about, "command": " ".join(["python", *sys.argv])}))


if __name__ == "__main__":
    main()
