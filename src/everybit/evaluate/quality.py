"""One pass over a text at every precision, next to the float model.

The text is walked in chunks and every chunk is scored at every precision, so the float model runs once and its
logits are held for one chunk only. A precision switch may rebuild dense weights; a chunk amortises it over
thousands of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm import tqdm

from everybit.errors import PrecisionError, ShapeError, SourceError
from everybit.evaluate.report import FloatQuality, Report, Row
from everybit.evaluate.text import Windows
from everybit.formats.sizes import Size

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 256 << 20  # float32 reference logits held at once
BATCH_BYTES = 64 << 20  # float32 logits of one forward call
BATCH_TOKENS = 4096  # beyond this a batch gains no speed and its activations cost memory
SLICE_BYTES = 32 << 20  # float64 log-probabilities worked on at once

_VOCABULARIES_DIFFER = (
    "the reference knows {} tokens and the quantized model {}; expected the model that was quantized as the reference"
)

Batch = Sequence[Sequence[int]]  # windows of one length


class CausalModel(Protocol):
    """What is asked of a model: transformers' causal language models, or a mock."""

    def __call__(self, input_ids: torch.Tensor, /, *, use_cache: bool) -> Any:
        """An object whose `.logits` are [windows, length, vocabulary]."""


@dataclass
class _Tally:
    """Running sums of one model over the text; per-token KL is kept whole (4 bytes a token), so that p99 is exact."""

    nll: float = 0.0  # nats
    agreed: int = 0
    kl: list[np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=list)


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
) -> Report:
    """Score `windows` at each of `precisions`, and against `reference` (the float model) when there is one.

    Perplexity is over all scored tokens; bits per byte divides by their text. KL is of the float model's distribution
    to the quantized one's, per scored token in nats, from float64 log-softmax; p99 interpolates linearly.

    Needs:   precisions not empty; reference and model with the same vocabulary
    Cost:    one forward pass of the text per precision and one of the reference. Beyond the models and the activations
             of one batch: the reference's logits of a chunk, at most 256 MB or one window, whichever is more; the
             logits of a batch, at most 64 MB or one window; about 100 MB of work space; 4 bytes per token and precision
    Mutates: the precision of `model`, which is left at the last one. Progress goes to stderr where that is a terminal
    Raises:  PrecisionError, ShapeError (vocabularies differ), SourceError (token ids beyond the vocabulary)
    """
    if not precisions:
        raise PrecisionError("no precision to evaluate; expected at least one of 2..8")
    import torch

    tallies = {bits: _Tally() for bits in precisions}
    reference_tally = _Tally()
    highest = max(max(window) for window in windows.ids)
    vocabulary = _vocabulary(model, highest)
    if reference is not None and (other := _vocabulary(reference, highest)) != vocabulary:
        raise ShapeError(_VOCABULARIES_DIFFER.format(other, vocabulary))
    chunks = list(_chunks(list(_batches(windows.ids, vocabulary)), vocabulary))
    bar = tqdm(
        total=windows.tokens * (len(tallies) + (reference is not None)), unit="tok", disable=None if progress else True
    )
    with torch.inference_mode(), bar:
        for chunk in chunks:
            held: list[torch.Tensor | None] = [None] * len(chunk)
            if reference is not None:
                bar.set_description("float")
                for i, batch in enumerate(chunk):
                    held[i] = logits = _logits(reference, batch)
                    _score(reference_tally, batch, logits, None)
                    bar.update(_scored(batch))
            for bits, tally in tallies.items():
                bar.set_description(f"{bits} bits")
                set_precision(bits)
                for batch, floats in zip(chunk, held, strict=True):
                    _score(tally, batch, _logits(model, batch), floats)
                    bar.update(_scored(batch))

    tokens, text_bytes = windows.tokens, windows.text_bytes
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
    return Report(quality, rows, tokens, text_bytes)


def _vocabulary(model: CausalModel, highest: int) -> int:
    """The model's vocabulary size, for planning memory; a model that does not say is planned for its tokens only."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text_config, "vocab_size", None)
    if size is None:
        return highest + 1
    if highest >= size:
        raise SourceError(
            f"the tokenizer made token {highest} and the model knows tokens 0 to {size - 1}; "
            "expected the tokenizer that belongs to the model"
        )
    return int(size)


def _batches(ids: Sequence[Sequence[int]], vocabulary: int) -> Iterator[Batch]:
    """Windows of equal length together, so that nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for window in ids:
        by_length.setdefault(len(window), []).append(window)
    for length, group in sorted(by_length.items(), reverse=True):  # longest first: memory trouble shows at once
        count = max(1, min(BATCH_TOKENS // length, BATCH_BYTES // (length * vocabulary * 4)))
        yield from (group[i : i + count] for i in range(0, len(group), count))


def _chunks(batches: Sequence[Batch], vocabulary: int) -> Iterator[list[Batch]]:
    """Batches whose reference logits fit into CHUNK_BYTES together; a batch that alone does not is its own chunk."""
    chunk: list[Batch] = []
    held_bytes = 0
    for batch in batches:
        batch_bytes = len(batch) * len(batch[0]) * vocabulary * 4
        if chunk and held_bytes + batch_bytes > CHUNK_BYTES:
            yield chunk
            chunk, held_bytes = [], 0
        chunk.append(batch)
        held_bytes += batch_bytes
    if chunk:
        yield chunk


def _scored(batch: Batch) -> int:
    return len(batch) * (len(batch[0]) - 1)


def _logits(model: CausalModel, batch: Batch) -> torch.Tensor:
    """Logits that predict the scored tokens of a batch: float32 [tokens, vocabulary]."""
    import torch

    ids = torch.tensor(batch, dtype=torch.long, device=getattr(model, "device", None))
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]).float()


def _score(tally: _Tally, batch: Batch, logits: torch.Tensor, floats: torch.Tensor | None) -> None:
    """Add a batch to `tally`, in slices of rows so that float64 work space stays small."""
    import torch

    if floats is not None and floats.shape != logits.shape:
        raise ShapeError(_VOCABULARIES_DIFFER.format(floats.shape[-1], logits.shape[-1]))
    targets = torch.tensor(batch, dtype=torch.long, device=logits.device)[:, 1:].reshape(-1, 1)
    step = max(1, SLICE_BYTES // (logits.shape[-1] * 8))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        log_q = logits[part].double().log_softmax(-1)
        tally.nll -= log_q.gather(-1, targets[part]).sum().item()
        if floats is None:
            continue
        log_p = floats[part].to(logits.device).double().log_softmax(-1)
        p = log_p.exp()
        terms = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, also where both are -inf
        # Mathematically never negative; float64 rounding may leave -1e-16.
        tally.kl.append(terms.sum(-1).clamp_min_(0.0).float().cpu().numpy())
        tally.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def _perplexity(nll: float, tokens: int) -> float:
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def _bits_per_byte(nll: float, text_bytes: int) -> float:
    """Nats to bits over the bytes; a text that decodes to nothing (special tokens only) has no such figure."""
    return nll / math.log(2) / text_bytes if text_bytes else math.nan
