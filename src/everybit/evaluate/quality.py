"""One pass over a text at every precision, next to the float model.

The text is walked in chunks and every chunk is scored at every precision, so the float model runs once and its
logits are held for one chunk only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from everybit.errors import ModelError, PrecisionError, ShapeError, SourceError
from everybit.evaluate.intervals import Sums, blocks
from everybit.evaluate.report import FloatQuality, Report, Row
from everybit.evaluate.text import Windows
from everybit.formats.sizes import Size

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
CHUNK_BYTES = 256 << 20  # float32 reference logits held at once
SLICE_BYTES = 2 << 20  # float64 log-probabilities that a thread works on at once: they stay in its cache

_VOCABULARIES_DIFFER = (
    "the reference knows {} tokens and the quantized model {}; expected the model that was quantized as the reference"
)

Chunk = Sequence[Sequence[int]]  # windows


class CausalModel(Protocol):
    """What is asked of a model: `EngineModel`, or a mock."""

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""

    def score(self, windows: Chunk) -> Iterator[F32]:
        """Logits that predict the scored tokens of the windows, all but the first of each, in order.

        Shapes: pieces f32[n, vocabulary] of any n >= 1, together as many rows as there are scored tokens
        """


@dataclass
class _Tally:
    """One model over the text, token by token in order: p99 is exact, and any block of text can be summed."""

    losses: list[F64] = field(default_factory=list)  # negative log-likelihoods, nats
    agreed: int = 0
    kl: list[F32] = field(default_factory=list)

    @property
    def nll(self) -> float:
        return math.fsum(float(piece.sum()) for piece in self.losses)


def evaluate(
    model: CausalModel,
    precisions: Sequence[int],
    windows: Windows,
    reference: CausalModel | None = None,
    *,
    set_precision: Callable[[int], object],
    size: Callable[[int], Size] | None = None,
    reference_size: Size | None = None,
    progress: bool = True,
    threads: int = 1,
) -> Report:
    """Score `windows` at each of `precisions`, and against `reference` (the float model) when there is one.

    Perplexity is over all scored tokens; bits per byte divides by their text. KL is of the float model's distribution
    to the quantized one's, per scored token in nats, from float64 log-softmax; p99 interpolates linearly. Intervals are
    those of `intervals` (none without a reference). `threads` are those of this arithmetic; the models have their own.

    Needs:   precisions not empty; reference and model with the same vocabulary
    Cost:    one pass of the text per precision and one of the reference. Beyond the models: the reference's logits of
             a chunk, at most 256 MB or one window, whichever is more; one piece of logits; some 10 MB a thread; 12
             bytes per token and precision
    Mutates: the precision of `model`, which is left at the last one. Progress goes to stderr where that is a terminal
    Raises:  PrecisionError, ShapeError (vocabularies differ), SourceError (token ids beyond the vocabulary)
    """
    if not precisions:
        raise PrecisionError("no precision to evaluate; expected at least one of 2..8")
    tallies = {bits: _Tally() for bits in precisions}
    reference_tally = _Tally()
    if reference is not None and reference.vocabulary != model.vocabulary:
        raise ShapeError(_VOCABULARIES_DIFFER.format(reference.vocabulary, model.vocabulary))
    if (highest := max(max(window) for window in windows.ids)) >= model.vocabulary:
        raise SourceError(
            f"the tokenizer made token {highest} and the model knows tokens 0 to {model.vocabulary - 1}; "
            "expected the tokenizer that belongs to the model"
        )
    bar = tqdm(
        total=windows.tokens * (len(tallies) + (reference is not None)), unit="tok", disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(threads) as pool:
        for chunk in _chunks(windows.ids, model.vocabulary):
            held: F32 | None = None
            if reference is not None:
                bar.set_description("float")
                held = np.empty((_scored(chunk), reference.vocabulary), np.float32)
                for at, targets, logits in _pieces(reference, chunk):
                    held[at : at + len(logits)] = logits
                    _score(reference_tally, targets, logits, None, pool)
                    bar.update(len(logits))
            for bits, tally in tallies.items():
                bar.set_description(f"{bits} bits")
                set_precision(bits)
                for at, targets, logits in _pieces(model, chunk):
                    _score(tally, targets, logits, None if held is None else held[at : at + len(logits)], pool)
                    bar.update(len(logits))

    tokens, text_bytes = windows.tokens, windows.text_bytes
    sums = _sums(windows, tallies, reference_tally if reference is not None else None)
    rows = []
    for bits, tally in tallies.items():
        cost = size(bits) if size else None
        kl = np.concatenate(tally.kl) if reference is not None else None
        with np.errstate(invalid="ignore"):  # infinite KL: inf - inf inside the interpolation
            p99 = None if kl is None else float(np.quantile(kl, 0.99))
        rows.append(
            Row(
                bits=bits,
                bpw=cost.bpw if cost else None,
                bytes=cost.bytes if cost else None,
                ppl=_perplexity(tally.nll, tokens),
                bits_per_byte=_bits_per_byte(tally.nll, text_bytes),
                kl_mean=None if kl is None else float(kl.mean(dtype=np.float64)),
                kl_p99=p99,
                top1=None if kl is None else tally.agreed / tokens,
                kl_interval=sums.kl_interval(bits),
                ppl_ratio=None if kl is None else _perplexity(tally.nll - reference_tally.nll, tokens),
                ppl_ratio_interval=sums.ratio_interval(bits),
            )
        )
    quality = None
    if reference is not None:
        quality = FloatQuality(
            ppl=_perplexity(reference_tally.nll, tokens),
            bits_per_byte=_bits_per_byte(reference_tally.nll, text_bytes),
            bpw=reference_size.bpw if reference_size else None,
            bytes=reference_size.bytes if reference_size else None,
        )
    return Report(quality, rows, tokens, text_bytes, sums)


def _sums(windows: Windows, tallies: Mapping[int, _Tally], reference: _Tally | None) -> Sums:
    """The blocks of the text, summed for every model."""
    found = blocks([len(window) - 1 for window in windows.ids], windows.documents)

    def losses(tally: _Tally) -> F64:
        return found.sums(np.concatenate(tally.losses))

    return Sums(
        of=found.of,
        tokens=found.sizes,
        reference=None if reference is None else losses(reference),
        nll={bits: losses(tally) for bits, tally in tallies.items()},
        kl={} if reference is None else {bits: found.sums(np.concatenate(t.kl)) for bits, t in tallies.items()},
    )


def _chunks(ids: Sequence[Sequence[int]], vocabulary: int) -> Iterator[Chunk]:
    """Windows whose reference logits fit into CHUNK_BYTES together; a window that alone does not is its own chunk."""
    chunk: list[Sequence[int]] = []
    held_bytes = 0
    for window in ids:
        window_bytes = (len(window) - 1) * vocabulary * 4
        if chunk and held_bytes + window_bytes > CHUNK_BYTES:
            yield chunk
            chunk, held_bytes = [], 0
        chunk.append(window)
        held_bytes += window_bytes
    if chunk:
        yield chunk


def _scored(chunk: Chunk) -> int:
    return sum(len(window) - 1 for window in chunk)


def _pieces(model: CausalModel, chunk: Chunk) -> Iterator[tuple[int, NDArray[np.int64], F32]]:
    """Where in the chunk's scored tokens a piece begins, its tokens, the logits that predict them."""
    targets = np.concatenate([np.asarray(window[1:], np.int64) for window in chunk])
    at = 0
    for logits in model.score(chunk):
        yield at, targets[at : at + len(logits)], logits
        at += len(logits)
    if at != len(targets):
        raise ShapeError(f"the model gave {at} rows of logits for {len(targets)} scored tokens")


