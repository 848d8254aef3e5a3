"""Table tuning: codes stay, each precision's codebook is trained until the model's outputs are those of the float model.

Every precision has tables of its own, so tuning one costs the others nothing. Minimized is the KL divergence of the
float model's next-token distribution to the quantized model's, on calibration text; the last tenth of it is never
trained on and decides everything: the learning rate, when to stop, and whether to keep the result at all.

Source: the loss is knowledge distillation on logits (Hinton et al., 1503.02531); training codebooks with the codes
fixed is the fine-tuning of AQLM (Egiazarian et al., 2401.06118), section 3.4, on the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

Codes = NDArray[np.uint8]
Table = NDArray[np.float32]

STEP_TOKENS = 2048
HELD_OUT = 0.1  # of the sequences, at most HELD_OUT_TOKENS
HELD_OUT_TOKENS = 8192
# Adam's rate in units of a row's standard deviation, by bits: finer tables need finer steps (quality-prototype study).
RATES = {2: 3e-2, 3: 1.5e-2, 4: 6e-3}
CANDIDATES = (1.0, 3.0)  # times that rate: tried for a quarter of the steps each
CHECK_EVERY = 10
PATIENCE = 3  # checks without progress


@dataclass(frozen=True)
class Quantized:
    """A weight at one precision. Shapes: codes u8[rows, K], table f32[rows, 2^bits]; `shape` is the model's own."""

    codes: Codes
    table: Table
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Tuned:
    """Tables by weight name, and KL on the held-out calibration text before and after (nats per token)."""

    tables: dict[str, Table]
    before: float
    after: float
    steps: int


class _LookUp(torch.autograd.Function):
    """table[row, code]; the gradient of an entry is the sum over its weights. Codes stay bytes between the two."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.width = table.shape[1]
        return table.gather(1, codes.long())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (codes,) = ctx.saved_tensors
        total = gradients[0].new_zeros(len(codes), ctx.width)
        return total.scatter_add_(1, codes.long(), gradients[0]), None


class Tuner:
    """The float model, the text and its held-out part; tunes one precision at a time.

    Cost: the model, a quantized copy of its weights in float32 with gradients, a step's activations; per step about
    four forward passes of STEP_TOKENS tokens. Mutates: nothing of the model.
    """

    def __init__(self, model: Any, sequences: Sequence[torch.Tensor], seed: int = 0) -> None:
        self.model = model
        order = [int(i) for i in np.random.default_rng(seed).permutation(len(sequences))]
        held: list[torch.Tensor] = []
        while len(order) > 1 and (
            len(held) < HELD_OUT * len(sequences) and sum(s.shape[1] for s in held) < HELD_OUT_TOKENS
        ):
            held.append(sequences[order.pop()])
        self._train = [sequences[i] for i in order]
        self._held = held or self._train
        self._random = np.random.default_rng(seed + 1)
        self._pending: list[torch.Tensor] = []
        self._expected = [self._probabilities(batch) for batch in _batches(self._held)]

    def tune(self, weights: Mapping[str, Quantized], bits: int, steps: int, progress: bool = True) -> Tuned:
        """Train the tables of one precision."""
        codes = {name: torch.from_numpy(np.ascontiguousarray(w.codes)) for name, w in weights.items()}
        start = {name: torch.from_numpy(np.array(w.table)) for name, w in weights.items()}
        # A step is measured by the row, not by its tables: rows of large weights move further.
        unit = {n: (t.gather(1, codes[n].long()).std(dim=1, keepdim=True) + 1e-12) for n, t in start.items()}
        base = RATES.get(bits, RATES[4] * 2.0 ** (4 - bits))

        def held_out(tables: Mapping[str, torch.Tensor]) -> float:
            return self._held_out(self._weights(weights, codes, tables))

        before = held_out(start)
        best, best_tables, taken = before, start, 0
        with tqdm(total=steps, desc=f"tuning {bits} bits", unit="step", disable=not progress) as bar:
            trial = max(1, steps // 4) if len(CANDIDATES) > 1 else 0
            results = []
            for factor in CANDIDATES:
                if trial * (len(results) + 1) >= steps:
                    break
                run = _Run(start, unit, base * factor)
                for _ in range(trial):
                    run.step(self._loss(self._weights(weights, codes, run.tables())), 1.0)
                    bar.update()
                taken += trial
                tables = run.detached()
                results.append((held_out(tables), run, tables))
            results.sort(key=lambda r: r[0] if math.isfinite(r[0]) else math.inf)
            run = results[0][1] if results else _Run(start, unit, base)
            if results and results[0][0] < best:
                best, best_tables = results[0][0], results[0][2]
            left, worse = steps - taken, 0
            for i in range(left):
                run.step(self._loss(self._weights(weights, codes, run.tables())), 1 - i / left)
                taken += 1
                bar.update()
                if (i + 1) % CHECK_EVERY == 0 or i + 1 == left:
                    now = held_out(run.detached())
                    bar.set_postfix_str(f"KL {before:.3g} -> {min(now, best):.3g}")
                    if now < best:
                        best, best_tables, worse = now, run.detached(), 0
                    else:
                        worse += 1
                        if worse == PATIENCE:
                            break
        return Tuned({n: t.numpy() for n, t in best_tables.items()}, before, best, taken)

    def _weights(
        self, weights: Mapping[str, Quantized], codes: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in weights.items():
            value: torch.Tensor = _LookUp.apply(tables[name], codes[name])  # type: ignore[no-untyped-call]
            if weight.transposed:
                stored = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
                found[name] = value.view(stored).transpose(-1, -2)
            else:
                found[name] = value.view(weight.shape)
        return found

    def _loss(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not self._pending:
            order = self._random.permutation(len(self._train))
            self._pending = _batches([self._train[int(i)] for i in order])
        ids = self._pending.pop()
        return self._divergence(weights, ids, self._probabilities(ids))

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
        return functional.log_softmax(
            self.model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1].float(), -1
        )

    def _divergence(
        self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, expected: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": ids.clamp(min=0), "use_cache": False}
        logits = functional_call(self.model, dict(weights), (), inputs).logits[:, :-1].float()
        found = functional.log_softmax(logits, -1)
        kl = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
        return kl[ids[:, 1:] >= 0].mean()


class _Run:
    """Adam over the tables of all weights."""

    def __init__(self, start: Mapping[str, torch.Tensor], unit: Mapping[str, torch.Tensor], rate: float) -> None:
        self.start, self.unit, self.rate = start, unit, rate
        self.change = {n: torch.zeros_like(t, requires_grad=True) for n, t in start.items()}
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
