"""The native engine as a model to evaluate: an overlay at a precision, or a float model folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.generate import choose_bits
from everybit.engine.plan import Precision
from everybit.engine.runtime import Runtime
from everybit.formats.sizes import SizeReport

F32 = NDArray[np.float32]


class EngineModel:
    """A `CausalModel` that runs in `Runtime`. Make one with `EngineModel.open`. Starts at the highest precision."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.precision: Precision = choose_bits(runtime, None)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], context: int, *, threads: int = 0, mode: str = "exact", **options: Any
    ) -> EngineModel:
        """A model folder, for windows of up to `context` tokens; `options` are those of `Runtime.open`.

        The KV cache is float32, so that in exact mode nothing but the weights is rounded.
        Raises: as Runtime.open
        """
        options = {"kv_dtype": "float32", **options}
        return cls(Runtime.open(folder, context=context, threads=threads, mode=mode, **options))

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return self.runtime.vocabulary

    @property
    def bits(self) -> tuple[int, ...]:
        """The precisions it has; none for float weights."""
        return self.runtime.bits

    def set_precision(self, bits: Precision) -> None:
        """Score at `bits`, a number or a plan, from now on. Raises: PrecisionError"""
        self.precision = choose_bits(self.runtime, bits)

    def sizes(self) -> SizeReport:
        """What each precision of an overlay costs."""
        overlay = self.runtime.checkpoint.overlay
        if overlay is None:
            raise ValueError("float weights have no precisions to size")
        return overlay.sizes()

    def score(self, windows: Sequence[Sequence[int]]) -> Iterator[F32]:
        """Logits for all but the first token of each window; every window is a fresh sequence."""
        for window in windows:
            self.runtime.reset()
            yield from self.runtime.score(0, window[:-1], self.precision)

    def close(self) -> None:
        """Closes the files."""
        self.runtime.close()

    def __enter__(self) -> EngineModel:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
