"""KL of plans to one reference plan of the same overlay, in nats per token: no float model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from everybit.engine.plan import Precision
from everybit.engine.runtime import Runtime

F32 = NDArray[np.float32]
HELD_BYTES = 512_000_000  # of the reference's logits and probabilities at a time
SLICE_BYTES = 4_000_000  # of one thread's work space
FAR = 60.0  # log-ratios beyond this are summed in another order: e^60 times a probability is still within float32


class Divergence:
    """KL(reference || candidate) of the next token, averaged over the scored tokens of `windows`.

    Cost: one pass of the text for each candidate. Beyond the model: what the reference said, 8 bytes for each token and
    word of the vocabulary; where that passes 512 MB, it is computed again for each call in pieces that do not.
    """

    def __init__(self, runtime: Runtime, windows: Sequence[Sequence[int]], reference: Precision) -> None:
        self.runtime = runtime
        self.reference = reference
        self.tokens = sum(len(window) - 1 for window in windows)
        most = max(1, HELD_BYTES // (8 * runtime.vocabulary))
        self._chunks = list(_chunks(windows, most))
        self._held: tuple[F32, F32] | None = None

    def of(self, candidates: Sequence[Precision]) -> list[float]:
        """Nats per token of each candidate.

        Mutates: sequence 0 of the runtime
        """
        sums = [0.0] * len(candidates)
        with ThreadPoolExecutor(self.runtime.threads) as pool:
            for chunk in self._chunks:
                logits, p = self._refer(chunk)
                for i, candidate in enumerate(candidates):
                    at = 0
                    for piece in _score(self.runtime, chunk, candidate):
                        end = at + len(piece)
                        sums[i] += _sum(logits[at:end], p[at:end], piece, pool)
                        at = end
        return [total / self.tokens for total in sums]

    def _refer(self, chunk: Sequence[Sequence[int]]) -> tuple[F32, F32]:
        """The reference's logits and probabilities for a chunk, kept where it is the only one."""
        if self._held is not None:
            return self._held
        logits = np.concatenate(list(_score(self.runtime, chunk, self.reference)))
        p = np.empty_like(logits)
        _softmax(logits, p)
        if len(self._chunks) == 1:
            self._held = (logits, p)
        return logits, p


def _sum(logits: F32, p: F32, others: F32, pool: ThreadPoolExecutor) -> float:
    """The sum over rows, in slices of rows so that work space stays small."""
    step = max(1, SLICE_BYTES // (4 * logits.shape[1]))

    def one(start: int) -> float:
        rows = slice(start, start + step)
        return float(divergences(logits[rows], p[rows], others[rows]).sum())

    return sum(pool.map(one, range(0, len(logits), step)))


def divergences(logits: F32, p: F32, others: F32) -> NDArray[np.float64]:
    """KL(p || softmax(others)) of each row, where p = softmax(logits).

    With c = others - logits and S = sum(p), KL = log1p(sum(p expm1(c)) / S) - sum(p c) / S. Shifting c by a constant
    changes nothing, so it is centred: then all terms are as small as c, and float32 keeps three digits of a KL of 1e-6,
    which the difference of two cross entropies would not.

    Shapes: f32[T, V] three times -> f64[T]
    """
    c = others - logits
    s = p.sum(axis=1, dtype=np.float64)
    c -= (_dot(p, c) / s).astype(np.float32)[:, None]
    far = c.max(axis=1) > FAR
    with np.errstate(over="ignore", invalid="ignore"):
        first = _dot(p, c)
        kl = np.maximum(np.log1p(_dot(p, np.expm1(c, out=c)) / s) - first / s, 0.0)
    if far.any():
        log_p, log_q = _log_softmax(logits[far]), _log_softmax(others[far])
        kl[far] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return np.asarray(kl)


def _chunks(windows: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Windows of up to `most` scored tokens together; a longer one is a chunk of its own."""
    chunk: list[Sequence[int]] = []
    tokens = 0
    for window in windows:
        if chunk and tokens + len(window) - 1 > most:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(window)
        tokens += len(window) - 1
    yield chunk


def _score(runtime: Runtime, windows: Sequence[Sequence[int]], precision: Precision) -> Iterator[F32]:
    for window in windows:
        runtime.reset(0)
        yield from runtime.score(0, window[:-1], precision)


def _softmax(logits: F32, out: F32) -> None:
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=1, keepdims=True)


def _dot(p: F32, x: F32) -> NDArray[np.float64]:
    """sum(p x) of each row; rows are long, so sums are float64."""
    return np.asarray((p * x).sum(axis=1, dtype=np.float64))


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))
