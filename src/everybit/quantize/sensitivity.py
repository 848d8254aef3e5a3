"""How much the loss minds an error in each weight: the diagonal of the empirical Fisher information.

One pass over the calibration sequences; per sequence the gradient of the mean token loss, squared, is added in
float32 (a bf16 sum loses small terms). Mixtures of experts: every expert also sees every token (see
`every_expert`). The result is one float32 tensor per quantized parameter, in a file that is rewritten while
the pass runs, so that a killed pass goes on where it stopped.

Source: SqueezeLLM (2306.07629), section 4.1; Any-Precision LLM (2402.10517), section 3.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from everybit.errors import OutputError, SourceError
from everybit.quantize.discover import Target, is_fused_experts

SAVE_EVERY_S = 60.0
# A weight whose input was always zero has no gradient, but other text may reach it: it counts this share of
# its row's mean, too little to move a codebook and enough to keep its value near a centroid.
FLOOR = 1e-3


class SensitivityFile:
    """The finished statistics, read one parameter at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def finished(cls, path: Path) -> SensitivityFile | None:
        """The file at `path`, if a pass over all its sequences made it."""
        state = _state(path)
        return cls(path) if state is not None and state["done"] == state["sequences"] else None

    def unreached(self) -> list[str]:
        """The parameters that no gradient reached: every weight of theirs counts the same."""
        with safe_open(self.path, framework="np") as file:
            return [name for name in file.keys() if not file.get_tensor(name).any()]  # noqa: SIM118

    def read(self, name: str) -> np.ndarray:
        """Stored (output-first) sensitivities f32, floored per row."""
        with safe_open(self.path, framework="np") as file:
            value: np.ndarray = file.get_tensor(name)
        mean = value.mean(axis=-1, keepdims=True)
        floored: np.ndarray = np.maximum(value, FLOOR * mean)
        return floored


def accumulate(
    model: Any,
    targets: list[Target],
    sequences: list[torch.Tensor],
    path: Path,
    progress: bool = True,
) -> SensitivityFile:
    """Run the pass, or the rest of it.

    Needs: a float32 model with every target as a parameter. Cost: one forward and backward per sequence; memory of
    the model, one gradient and the sums. Mutates: `path`.
    Raises: SourceError on a non-finite loss or gradient, naming the parameter.
    """
    fingerprint = hashlib.sha256(b"".join(s.numpy().tobytes() for s in sequences)).hexdigest()
    done, sums = _resume(path, fingerprint)
    state = {"fingerprint": fingerprint, "sequences": len(sequences)}
    parameters = {t.name: model.get_parameter(t.name) for t in targets}
    for t in targets:
        sums.setdefault(t.name, torch.zeros(t.shape))
    if done < len(sequences):
        last_saved = time.monotonic()
        with ExitStack() as stack:
            for t in targets:
                parameters[t.name].requires_grad_(True)
                hook = parameters[t.name].register_post_accumulate_grad_hook(_adder(sums[t.name], t))
                stack.callback(hook.remove)
            stack.enter_context(every_expert(model))
            bar = stack.enter_context(
                tqdm(total=len(sequences), initial=done, desc="sensitivity", unit="seq", disable=not progress)
            )
            for ids in sequences[done:]:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if not torch.isfinite(loss):
                    raise SourceError(f"the loss on calibration sequence {done} is {loss.item()}: check the weights")
                loss.backward()
                done += 1
                bar.update()
                if time.monotonic() - last_saved > SAVE_EVERY_S and done < len(sequences):
                    _save(path, {**state, "done": done}, sums)
                    last_saved = time.monotonic()
        _save(path, {**state, "done": done}, sums)
    for name, value in sums.items():
        if not torch.isfinite(value).all():
            raise SourceError(f"non-finite gradients at {name}: check the weights, or use --calibration none")
    return SensitivityFile(path)


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
    detached copy subtracted. Inputs are detached there, so no other gradient changes either.
    """
    patched = []
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


def _save(path: Path, state: dict[str, Any], sums: dict[str, torch.Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(sums, temporary, metadata={"state": json.dumps(state)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path} ({error}): free space, then continue with --resume") from error


def _resume(path: Path, fingerprint: str) -> tuple[int, dict[str, torch.Tensor]]:
    state = _state(path)
    if state is None or state["fingerprint"] != fingerprint:
        return 0, {}
    with safe_open(path, framework="pt") as file:
        return int(state["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _state(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            return state
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None  # torn by a power cut: measured again
