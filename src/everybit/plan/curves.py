"""How long a product takes by the rows of its input: four numbers that a probe of seven shapes tells.

Weight-only formats are no fixed speed-up: their kernels read less, but unpack first. Each has a curve of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from everybit.errors import SourceError
from everybit.plan.efficiency import Reading, WeightOnly

FEW_ROWS = 2  # that TensorRT-LLM's matrix-vector kernels multiply as fast as one

# (m, n, k): few, some and many rows, each of small and large weights, tell launch, reading and arithmetic apart.
PROBE = (
    (1, 4096, 4096),
    (1, 8192, 16384),
    (16, 4096, 4096),
    (16, 16384, 8192),
    (64, 8192, 8192),
    (256, 4096, 4096),
    (512, 8192, 8192),
)


class Product(NamedTuple):
    """m rows times weights of n x k, measured."""

    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Curve:
    """`few`: share of the bandwidth up to `FEW_ROWS` rows. `bits`: stored for each weight."""

    bits: float
    bytes_per_s: float
    flops: float
    memory: float
    few: float
    compute: float
    fixed_s: float

    def seconds(self, m: float, n: int, k: int) -> float:
        moved = (n * k * self.bits / 8 + 2 * m * (n + k)) / self.bytes_per_s
        reading = min(moved / self.memory, moved / self.few * max(1.0, m / FEW_ROWS))
        return self.fixed_s + max(reading, 2 * m * n * k / self.flops / self.compute)


def fit_curve(products: Sequence[Product], bits: float, bytes_per_s: float, flops: float) -> Curve:
    """From measured products, by robust least squares of log times.

    Raises: SourceError for fewer than 4, or times that are not above 0
    """
    if len(products) < 4 or any(min(one) <= 0 for one in products):
        raise SourceError(f"{len(products)} products arrived, expected 4 or more with times above 0: probe again")
    start = np.log([0.75, 0.75, 0.65, 5e-6])

    def residuals(x: np.ndarray) -> np.ndarray:
        curve = Curve(bits, bytes_per_s, flops, *np.exp(x))
        errors = [math.log(curve.seconds(m, n, k) / seconds) for m, n, k, seconds in products]
        return np.concatenate([errors, 0.1 * (x - start)])  # where few rows were not probed, the start stays

    bounds = np.log([[0.02, 0.02, 0.02, 1e-7], [1, 1, 1, 1e-3]])
    x = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1).x
    return Curve(bits, bytes_per_s, flops, *map(float, np.exp(x)))


def compare(low: Curve, plain: Curve) -> WeightOnly:
    """What `Efficiency` holds of a weight-only format: its curve over that of plain products on the same card.

    What its kernels for many rows miss of the bandwidth is taken for unpacking, which other widths need as well.
    """
    return WeightOnly(
        Reading(least=low.bits / 8 * plain.memory / low.memory),
        Reading(low.few / plain.memory),
        FEW_ROWS,
        low.compute / plain.compute,
        max(0.0, low.fixed_s - plain.fixed_s),
    )
