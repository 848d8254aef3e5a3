"""What a folder is, when it is not an overlay: the sentence that tells the user what to do about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everybit.errors import FormatError
from everybit.formats.config import QUANT_METHOD
from everybit.formats.tensors import show

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_folder(folder: Path) -> list[str]:
    """The names in `folder`.

    Raises: FormatError
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, ValueError):  # ValueError: a zero byte in the path
        raise FormatError(
            f"{folder} does not exist, expected an overlay folder: check the path, or download the model first"
        ) from None
    except NotADirectoryError:
        raise FormatError(f"{folder} is a file, expected an overlay folder: pass the folder that holds it") from None
    except OSError as error:
        raise FormatError(f"{folder} cannot be listed ({error.strerror}): make it readable") from None


def require_config(folder: Path, names: list[str]) -> None:
    """Refuses a folder without config.json, saying what it holds instead.

    Raises: FormatError
    """
    if "config.json" in names:
        return
    if "journal.jsonl" in names:
        raise FormatError(f"{folder} is an unfinished overlay: run the same everybit quantize command with --resume")
    refuse_pickle(folder, names)
    raise FormatError(f"{folder} has no config.json, expected an overlay folder: run everybit quantize to make one")


def require_overlay(folder: Path, names: list[str], config: Mapping[str, Any]) -> None:
    """Refuses a model folder that everybit has not quantized, saying what it is instead.

    Raises: FormatError
    """
    found = config.get("quantization_config")
    if isinstance(found, Mapping) and found.get("quant_method") == QUANT_METHOD:
        if not any(name.endswith(".safetensors") for name in names):
            refuse_pickle(folder, names)
        return
    if "anyprec" in config:
        raise FormatError(
            f"{folder} is an original Any-Precision checkpoint, not an everybit overlay: "
            f"run everybit import {folder} to make one"
        )
    if not any(name.endswith(".safetensors") for name in names):
        refuse_pickle(folder, names)
    if isinstance(found, Mapping) and "quant_method" in found:
        raise FormatError(
            f"{folder} is quantized with {show(found['quant_method'])}, not with everybit: "
            "run everybit quantize on the original model"
        )
    raise FormatError(f"{folder} is a model but not an overlay: run everybit quantize {folder} to make one")


def refuse_pickle(folder: Path, names: list[str]) -> None:
    """Refuses a folder that holds pickle files, which can run code when loaded.

    Raises: FormatError
    """
    for name in names:
        if name.endswith(PICKLES):
            raise FormatError(
                f"{folder} holds its tensors as pickle ({show(name)}), which everybit never loads: "
                "convert the model to safetensors first"
            )
