"""What calibration says about each weight: the diagonal of the Fisher information, and guided Hessians.

For a matrix z = W x and the loss L of a token, per group g of consecutive output rows,

    hessian_g = sum over tokens of mean over rows of g of (dL/dz_row)^2 * x x'

is the block of the empirical Fisher information that its rows share (GuidedQuant); the diagonal has one entry per
weight. Both come from the same forward and backward passes, one sequence at a time, added in float32 (a bf16 sum loses
small terms). Mixtures of experts: every expert also sees every token (see `every_expert`).

Memory is bounded: Hessians of [groups, K, K] are made for as many matrices at a time as fit, in several passes over
the sequences. Each pass writes a file that is rewritten while it runs, so that a killed one goes on where it stopped.

Source: GuidedQuant (2505.07004), section 3.2; SqueezeLLM (2306.07629), section 4.1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from everybit.errors import OutputError, SourceError
from everybit.quantize.discover import Target, is_fused_experts

F32 = NDArray[np.float32]
SAVE_EVERY_S = 60.0
# A weight whose input was always zero has no gradient, but other text may reach it: it counts this share of
# its row's mean, too little to move a codebook and enough to keep its value near a centroid.
FLOOR = 1e-3
HESSIAN = "|hessian"  # after a parameter's name; no parameter has a bar in it


class Statistics:
    """The finished statistics, read one parameter at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._unguided: list[str] = []
        for path in paths:
            self._unguided += (_state(path) or {}).get("unguided", [])
            with safe_open(path, framework="np") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    def _tensor(self, key: str) -> F32:
        with safe_open(self._file_of[key], framework="np") as file:
            value: F32 = file.get_tensor(key)
            return value

    def unreached(self) -> list[str]:
        """The parameters that no gradient reached: every weight of theirs counts the same."""
        return [name for name in self._file_of if HESSIAN not in name and not self._tensor(name).any()]

    def unguided(self) -> list[str]:
        """The parameters that gradients reached through products that no tap saw, so that their Hessians are zero."""
        return self._unguided

    def sensitivity(self, name: str) -> F32:
        """Stored (output-first) sensitivities, floored per row."""
        value = self._tensor(name)
        mean = value.mean(axis=-1, keepdims=True)
        floored: F32 = np.maximum(value, FLOOR * mean)
        return floored

    def hessian(self, name: str) -> F32 | None:
        """f32[groups, K, K] ([E, groups, K, K] for experts), or None where none was measured."""
        return self._tensor(name + HESSIAN) if name + HESSIAN in self._file_of else None


class Calibrated(Protocol):
    """A float32 model and the sequences to run it on; neither is touched where a finished file says it all."""

    @property
    def model(self) -> Any:
        """With every target as a parameter."""

    @property
    def sequences(self) -> list[torch.Tensor]:
        """Each [1, T]."""


def measure(
    calibrated: Calibrated,
    targets: list[Target],
    path: Path,
    groups: int = 0,
    memory_bytes: int = 4 << 30,
    progress: bool = True,
) -> Statistics:
    """Run the passes, or the rest of them. `groups` = 0 measures the diagonal only.

    Needs: a `path` that belongs to this model and these sequences.
    Cost: a forward and backward per sequence and pass; memory of the model, one gradient, the sums and at most
    `memory_bytes` of Hessians (or one matrix's, if that is more); disk for all of them, 4 * groups * K^2 bytes a matrix
    (20 GB and 5 passes for 1.1 billion parameters).
    Mutates: `path` and, with more than one pass, `path`.1, `path`.2, ... A finished file is taken as it is.
    Raises: SourceError on a non-finite loss or gradient, naming the parameter; OutputError, also when the disk is full.
    """
    waves: list[list[Target]] = [[]]
    used = 0
    for target in targets:
        size = _hessian_bytes(target, groups)
        if waves[-1] and used + size > memory_bytes:
            waves.append([])
            used = 0
        waves[-1].append(target)
        used += size
    needed = sum(_hessian_bytes(t, groups) + 4 * math.prod(t.shape) for t in targets)
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else math.inf  # else saving says it
    if free < needed and not path.exists():
        raise OutputError(
            f"{path.parent}: statistics need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free space, give "
            "--statistics FOLDER on another disk, or use --solver tree"
        )
    paths = [path if i == 0 else path.with_name(f"{path.name}.{i}") for i in range(len(waves))]
    for i, (wave, file) in enumerate(zip(waves, paths, strict=True)):
        name = "statistics" if len(waves) == 1 else f"statistics {i + 1}/{len(waves)}"
        names = hashlib.sha256("\n".join(t.name for t in wave).encode()).hexdigest()
        state = _state(file)
        if state is None or (state["names"], state["groups"]) != (names, groups) or state["done"] < state["sequences"]:
            identity = {"names": names, "groups": groups}
            _pass(calibrated.model, wave, calibrated.sequences, file, identity, name, progress)
    return Statistics(paths)


