"""Calibration sequences: windows of a text file, text that the model itself writes, or random tokens."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from everybit.errors import SourceError
from everybit.quantize.source import empty_model, load_float, load_tokenizer
from everybit.texts import read_documents

MINIMUM_TOKENS = 64  # below this a squared gradient is an anecdote, not a statistic


@dataclass(frozen=True)
class Calibration:
    """Where the sequences come from, written into the overlay as provenance.

    `kind` is `none`, `self`, `random` or `text`; `file` is the name (not the path) and `sha256` the digest of the text.
    """

    kind: str
    file: str | None = None
    sha256: str | None = None
    sequences: int = 128
    length: int = 512
    seed: int = 0

    def provenance(self) -> dict[str, Any]:
        if self.kind == "none":
            return {"kind": "none"}
        return {k: v for k, v in asdict(self).items() if v is not None}


def describe(calibration: str | Path, sequences: int, length: int, seed: int) -> tuple[Calibration, list[str] | None]:
    """The calibration record and the documents it names (None for all but `text`).

    Raises: SourceError when the file is missing, empty or not UTF-8, or a count is not positive.
    """
    for option, value, least in (("--calibration-sequences", sequences, 1), ("--calibration-length", length, 2)):
        if value < least:
            raise SourceError(f"{option} {value}: expected {least} or more")
    if str(calibration) in ("none", "self", "random"):
        return Calibration(str(calibration), sequences=sequences, length=length, seed=seed), None
    path = Path(calibration).expanduser()
    documents = read_documents(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Calibration("text", path.name, digest, sequences, length, seed), documents


def text_sequences(tokenizer: Any, documents: list[str], record: Calibration, context: int) -> list[torch.Tensor]:
    """At most `record.sequences` windows of `record.length` tokens, chosen evenly by seed.

    Each document is encoded with the tokenizer's own special tokens; the whole is one stream cut into windows.
    Raises: SourceError when the text is too short to be a statistic
    """
    ids = np.concatenate([np.asarray(tokenizer(d, verbose=False)["input_ids"], dtype=np.int64) for d in documents])
    length = min(record.length, context)
    if len(ids) < MINIMUM_TOKENS:
        raise SourceError(f"the calibration text has {len(ids)} tokens, at least {MINIMUM_TOKENS} are needed: add text")
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    if len(windows) > 1 and len(windows[-1]) < min(length, MINIMUM_TOKENS):
        windows.pop()
    chosen = np.random.default_rng(record.seed).permutation(len(windows))[: record.sequences]
    return [torch.from_numpy(windows[i].copy())[None] for i in sorted(chosen)]


@torch.no_grad()
def self_sequences(
    model: Any, tokenizer: Any, record: Calibration, context: int, progress: bool = True
) -> list[torch.Tensor]:
    """Sequences that the model samples from its own distribution, begun by its first special token.

    Source: data-free calibration by self-generation, LLM-QAT (2305.17888), section 3.1.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SourceError("the tokenizer has neither a BOS nor an EOS token to start from: pass a text file")
    length = min(record.length, context)
    sequences: list[torch.Tensor] = []
    batch = 8
    # a configuration of our own: the model's may carry penalties and would not be its own distribution
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        min_length=length,
        pad_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(record.seed)
    try:
        for done in tqdm(
            range(0, record.sequences, batch), desc="writing calibration text", unit="batch", disable=not progress
        ):
            count = min(batch, record.sequences - done)
            first = torch.full((count, 1), start)
            ids = model.generate(first, attention_mask=torch.ones_like(first), generation_config=config)
            sequences += list(ids.split(1))
    finally:
        torch.random.set_rng_state(state)
    return sequences


def random_sequences(record: Calibration, vocabulary: int, context: int) -> list[torch.Tensor]:
    """Tokens drawn uniformly from the vocabulary: what a model is calibrated with when it has no text at all."""
    shape = (record.sequences, 1, min(record.length, context))
    return list(torch.from_numpy(np.random.default_rng(record.seed).integers(0, vocabulary, shape)))


class Calibrated:
    """The float model and its calibration sequences, made when they are first asked for.

    Raises: SourceError
    """

    def __init__(self, folder: Path, record: Calibration, documents: list[str] | None, progress: bool = True) -> None:
        self._folder, self._record, self._documents, self._progress = folder, record, documents, progress

    @cached_property
    def model(self) -> Any:
        """In float32, nothing of it trainable."""
        return load_float(self._folder).requires_grad_(False)

    @cached_property
    def sequences(self) -> list[torch.Tensor]:
        """Each [1, T]."""
        record, folder = self._record, self._folder
        empty = empty_model(folder)
        context = int(getattr(empty.config.get_text_config(), "max_position_embeddings", record.length))
        vocabulary = empty.get_input_embeddings().num_embeddings
        if record.kind == "random":
            return random_sequences(record, vocabulary, context)
        tokenizer = load_tokenizer(folder)
        if self._documents is None:
            sequences = self_sequences(self.model, tokenizer, record, context, self._progress)
        else:
            sequences = text_sequences(tokenizer, self._documents, record, context)
        if (highest := max(int(s.max()) for s in sequences)) >= vocabulary:
            raise SourceError(
                f"{folder}: the tokenizer gives token {highest}, the model knows {vocabulary}: "
                "they do not belong together; fix the folder or use --calibration none"
            )
        return sequences

    def without_model(self) -> list[torch.Tensor]:
        """The sequences, for a caller that runs the model in another way: its memory is given back."""
        sequences = self.sequences
        self.__dict__.pop("model", None)
        gc.collect()  # its modules refer to each other
        return sequences
