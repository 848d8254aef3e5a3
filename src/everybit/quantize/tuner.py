"""Table tuning: codes stay, each precision's tables are trained until the outputs are those of the float model.

Every precision has tables of its own, so tuning one costs the others nothing. Minimized is the KL divergence of the
float model's next-token distribution to the quantized model's, on calibration text; the last tenth of it is never
trained on and decides everything: the learning rate, when to stop, and whether to keep the result at all.

Source: the loss is knowledge distillation on logits (Hinton et al., 1503.02531); training codebooks with the codes
fixed is the fine-tuning of AQLM (Egiazarian et al., 2401.06118), section 3.4, on the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

from everybit.formats.compact import MOST

Codes = NDArray[np.uint8]
Table = NDArray[np.float32]

STEP_TOKENS = 2048
HELD_OUT = 0.1  # of the sequences, at most HELD_OUT_TOKENS
HELD_OUT_TOKENS = 8192
# Adam's rate in units of a row's standard deviation, by bits: finer tables need finer steps (quality-prototype study).
RATES = {2: 3e-2, 3: 1.5e-2, 4: 6e-3}
CANDIDATES = (0.3, 1.0, 3.0)  # times that rate; trying them takes half of the steps
CHECK_EVERY = 10
NOTHING = 1e-9  # nats: float32 noise, as of weights that their tables represent exactly
PATIENCE = 3  # checks without progress


@dataclass(frozen=True)
class Quantized:
    """A weight at one precision. Where `scale` is given, an entry is stored as an int8 times that of its row.

    Shapes: codes u8[rows, K], table f32[rows, 2^bits], scale f32[rows, 1]; `shape` is the model's own
    """

    codes: Codes
    table: Table
    scale: Table | None
    shape: tuple[int, ...]
    transposed: bool

    def in_model(self, values: torch.Tensor) -> torch.Tensor:
        """Values [rows, K] as the model holds the weight."""
        if not self.transposed:
            return values.view(self.shape)
        return values.view(*self.shape[:-2], self.shape[-1], self.shape[-2]).transpose(-1, -2)


@dataclass(frozen=True)
class Tuned:
    """Tables by weight name, and KL on the held-out calibration text before and after (nats per token)."""

    tables: dict[str, Table]
    before: float
    after: float
    steps: int


class _LookUp(torch.autograd.Function):
    """stored(table)[row, code]; the gradient of an entry is the sum over its weights, as if it were not rounded.

    Codes stay bytes between the two passes.
    """

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.width = table.shape[1]
        return _stored(table, scale).gather(1, codes.long())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        total = gradients[0].new_zeros(len(codes), ctx.width)
        return total.scatter_add_(1, codes.long(), gradients[0]), None, None


def _stored(table: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return table
    return (table / torch.where(scale > 0, scale, 1)).round_().clamp_(-MOST, MOST) * scale


class Tuner:
    """The float model, the text and its held-out part; tunes one precision at a time.

    Cost: the model, a quantized copy of its weights in float32 with gradients, a step's activations; per step about
    four forward passes of STEP_TOKENS tokens. Mutates: nothing of the model.
    """

    def __init__(self, model: Any, sequences: Sequence[torch.Tensor], seed: int = 0) -> None:
        self.model = model
        self._train, self._held = hold_out(sequences, seed)
        self._seed = seed
        self._expected = [self._probabilities(batch) for batch in _batches(self._held)]

    def tune(
        self,
        weights: Mapping[str, Quantized],
        fixed: Mapping[str, torch.Tensor],
        bits: int,
        steps: int,
        progress: bool = True,
    ) -> Tuned:
        """Train the tables of `weights` at one precision; `fixed` are the model's other quantized parameters there."""
        level = Level(weights, fixed)
        text = self._endless(bits)

        def loss(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
            ids = next(text)
            return self._divergence(parameters, ids, self._probabilities(ids))

        with tqdm(total=steps, desc=f"tuning {bits} bits", unit="step", disable=not progress) as bar:
            found = descend(level, bits, steps, loss, self._held_out, "KL", bar)
        return Tuned({n: t.numpy() for n, t in found.tables.items()}, found.before, found.after, found.steps)

    def _endless(self, bits: int) -> Iterator[torch.Tensor]:
        """Batches of the training text, shuffled anew each time it ends."""
        random = np.random.default_rng((self._seed, bits))
        while True:
            yield from _batches([self._train[int(i)] for i in random.permutation(len(self._train))])

    def _held_out(self, weights: Mapping[str, torch.Tensor]) -> float:
        total, tokens = 0.0, 0
        with torch.no_grad():
            for ids, expected in zip(_batches(self._held), self._expected, strict=True):
                count = int((ids[:, 1:] >= 0).sum())
                total += float(self._divergence(weights, ids, expected)) * count
                tokens += count
        return total / tokens

    @torch.no_grad()
    def _probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids.clamp(min=0), use_cache=False).logits
        return functional.log_softmax(logits[:, :-1].float(), -1)

    def _divergence(
        self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, expected: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": ids.clamp(min=0), "use_cache": False}
        logits = functional_call(self.model, dict(weights), (), inputs).logits[:, :-1].float()
        found = functional.log_softmax(logits, -1)
        kl = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
        return kl[ids[:, 1:] >= 0].mean()


class Level:
    """Quantized parameters at one precision, as functions of the tables. Shapes: those of `Quantized`, as tensors"""

    def __init__(self, weights: Mapping[str, Quantized], fixed: Mapping[str, torch.Tensor]) -> None:
        self.weights, self.fixed = weights, fixed
        self.codes = {n: torch.from_numpy(np.ascontiguousarray(w.codes)) for n, w in weights.items()}
        self.start = {n: torch.from_numpy(np.array(w.table)) for n, w in weights.items()}
        self.scale = {n: None if w.scale is None else torch.from_numpy(w.scale) for n, w in weights.items()}

    def parameters(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = dict(self.fixed)
        for name, weight in self.weights.items():
            values = _LookUp.apply(tables[name], self.codes[name], self.scale[name])  # type: ignore[no-untyped-call]
            found[name] = weight.in_model(values)
        return found

    @torch.no_grad()
    def untuned(self) -> dict[str, torch.Tensor]:
        """The parameters as the solver made them."""
        return self.parameters(self.start)

    def stored(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tables as the file will hold them."""
        return {n: _stored(t, self.scale[n]) for n, t in tables.items()}


@dataclass(frozen=True)
class Descent:
    """The best tables found (as stored), and the held-out loss before and after."""

    tables: dict[str, torch.Tensor]
    before: float
    after: float
    steps: int


def descend(
    level: Level,
    bits: int,
    steps: int,
    loss: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    held_out: Callable[[Mapping[str, torch.Tensor]], float],
    what: str,
    bar: Any,
) -> Descent:
    """Train the tables of `level` by at most `steps` of Adam; what `held_out` says chooses the rate, when to stop, and
    whether anything is kept.

    `loss` is that of the parameters on its next batch of training text; `bar` moves by one a step, `what` names the
    loss there.
    """
    start = level.start
    before = held_out(level.untuned())
    if not start or before <= NOTHING:
        return Descent(level.stored(start), before, before, 0)
    best, best_tables = before, start

    def train(run: _Run, share: float) -> None:
        run.step(loss(level.parameters(run.tables())), share)
        bar.update()

    runs = [_Run(level, RATES.get(bits, RATES[4] * 2.0 ** (4 - bits)) * factor) for factor in CANDIDATES]
    trial = steps // (2 * len(CANDIDATES))
    if trial == 0:  # too few to try: the middle rate
        runs = runs[1:2]
    results = []
    for run in runs:
        for _ in range(trial):
            train(run, 1.0)
        results.append(held_out(level.parameters(run.detached())) if trial else before)
    taken = trial * len(runs)
    chosen = min(range(len(runs)), key=lambda i: results[i] if math.isfinite(results[i]) else math.inf)
    run = runs[chosen]
    if results[chosen] < best:
        best, best_tables = results[chosen], run.detached()
    left, worse = steps - taken if math.isfinite(results[chosen]) else 0, 0
    for i in range(left):
        train(run, 1 - i / left)
        taken += 1
        if (i + 1) % CHECK_EVERY and i + 1 < left:
            continue
        now = held_out(level.parameters(run.detached()))
        worse = 0 if now < best else worse + 1
        if now < best:
            best, best_tables = now, run.detached()
        bar.set_postfix_str(f"{what} {before:.3g} -> {best:.3g}")
        if worse == PATIENCE:
            break
    return Descent(level.stored(best_tables), before, best, taken)


def hold_out(sequences: Sequence[torch.Tensor], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sequences to train on and those to decide by; of a single one its end is held out."""
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(sequences))]
    held: list[torch.Tensor] = []
    while len(order) > 1 and (
        len(held) < HELD_OUT * len(sequences) and sum(s.shape[1] for s in held) < HELD_OUT_TOKENS
    ):
        held.append(sequences[order.pop()])
    train = [sequences[i] for i in order]
    if not held:
        cut = max(2, train[0].shape[1] * 9 // 10)
        held, train = [train[0][:, cut - 1 :]], [train[0][:, :cut]]
    return train, held


class _Run:
    """Adam over the tables of all weights, each measured in standard deviations of its row."""

    def __init__(self, level: Level, rate: float) -> None:
        self.start, self.rate = level.start, rate
        self.unit = {
            n: t.gather(1, level.codes[n].long()).std(dim=1, keepdim=True, correction=0) for n, t in level.start.items()
        }
        self.change = {n: torch.zeros_like(t, requires_grad=True) for n, t in level.start.items()}
        self.adam = torch.optim.Adam(self.change.values(), lr=rate, betas=(0.9, 0.99))

    def tables(self) -> dict[str, torch.Tensor]:
        return {n: t + self.unit[n] * self.change[n] for n, t in self.start.items()}

    @torch.no_grad()
    def detached(self) -> dict[str, torch.Tensor]:
        return self.tables()

    def step(self, loss: torch.Tensor, share: float) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.adam.param_groups:
            group["lr"] = self.rate * share
        self.adam.step()


def _batches(sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sequences of about STEP_TOKENS tokens together, padded at the end with -1. Causal models do not mind."""
    batches: list[list[torch.Tensor]] = []
    for sequence in sequences:
        if not batches or sum(len(s) for s in batches[-1]) + sequence.shape[1] > STEP_TOKENS:
            batches.append([])
        batches[-1].append(sequence[0])
    return [torch.nn.utils.rnn.pad_sequence(b, batch_first=True, padding_value=-1) for b in batches]
