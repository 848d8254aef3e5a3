"""Ternary checkpoints as overlays of two planes: every weight -s, 0 or s.

Recognised are
- `quant_method: bitnet` of transformers: packed (uint8 [N/4, K], two bits a weight, the quarters of the rows in the
  four pairs of bits, the lowest first) or float weights of -1, 0 and 1, both with a `weight_scale`; and, quantized
  `online`, float weights that the model rounds at every step;
- float weights that hold three values a row already;
- with `absmean`, any float weights, rounded as BitNet b1.58 and MatMul-free models round theirs at every step:
  s = mean |w| of the matrix, weight = s * clip(round(w / s), -1, 1).

Codes are the weight / s + 2 and tables -2, -1, 0, 1: on this grid compressed-tensors holds them as they are, too.
Activations, which those models round to 8 bits for each token, stay floats here.
Source: Ma et al., The Era of 1-bit LLMs (2024), section 2; Zhu et al., Scalable MatMul-free Language Modeling (2024);
transformers 5.24, integrations/bitnet.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import SourceError
from everybit.formats import TensorSpec, WeightSpec
from everybit.formats.compact import Compact
from everybit.formats.inventory import find_shards
from everybit.formats.recognize import refuse_pickle, require_folder
from everybit.formats.shard import Shard
from everybit.formats.tensors import from_bf16, show, to_bf16
from everybit.integrations.imported import ImportReport, write_overlay
from everybit.kernels import pack_planes

F32 = NDArray[np.float32]
Ternary = tuple[NDArray[np.int8], F32]  # i8[N, K] of -1, 0, 1; f32[N], 0 or more
BITS = (2,)
LEVELS = np.array([-2, -1, 0, 1], np.int8)
LEAST_MEAN = np.float32(1e-5)  # below, BitNet takes this for the mean
FLOATS = ("F32", "F16", "BF16")
SMALLEST = 1e-30  # of scales: neither they nor their inverses are denormal
_LINEAR = re.compile(r".*\.\d+\..*\.weight", re.DOTALL)  # in a layer: neither embeddings nor the head
ROUTERS = ("gate", "router", "shared_expert_gate")
KEYS = ("linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps", "modules_to_not_convert", "quant_method")
FLOAT_ACTIVATIONS = "activations stay floats: the model rounded them to 8 bits for each token"


def import_ternary(folder: Path, out: Path, config: Mapping[str, Any], absmean: bool = False) -> ImportReport:
    """Writes the overlay of a checkpoint whose config.json is `config`.

    Cost: memory of one weight in float32; every weight is read twice.
    Raises: SourceError (no ternary weights, a switch that the engine does not have), FormatError, OutputError
    """
    names = require_folder(folder)
    if not any(name.endswith(".safetensors") for name in names):
        refuse_pickle(folder, names)
    shards: list[Shard] = []
    try:
        find_shards(folder, names, shards)
        source = _Source(folder, shards, _Method.read(config.get("quantization_config"), absmean, folder))
        return _write(source, folder, out, config)
    finally:
        for shard in shards:
            shard.close()


def _write(source: _Source, folder: Path, out: Path, config: Mapping[str, Any]) -> ImportReport:
    weights: dict[str, WeightSpec] = {}
    for name in source.specs:
        if (found := source.ternary(name)) is not None:
            rows, columns = found[0].shape
            weights[name] = WeightSpec(name, (rows, columns), BITS, "compact")
    if not weights:
        raise SourceError(
            f"{folder} has no ternary weights: quantize it with everybit quantize, or pass --absmean if the model was "
            "trained to be rounded to -s, 0 and s"
        )
    own = {*weights, *(f"{name}_scale" for name in weights)}
    plain = {name: spec for name, spec in source.specs.items() if name not in own}

    def groups() -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        for name in plain:
            yield name, {name: source.shard_of[name].view(name)}
        for name, spec in weights.items():
            found = source.ternary(name)
            assert found is not None
            yield name, _encode(spec, *found)

    method = source.method
    own_config = {key: value for key, value in config.items() if key != "quantization_config"}
    details = {"ternary": "rounded by absmean" if method.rounds else "as stored"}
    notes = (FLOAT_ACTIVATIONS,) if method.rounds_activations else ()
    return write_overlay(out, folder, "ternary", own_config, weights, plain, groups(), details, notes)


@dataclass(frozen=True)
class _Method:
    """How a checkpoint says its weights: `power` of `weight_scale` that multiplies one, whether floats are `rounds`ed
    by absmean (but those of modules named in `but`; by the user's wish alone where `asked`), and whether its model
    rounds activations."""

    power: int
    rounds: bool
    rounds_activations: bool
    but: tuple[str, ...] = ()
    asked: bool = False

    @classmethod
    def read(cls, found: Any, absmean: bool, folder: Path) -> _Method:
        """From a `quantization_config`, or None. Raises: SourceError"""
        if found is None:
            return cls(1, absmean, absmean, asked=absmean)
        where = f"{folder}/config.json: quantization_config"
        if not isinstance(found, Mapping) or found.get("quant_method") != "bitnet":
            raise SourceError(f"{where}: {show(found)} arrived, expected quant_method bitnet: import takes no other")
        if unknown := sorted(set(found) - set(KEYS)):
            raise SourceError(f"{where}: unknown key {show(unknown[0])}, expected only {', '.join(KEYS)}")
        if found.get("use_rms_norm"):
            raise SourceError(f"{where}: use_rms_norm puts a norm before every layer, which the engine does not have")
        kind, mode = found.get("linear_class", "bitlinear"), found.get("quantization_mode", "offline")
        if kind not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
            raise SourceError(f"{where}: linear_class {show(kind)}, quantization_mode {show(mode)} are unknown")
        rounds = (kind, mode) == ("autobitlinear", "online")
        if absmean and not rounds:
            raise SourceError(f"{folder} is ternary already, --absmean would round it again: drop it")
        # BitLinear divides its output by the scale, AutoBitLinear multiplies it.
        but = tuple(str(name) for name in found.get("modules_to_not_convert") or ())
        return cls(-1 if kind == "bitlinear" else 1, rounds, True, but)


class _Source:
    """The tensors of a folder, and which of them are ternary."""

    def __init__(self, folder: Path, shards: list[Shard], method: _Method) -> None:
        self.folder, self.method = folder, method
        self.shard_of = {name: shard for shard in shards for name in shard.entries}
        self.specs = {name: shard.entries[name].spec for name, shard in self.shard_of.items()}

    def ternary(self, name: str) -> Ternary | None:
        """The signs and scales of a tensor, or None where it is no ternary weight. Raises: SourceError"""
        spec, module = self.specs[name], name.removesuffix(".weight")
        if module == name or len(spec.shape) != 2:
            return None
        if f"{name}_scale" in self.specs:
            return self._scaled(name)
        if spec.dtype == "U8":
            raise SourceError(f"{self.folder}: {show(name)} is packed and has no {show(name + '_scale')} beside it")
        if spec.dtype not in FLOATS or not _LINEAR.fullmatch(name):
            return None
        if not self.method.rounds:
            return three_values(self._numbers(name))
        if module.endswith(self.method.but) or module.rpartition(".")[2] in ROUTERS:
            return None
        weights = self._numbers(name)
        if self.method.asked and min(spec.shape) > 1 and weights.any() and three_values(weights) is not None:
            raise SourceError(
                f"{self.folder}: {show(name)} is ternary already, --absmean would round it again: drop --absmean"
            )
        return round_absmean(weights, spec.dtype)

    def _scaled(self, name: str) -> Ternary:
        weights, scales = self._numbers(name), self._numbers(f"{name}_scale").reshape(-1)
        signs = unpack(weights) if weights.dtype == np.uint8 else weights
        if not np.isin(signs, (-1, 0, 1)).all():
            raise SourceError(f"{self.folder}: {show(name)} has values besides -1, 0 and 1: download it again")
        if len(scales) != 1 or not SMALLEST < float(scales[0]) < 1 / SMALLEST:
            raise SourceError(f"{self.folder}: {show(name)} has the scale {scales[:3]}, expected one positive number")
        return signs.astype(np.int8), np.full(len(signs), float(scales[0]) ** self.method.power, np.float32)

    def _numbers(self, name: str) -> NDArray[Any]:
        """A tensor as float32; packed ones as they are."""
        view, dtype = self.shard_of[name].view(name), self.specs[name].dtype
        if dtype == "BF16":
            return from_bf16(view)
        return view if dtype == "U8" else view.astype(np.float32)


def three_values(weights: F32) -> Ternary | None:
    """The signs and the magnitude of each row, where a row has no other. Shapes: f32[N, K]"""
    scale = np.abs(weights).max(axis=1, initial=0)
    signs = np.sign(weights)
    same = bool(np.isfinite(scale).all()) and np.array_equal(signs * scale[:, None], weights)
    return (signs.astype(np.int8), scale) if same else None


def round_absmean(weights: F32, dtype: str) -> Ternary:
    """Signs and scales as the model rounds its weights; `dtype` is theirs, in which the result is held.

    The mean is taken in float64: a framework's float32 sum may differ in the last bit of s.
    """
    mean = np.float32(np.abs(weights).mean(dtype=np.float64))
    inverse = np.float32(1) / max(mean, LEAST_MEAN)
    signs = np.clip(np.rint(weights * inverse), -1, 1).astype(np.int8)
    scale = np.array([np.float32(1) / inverse], np.float32)
    scale = from_bf16(to_bf16(scale)) if dtype == "BF16" else scale.astype(TensorSpec(dtype, ()).numpy)
    return signs, np.repeat(scale.astype(np.float32), len(weights))


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Signs of transformers' packed weights. Shapes: u8[N/4, K] -> i8[N, K], 2 where the pair of bits is 3"""
    pairs = [packed >> np.uint8(2 * i) & np.uint8(3) for i in range(4)]
    return np.concatenate(pairs).astype(np.int8) - np.int8(1)


def _encode(spec: WeightSpec, signs: NDArray[np.int8], scale: F32) -> dict[str, NDArray[Any]]:
    planes = pack_planes((signs + np.int8(2)).astype(np.uint8), spec.planes)
    book = Compact.pack(scale, {BITS[0]: np.repeat(LEVELS[None], spec.rows, axis=0)})
    arrays: dict[str, NDArray[Any]] = {spec.plane_name(k): plane for k, plane in enumerate(planes)}
    return arrays | {f"{spec.name}_{suffix}": array for suffix, array in book.items()}
