"""What a transformers model gains when its weights come from an overlay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everybit.errors import OutputError
from everybit.formats import Overlay, OverlayWriter, TensorSpec
from everybit.formats.weights import require_bits
from everybit.integrations.transformers.products import Products
from everybit.integrations.transformers.weights import Slot
from everybit.quantize.encode import to_numpy
from everybit.quantize.workspace import free_output, promote

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


class OverlayModel(_Base):  # type: ignore[misc]
    """Mixed into the model's class: precision, and saving as an overlay.

    `overlay` is the opened `formats.Overlay`. Precision is a state of the model: one thread at a time.
    """

    overlay: Overlay
    _slots: list[Slot]
    _bits: int
    _products: Products

    @property
    def precision(self) -> int:
        """The bits in force."""
        return self._bits

    def set_precision(self, bits: int) -> None:
        """Serve every weight at `bits` from now on. Cheap: planes are read at the next use.

        Raises: PrecisionError when the overlay does not hold `bits`.
        """
        require_bits(bits, self.overlay.bits, "the overlay")
        self._bits = bits
        for slot in self._slots:
            if slot.spec.served_bits(bits) != slot.spec.served_bits(slot.bits):
                slot.release()
            slot.bits = bits

    @contextmanager
    def at_precision(self, bits: int | None) -> Iterator[None]:
        """Within the block, serve at `bits` (None: leave as it is)."""
        before = self._bits
        if bits is not None:
            self.set_precision(bits)
        try:
            yield
        finally:
            if bits is not None:
                self.set_precision(before)

    def generate(self, *args: Any, bits: int | None = None, **kwargs: Any) -> Any:
        """transformers' generate, at `bits` for this call if given."""
        with self.at_precision(bits):
            return super().generate(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], shard_bytes: int = 2 << 30, **kwargs: Any
    ) -> None:
        """Write the whole overlay (every precision) with the model's unquantized parameters as they are now.

        The folder appears when it is complete. Raises: OutputError when it is not empty, on a model with an adapter, or
        on options that other formats have (push_to_hub: save, then `everybit push`).
        """
        if kwargs:
            raise OutputError(
                f"save_pretrained of an overlay knows no {sorted(kwargs)[0]!r}: save, then use the folder"
            )
        if any(hasattr(module, "base_layer") for module in self.modules()):
            raise OutputError(
                "the model carries an adapter: save that by PeftModel.save_pretrained, or unload it first"
            )
        out = Path(save_directory)
        partial = free_output(out, resume=False, remedy="")
        plain = {n: t for n, t in self.state_dict().items() if n not in (self.all_tied_weights_keys or {})}
        for name, tensor in plain.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise OutputError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, DTYPE_NAMES))}")
        layout = {n: TensorSpec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in plain.items()}
        for spec in self.overlay.weights.values():
            layout |= {name: self.overlay.spec_of(name) for name in spec.tensors()}
        config = json.loads(self.config.to_json_string(use_diff=True))
        config["architectures"] = [type(self).__name__]
        with OverlayWriter(partial, layout, config, shard_bytes) as writer:
            for name, tensor in plain.items():
                writer.write_group(name, {name: to_numpy(tensor)})
            for name, spec in self.overlay.weights.items():
                writer.write_group(name, {t: self.overlay.tensor(t) for t in spec.tensors()})
            if self.can_generate():
                self.generation_config.save_pretrained(partial)
            writer.finish()
        promote(partial, out)


@cache
def overlay_model_class(base: Any) -> type:
    """`base` with `OverlayModel` mixed in, under its own name (config.json records it).

    Its forward pass takes `bits`, the precision of this call, wherever it is called from (PEFT does not use __call__).
    """

    @wraps(base.forward)  # with its signature, which transformers looks at
    def forward(self: Any, *args: Any, bits: int | None = None, **kwargs: Any) -> Any:
        with self.at_precision(bits):
            return base.forward(self, *args, **kwargs)

    return type(base.__name__, (OverlayModel, base), {"__module__": base.__module__, "forward": forward})
