"""Adapters of Hugging Face PEFT on an overlay: any precision under them, saved and loaded by PEFT itself.

    model = everybit.load("overlay", bits=3)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    ...                                                     # train; gradients reach the adapter only
    tuned.save_pretrained("adapter")
    model = everybit.load("overlay", bits=8, adapter="adapter")

Needs: peft (tested with 0.21.2).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from safetensors import safe_open

from everybit.engine.adapter import MOST_ALPHA
from everybit.errors import EverybitError, SourceError, reason

_WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: str | Path) -> None:
    """Raises: SourceError where PEFT is not installed, or `folder` is none that it saved"""
    if importlib.util.find_spec("peft") is None:
        raise SourceError('adapters need peft, which is not installed: pip install "everybit[peft]"')
    path = Path(folder).expanduser()
    for name in ("adapter_config.json", _WEIGHTS):
        if not (path / name).is_file():
            raise SourceError(f"{folder}: there is no {name}, expected a folder that PeftModel.save_pretrained wrote")


def put_on(model: Any, folder: str | Path) -> Any:
    """`model` under the adapter in `folder`, as a `peft.PeftModel` for inference. Mutates: `model`

    Raises: SourceError where it is not one for this model: PEFT itself would leave out what does not fit
    """
    import peft

    path = Path(folder).expanduser()
    try:
        with safe_open(path / _WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        tuned = peft.PeftModel.from_pretrained(model, str(path))
    except EverybitError:
        raise
    except Exception as error:  # a dozen types
        raise SourceError(f"{folder}: PEFT cannot put it on this model ({reason(error)})") from error
    expected = set(peft.get_peft_model_state_dict(tuned))
    if different := sorted(stored ^ expected):
        raise SourceError(
            f"{folder}: the adapter was trained on another model ({len(different)} parameters differ, first: "
            f"{different[0]}): train one on this overlay or its float model"
        )
    for name, tensor in peft.get_peft_model_state_dict(tuned).items():
        if not tensor.isfinite().all():
            raise SourceError(f"{folder}: {name} has numbers that are not finite: train it again")
    alpha = getattr(tuned.active_peft_config, "lora_alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MOST_ALPHA:
        raise SourceError(f"{folder}: lora_alpha {alpha!r} arrived, expected a number up to {MOST_ALPHA}")
    return tuned
