"""`everybit serve` and llama-cpp-python's server: concurrent streams of the same shape, in interleaved rounds.

    python benchmarks/server_compare.py --overlay FOLDER --gguf 4=q4_k.gguf --gguf 8=q8_0.gguf --peer-python PYTHON

The overlay and the GGUF files hold random weights of one shape (peers/synthetic_overlay.py, peers/llama_cpp_peer.py),
both with the tokenizer of peers/words.py (peers/gguf_words.py). A round sends N streams at once, each with its own
prompt of --prompt tokens and --tokens to come, to each server in turn; both stay up, one works at a time. A row is the
median of the rounds, with their range: all streams' tokens over the time from the first request to the last token, and
the median time to a first token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_decode import machine
from peers.served import commit, serving, write_line
from peers.streams import stream

PEER_PORT = 8790


@contextlib.contextmanager
def peer(python: str, gguf: Path, port: int, threads: int, context: int) -> Iterator[int]:
    """llama-cpp-python's server, until the block ends."""
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", str(context)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the peer ended with {process.returncode}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


async def together(port: int, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second of all, and the median ms to a first token."""
    begin = time.perf_counter_ns()
    found = await asyncio.gather(*(stream(port, body) for body in bodies))
    if bad := [one.problem or one.status for one in found if not one.tokens_ns]:
        raise RuntimeError(f"a stream brought nothing: {bad[0]}")
    end = max(one.tokens_ns[-1] for one in found)
    return {
        "tokens_per_s": sum(len(one.tokens_ns) for one in found) / (end - begin) * 1e9,
        "ttft_ms": statistics.median((one.tokens_ns[0] - one.sent_ns) / 1e6 for one in found),
        "tokens": sum(len(one.tokens_ns) for one in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", type=Path, required=True)
    parser.add_argument("--gguf", action="append", required=True, metavar="BITS=FILE")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speculation", action="store_true", help="let ours draft (random weights: it will not)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = ["--threads", str(args.threads)] + ([] if args.speculation else ["--no-speculation"])
    about = {"prompt": args.prompt, "tokens": args.tokens, "threads": args.threads, "commit": commit()}
    about |= {"machine": machine(), "command": "python " + " ".join(sys.argv)}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(serving(args.overlay, *options))
        for place, pair in enumerate(args.gguf):
            bits, _, file = pair.partition("=")
            with peer(args.peer_python, Path(file), PEER_PORT + place, args.threads, 2048) as port:
                for streams in map(int, args.streams.split(",")):
                    rows: dict[str, list[dict[str, float]]] = {"everybit": [], "llama_cpp": []}
                    for turn in range(-1, args.rounds):
                        for who in list(rows) if turn % 2 else list(rows)[::-1]:
                            found = asyncio.run(together(*_bodies(who, ours, port, int(bits), streams, turn, args)))
                            if turn >= 0:
                                rows[who].append(found)
                    line: dict[str, Any] = {"benchmark": "server_compare", "bits": int(bits), "gguf": Path(file).name}
                    line["streams"] = streams
                    for who, found_rows in rows.items():
                        for key in ("tokens_per_s", "ttft_ms", "tokens"):
                            values = [row[key] for row in found_rows]
                            line[f"{who}_{key}"] = round(statistics.median(values), 2)
                            line[f"{who}_{key}_range"] = [round(min(values), 2), round(max(values), 2)]
                    line["ratio"] = round(line["everybit_tokens_per_s"] / line["llama_cpp_tokens_per_s"], 2)
                    write_line(args.out, {**line, **about})
    return 0


def _bodies(
    who: str, ours: Any, port: int, bits: int, streams: int, turn: int, args: argparse.Namespace
) -> tuple[int, list[dict[str, Any]]]:
    """The port, and requests whose prompts have no beginning in common: nothing is to be found in a cache."""
    texts = [
        (f"{chr(97 + (i + 5 * turn) % 26)}{turn}{who[0]}.{i} " * args.prompt)[: args.prompt] for i in range(streams)
    ]
    common: dict[str, Any] = {"max_tokens": args.tokens, "temperature": 0}
    if who == "everybit":
        return ours.port, [
            {**common, "model": ours.name, "prompt": t, "precision": bits, "ignore_eos": True} for t in texts
        ]
    return port, [{**common, "prompt": text, "logit_bias": {"1": -100}} for text in texts]


if __name__ == "__main__":
    sys.exit(main())
