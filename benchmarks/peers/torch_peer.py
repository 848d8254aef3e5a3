"""torch as a peer: a plain stack of the shape's bf16 linear layers, decode only, on the line protocol of protocol.py.

    python benchmarks/peers/torch_peer.py SHAPE --threads 2

No attention, norms or cache: a lower bound of what a torch model at bf16 needs for a token.
"""

from __future__ import annotations

import argparse
import time

import torch
from protocol import SHAPES, Shape, serve


class Stack:
    """One random matrix for every linear layer, head included."""

    def __init__(self, shape: Shape) -> None:
        sizes = list(shape.linears().values()) * shape.layers + [(shape.vocabulary, shape.hidden)]
        self.weights = [torch.empty(size, dtype=torch.bfloat16).normal_(std=size[1] ** -0.5) for size in sizes]

    def decode(self, steps: int, batch: int) -> list[float]:
        """Seconds of each step after one that is not counted."""
        inputs = {w.shape[1]: torch.randn(batch, w.shape[1], dtype=torch.bfloat16) for w in self.weights}
        seconds = []
        with torch.inference_mode():
            for _ in range(steps + 1):
                start = time.perf_counter()
                for weight in self.weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)
                seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def info(self) -> dict[str, object]:
        """Sizes in the protocol's words."""
        return {"bpw": 16.0, "read_bytes": sum(w.nbytes for w in self.weights), "version": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stack = Stack(SHAPES[args.shape])
    serve({"decode": stack.decode, "info": stack.info})


if __name__ == "__main__":
    main()
