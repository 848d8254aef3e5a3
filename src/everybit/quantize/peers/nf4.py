"""NF4: sixteen quantiles of a normal distribution, scaled by the greatest weight of a block of 64.

Source: Dettmers et al., QLoRA (2305.14314), section 3 and appendix E (the table); bitsandbytes keeps one float32
maximum per block, blocks running on from row to row. Its double quantization (4.13 bits per weight) is not used.
"""

from __future__ import annotations

import numpy as np

from everybit.quantize.peers.method import F32, Statistics

BLOCK = 64
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def nf4(weights: F32, bits: int, statistics: Statistics) -> tuple[F32, float]:
    """The nearest of 16 values times the block's greatest.

    Shapes: f32[N, K] -> f32[N, K]. Bits per weight: 4 + 32 / 64 (a last block may be shorter)
    """
    blocks = -(-weights.size // BLOCK)
    padded = np.zeros((blocks, BLOCK), np.float32)
    padded.reshape(-1)[: weights.size] = weights.reshape(-1)
    most = np.abs(padded).max(axis=1, keepdims=True)
    scaled = np.divide(padded, most, out=np.zeros_like(padded), where=most > 0)
    codes = np.searchsorted((TABLE[:-1] + TABLE[1:]) / 2, scaled)
    values = (TABLE[codes] * most).reshape(-1)[: weights.size].reshape(weights.shape)
    return values, 4 + 32 * blocks / weights.size
