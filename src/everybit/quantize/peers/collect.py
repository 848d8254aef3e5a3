"""What the methods need from calibration, for every weight of a model, from the same sequences."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from everybit.quantize import calibrate
from everybit.quantize.build import GROUPS
from everybit.quantize.calibrate import Calibrated
from everybit.quantize.discover import Target
from everybit.quantize.peers.method import F32, UnfitError
from everybit.quantize.source import Source
from everybit.quantize.statistics import measure


class Hessians(Protocol):
    """X'X / tokens of the inputs of each quantized parameter."""

    def hessian(self, name: str) -> F32:
        """Shapes: -> f32[K, K] in stored orientation. Raises: UnfitError"""


class Sensitivities(Protocol):
    """The diagonal Fisher information of each quantized parameter."""

    def sensitivity(self, name: str) -> F32:
        """Shapes: -> f32 of the stored shape"""

    def hessian(self, name: str) -> F32 | None:
        """Guided ones. Shapes: -> f32[groups, K, K] or [E, groups, K, K]"""


@dataclass(frozen=True)
class Collected:
    """Statistics of a model; a part that no method needed is None."""

    sensitivities: Sensitivities | None
    hessians: Hessians | None


@dataclass(frozen=True)
class MatrixStatistics:
    """One matrix's share of `Collected`: what a method is given."""

    collected: Collected
    name: str
    expert: int | None
    seed: int

    def sensitivity(self) -> F32:
        """f32[N, K]."""
        if self.collected.sensitivities is None:
            raise UnfitError("no sensitivities were measured")
        found = self.collected.sensitivities.sensitivity(self.name)
        return np.ascontiguousarray(found if self.expert is None else found[self.expert])

    def guided(self) -> F32:
        """f32[groups, K, K]."""
        found = None if self.collected.sensitivities is None else self.collected.sensitivities.hessian(self.name)
        if found is None:
            raise UnfitError("no guided Hessians were measured")
        return found if self.expert is None else found[self.expert]

    def hessian(self) -> F32:
        """f32[K, K]."""
        if self.collected.hessians is None:
            raise UnfitError("no Hessians were measured")
        return self.collected.hessians.hessian(self.name)


class InputHessians:
    """X'X / tokens of linear layers, by forward hooks; all of them in memory."""

    def __init__(self, model: Any, targets: list[Target], sequences: list[torch.Tensor], progress: bool) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        with ExitStack() as stack, torch.no_grad():
            for target in targets:
                module = model.get_submodule(target.name.rpartition(".")[0])
                if len(target.shape) == 2:
                    hook = module.register_forward_pre_hook(self._adder(target.name, target.shape[1]))
                    stack.callback(hook.remove)
            for ids in tqdm(sequences, desc="Hessians", unit="seq", disable=None if progress else True):
                model(input_ids=ids, use_cache=False)

    def _adder(self, name: str, columns: int) -> Any:
        total = self._sums.setdefault(name, torch.zeros(columns, columns))

        def add(module: Any, inputs: Any) -> None:
            x = inputs[0].detach().reshape(-1, columns).float()
            total.addmm_(x.T, x)
            self._tokens[name] = self._tokens.get(name, 0) + len(x)

        return add

    def hessian(self, name: str) -> F32:
        """Raises: UnfitError for fused experts, and for a layer that no token reached"""
        if name not in self._tokens:
            raise UnfitError(f"{name} has no Hessian here (fused experts, or a layer that no token reached)")
        mean: F32 = (self._sums[name] / self._tokens[name]).numpy()
        return mean


def collect(
    source: Source,
    targets: list[Target],
    record: calibrate.Calibration,
    documents: list[str],
    needs: Collection[str],
    folder: Path,
    progress: bool = True,
) -> Collected:
    """Measure what `needs` names (sensitivity, hessian, guided) on sequences that `record` chooses from `documents`.

    Cost: memory of the float32 model, its sensitivities and a K x K matrix per weight. Mutates: `folder`
    Raises: SourceError
    """
    if not needs:
        return Collected(None, None)
    calibrated = Calibrated(source.folder, record, documents, progress)
    hessians = InputHessians(calibrated.model, targets, calibrated.sequences, progress) if "hessian" in needs else None
    sensitivities = (
        measure(calibrated, targets, folder / "statistics", GROUPS, progress=progress)
        if "sensitivity" in needs
        else None
    )
    return Collected(sensitivities, hessians)
