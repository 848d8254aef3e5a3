"""What the server itself costs: time per streamed piece, time added to the first token, start to ready.

    python benchmarks/server_overhead.py OVERLAY [--tokens 512] [--rounds 15]

Per piece: tokens of one greedy stream through HTTP against the same tokens from a batcher in this process, in pairs;
the difference of the wall times over the number of tokens, with the client, sockets and two threads that share an
interpreter in it. `own_us_per_piece`: processor time of the event loop's thread from the ASGI application's door in and
out, no sockets: what our code takes for a piece. First token: a stream's first piece against the batcher's first event.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cpu_decode import machine
from everybit.batching.batcher import Batcher
from everybit.batching.fluidity import Target
from everybit.batching.scheduler import Request
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.server.app import Server as App
from everybit.server.app import Settings
from everybit.server.served import Served as ServedModel
from everybit.tokenizer import Tokenizer
from peers.served import commit, serving, write_line


def direct(batcher: Batcher, id: int, prompt: list[int], tokens: int, bits: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and their number."""
    begin, first, found = time.perf_counter(), 0.0, 0
    batcher.submit(Request(id, tuple(prompt), tokens, bits, tenant=id), Sampling(temperature=0))
    while batcher.busy:
        found += len(batcher.step())
        first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin, found


def streamed(
    connection: http.client.HTTPConnection, name: str, prompt: list[int], tokens: int, bits: int, salt: str
) -> tuple[float, float, int]:
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "precision": bits}
    body |= {"stream": True, "ignore_eos": True, "cache_salt": salt}
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, pieces = 0.0, 0
    while line := response.readline():
        if line.startswith(b"data: {"):
            pieces += 1
            first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin, pieces


def own(overlay: Path, tokens: int, bits: int, rounds: int, threads: int) -> list[float]:
    """Microseconds of the event loop's thread for each piece, of each round, without sockets."""
    target = Target(1_000_000_000, 100_000_000)
    served = ServedModel.open(
        "model", overlay, bits="auto", plans={}, threads=threads, mode="fast", context=None, sequences=8,
        kv_dtype="float16", budget=512, queue=64, target=target, speculate=False,
    )  # fmt: skip
    server = App({"model": served}, Settings())
    body = {"model": "model", "prompt": "Once", "max_tokens": tokens, "temperature": 0, "precision": bits}
    sent = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "headers": headers,
    }
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "", "client": None}
    scope["asgi"] = {"version": "3.0", "spec_version": "2.3"}

    async def measure() -> list[float]:
        found = []
        async with server.running():
            for _ in range(rounds):
                pieces, messages = 0, [{"type": "http.request", "body": sent, "more_body": False}]

                async def receive() -> Any:
                    return messages.pop() if messages else await asyncio.Event().wait()  # noqa: B023

                async def send(message: Any) -> None:
                    nonlocal pieces
                    pieces += message["type"] == "http.response.body"

                begin = time.thread_time()
                await server.app({**scope, "state": {}}, receive, send)
                found.append(1e6 * (time.thread_time() - begin) / pieces)
        return found

    return asyncio.run(measure())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = ["--threads", str(args.threads), "--no-speculation"]
    starts = []
    for _ in range(3):
        with serving(args.overlay, *options) as server:
            starts.append(server.ready_s)
    with (
        serving(args.overlay, *options) as server,
        Runtime.open(args.overlay, threads=args.threads, mode="fast", sequences=8) as runtime,
    ):
        batcher = Batcher(runtime, speculate=False)
        prompt = Tokenizer.open(args.overlay).encode("Once upon a time there was")
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        rows = []
        for i in range(args.rounds + 2):
            pair = {}
            for who in ("direct", "server") if i % 2 else ("server", "direct"):
                if who == "direct":
                    pair[who] = direct(batcher, i, prompt, args.tokens, args.bits)
                else:
                    pair[who] = streamed(connection, server.name, prompt, args.tokens, args.bits, str(i))
            if i >= 2:
                rows.append(pair)
    per_token = [1e6 * (r["server"][1] - r["direct"][1]) / args.tokens for r in rows]
    added = [1e3 * (r["server"][0] - r["direct"][0]) for r in rows]
    line = {
        "benchmark": "server_overhead",
        "overlay": args.overlay.name,
        "tokens": args.tokens,
        "threads": args.threads,
        "us_per_token": _spread(per_token),
        "added_first_token_ms": _spread(added),
        "own_us_per_piece": _spread(own(args.overlay, args.tokens, args.bits, args.rounds, args.threads)),
        "direct_us_per_token": _spread([1e6 * r["direct"][1] / args.tokens for r in rows]),
        "pieces_per_stream": statistics.median(r["server"][2] for r in rows),
        "ready_s": _spread(starts),
        "commit": commit(),
        "machine": machine(),
        "command": "python " + " ".join(sys.argv),
    }
    print(f"per token {line['us_per_token']} us, of it ours {line['own_us_per_piece']} us a piece")
    print(f"first token +{line['added_first_token_ms']} ms, ready after {line['ready_s']} s")
    write_line(args.out, line)
    return 0


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


if __name__ == "__main__":
    sys.exit(main())
