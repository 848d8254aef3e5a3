"""`everybit.load`: an overlay folder to a transformers model at a chosen precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everybit.errors import EverybitError, FormatError, reason
from everybit.formats import Overlay
from everybit.formats.weights import require_bits


def load(folder: str | Path, bits: int | None = None, **kwargs: Any) -> Any:
    """The overlay in `folder` as a transformers model that serves `bits` (None: the most it has).

    `kwargs` go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...). The model has `set_precision`,
    `precision`, `at_precision`, per-call `bits=` and `overlay`. Planes a precision does not need are never read.

    Cost: a dense copy of every weight at the precision in force, made layer by layer at the first call.
    Raises: FormatError (not an overlay, or a damaged one), PrecisionError (bits not in it).
    """
    path = Path(folder).expanduser()
    with Overlay.open(path) as overlay:  # refuses with a clear message before transformers sees the folder
        if bits is not None:
            require_bits(bits, overlay.bits, "the overlay")
    from transformers import AutoModelForCausalLM

    import everybit.integrations.transformers.quantizer  # noqa: F401  (registers the format)

    kwargs.setdefault("trust_remote_code", False)  # nothing in a model folder is executed unless asked for
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except EverybitError:
        raise
    except Exception as error:  # many types; every one means that this config.json makes no model
        raise FormatError(
            f"{path}: transformers cannot load it ({reason(error)}): upgrade transformers, or quantize again"
        ) from error
    if bits is not None:
        model.set_precision(bits)
    return model
