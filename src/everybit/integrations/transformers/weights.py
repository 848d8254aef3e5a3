"""A module whose weight is read from an overlay.

The module keeps its class's forward pass: its parameter is replaced by a property of the same name that gives the
dense weight at the precision in force. One mechanism serves `nn.Linear`, `Conv1D` and fused experts alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from everybit.errors import FormatError
from everybit.formats import Overlay, WeightSpec
from everybit.kernels import dequantize

ANCHOR = "_overlay_anchor"  # an empty buffer that follows .to(device, dtype), which the dense weight then follows


class Slot:
    """One weight of an overlay and its dense form at one precision, made at first use.

    `bits` is what the model is set to; a weight without that precision is read at its `served_bits`.
    """

    def __init__(self, overlay: Overlay, spec: WeightSpec, bits: int) -> None:
        self.overlay = overlay
        self.spec = spec
        self.bits = bits
        self._dense: torch.Tensor | None = None
        self._dense_bits = 0

    def dense(self, anchor: torch.Tensor) -> torch.Tensor:
        """The weight in the model's orientation, with the dtype and device of `anchor`.

        Cost: the first call at a precision reads its planes and one codebook; the dense copy then stays.
        """
        bits = self.spec.served_bits(self.bits)
        dense = self._dense
        if dense is None or self._dense_bits != bits or dense.dtype != anchor.dtype or dense.device != anchor.device:
            self._dense = None  # freed before its successor is made
            planes = self.overlay.planes(self.spec.name, bits)
            values = dequantize(planes, self.overlay.table(self.spec.name, bits), self.spec.columns)
            with torch.inference_mode(False):  # it outlives the caller's inference mode, which would taint it
                dense = torch.from_numpy(values).reshape(self.spec.shape).to(device=anchor.device, dtype=anchor.dtype)
                if self.spec.transposed:
                    dense = dense.transpose(-1, -2).contiguous()
            self._dense, self._dense_bits = dense, bits
        return dense

    def release(self) -> None:
        """Forget the dense copy."""
        self._dense = None


def attach(model: nn.Module, overlay: Overlay, bits: int, prefix: str = "") -> list[Slot]:
    """Replace every parameter that the overlay holds by a property that reads it.

    `prefix` is the name of the base model inside the full one; where `model` is the base model alone, it is dropped
    from the overlay's names and the head is left out.
    Mutates: `model`. Raises: FormatError when the model has no such parameter or another shape.
    """
    slots = []
    base_only = bool(prefix) and not hasattr(model, prefix)
    for spec in overlay.weights.values():
        path, _, attribute = spec.name.rpartition(".")
        if base_only:
            if not path.startswith(prefix + "."):
                continue  # a quantized head, which the base model does not have
            path = path.removeprefix(prefix + ".")
        module = _find(model, path)
        parameter = None if module is None else module._parameters.get(attribute)
        if module is None or parameter is None:
            raise FormatError(
                f"{overlay.folder}: the overlay holds {spec.name}, which {type(model).__name__} does not have: "
                "config.json and weights do not belong together"
            )
        expected = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2]) if spec.transposed else spec.shape
        if tuple(parameter.shape) != expected:
            raise FormatError(
                f"{overlay.folder}: {spec.name} has shape {list(expected)} in the overlay, {type(model).__name__} "
                f"expects {list(parameter.shape)}: config.json and weights do not belong together"
            )
        slot = Slot(overlay, spec, bits)
        slots.append(slot)
        _swap(module, attribute, slot, parameter)
    return slots


def detach(model: nn.Module) -> None:
    """Turn every overlay weight back into an ordinary parameter at the precision in force."""
    for module in model.modules():
        slots: dict[str, Slot] | None = module.__dict__.pop("_overlay_slots", None)
        if slots is None:
            continue
        anchor = getattr(module, ANCHOR)
        module.__class__ = type(module).__mro__[1]
        delattr(module, ANCHOR)
        for attribute, slot in slots.items():
            module.register_parameter(attribute, nn.Parameter(slot.dense(anchor), requires_grad=False))


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _swap(module: nn.Module, attribute: str, slot: Slot, parameter: nn.Parameter) -> None:
    del module._parameters[attribute]
    if "_overlay_slots" in module.__dict__:
        module.__dict__["_overlay_slots"][attribute] = slot
        attributes = tuple(module.__dict__["_overlay_slots"])
        module.__class__ = _overlay_class(type(module).__mro__[1], attributes)
        return
    module.__dict__["_overlay_slots"] = {attribute: slot}
    module.register_buffer(ANCHOR, torch.empty(0, dtype=parameter.dtype, device=parameter.device), persistent=False)
    module.__class__ = _overlay_class(type(module), (attribute,))  # type: ignore[arg-type]
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not re-initialise what is read


@cache
def _overlay_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base`, under its name, with a property for each attribute."""

    def reader(attribute: str) -> property:
        def read(self: Any) -> torch.Tensor:
            slot: Slot = self.__dict__["_overlay_slots"][attribute]
            return slot.dense(self._buffers[ANCHOR])

        return property(read)

    return type(base.__name__, (base,), {"__module__": base.__module__, **{a: reader(a) for a in attributes}})
