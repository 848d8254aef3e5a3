"""The definition of sampling, in numpy and float64: parity tests hold native/src/engine/sample.cc to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from everybit.engine.sampling import Sampling

F64 = NDArray[np.float64]
_MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1) with 53 bits, a function of its arguments alone."""
    counter = (position & _MASK, position >> 32, stream & _MASK, stream >> 32)
    high, low, _, _ = philox(counter, (seed & _MASK, seed >> 32))
    return float(((high << 32 | low) >> 11) * 2.0**-53)


def penalize(logits: F64, history: Mapping[int, int], sampling: Sampling) -> F64:
    """Logits after penalties; `history` maps each token so far to how often it was generated (0: prompt only)."""
    out = logits.copy()
    for token, generated in history.items():
        x = out[token]
        x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        out[token] = x - sampling.frequency_penalty * generated - (sampling.presence_penalty if generated else 0)
    return out


def distribution(logits: NDArray[np.floating], history: Mapping[int, int], sampling: Sampling) -> F64:
    """The probability of every token; zero for what the filters exclude.

    Shapes: f[V] -> f64[V]
    Needs:  temperature above 0, a finite logit
    """
    x = penalize(np.asarray(logits, np.float64), history, sampling) / sampling.temperature
    p = np.exp(x - x.max())
    order = np.argsort(-x, kind="stable")  # falling, ties to the lower id
    if 0 < sampling.top_k < len(p):
        p[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]  # the mass of the tokens ahead of each
        p[order[before >= sampling.top_p * p.sum()]] = 0
    p[p < sampling.min_p] = 0  # the largest is 1
    return np.asarray(p / p.sum(), np.float64)


def choose(logits: NDArray[np.floating], history: Mapping[int, int], sampling: Sampling, position: int) -> int:
    """The token that `Sampler` chooses, but for rounding at the edges of the filters and of the draw."""
    if sampling.temperature == 0:
        return int(np.argmax(penalize(np.asarray(logits, np.float64), history, sampling)))
    edges = np.cumsum(distribution(logits, history, sampling))
    return int(np.searchsorted(edges, uniform(sampling.seed, position) * edges[-1], side="right"))