def _hessian_bytes(target: Target, groups: int) -> int:
    experts = target.shape[0] if len(target.shape) == 3 else 1
    return 4 * experts * min(groups, target.shape[-2]) * target.shape[-1] ** 2


def _pass(
    model: Any,
    targets: list[Target],
    sequences: list[torch.Tensor],
    path: Path,
    identity: dict[str, Any],
    title: str,
    progress: bool,
) -> None:
    groups = identity["groups"]
    fingerprint = hashlib.sha256(b"".join(s.numpy().tobytes() for s in sequences)).hexdigest()
    identity = {**identity, "fingerprint": fingerprint, "sequences": len(sequences)}
    done, sums = _resume(path, identity)
    parameters = {t.name: model.get_parameter(t.name) for t in targets}
    for t in targets:
        sums.setdefault(t.name, torch.zeros(t.shape))
        if groups:
            shape = (*t.shape[:-2], min(groups, t.shape[-2]), t.shape[-1], t.shape[-1])
            sums.setdefault(t.name + HESSIAN, torch.zeros(shape))
    if done < len(sequences):
        last_saved, save_s = time.monotonic(), 0.0
        with ExitStack() as stack:
            taps = []
            for t in targets:
                parameters[t.name].requires_grad_(True)
                stack.callback(parameters[t.name].requires_grad_, False)
                hook = parameters[t.name].register_post_accumulate_grad_hook(_adder(sums[t.name], t))
                stack.callback(hook.remove)
                if groups:
                    taps.append(_Tap(parameters[t.name], t, sums[t.name + HESSIAN]))
            stack.enter_context(every_expert(model))
            stack.enter_context(_Tapping(taps))
            bar = stack.enter_context(
                tqdm(total=len(sequences), initial=done, desc=title, unit="seq", disable=not progress)
            )
            for ids in sequences[done:]:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if not torch.isfinite(loss):
                    raise SourceError(f"the loss on calibration sequence {done} is {loss.item()}: check the weights")
                (loss * (ids.shape[1] - 1)).backward()  # the sum: a token counts the same in windows of any length
                done += 1
                bar.update()
                now = time.monotonic()
                if now - last_saved > max(SAVE_EVERY_S, 20 * save_s) and done < len(sequences):
                    _save(path, {**identity, "done": done}, sums)
                    last_saved = time.monotonic()
                    save_s = last_saved - now
        for name, value in sums.items():
            if not torch.isfinite(value).all():
                where = name.removesuffix(HESSIAN)
                raise SourceError(f"non-finite gradients at {where}: check the weights, or use --calibration none")
        unguided = [n for n in parameters if groups and sums[n].any() and not sums[n + HESSIAN].any()]
        _save(path, {**identity, "done": done, "unguided": unguided}, sums)


