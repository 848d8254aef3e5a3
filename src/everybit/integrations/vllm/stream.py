"""The weights of an overlay on their way from its files to vLLM's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from everybit.errors import FormatError
from everybit.formats import WeightSpec
from everybit.integrations.vllm.decode import decode

if TYPE_CHECKING:
    from everybit.integrations.vllm.config import OverlayConfig

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class OverlayMapper(WeightsMapper):  # type: ignore[misc]
    """A mapper of names that turns weights into what the layers hold, first of all.

    vLLM joins it with the model's own: `model_mapper | this`, for which a subclass is asked first (`__ror__`).
    """

    overlay: Any = None

    def __or__(self, other: WeightsMapper) -> OverlayMapper:
        return self._joined(self, other)

    def __ror__(self, other: WeightsMapper) -> OverlayMapper:
        return self._joined(other, self)

    def _joined(self, first: WeightsMapper, second: WeightsMapper) -> OverlayMapper:
        both = WeightsMapper.__or__(first, second)
        return OverlayMapper(**{f.name: getattr(both, f.name) for f in fields(WeightsMapper)}, overlay=self.overlay)

    def apply(self, weights: Weights) -> Weights:
        found: Weights = super().apply(translate(self.overlay, weights))
        return found


def needed(spec: WeightSpec, bits: int) -> set[str]:
    """The suffixes of the tensors that a deployment at `bits` reads."""
    own = spec.served_bits(bits)
    return {f"plane{k}" for k in range(own)} | {part.suffix for part in spec.book.parts(own)}


def translate(overlay: OverlayConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Planes of layers that hold them as they are, other weights dense, without what the precision does not read.

    What is left out was only mapped by the loader of safetensors: its bytes are never copied.
    Raises: FormatError where tensors of a weight are missing or hold impossible numbers
    """
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        parameter, _, suffix = name.rpartition("_")
        spec = overlay.weights.get(parameter)
        if spec is None:
            yield _rename(overlay, name), tensor
        elif suffix not in (wanted := needed(spec, overlay.bits)):
            continue
        elif parameter in overlay.taken:
            overlay.seen.add(name)
            yield name, tensor
        else:
            found = pending.setdefault(parameter, {})
            found[suffix] = tensor
            if len(found) == len(wanted):
                del pending[parameter]
                yield _rename(overlay, parameter), _dense(spec, overlay.bits, found)
    for parameter, found in pending.items():
        spec = overlay.weights[parameter]
        require_all(spec, overlay.bits, {f"{parameter}_{suffix}" for suffix in found})


def require_all(spec: WeightSpec, bits: int, found: set[str]) -> None:
    """Raises: FormatError where a tensor of the weight did not come"""
    if missing := sorted({f"{spec.name}_{suffix}" for suffix in needed(spec, bits)} - found):
        raise FormatError(
            f"{missing[0]} did not come while loading at {bits} bits: the overlay lacks this precision or is damaged "
            "(`everybit inspect` tells), or vLLM's model reads its weights in a way of its own"
        )


def _dense(spec: WeightSpec, bits: int, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the model holds it, in the dtype that vLLM loads it in."""
    own = spec.served_bits(bits)
    planes = [found[f"plane{k}"].reshape(spec.rows, -1) for k in range(own)]
    dense = decode(spec, own, planes, found, spec.columns).to(torch.get_default_dtype()).reshape(spec.shape)
    return dense.transpose(-1, -2).contiguous() if spec.transposed else dense


def _rename(overlay: OverlayConfig, name: str) -> str:
    for ours, theirs in overlay.renamed.items():
        name = name.replace(ours, theirs)
    return name
