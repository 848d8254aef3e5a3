"""`everybit.load`: an overlay folder to a transformers model at a chosen precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everybit.errors import EverybitError, FormatError, reason
from everybit.formats import Overlay
from everybit.formats.weights import require_bits


def load(
    folder: str | Path,
    bits: int | None = None,
    *,
    kernels: str = "auto",
    adapter: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """The overlay in `folder` as a transformers model that serves `bits` (None: the most it has).

    `kernels` says how linear layers multiply: `auto` by our kernels from bit-planes where the model is on a GPU that
    runs them, else by dense copies; `gpu` on a GPU or not at all (it is moved there unless there is a device_map);
    `reference` as the kernels would, on a processor and slowly; `dense`. Kernels need float16 or bfloat16; embeddings,
    experts and free tables above 4 bits stay dense. `adapter`: a folder that PEFT saved, put on top.
    `kwargs` go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...). The model has `set_precision`,
    `precision`, `at_precision`, per-call `bits=` and `overlay`. Planes a precision does not need are never read.

    Cost: dense copies are made layer by layer at the first call at a precision; planes on a GPU at the first at more
    bits than before.
    Raises: FormatError (not an overlay, or a damaged one), PrecisionError (bits not in it), ModelError (kernels that
    cannot run), SourceError (not an adapter for this model).
    """
    path = Path(folder).expanduser()
    with Overlay.open(path) as overlay:  # refuses with a clear message before transformers sees the folder
        if bits is not None:
            require_bits(bits, overlay.bits, "the overlay")
    import torch
    from transformers import AutoModelForCausalLM

    import everybit.integrations.transformers.quantizer  # noqa: F401  (registers the format)
    from everybit.integrations.peft import check_adapter, put_on
    from everybit.integrations.transformers.products import check_kernels, naming_what_fits

    check_kernels(kernels)
    if adapter is not None:
        check_adapter(adapter)
    kwargs.setdefault("trust_remote_code", False)  # nothing in a model folder is executed unless asked for
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except EverybitError:
        raise
    except Exception as error:  # many types; every one means that this config.json makes no model
        raise FormatError(
            f"{path}: transformers cannot load it ({reason(error)}): upgrade transformers, or quantize again"
        ) from error
    model._products.kernels = kernels
    if kernels == "gpu" and "device_map" not in kwargs:
        with naming_what_fits(model.overlay, torch.device("cuda")):
            model.to("cuda")
    if kernels in ("gpu", "reference"):
        model._products.by_planes(model.device, model.dtype)
    if bits is not None:
        model.set_precision(bits)
    return model if adapter is None else put_on(model, adapter)
