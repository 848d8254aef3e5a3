"""Table tuning one decoder block after the other, for a model that does not fit into memory with its gradients.

The calibration text walks through the blocks twice: as the float model has it, and as the model does that is quantized
at one precision with what is tuned so far. A block is tuned where both stand before it: its tables are trained until
it makes of the quantized model's states what the float block makes of the float model's, so that it also mends what
earlier blocks left. The last block is judged by what comes of it, the divergence of the model's outputs. Each block has
a rate of its own and keeps its tables where the error on held-out text does not fall.

Source: block by block and with the tables alone, AQLM (Egiazarian et al., 2401.06118), section 3.4; on the quantized
model's own states, GPTQ's sequence of layers (2210.17323), section 4. Measured choices: docs/log.md.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from everybit.quantize.blocks import Blocks, Values
from everybit.quantize.tuner import STEP_TOKENS, Descent, Level, descend, hold_out
from everybit.quantize.workspace import writable

FLOOR = 1e-3  # of the mean variance: a channel that says next to nothing counts no more than this makes it


class BlockTuner:
    """The text, its held-out part and its hidden states; `enter`, then for each block `read`, `tune`, `move_on`.

    Needs: blocks that can run apart. Cost: memory of a block with gradients and of a step's activations; disk in
    `folder` for two (of the held-out text, three) float32 states of the whole text, freed when the tuner is dropped,
    killed runs included. A step costs about four forward passes of the block over STEP_TOKENS tokens.
    Raises: OutputError where the states have no room
    """

    def __init__(self, blocks: Blocks, sequences: Sequence[torch.Tensor], folder: Path, seed: int = 0) -> None:
        self.blocks = blocks
        train, held = hold_out(sequences, seed)
        rows = [s[0] for s in (*train, *held)]
        self._ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        self._there = self._ids >= 0
        self._first_held, self._seed = len(train), seed
        width = blocks.enter(self._ids[:1, :1], {}).shape[-1]
        # Rows are sequences; of `_untuned` only the held-out ones are used.
        self._float, self._tuned = (_on_disk((*self._ids.shape, width), folder) for _ in range(2))
        self._untuned = _on_disk((len(held), self._ids.shape[1], width), folder)
        self._index, self._bits = -1, 0
        self._outside: Values = {}
        self._own: dict[str, torch.Tensor] = {}

    def enter(self, bits: int, outside: Values) -> None:
        """Stand before the first block, at one precision; `outside` are the quantized parameters of no block."""
        self._index, self._bits, self._outside = -1, bits, outside
        for rows in self._batches():
            ids = self._ids[rows].clamp(min=0)
            self._float[rows] = self.blocks.enter(ids, {})
            self._tuned[rows] = self.blocks.enter(ids, outside)
        self._untuned.copy_(self._tuned[self._first_held :])

    @torch.no_grad()
    def read(self) -> None:
        """Read the next block and make its goal, what it does in the float model."""
        self._index += 1
        self._own = self.blocks.read(self._index)
        for rows in self._batches():
            self._float[rows] = self._run({}, self._float[rows])

    def tune(self, level: Level, steps: int, bar: Any) -> Descent:
        """Train the tables of the block that was read; `bar` moves by one a step."""
        last = self._index + 1 == len(self.blocks.names)
        weight = torch.empty(0) if last else self._channel_weights()
        text = self._endless()

        def error(parameters: Values, rows: Any) -> torch.Tensor:
            found, goal = self._run(parameters, self._tuned[rows]), self._float[rows]
            if last:
                return self._divergence(found, goal, rows).mean()
            return ((found - goal)[self._there[rows]].square() * weight).mean()

        @torch.no_grad()
        def held_out(parameters: Values) -> float:
            counts = [int(self._there[rows].sum()) for rows in self._batches(self._first_held)]
            errors = [float(error(parameters, rows)) for rows in self._batches(self._first_held)]
            return float(np.average(errors, weights=counts))

        what = "KL" if last else "error"
        return descend(level, self._bits, steps, lambda p: error(p, next(text)), held_out, what, bar)

    @torch.no_grad()
    def move_on(self, level: Level, tables: Mapping[str, torch.Tensor]) -> None:
        """Stand behind the block that was read, whose tables are now these."""
        tuned, untuned = level.parameters({**level.start, **tables}), level.untuned()
        for rows in self._batches():
            self._tuned[rows] = self._run(tuned, self._tuned[rows])
        for rows in self._batches(self._first_held):
            held = slice(rows.start - self._first_held, rows.stop - self._first_held)
            self._untuned[held] = self._run(untuned, self._untuned[held])
        self._own = {}

    @torch.no_grad()
    def divergences(self) -> tuple[float, float]:
        """Behind the last block: KL of the float model to the quantized one, untuned and tuned, on held-out text.

        In nats per predicted token.
        """
        before, after = [], []
        for rows in self._batches(self._first_held):
            held = slice(rows.start - self._first_held, rows.stop - self._first_held)
            before.append(self._divergence(self._untuned[held], self._float[rows], rows))
            after.append(self._divergence(self._tuned[rows], self._float[rows], rows))
        return float(torch.cat(before).mean()), float(torch.cat(after).mean())

    def _run(self, parameters: Values, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks.run(self._index, {**self._own, **parameters}, hidden)

    def _divergence(self, found: torch.Tensor, goal: torch.Tensor, rows: Any) -> torch.Tensor:
        """Of what the model says behind its last block, one number for each predicted token of `rows`."""
        with torch.no_grad():
            expected = functional.log_softmax(self.blocks.logits(goal, {})[:, :-1], -1)
        logits = functional.log_softmax(self.blocks.logits(found, self._outside)[:, :-1], -1)
        kl = functional.kl_div(logits, expected, reduction="none", log_target=True).sum(-1)
        return kl[self._there[rows][:, 1:]]

    def _channel_weights(self) -> torch.Tensor:
        """One over the variance of each channel of the block's goal, in the text to train on. Shapes: f32[D]"""
        count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for rows in self._batches(0, self._first_held):
            values = self._float[rows][self._there[rows]].double()
            count += len(values)
            total, squares = total + values.sum(0), squares + values.square().sum(0)
        variance = squares / count - (total / count).square()
        floor = max(FLOOR * float(variance.mean()), torch.finfo(torch.float32).tiny)
        return (1 / variance.clamp(min=floor)).float()

    def _batches(self, first: int = 0, end: int | None = None) -> list[slice]:
        end, step = len(self._ids) if end is None else end, self._step
        return [slice(i, min(i + step, end)) for i in range(first, end, step)]

    @property
    def _step(self) -> int:
        """Sequences that are run together."""
        return max(1, STEP_TOKENS // self._ids.shape[1])

    def _endless(self) -> Iterator[torch.Tensor]:
        """Rows of the training text, shuffled anew each time it ends."""
        random = np.random.default_rng((self._seed, self._bits, self._index))
        while True:
            rows = torch.from_numpy(random.permutation(self._first_held))
            yield from torch.split(rows, self._step)


def _on_disk(shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    """Float32 zeros that lie in a file without a name, gone with the last use of them. Raises: OutputError"""
    size_bytes = 4 * int(np.prod(shape))
    with writable(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)  # now, not as a signal at some later write
        memory = mmap.mmap(file.fileno(), size_bytes)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
