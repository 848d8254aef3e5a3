"""How many bits a stored weight takes: number formats with their scales, and what a checkpoint says of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from everybit.errors import ModelError, SourceError
from everybit.formats import ALL_BITS, WeightSpec
from everybit.formats.tensors import show
from everybit.plan.fields import WIDEST

KINDS = ("attention", "mlp", "experts", "state", "router", "head", "embedding")
# Left at 16 bits by every usual quantizer, unless somebody says otherwise.
KEPT = ("router", "head", "embedding")

# name -> (bits of a code, bits of a scale, codes a scale). NVFP4: an E4M3 scale for 16; MXFP4 and MXFP8: an E8M0
# scale for 32 (OCP Microscaling 1.0); block fp8: an f32 for 128 x 128 (DeepSeek-V3, section 3.3).
FORMATS: dict[str, tuple[float, float, int]] = {
    "fp32": (32, 0, 1),
    "bf16": (16, 0, 1),
    "fp16": (16, 0, 1),
    "fp8": (8, 0, 1),
    "fp8_block": (8, 32, 128 * 128),
    "mxfp8": (8, 8, 32),
    "int8": (8, 0, 1),
    "int4": (4, 16, 128),
    "nf4": (4, 32, 64),
    "mxfp4": (4, 8, 32),
    "nvfp4": (4, 8, 16),
}
_EVERYBIT = {f"everybit{bits}": bits for bits in ALL_BITS}
WeightBits: TypeAlias = float | str | Mapping[str, float | str]


def codebook_bits(kind: str, group: int | None = None, bits: float | None = None) -> float:
    """Stored bits a weight of a format, scales or codebooks included.

    `group`, `bits`: other than usual for the format. Of `everybit` (a `compact` container read at `bits`), `group` is
    the length of a row: planes of whole bytes, and the codebook that this precision reads.
    Raises: SourceError
    """
    if group is not None and group < 1:
        raise SourceError(f"a group of {group} weights arrived, expected 1 or more: fix it")
    if kind == "everybit":
        if group is None or bits not in ALL_BITS:
            raise SourceError(
                f"everybit at {bits} bits in rows of {group} arrived, expected 2 to 8 bits and a row: fix it"
            )
        spec = WeightSpec("weight", (1, group), codebook="compact")
        stored, names = spec.tensors(), spec.codebook_names(int(bits)).values()
        return 8 * (int(bits) * spec.plane_bytes + sum(stored[name].nbytes for name in names)) / group
    if kind not in FORMATS:
        raise SourceError(
            f"the weight format {show(kind)} is unknown, expected one of {', '.join([*FORMATS, *_EVERYBIT])}: pass one"
        )
    code, scale, usual = FORMATS[kind]
    return (code if bits is None else check_width("bits", bits)) + scale / (group or usual)


def asked_bits(asked: WeightBits) -> Callable[[str, int], float]:
    """What a user asks for, as a function of a kind of weight and the length of its rows.

    One number or format is of the linears in layers; below 16 bits, routers, head and embedding stay at 16. A mapping
    says it by kind, of the others under `default` (16 where it has none).
    Raises: SourceError
    """
    if not isinstance(asked, Mapping):
        kept = KEPT if _bits_of(asked, 4096) < 16 else ()
        asked = {"default": asked, **dict.fromkeys(kept, 16.0)}
    if bad := [kind for kind in asked if kind not in (*KINDS, "default")]:
        raise SourceError(f"bits of {show(bad[0])} were asked, expected of {', '.join(KINDS)} or default: fix the name")
    chosen = {kind: asked.get(kind, asked.get("default", 16.0)) for kind in KINDS}
    for one in chosen.values():
        _bits_of(one, 4096)  # refused now, not at the first weight of the kind
    return lambda kind, row: _bits_of(chosen[kind], row)


def _bits_of(one: float | str, row: int) -> float:
    if isinstance(one, str):
        return codebook_bits("everybit", row, _EVERYBIT[one]) if one in _EVERYBIT else codebook_bits(one)
    return check_width("weight_bits", one)


def check_width(name: str, bits: object) -> float:
    """Bits of a number: more than 0, at most 64. Raises: SourceError"""
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= 64:
        raise SourceError(f"{name} {show(bits)} arrived, expected a number of bits above 0, at most 64: fix it")
    return float(bits)


@dataclass(frozen=True)
class Group:
    """`bits` stored for each weight of the modules that a pattern of `targets` names (none: every linear)."""

    bits: float
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scheme:
    """A quantized checkpoint: its groups, the modules left as they were, and widths of what is multiplied and cached.

    `head`: whether the output head may be quantized; routers and embeddings never are.
    """

    groups: tuple[Group, ...]
    ignored: tuple[str, ...] = ()
    activation_bits: float = 16.0
    kv_bits: float = 16.0
    head: bool = False

    def bits(self, kind: str, modules: tuple[str, ...]) -> float:
        if kind in ("router", "embedding") or (kind == "head" and not self.head):
            return 16.0
        if any(_matches(pattern, module) for pattern in self.ignored for module in modules):
            return 16.0
        for group in self.groups:
            if not group.targets or any(_matches(pattern, module) for pattern in group.targets for module in modules):
                return group.bits
        return 16.0


def _matches(pattern: str, module: str) -> bool:
    """The three ways in which configs name modules: `re:` expressions, wildcards, and a name or a part of it."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    pattern = pattern.replace("language_model.", "")  # of models with a vision tower
    if "*" in pattern:
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}."


