"""Widths as their users name them: fp8 is weights and activations, w4a16 says both, numbers are of weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everybit.errors import SourceError
from everybit.plan.cost import WIDTHS
from everybit.plan.hardware import Hardware
from everybit.plan.model import read_model
from everybit.plan.operators import Model

Width = int | float | str | Path | None
_FP8 = ("fp8", "fp8_block", "mxfp8")


def read_at(
    source: str | Path | Mapping[str, Any],
    width: Width,
    kv_bits: float | None = None,
    activation_bits: float | None = None,
) -> Model:
    """`read_model` at a width; None: the checkpoint's own. Raises: SourceError, ModelError and of overlays others"""
    if width in _FP8 and activation_bits is None:
        activation_bits = 8.0
    if term := re.fullmatch(r"w(4|8|16)a(4|8|16)", str(width)):
        if activation_bits not in (None, float(term[2])):
            raise SourceError(f"{width} and activations of {activation_bits:g} bits: they differ, give one of them")
        width, activation_bits = {"4": "int4", "8": "int8", "16": "bf16"}[term[1]], float(term[2])
    return read_model(source, weight_bits=width, kv_bits=kv_bits, activation_bits=activation_bits)


def check_multiplied(width: object, model: Model, card: Hardware) -> None:
    """Raises: SourceError where fp8, or activations narrower than all it multiplies, were asked of a card"""
    if width in _FP8 and model.activation_bits == 8 and "fp8" not in card.flops:
        raise SourceError(
            f"card {card.name} multiplies no fp8: pass w8a16 (weights alone)"
            + (", or w8a8 for its int8" if "int8" in card.flops else "")
        )
    narrowest = min((bits for name, bits in WIDTHS if name in card.flops), default=0)
    if model.activation_bits < min(16, narrowest):
        raise SourceError(
            f"card {card.name} multiplies {', '.join(card.flops)}, no {model.activation_bits:g}-bit activations: leave "
            f"them at {min(16, narrowest)} bits, such as w4a{min(16, narrowest)}"
        )
