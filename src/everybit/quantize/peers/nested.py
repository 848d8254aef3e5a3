"""Tables of free values per row: the original Any-Precision clustering, SqueezeLLM's, and guided coordinate descent.

Tables are counted: float16 ones are 16 * 2^bits / K bits per weight on top of the codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everybit.quantize.peers.method import F32, SCALE_BITS, Statistics, half
from everybit.quantize.solvers import Solution, solve
from everybit.quantize.solvers.guided import solve_guided

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


def lnq(weights: F32, bits: int, statistics: Statistics) -> tuple[F32, float]:
    """Guided coordinate descent for this one bit-width: the solver guided with a single precision, int8 tables.

    Shapes: f32[N, K] -> f32[N, K]
    Source: LNQ with GuidedQuant (2505.07004), sections 3 and 4
    """
    solution = solve_guided(weights, statistics.guided(), statistics.sensitivity(), [bits])
    stored_bits = 8 * sum(array.nbytes for array in solution.codebook.values())
    return solution.values_at(bits), bits + stored_bits / weights.size


def _as_stored(solution: Solution, bits: int) -> tuple[F32, float]:
    table = half(solution.table_at(bits), "table entries")
    codes: NDArray[np.intp] = solution.codes_at(bits).astype(np.intp)
    return np.take_along_axis(table, codes, axis=1), bits + SCALE_BITS * (1 << bits) / codes.shape[1]
