"""A module whose weight is read from an overlay.

The parameter is replaced by a property of the same name that gives the dense weight at the precision in force, which
serves every class alike. A module that does nothing but multiply (`nn.Linear`, `Conv1D`) may do so by `everybit.gpu`
instead, from bit-planes; `products` says when.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from everybit.errors import FormatError, OutputError, PrecisionError
from everybit.formats import Overlay, WeightSpec
from everybit.gpu import TiledWeight
from everybit.integrations.transformers.products import Products, naming_what_fits
from everybit.kernels import dequantize

ANCHOR = "_overlay_anchor"  # an empty buffer that follows .to(device, dtype), which the dense weight then follows


class Slot:
    """One weight of an overlay: its planes on a GPU, or its dense form at one precision, made at first use.

    `bits` is what the model is set to; a weight without that precision is read at its `served_bits`. `multiplies`:
    whether its module only multiplies by it.
    """

    def __init__(self, overlay: Overlay, spec: WeightSpec, bits: int, products: Products, multiplies: bool) -> None:
        self.overlay = overlay
        self.spec = spec
        self.bits = bits
        self.products = products
        self.multiplies = multiplies
        self._dense: torch.Tensor | None = None
        self._dense_bits = 0
        self._tiled: TiledWeight | None = None
        self._tiled_for: tuple[torch.device, torch.dtype] | None = None
        self._without_kernel = 9  # bits from which on the codebook has none

    def dense(self, anchor: torch.Tensor) -> torch.Tensor:
        """The weight in the model's orientation, with the dtype and device of `anchor`.

        Cost: the first call at a precision reads its planes and one codebook; the dense copy then stays, except where
        products are made from planes.
        """
        bits = self.spec.served_bits(self.bits)
        dense = self._dense
        if dense is None or self._dense_bits != bits or dense.dtype != anchor.dtype or dense.device != anchor.device:
            self._dense = None  # freed before its successor is made
            planes = self.overlay.planes(self.spec.name, bits)
            values = dequantize(planes, self.overlay.table(self.spec.name, bits), self.spec.columns)
            # It outlives the caller's inference mode, which would taint it.
            with torch.inference_mode(False), naming_what_fits(self.overlay, anchor.device):
                dense = torch.from_numpy(values).reshape(self.spec.shape).to(device=anchor.device, dtype=anchor.dtype)
                if self.spec.transposed:
                    dense = dense.transpose(-1, -2).contiguous()
            if not self._by_planes(bits, anchor):
                self._dense, self._dense_bits = dense, bits
        return dense

    def times(self, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor | None:
        """x W' from planes; None where the dense weight is to be used.

        Shapes: [..., K] -> [..., N]
        Cost: planes up to the precision in force are read at first use and stay, so that fewer bits cost nothing
        later; more bits read them again. Raises: ModelError, ShapeError
        """
        bits = self.spec.served_bits(self.bits)
        if not self._by_planes(bits, anchor):
            return None
        if self._tiled is None or bits not in self._tiled.tables or self._tiled_for != (anchor.device, anchor.dtype):
            self._tiled = self._dense = None
            try:
                with torch.inference_mode(False), naming_what_fits(self.overlay, anchor.device):
                    self._tiled = TiledWeight.of(
                        self.overlay, self.spec.name, anchor.dtype, anchor.device, most_bits=bits
                    )
            except PrecisionError:
                self._without_kernel = bits
                return None
            self._tiled_for = anchor.device, anchor.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(anchor.dtype)
        return self._tiled.times(x, bits)

    def release(self) -> None:
        """Forget the dense copy."""
        self._dense = None

    def _by_planes(self, bits: int, anchor: torch.Tensor) -> bool:
        return self.multiplies and bits < self._without_kernel and self.products.by_planes(anchor.device, anchor.dtype)


class OverlayTensor(torch.Tensor):
    """A weight as it was read. Writing through `data`, as PEFT merges adapters, would be lost: it is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @property
    def data(self) -> torch.Tensor:
        raise OutputError(
            "an overlay's weight cannot be written, as merging, DoRA and some initialisations do: keep a plain adapter "
            "beside the overlay, or call the model's dequantize() first, which leaves one precision"
        )

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _ = self.data  # refuses


def attach(model: nn.Module, overlay: Overlay, bits: int, products: Products, prefix: str = "") -> list[Slot]:
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
        slot = Slot(overlay, spec, bits, products, attribute == "weight" and type(module).forward in _products())
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


@cache
def _products() -> tuple[Any, ...]:
    """The forward passes that are x W' + bias."""
    from transformers.pytorch_utils import Conv1D  # not at the top: transformers may be half imported then

    return nn.Linear.forward, Conv1D.forward


def _swap(module: nn.Module, attribute: str, slot: Slot, parameter: nn.Parameter) -> None:
    del module._parameters[attribute]
    if "_overlay_slots" in module.__dict__:
        module.__dict__["_overlay_slots"][attribute] = slot
        attributes = tuple(module.__dict__["_overlay_slots"])
        module.__class__ = _overlay_class(type(module).__mro__[1], attributes, False)
        return
    module.__dict__["_overlay_slots"] = {attribute: slot}
    module.register_buffer(ANCHOR, torch.empty(0, dtype=parameter.dtype, device=parameter.device), persistent=False)
    module.__class__ = _overlay_class(type(module), (attribute,), slot.multiplies)  # type: ignore[arg-type]
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not re-initialise what is read


@cache
def _overlay_class(base: type[nn.Module], attributes: tuple[str, ...], multiplies: bool) -> type[nn.Module]:
    """A subclass of `base`, under its name, with a property for each attribute."""

    def reader(attribute: str) -> property:
        def read(self: Any) -> torch.Tensor:
            slot: Slot = self.__dict__["_overlay_slots"][attribute]
            return slot.dense(self._buffers[ANCHOR]).as_subclass(OverlayTensor)

        return property(read)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        slot: Slot = self.__dict__["_overlay_slots"]["weight"]
        y = slot.times(x, self._buffers[ANCHOR])
        if y is None:
            y = base.forward(self, x)
        elif self.bias is not None:
            y = y + self.bias
        return y

    members = {"__module__": base.__module__, **{a: reader(a) for a in attributes}}
    return type(base.__name__, (base,), members | ({"forward": forward} if multiplies else {}))
