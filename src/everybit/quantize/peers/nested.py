"""Tables of free values per row: the original Any-Precision clustering, SqueezeLLM's, and guided coordinate descent.

Tables are float16, and counted: 16 * 2^bits / K bits per weight on top of the codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everybit.quantize.peers.method import F32, SCALE_BITS, Quantize, Statistics, UnfitError, half
from everybit.quantize.solvers import Solution, solve

SEED_BITS = 3  # the original's seed; at 2 bits its nesting starts at 2


def upscale(weights: F32, bits: int, statistics: Statistics) -> tuple[F32, float]:
    """Nested codes: k-means at the seed, every cluster cut in two for each bit more. The seed has 3 bits, or 2 at 2.

    Shapes: f32[N, K] -> f32[N, K]
    Source: Any-Precision LLM (2402.10517), section 3; the seed of 3 bits is its default
    """
    asked = list(range(min(bits, SEED_BITS), bits + 1))
    return _as_stored(solve(weights, statistics.sensitivity(), asked, "upscale", statistics.seed), bits)


def squeezellm(weights: F32, bits: int, statistics: Statistics) -> tuple[F32, float]:
    """Weighted k-means of every row for this one bit-width, dense (no sparse outliers kept apart).

    Shapes: f32[N, K] -> f32[N, K]
    Source: SqueezeLLM (2306.07629), section 4.1
    """
    return _as_stored(solve(weights, statistics.sensitivity(), [bits], "upscale", statistics.seed), bits)


def load_lnq() -> Quantize:
    """Layer-wise non-uniform quantization for this one bit-width, guided by the end loss.

    Source: GuidedQuant (2505.07004), section 4
    Raises: UnfitError until quantize/solvers/guided.py has a door for a single bit-width
    """
    raise UnfitError("everybit.quantize.solvers.guided has no door for one bit-width yet")


def _as_stored(solution: Solution, bits: int) -> tuple[F32, float]:
    table = half(solution.table_at(bits), "table entries")
    codes: NDArray[np.intp] = solution.codes_at(bits).astype(np.intp)
    return np.take_along_axis(table, codes, axis=1), bits + SCALE_BITS * (1 << bits) / codes.shape[1]
