"""A model ready to run on this machine: sequences, their places in the KV cache, prompts and steps.

    runtime = Runtime.open("overlay", threads=2)
    logits = runtime.prefill(0, tokens, bits=4)      # f32[V], of the last token
    logits = runtime.decode([next_token], bits=3)    # f32[1, V]
    logits = runtime.decode([next_token], bits=plan)  # a precision of its own for each weight: everybit.engine.plan

The scheduler of the server (issue 5) brings its own block tables and uses `Native` directly; here every sequence owns a
fixed run of blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.engine.adapter import Adapter
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import build
from everybit.engine.native import BLOCK_TOKENS, Native, make_step
from everybit.engine.plan import Plan, Precision
from everybit.engine.program import Program, Step
from everybit.errors import ContextError, ModelError, PrecisionError
from everybit.formats.tensors import show

F32 = NDArray[np.float32]
Ints = NDArray[np.int32]
MOST_BLOCKS = 2**31 - 1  # block numbers are int32
MODES = ("exact", "default", "fast")
KV_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
ISA_VARIABLE = "EVERYBIT_ISA"


class Backend(Protocol):
    """What runs a program: `Native` on this machine's processors, `everybit.gpu.engine.Device` on a GPU.

    One step at a time; the KV cache belongs to it, and `most_tokens` is the most that a step has. `isa`: on what.
    `bits`: the precisions that it serves; none for float weights.
    """

    program: Program
    bits: tuple[int, ...]
    most_tokens: int
    isa: str

    def prepare(self, bits: Precision) -> Any:
        """Verify and place what `bits` needs. Raises: PrecisionError, FormatError, ChecksumError"""

    def run(self, step: Step, bits: Precision = 0) -> F32:
        """One forward pass: logits f32[R, V]. Raises: PrecisionError, FormatError, ModelError"""


class Runtime:
    """An opened model with room for `sequences` sequences of up to `context` tokens. Make one with `Runtime.open`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        native: Backend,
        context: int,
        sequences: int,
        threads: int,
        adapter: Adapter | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.native = native
        self.context = context
        self.sequences = sequences
        self.threads = threads
        self.bits = native.bits
        self.isa = native.isa
        self.vocabulary = native.program.vocabulary
        self.lengths = [0] * sequences  # tokens of each sequence in the cache
        self._blocks_each = blocks_of(context)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        threads: int = 0,
        pin: Sequence[int] = (),
        isa: str | None = None,
        mode: str = "default",
        context: int | None = None,
        sequences: int = 1,
        kv_dtype: str = "float16",
        most_tokens: int = 512,
        debug: bool = False,
        verify: bool = True,
        adapter: str | os.PathLike[str] | None = None,
        backend: Callable[..., Backend] | None = None,
    ) -> Runtime:
        """An overlay, or a folder of float safetensors, ready to run.

        `threads` 0: one per processor this process may use. `isa` None: $EVERYBIT_ISA, else the best there is.
        `context` None: the model's own. `mode` exact, default or fast: docs/design/0002. `verify=False`: no checksums.
        `adapter`: a folder with a LoRA adapter of PEFT, put on every precision.
        `backend` None: `Native`; another is made with (program, checkpoint, kv_blocks, kv_dtype, most_tokens, debug)
        and knows no threads, pin, isa and mode.

        Cost: planes are neither read nor copied; a precision is verified and its tables built at its first use. Plain
        parameters (embeddings, norms) are verified at once.
        Raises: FormatError, ModelError (architecture, option or processor), ContextError, SourceError (adapter)
        """
        if backend is not None and (threads or pin or isa or mode != "default"):
            raise ModelError(
                "threads, pin, isa or a mode arrived for a device: they are the processor's, leave them out"
            )
        threads = check_threads(threads)
        pin = [whole(processor, "processor", 0, 1 << 16) for processor in pin]
        sequences = whole(sequences, "sequences", 1, MOST_BLOCKS)
        most_tokens = whole(most_tokens, "most_tokens", 1, 1 << 20)
        if context is not None:
            context = whole(context, "context", 1, MOST_BLOCKS)
        if mode not in MODES:
            raise ModelError(f"mode {mode!r} arrived, expected one of {', '.join(MODES)}")
        if kv_dtype not in KV_DTYPES:
            raise ModelError(f"kv_dtype {kv_dtype!r} arrived, expected one of {', '.join(KV_DTYPES)}")
        isa = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
        if isa and isa not in _native.isas():
            raise ModelError(
                f"instruction set {isa!r} arrived (as an argument or in {ISA_VARIABLE}), this processor runs "
                f"{', '.join(_native.isas())}: choose one of them or leave it out"
            )
        checkpoint = Checkpoint.open(Path(folder).expanduser(), verify)
        try:
            program = build(checkpoint, context=context)
            context = program.context if context is None else context
            if not 1 <= context <= program.context:
                raise ContextError(f"a context of {context} tokens arrived, the model has 1 to {program.context}")
            if blocks_of(context) * sequences > MOST_BLOCKS:
                raise ContextError(
                    f"{sequences} sequences of {context} tokens need {blocks_of(context) * sequences} KV blocks, "
                    f"expected at most {MOST_BLOCKS}: open the model with a smaller context"
                )
            adapted = Adapter.open(Path(adapter).expanduser()) if adapter is not None else None
            if adapted:
                program = adapted.put_on(program, checkpoint)
            make = backend or partial(Native, threads=threads, pin=pin, isa=isa, mode=mode)
            native = make(
                program,
                checkpoint,
                kv_blocks=blocks_of(context) * sequences,
                kv_dtype=KV_DTYPES[kv_dtype],
                most_tokens=min(most_tokens, max(context, sequences)),
                debug=debug,
            )
        except MemoryError:
            checkpoint.close()
            raise ModelError(
                f"not enough memory for {sequences} sequences of {context} tokens: lower the context or the sequences"
            ) from None
        except ValueError as error:  # the native side names what it refused
            checkpoint.close()
            raise ModelError(f"{folder}: {error}") from None
        except BaseException:
            checkpoint.close()
            raise
        return cls(checkpoint, native, context, sequences, threads, adapted)

    def prefill(self, sequence: int, tokens: Sequence[int], bits: Precision = 0) -> F32:
        """Append tokens to a sequence. `bits`: a precision of the overlay or a plan for it; 0 where weights are float.

        Shapes:  -> logits f32[V] of the last of them
        Mutates: the sequence's cache and length
        Raises:  ContextError, PrecisionError, FormatError (a plan for another overlay), ModelError (token ids
                 outside the vocabulary, no tokens)
        """
        ids = self.check_tokens(tokens)
        self._check_room(sequence, len(ids))
        logits: F32 = np.empty((0, self.vocabulary), np.float32)
        parts = self._parts(ids)
        for part in parts:
            logits = self._run([(part, sequence)], [len(part) - 1] if part is parts[-1] else [], bits)
        last: F32 = logits[0]
        return last

    def score(self, sequence: int, tokens: Sequence[int], bits: Precision = 0) -> Iterator[F32]:
        """As prefill, but the logits of every token, in pieces f32[n, V] that together cover `tokens`.

        Each piece is computed when it is asked for; what is appended to the sequence meanwhile comes before it.
        """
        ids = self.check_tokens(tokens)
        self._check_room(sequence, len(ids))
        return (self._run([(part, sequence)], range(len(part)), bits) for part in self._parts(ids))

    def decode(self, tokens: Sequence[int], bits: Precision = 0) -> F32:
        """Append one token to each of the first len(tokens) sequences.

        Shapes: -> logits f32[len(tokens), V]
        Raises: as prefill
        """
        ids = self.check_tokens(tokens)
        if len(ids) > self.sequences:
            raise ModelError(f"{len(ids)} tokens arrived, expected one for each of up to {self.sequences} sequences")
        for sequence in range(len(ids)):
            self._check_room(sequence, 1)
        pieces = []
        for part in self._parts(np.arange(len(ids), dtype=np.int32)):
            pieces.append(self._run([(ids[i : i + 1], int(i)) for i in part], range(len(part)), bits))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def reset(self, sequence: int | None = None, length: int = 0) -> None:
        """Forget the tokens of a sequence (None: of all) beyond the first `length`.

        Raises: ModelError
        """
        length = whole(length, "length", 0, self.context)
        for s in range(self.sequences) if sequence is None else [self._check_sequence(sequence)]:
            self.lengths[s] = min(self.lengths[s], length)

    def close(self) -> None:
        """Closes the files; precisions that were used already stay usable until the runtime is dropped."""
        self.checkpoint.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _parts(self, ids: Ints) -> list[Ints]:
        """Pieces that one step has room for."""
        most = self.native.most_tokens
        return [ids[start : start + most] for start in range(0, len(ids), most)]

    def _run(self, parts: Sequence[tuple[Ints, int]], rows: Sequence[int], bits: Precision) -> F32:
        if not self.bits and bits:
            asked = bits if isinstance(bits, Plan) else f"{bits} bits"
            raise PrecisionError(f"{asked} were asked of float weights, expected 0: quantize the model first")
        for ids, s in parts:  # again: pieces of a score may come late
            self._check_room(s, len(ids))
        step = make_step([(ids, self.lengths[s], self._blocks(s, len(ids))) for ids, s in parts], rows)
        logits = self.native.run(step, bits)
        for ids, s in parts:
            self.lengths[s] += len(ids)
        return logits

    def _blocks(self, sequence: int, new: int) -> Ints:
        """The KV blocks that the sequence needs with so many new tokens."""
        first = sequence * self._blocks_each
        return np.arange(first, first + blocks_of(self.lengths[sequence] + new), dtype=np.int32)

    def check_tokens(self, tokens: Sequence[int]) -> Ints:
        """`tokens` as the native side takes them, which looks at them no more. Raises: ModelError"""
        try:
            ids = np.asarray(tokens)
        except (ValueError, OverflowError):
            ids = np.empty(0)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0:
            raise ModelError(f"tokens {show(tokens)} arrived, expected a list of at least one whole number")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ModelError(
                f"token {int(ids.min() if ids.min() < 0 else ids.max())} arrived, the model knows 0 to "
                f"{self.vocabulary - 1}: use the tokenizer that belongs to it"
            )
        return ids.astype(np.int32)

    def _check_sequence(self, sequence: int) -> int:
        return whole(sequence, "sequence", 0, self.sequences - 1)

    def _check_room(self, sequence: int, new: int) -> None:
        have = self.lengths[self._check_sequence(sequence)]
        if have + new > self.context:
            raise ContextError(
                f"{have} tokens in sequence {sequence} and {new} more make {have + new}, the context is "
                f"{self.context}: shorten the text or open the model with a larger context"
            )


def whole(value: object, what: str, least: int, most: int) -> int:
    """`value` as an int within least..most.

    Raises: ModelError
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(f"{what} {show(value)} arrived, expected a whole number from {least} to {most}")
    return int(value)


def blocks_of(tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def check_threads(threads: int) -> int:
    """The number of threads to use; 0 is one per processor this process may use.

    Raises: ModelError when negative or more than four per processor
    """
    processors: int = _native.usable_processors()
    if not isinstance(threads, int) or not 0 <= threads <= 4 * processors:
        raise ModelError(
            f"{threads} threads arrived, expected 0 (one per processor) to {4 * processors} "
            f"(4 for each of {processors} processors)"
        )
    return threads or processors
