"""Registers the overlay format with transformers: `AutoModelForCausalLM.from_pretrained(overlay)` works.

transformers loads the unquantized parameters; planes and codebooks stay in the mapped files and are read by
`weights.Slot` when a precision first needs them.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from everybit.errors import FormatError, SourceError
from everybit.formats import QUANT_METHOD, Overlay
from everybit.formats.codebooks import CODEBOOKS
from everybit.integrations.transformers.model import overlay_model_class
from everybit.integrations.transformers.products import Products
from everybit.integrations.transformers.weights import attach, detach

if TYPE_CHECKING:  # this module may be imported while transformers itself is still being imported
    from transformers import PreTrainedModel

OVERLAY_TENSORS = {r"_plane\d+$"} | {rf"_{s}$" for book in CODEBOOKS.values() for s in book.suffixes}


@register_quantization_config(QUANT_METHOD)
class OverlayConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of an overlay as transformers holds it: the dictionary, unchanged (formats checks it)."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.fields)


@register_quantizer(QUANT_METHOD)
class OverlayQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps weights for overlay slots before transformers loads the rest."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise SourceError("this model is not an overlay: run `everybit quantize MODEL OUT` and load OUT")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise SourceError("an overlay is read from its folder: expected a path or hub id, not a state_dict")
        overlay = Overlay.open(Path(checkpoint_files[0]).parent)
        products = Products()
        slots = attach(model, overlay, overlay.bits[-1], products, model.base_model_prefix)
        _check_plain(model, overlay)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | OVERLAY_TENSORS
        model.__class__ = overlay_model_class(type(model))  # type: ignore[arg-type]
        model.overlay, model._slots, model._bits, model._products = overlay, slots, overlay.bits[-1], products

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for slot in model._slots:
            slot.release()  # GPT-2's initialisation writes into c_proj.weight whoever owns it
        model._weight_conversions = []  # stored under the model's own names: nothing to revert when saving
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        detach(model)
        model.__class__ = type(model).__mro__[2]
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are: gradients go through the quantized weights, not to them."""
        return True


def _check_plain(model: PreTrainedModel, overlay: Overlay) -> None:
    """Whether the overlay holds exactly the parameters it does not quantize, undamaged.

    transformers would fill a missing one with random numbers and read a damaged one as it stands.
    Raises: FormatError, ChecksumError
    """
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    expected = set(model.state_dict()) - tied
    stored = set(overlay.plain_names())
    if not any(name.startswith(prefix) for name in expected):  # the base model alone: its head is left out
        stored = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
    elif extra := sorted(stored - expected - tied):
        raise FormatError(
            f"{overlay.folder}: tensor {extra[0]} belongs to no parameter of {type(model).__name__}: "
            "config.json and weights do not belong together, download both again"
        )
    if missing := sorted(expected - stored):
        raise FormatError(
            f"{overlay.folder}: {len(missing)} parameters of {type(model).__name__} are missing (first: {missing[0]}): "
            "config.json and weights do not belong together, download both again"
        )
    for name in overlay.plain_names():
        overlay.tensor(name)
