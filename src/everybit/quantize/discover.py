"""Which parameters of a decoder are quantized.

Found: `nn.Linear`, GPT-2's `Conv1D` (stored transposed) and the fused three-dimensional experts of
transformers 5 (some transposed and interleaved). Left as they are by default: everything outside the text
decoder (vision and audio towers), routers, embeddings, the output head, whether tied or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from everybit.errors import SourceError

ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}  # linear routers; newer ones are no nn.Linear at all


@dataclass(frozen=True)
class Target:
    """A parameter to quantize: its name, its stored shape (output first) and whether the model holds it transposed."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


def discover(model: PreTrainedModel, ignore: list[str], include: list[str]) -> tuple[list[Target], dict[str, str]]:
    """The parameters to quantize, and the matrices left alone with the reason.

    `ignore` and `include` are regular expressions searched in module names; `include` brings in what the
    default leaves out (an untied head, say), `ignore` wins over everything.
    Raises: SourceError when a pattern is invalid or matches nothing, or when nothing is left to quantize.
    """
    ignored, included = _compile(ignore, "--ignore"), _compile(include, "--override")
    used: set[re.Pattern[str]] = set()
    targets: list[Target] = []
    left: dict[str, str] = {}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    tied |= set((getattr(model, "all_tied_weights_keys", {}) or {}).values())
    for module_name, target, why_not in _candidates(model):
        matching = [p for p in ignored if p.search(module_name)]
        wanted = [p for p in included if p.search(module_name)]
        used.update(matching, wanted)
        if matching:
            left[target.name] = f"--ignore {matching[0].pattern}"
        elif target.name in tied:
            if wanted:
                raise SourceError(
                    f"--override {wanted[0].pattern!r} matches {module_name}, which is tied to the embedding: "
                    "a tied head cannot be quantized apart from it; drop the override"
                )
            left[target.name] = "tied to the embedding"
        elif why_not and not wanted:
            left[target.name] = why_not
        else:
            targets.append(target)
    for option, patterns in (("--ignore", ignored), ("--override", included)):
        if unused := [p.pattern for p in patterns if p not in used]:
            raise SourceError(
                f"{option} {unused[0]!r} matches no layer: expected a regular expression for names such as "
                f"{(targets[0].name if targets else 'model.layers.0.self_attn.q_proj')!r}"
            )
    if not targets:
        raise SourceError("no layer is left to quantize: expected nn.Linear, Conv1D or fused experts in the decoder")
    return targets, left


def _candidates(model: PreTrainedModel) -> Iterator[tuple[str, Target, str]]:
    """(module name, target, reason to leave it by default or '') for every matrix that could be quantized."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = {id(m) for m in decoder.modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        kind: list[tuple[str, tuple[int, ...], bool]] = []
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape[1], module.weight.shape[0]
            kind.append(("weight", (rows, columns), True))
        elif isinstance(module, nn.Linear):
            kind.append(("weight", tuple(module.weight.shape), False))
        elif is_fused_experts(module):
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim == 3:
                    e, first, second = value.shape
                    stored = (e, second, first) if module.is_transposed else (e, first, second)
                    kind.append((parameter, stored, bool(module.is_transposed)))
        else:
            continue
        reason = ""
        if module is head:
            reason = "output head"
        elif id(module) not in inside:
            reason = "outside the text decoder"
        elif name.rpartition(".")[2] in ROUTER_NAMES:
            reason = "router"
        for parameter, shape, transposed in kind:
            yield name, Target(f"{name}.{parameter}", shape, transposed), reason


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds its experts as three-dimensional parameters in the manner of transformers 5."""
    return hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def _compile(patterns: list[str], option: str) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise SourceError(f"{option} {pattern!r} is not a regular expression ({error}): fix it") from error
    return compiled