class _Tap:
    """Adds one parameter's Hessians: told of each product with it, it waits for the product's gradient."""

    def __init__(self, parameter: torch.Tensor, target: Target, total: torch.Tensor) -> None:
        self.begin = parameter.data_ptr()
        self.end = self.begin + parameter.numel() * parameter.element_size()
        self.matrix_bytes = target.shape[-1] * target.shape[-2] * parameter.element_size()
        self.total = total.view(-1, *total.shape[-3:])  # [experts or 1, groups, K, K]
        self.columns = target.shape[-1]

    def watch(self, weight: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> None:
        expert = (weight.data_ptr() - self.begin) // self.matrix_bytes
        total, inputs = self.total[expert], x.detach().reshape(-1, self.columns)

        def add(gradient: torch.Tensor) -> None:
            squares = gradient.detach().reshape(len(inputs), -1).float().square()
            bounds = [-(-i * squares.shape[1] // len(total)) for i in range(len(total) + 1)]
            for g, (begin, end) in enumerate(pairwise(bounds)):
                total[g].addmm_((inputs * squares[:, begin:end].mean(dim=1, keepdim=True)).T, inputs)

        if z.requires_grad and len(inputs):
            z.register_hook(add)  # type: ignore[no-untyped-call]


class _Tapping(TorchFunctionMode):
    """While active, every product with a tapped parameter (or one expert's slice of it) is watched.

    Linear layers call `linear`, GPT-2's Conv1D `addmm`, experts `linear` or `matmul` on a slice: what they share is
    that one operand lies in the parameter's memory.
    """

    def __init__(self, taps: list[_Tap]) -> None:
        super().__init__()
        self.taps = sorted(taps, key=lambda tap: tap.begin)
        self.begins = np.array([tap.begin for tap in self.taps], dtype=np.uint64)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = (*args, *(kwargs or {}).values())
        if function in (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm):
            self._tell(operands[0], operands[1], result)
        elif function in (torch.addmm, torch.Tensor.addmm):
            self._tell(operands[1], operands[2], result)
        return result

    def _tell(self, x: Any, weight: Any, result: torch.Tensor) -> None:
        if not self.taps or not isinstance(weight, torch.Tensor):
            return
        address = weight.data_ptr()
        tap = self.taps[max(0, int(np.searchsorted(self.begins, np.uint64(address), "right")) - 1)]
        if tap.begin <= address < tap.end:
            tap.watch(weight, x, result)


def _adder(total: torch.Tensor, target: Target) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if target.transposed:
            gradient = gradient.transpose(-1, -2)
        total.addcmul_(gradient, gradient)
        parameter.grad = None  # freed before the next layer's gradient exists

    return add


@contextmanager
def every_expert(model: Any) -> Iterator[None]:
    """While active, experts that the router did not choose for a token also get a gradient from it.

    The value of every forward pass is unchanged: each unchosen expert's output, at weight 1/E, is added and its
    detached copy subtracted. Inputs are detached there, so no other gradient changes either. Experts run one after the
    other (transformers' default is one product for all, in which no expert's own can be told apart).
    """
    patched = []
    fused = any(is_fused_experts(module) for module in model.modules())
    implementation = model.get_experts_implementation() if fused else None
    if fused:
        model.set_experts_implementation("eager")
    for module in model.modules():
        if not is_fused_experts(module):
            continue
        original = module.forward

        def forward(
            hidden: torch.Tensor,
            index: torch.Tensor,
            weights: torch.Tensor,
            original: Callable[..., torch.Tensor] = original,
            experts: int = module.num_experts,
        ) -> torch.Tensor:
            out = original(hidden, index, weights)
            everyone = torch.arange(experts).expand(hidden.shape[0], experts)
            share = torch.full((hidden.shape[0], experts), 1.0 / experts, dtype=weights.dtype)
            share.scatter_(1, index, 0.0)
            unchosen = original(hidden.detach(), everyone, share)
            return out + (unchosen - unchosen.detach())

        module.forward = forward
        patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward
        if fused:
            model.set_experts_implementation(implementation)


def _save(path: Path, state: dict[str, Any], sums: dict[str, torch.Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(sums, temporary, metadata={"state": json.dumps(state)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path} ({error}): free space, then continue with --resume") from error


def _resume(path: Path, identity: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor]]:
    state = _state(path)
    if state is None or {k: v for k, v in state.items() if k != "done"} != identity:
        return 0, {}
    with safe_open(path, framework="pt") as file:
        return int(state["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _state(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            return state if set(state) >= {"names", "groups", "fingerprint", "sequences", "done"} else None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None  # torn by a power cut: measured again
