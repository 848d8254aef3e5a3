"""Other people's quantization methods, as small functions, to be compared with ours on equal terms.

    values, bits_per_weight = peers.find(["gptq"])[0].load()(weights, 4, statistics)

One file per family, written from the paper. Nothing here is used by `everybit quantize`.
"""

from __future__ import annotations

from everybit.quantize.peers.method import Method, Quantize, Statistics, UnfitError
from everybit.quantize.peers.registry import DEFAULT, METHODS, find

__all__ = ["DEFAULT", "METHODS", "Method", "Quantize", "Statistics", "UnfitError", "find"]
