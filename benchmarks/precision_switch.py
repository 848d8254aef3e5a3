"""What a change of precision in the middle of a text costs: the KV cache holds what the precision before wrote.

    python benchmarks/precision_switch.py OVERLAY --text FILE [--past 256] [--more 64] [--pieces 24]

For precisions A and B: a text's first `past` tokens are read at A, the next `more` scored at B. Beside it, all at B
(what `recompute` gives). Printed: KL(all at B || read at A), nats per token, and the loss (nats per token) of both and
of A throughout; so one sees whether the switch gets what B is worth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cpu_decode import machine
from everybit.engine.runtime import Runtime
from everybit.tokenizer import Tokenizer
from peers.served import commit, write_line


def scores(runtime: Runtime, past: list[int], more: list[int], before: int, after: int) -> Any:
    """Log-probabilities f64[len(more), V] of what follows each token of `more`."""
    runtime.reset()
    runtime.prefill(0, past, before)
    logits = np.concatenate(list(runtime.score(0, more, after))).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--more", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--pairs", default="8:3,8:4,4:8,3:8,2:8")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ids = Tokenizer.open(args.overlay).encode(args.text.read_text(encoding="utf-8"))
    length = args.past + args.more + 1
    starts = np.linspace(0, len(ids) - length, args.pieces).astype(int).tolist()
    with Runtime.open(args.overlay, mode="fast", context=length) as runtime:
        for pair in args.pairs.split(","):
            before, after = map(int, pair.split(":"))
            kl, losses = [], {"switched": [], "recomputed": [], "not_switched": []}
            for start in starts:
                piece = ids[start : start + length]
                past, more, next_ = piece[: args.past], piece[args.past : -1], piece[args.past + 1 :]
                found = {
                    "switched": scores(runtime, past, more, before, after),
                    "recomputed": scores(runtime, past, more, after, after),
                    "not_switched": scores(runtime, past, more, before, before),
                }
                same, other = found["recomputed"], found["switched"]
                kl.append((np.exp(same) * (same - other)).sum(1).mean())
                for name, logprobs in found.items():
                    losses[name].append(-logprobs[np.arange(len(next_)), next_].mean())
            line = {"benchmark": "precision_switch", "overlay": args.overlay.name, "before": before, "after": after}
            line |= {"kl": round(float(np.mean(kl)), 5)}
            line |= {f"loss_{name}": round(float(np.mean(values)), 4) for name, values in losses.items()}
            line |= {"past": args.past, "more": args.more, "pieces": args.pieces, "commit": commit()}
            write_line(args.out, {**line, "machine": machine(), "command": "python " + " ".join(sys.argv)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
