"""everybit's side of cpu_decode.py: serves an overlay on the line protocol of protocol.py, in a process like a peer's.

    python benchmarks/peers/everybit_peer.py FOLDER --threads 2 [--mode default]

Every command takes the bits as its last word: `info BITS`, `decode STEPS BATCH BITS`, `prefill TOKENS BITS`. The
environment variable EVERYBIT_ISA chooses the instruction set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from protocol import CONTEXT, PROMPT, serve, token

from everybit.engine.runtime import Runtime
from everybit.formats import Overlay


class Ours:
    """An overlay, and a runtime for each number of sequences asked for."""

    def __init__(self, folder: Path, threads: int, mode: str) -> None:
        self.folder, self.threads, self.mode = folder, threads, mode
        self.overlay = Overlay.open(folder, verify=False)
        self.runtimes: dict[int, Runtime] = {}
        self.vocabulary = self.overlay.spec_of("model.embed_tokens.weight").shape[0]

    def empty(self, sequences: int) -> Runtime:
        """A runtime of `sequences` with an empty cache."""
        if sequences not in self.runtimes:
            self.runtimes[sequences] = Runtime.open(
                self.folder, threads=self.threads, mode=self.mode, isa=None, context=CONTEXT, sequences=sequences
            )
        self.runtimes[sequences].reset()
        return self.runtimes[sequences]

    def decode(self, steps: int, sequences: int, bits: int) -> list[float]:
        """Seconds of each step after a short prompt and one step that is not counted."""
        runtime = self.empty(sequences)
        for s in range(sequences):
            runtime.prefill(s, [token(i, s, self.vocabulary) for i in range(PROMPT)], bits)
        seconds = []
        for place in range(PROMPT, PROMPT + steps + 1):
            tokens = [token(place, s, self.vocabulary) for s in range(sequences)]
            start = time.perf_counter()
            runtime.decode(tokens, bits)
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def prefill(self, length: int, bits: int) -> list[float]:
        """Seconds of one prompt into an empty cache."""
        runtime, tokens = self.empty(1), [token(i, 0, self.vocabulary) for i in range(length)]
        start = time.perf_counter()
        runtime.prefill(0, tokens, bits)
        return [time.perf_counter() - start]

    def info(self, bits: int) -> dict[str, object]:
        """`bpw` of the quantized weights; `read_bytes` of one token: the embedding counts only where it is the head."""
        size = self.overlay.sizes().rows[bits]
        head = any(name.startswith("lm_head.") for name in [*self.overlay.weights, *self.overlay.plain_names()])
        embedding = self.overlay.spec_of("model.embed_tokens.weight").nbytes if head else 0
        return {"bpw": size.bpw, "read_bytes": size.bytes - embedding, "isa": self.empty(1).isa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", default="default")
    args = parser.parse_args()
    ours = Ours(args.folder, args.threads, args.mode)
    serve({"decode": ours.decode, "prefill": ours.prefill, "info": ours.info})


if __name__ == "__main__":
    main()