def read_scheme(found: object, where: str) -> Scheme:
    """The scheme that a `quantization_config` states. Raises: ModelError"""
    if not isinstance(found, Mapping):
        raise ModelError(f"{where}: {show(found)} arrived, expected an object with quant_method: fix it")
    method = found.get("quant_method") or ("modelopt" if "quant_algo" in found else None)
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise ModelError(
            f"{where}: quant_method {show(method)} is unknown, expected one of {', '.join(_METHODS)} or everybit: "
            "plan the float model with weight_bits instead"
        )
    try:
        return read(found)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise ModelError(
            f"{where}: not a {method} scheme that can be read ({type(error).__name__}: {show(str(error))}): "
            "plan the float model with weight_bits instead"
        ) from None


def _patterns(found: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    patterns = [one for name in names for one in found.get(name) or ()]
    for one in patterns:
        if not isinstance(one, str) or len(one) > 200:
            raise ValueError("a module pattern of at most 200 characters")
        # A repeated group or many repetitions could run for hours on a hostile config.
        if one.startswith("re:") and (re.search(r"\)[*+?{]", one) or len(re.findall(r"[*+?{]", one)) > 4):
            raise ValueError(f"a simpler expression than {show(one)}")
        if one.startswith("re:"):
            re.compile(one[3:])
    return tuple(patterns)


def _whole(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} {show(value, 30)}, expected 1 to {most}")
    return value


def _width(found: Mapping[str, Any], name: str = "num_bits") -> int:
    return _whole(name, found[name], 16)


def _group(size: object) -> int | None:
    """None: one scale a row or tensor, which configs say by null or -1."""
    return None if size in (None, -1) else _whole("group_size", size, WIDEST)


def _overhead(bits: float, group: int | None, scale: float, zero: float = 0.0) -> float:
    """Without groups the scales are too few to count."""
    return float(bits) if group is None else bits + (scale + zero) / group


def _block_bits(bits: float, block: object) -> float:
    """An f32 for each block of rows x columns."""
    if not isinstance(block, list) or len(block) != 2:
        raise ValueError(f"block {show(block, 40)}, expected rows and columns")
    rows, columns = (_whole("block", one, WIDEST) for one in block)
    return bits + 32 / (rows * columns)


def _fp8(found: Mapping[str, Any]) -> Scheme:
    block = found.get("weight_block_size")
    bits = 8.0 if block is None else _block_bits(8, block)
    return Scheme((Group(bits),), _patterns(found, "modules_to_not_convert", "ignored_layers"), activation_bits=8.0)


def _gptq(found: Mapping[str, Any]) -> Scheme:
    """GPTQ and AWQ store an f16 scale and a zero point of the weights' width for each group."""
    bits = _width(found, "bits" if "bits" in found else "w_bit")
    group = _group(found.get("group_size", found.get("q_group_size", 128)))
    stored = _overhead(bits, group, 16, bits)
    return Scheme((Group(stored),), _patterns(found, "modules_to_not_convert"), head=bool(found.get("lm_head")))


def _bitsandbytes(found: Mapping[str, Any]) -> Scheme:
    """NF4: an f32 for 64 weights; doubly quantized, 8 bits for 64 and an f32 for 256 of those (QLoRA, section 3)."""
    bits = 8.0
    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        bits = 4 + 8 / 64 + 32 / (64 * 256) if found.get("bnb_4bit_use_double_quant") else 4 + 32 / 64
    return Scheme((Group(bits),), _patterns(found, "llm_int8_skip_modules"))


def _mxfp4(found: Mapping[str, Any]) -> Scheme:
    return Scheme((Group(codebook_bits("mxfp4")),), _patterns(found, "modules_to_not_convert"))


def _compressed_tensors(found: Mapping[str, Any]) -> Scheme:
    groups, activations = [], 16.0
    for group in found["config_groups"].values():
        weights = group["weights"]
        bits = _width(weights)
        is_float = weights.get("type") == "float"
        zero = 0 if weights.get("symmetric", True) else bits
        if weights.get("strategy") == "block":
            stored = _block_bits(bits, weights["block_structure"])
        else:
            stored = _overhead(bits, _group(weights.get("group_size")), 8 if is_float and bits == 4 else 16, zero)
        targets = tuple(one for one in _patterns(group, "targets") if one != "Linear")
        everything = "Linear" in group.get("targets", ["Linear"])
        groups.append(Group(stored, () if everything else targets))
        if group.get("input_activations"):
            activations = min(activations, float(_width(group["input_activations"])))
    cache = found.get("kv_cache_scheme")
    groups.sort(key=lambda one: not one.targets)  # those that name modules come before the one of all
    kv_bits = float(_width(cache)) if cache else 16.0
    return Scheme(tuple(groups), _patterns(found, "ignore"), activations, kv_bits, head=True)


_ALGORITHMS = {  # of NVIDIA's modelopt: stored bits, activation bits
    "FP8": (8.0, 8.0),
    "FP8_PB_WO": (codebook_bits("fp8_block"), 16.0),
    "FP8_PER_CHANNEL_PER_TOKEN": (8.0, 8.0),
    "NVFP4": (codebook_bits("nvfp4"), 4.0),
    "W4A16_NVFP4": (codebook_bits("nvfp4"), 16.0),
    "INT4_AWQ": (codebook_bits("int4"), 16.0),
    "W4A16_AWQ": (codebook_bits("int4"), 16.0),
    "W4A8_AWQ": (codebook_bits("int4"), 8.0),
    "INT8_SQ": (8.0, 8.0),
}
_CACHES = {"FP8": 8.0, "INT8": 8.0, "NVFP4": 4.5}


def _modelopt(found: Mapping[str, Any]) -> Scheme:
    stored, activations = _ALGORITHMS[found["quant_algo"]]
    cache = found.get("kv_cache_quant_algo") or ("FP8" if found.get("kv_cache_scheme") else None)
    kv_bits = _CACHES[cache] if cache else 16.0
    return Scheme((Group(stored),), _patterns(found, "ignore", "exclude_modules"), activations, kv_bits, head=True)


_METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
