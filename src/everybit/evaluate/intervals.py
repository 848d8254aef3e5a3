"""How far a figure may be off: 95 % intervals from a paired block bootstrap.

Tokens of one document are correlated, so whole blocks of text are resampled, never single tokens. A resample draws as
many blocks as there are, with replacement, and every model is measured on the same draw: what is hard in a block is
hard for all of them and cancels in their ratio.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile intervals); blocks of
text as in Koehn, Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 1000
LEAST_BLOCKS = 8  # below, a percentile interval is far too narrow (with 8 blocks one of 95 % covers some 88 %)
LEAST_DOCUMENTS = 20  # below, windows are the blocks: neighbours in a document touch at their ends only
HELD = 1 << 22  # drawn counts held at once, 32 MB

Interval = tuple[float, float]


@dataclass(frozen=True)
class Blocks:
    """What is resampled: which run of scored tokens is one block, and what to call it.

    `starts` are the first tokens of the blocks, ascending from 0; `of` is `documents` or `windows`.
    """

    starts: NDArray[np.intp]
    tokens: int
    of: str

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> F64:
        """Tokens of each block."""
        return np.diff(np.append(self.starts, self.tokens)).astype(np.float64)

    def sums(self, per_token: NDArray[np.floating]) -> F64:
        """The sum of each block. Shapes: [tokens] -> f64[blocks]"""
        return np.asarray(np.add.reduceat(per_token.astype(np.float64), self.starts))


def blocks(lengths: Sequence[int], documents: Sequence[int] = ()) -> Blocks:
    """The blocks of windows with `lengths` scored tokens: documents where there are enough of them, else windows.

    `documents` numbers the document of each window, ascending; empty, every window stands for itself.
    """
    starts = np.cumsum([0, *lengths[:-1]])
    if len(set(documents)) < LEAST_DOCUMENTS:
        return Blocks(starts, sum(lengths), "windows")
    first = np.flatnonzero(np.diff(np.asarray(documents), prepend=documents[0] - 1))
    return Blocks(starts[first], sum(lengths), "documents")


def resample(sums: F64, seed: int = 0, resamples: int = RESAMPLES) -> F64:
    """Sums over blocks that are drawn with replacement, the same draw for every column.

    Shapes: f64[blocks, series] -> f64[resamples, series]
    Cost:   resamples * blocks draws; at most 32 MB at once. Deterministic by seed
    """
    count = len(sums)
    generator = np.random.default_rng(seed)
    out = np.empty((resamples, sums.shape[1]))
    step = max(1, HELD // count)
    with np.errstate(invalid="ignore"):  # infinite sums: 0 * inf
        for at in range(0, resamples, step):
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - at))
            out[at : at + step] = drawn.astype(np.float64) @ sums
    return out


def interval(samples: F64, level: float = LEVEL) -> Interval | None:
    """The central `level` of resampled values; None where one of them is not finite."""
    if not np.isfinite(samples).all():
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(samples, (tail, 1 - tail))
    return float(low), float(high)


@dataclass(frozen=True)
class Sums:
    """What the blocks of a text add up to, f64[blocks] each: enough for the interval of every figure.

    `nll` and `kl` by precision, in nats; `kl` is empty and `reference` None without a float model.
    """

    of: str  # what the blocks are
    tokens: F64
    reference: F64 | None
    nll: Mapping[int, F64]
    kl: Mapping[int, F64]

    def kl_interval(self, *precisions: int, seed: int = 0) -> Interval | None:
        """Of the mean KL, itself the mean of `precisions`. None without a float model or with fewer than 8 blocks."""
        if not self.kl or len(self.tokens) < LEAST_BLOCKS:
            return None
        kl = np.mean([self.kl[p] for p in precisions], axis=0)
        drawn = resample(np.stack([kl, self.tokens], axis=1), seed)
        return interval(drawn[:, 0] / drawn[:, 1])

    def ratio_interval(self, *precisions: int, seed: int = 0) -> Interval | None:
        """Of perplexity / the float model's, geometric mean of `precisions`. None as for `kl_interval`."""
        if self.reference is None or len(self.tokens) < LEAST_BLOCKS:
            return None
        nll = np.mean([self.nll[p] for p in precisions], axis=0)
        drawn = resample(np.stack([nll, self.reference, self.tokens], axis=1), seed)
        with np.errstate(invalid="ignore", over="ignore"):
            return interval(np.exp((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2]))


def plus_minus(found: Interval | None) -> str:
    """` ±0.00081`, half the interval's width to two digits; empty without one."""
    return "" if found is None else f" ±{(found[1] - found[0]) / 2:.2g}"
