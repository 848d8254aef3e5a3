"""What the benchmark's servers share: the model shapes, the line protocol and waiting until a process is idle.

Imported by scripts of several Python environments: standard library only.

A server prints `ready`, then reads one command a line from stdin and answers with one line of JSON: `info`,
`decode STEPS BATCH`, `prefill TOKENS` (everybit's take BITS as a last word) and `quit`. Times are seconds. It answers
when its threads have stopped spinning, so that whatever the driver runs next has the processors to itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CONTEXT = 1024  # positions of each sequence
PROMPT = 8  # tokens in the cache before the first decode step


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder; `tied` says that the head is the embedding."""

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    bias: bool = False
    tied: bool = False

    @property
    def kv(self) -> int:
        """Rows of the key and of the value projection."""
        return self.hidden // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name and [N, K] of the matrices of one layer, in Hugging Face's names."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }


SHAPES = {
    "tinyllama-1.1b": Shape("llama", 2048, 5632, 22, 32, 4, 32000),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, bias=True, tied=True),
    "llama3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama7b-8l": Shape("llama", 4096, 11008, 8, 32, 32, 32000),
    "tiny": Shape("llama", 256, 768, 2, 4, 2, 1024),  # to try the scripts
}


def token(index: int, sequence: int, vocabulary: int) -> int:
    """A fixed, unremarkable token: what is generated does not change the time it takes."""
    return (index * 7919 + sequence * 104729 + 13) % vocabulary


def settle(limit_s: float = 1.0) -> None:
    """Returns when this process has used less than a tenth of a processor for 2 ms (OpenMP spins for a while)."""
    end = time.perf_counter() + limit_s
    while (start := time.perf_counter()) < end:
        used = time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start):
            return
    raise SystemExit(f"threads still ran {limit_s} s after a command: expected an idle process, see OMP_WAIT_POLICY")


def serve(commands: Mapping[str, Callable[..., object]]) -> None:
    """Answers commands (integer arguments) until `quit` or the end of stdin; an error is answered as {"error": ...}."""
    settle()
    print("ready", flush=True)
    for line in sys.stdin:
        word, *arguments = line.split() or [""]
        if word == "quit":
            return
        try:
            if word not in commands:
                raise ValueError(f"command {word!r} arrived, expected one of {', '.join(commands)} or quit")
            answer = commands[word](*map(int, arguments))
        except Exception as error:  # the driver decides what a failed row means
            answer = {"error": f"{type(error).__name__}: {error}"}
        settle()
        print(json.dumps(answer), flush=True)
