"""Which of ggml's types each tensor of a file type gets: llama-quantize's rules, without an importance matrix.

A file type is a recipe. Most matrices have one type; what hurts most (values, the down projection, the output head)
gets more bits, in some or all layers. Rows that a type's blocks do not divide get another type.

Source: llama.cpp, src/llama-quant.cpp (the rules), gguf.constants (numbers and block sizes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# file type -> the type of most matrices
FILE_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
}
FLOATS = ("F32", "F16", "BF16")
# Where 256 does not divide a row.
_SMALL = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Sizes:
    """What the rules look at of a model."""

    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool


def choose_type(file_type: str, name: str, shape: tuple[int, ...], sizes: Sizes) -> str:
    """The type of a tensor of `shape` (output-first) by its name in the file."""
    kept = name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or name == "position_embd.weight"
    if len(shape) < 2 or not name.endswith(".weight") or kept:
        return "F32"
    kind = FILE_TYPES[file_type]
    if kind in FLOATS:
        return kind
    return _fitting(_wanted(file_type, kind, name, shape[-1], sizes), shape[-1])


def plain_type(file_type: str, name: str, sizes: Sizes) -> str:
    """The type of a matrix by name whose rows have a length that suits every type."""
    return choose_type(file_type, name, (256, 256), sizes)


def _fitting(kind: str, columns: int) -> str:
    if kind.endswith("_K") and columns % 256:
        kind = _SMALL[kind]
    return "F16" if columns % 32 else kind


def _wanted(file_type: str, kind: str, name: str, columns: int, sizes: Sizes) -> str:
    if name == "output.weight" or (sizes.tied and name == "token_embd.weight"):
        block = 256 if kind.endswith("_K") else 32
        return "Q8_0" if kind == "Q8_0" or columns % block else "Q6_K"
    found = _LAYER.fullmatch(name)
    if not found:
        return kind
    layer, module = int(found[1]), found[2].removesuffix("_exps")
    eighth = layer < sizes.layers // 8
    more = eighth or layer >= 7 * sizes.layers // 8 or (layer - sizes.layers // 8) % 3 == 2
    raised: dict[str, str | None] = {}
    if module in ("attn_v", "attn_qkv"):
        if sizes.experts == 8:
            return "Q8_0"
        raised = {
            "Q2_K": "Q4_K" if sizes.heads >= 4 * sizes.kv_heads else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < 4 else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
        }
        chosen = raised.get(file_type) or kind
        large = sizes.layers == 80 and sizes.heads != sizes.kv_heads  # how llama.cpp knows a 70B
        return "Q5_K" if large and chosen in ("Q3_K", "Q4_K") else chosen
    if module == "attn_k" and sizes.experts == 8:
        return "Q8_0"
    if module == "ffn_down":
        raised = {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < sizes.layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if eighth else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
        }
    elif module == "attn_output" and sizes.experts == 8:
        raised = dict.fromkeys(("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"), "Q5_K")
    elif module == "attn_output":
        raised = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
    return raised.get(file_type) or kind