def _score(
    tally: _Tally, targets: NDArray[np.int64], logits: F32, floats: F32 | None, pool: ThreadPoolExecutor
) -> None:
    """Add a piece to `tally`, in slices of rows so that float64 work space stays small."""
    step = max(1, SLICE_BYTES // (logits.shape[-1] * 8))

    def one(start: int) -> tuple[F64, F32 | None, int]:
        part = slice(start, start + step)
        return _score_slice(targets[part], logits[part], None if floats is None else floats[part])

    for losses, kl, agreed in pool.map(one, range(0, len(logits), step)):
        tally.losses.append(losses)
        if kl is not None:
            tally.kl.append(kl)
            tally.agreed += agreed


def _score_slice(targets: NDArray[np.int64], logits: F32, floats: F32 | None) -> tuple[F64, F32 | None, int]:
    """Negative log-likelihood and KL per token, and how often both rank the same token first."""
    log_q = _log_softmax(logits)
    losses = -log_q[np.arange(len(targets)), targets]
    if np.isnan(losses).any():
        raise ModelError("the logits hold a number that is not finite: quantize again, or leave the adapter out")
    if floats is None:
        return losses, None, 0
    log_p = _log_softmax(floats)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.subtract(log_p, log_q, out=log_q)
        terms *= p
    terms[p == 0] = 0.0  # 0 log 0 = 0, also where both are -inf
    # Mathematically never negative; float64 rounding may leave -1e-16.
    kl = np.maximum(terms.sum(axis=-1), 0.0).astype(np.float32)
    return losses, kl, int((floats.argmax(axis=-1) == logits.argmax(axis=-1)).sum())


def _log_softmax(logits: F32) -> F64:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def _perplexity(nll: float, tokens: int) -> float:
    """Also of a difference of two, which is the perplexities' ratio."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def _bits_per_byte(nll: float, text_bytes: int) -> float:
    """Nats to bits over the bytes; a text that decodes to nothing (special tokens only) has no such figure."""
    return nll / math.log(2) / text_bytes if text_bytes else math.nan
