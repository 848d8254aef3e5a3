"""LoRA adapters of PEFT: beside a product x W' runs the narrow (x A') B', at every precision of W alike.

    adapter = Adapter.open("adapter")
    program = adapter.put_on(program, checkpoint)  # two more kinds of `Linear`; back ends know nothing of adapters

Source: LoRA (arXiv 2106.09685, section 4.1), its scale by the root of the rank (arXiv 2312.03732), files of PEFT 0.21.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.ops import Embed, Linear
from everybit.engine.program import Program
from everybit.errors import SourceError
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.shard import Shard
from everybit.formats.tensors import from_bf16, show

F32 = NDArray[np.float32]
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_RANK, MOST_ALPHA = 1 << 16, 1 << 16
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Keys of the config that change nothing here.
_UNREAD = {
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("layers_pattern", "fan_in_fan_out", "lora_dropout", "megatron_core", "runtime_config"),
    "qalora_group_size",
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
_READ |= {"target_modules", "exclude_modules", "layers_to_transform"}
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")  # the others write into the model's weights


@dataclass(frozen=True)
class Adapter:
    """An adapter, read and checked. Make one with `Adapter.open`.

    `pairs`: A f32[r, K] and B f32[N, r], times its scale, of each module. `checksum`: of all that is in them.
    `targets`: whether PEFT puts it on a module of this name; None: its tensors tell.
    """

    folder: Path
    pairs: Mapping[str, tuple[F32, F32]]
    checksum: str
    targets: Callable[[str], bool] | None

    @property
    def nbytes(self) -> int:
        """Of all A and B, as they are read."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Reads a folder that `PeftModel.save_pretrained` wrote.

        Raises: SourceError (no such folder, another kind of adapter), FormatError (damaged files)
        """
        folder = Path(folder)
        if os.path.isfile(folder / PICKLED) and not os.path.isfile(folder / WEIGHTS):
            raise SourceError(
                f"{folder} holds its tensors as pickle ({PICKLED}), which everybit never loads: save it with "
                "safe_serialization=True"
            )
        for name in (CONFIG, WEIGHTS):
            if not os.path.isfile(folder / name):
                raise SourceError(
                    f"{folder}: there is no {name}, expected a folder that PeftModel.save_pretrained wrote"
                )
        config = parse_object(read_inside(folder, CONFIG), str(folder / CONFIG))
        _check_config(config, folder / CONFIG)
        stored = _read_tensors(folder)
        targets = _targets(config, folder / CONFIG)
        pairs, digest = {}, hashlib.sha256()
        for module in sorted({module for module, _ in stored}):
            a, b = stored.get((module, "A")), stored.get((module, "B"))
            if targets and not targets(module):
                raise SourceError(
                    f"{folder}: {show(module)} has an adapter that target_modules of {CONFIG} leaves out: save it again"
                )
            if a is None or b is None:
                raise SourceError(
                    f"{folder}: {show(module)} has lora_{'B' if a is None else 'A'} alone, expected both: save it again"
                )
            rank, scale = _rank_and_scale(config, module, folder / CONFIG)
            if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
                raise SourceError(
                    f"{folder}: {show(module)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected "
                    f"[{rank}, inputs] and [outputs, {rank}] by {CONFIG}: save it again"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                b = b * np.float32(scale)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise SourceError(f"{folder}: {show(module)} has numbers that are not finite: train it again")
            pairs[module] = a, b
            digest.update(repr((module, a.shape, b.shape)).encode())
            digest.update(a.data)
            digest.update(b.data)
        return cls(folder, pairs, digest.hexdigest(), targets)

    def put_on(self, program: Program, checkpoint: Checkpoint) -> Program:
        """`program` with the adapter's products beside its own.

        Mutates: `checkpoint`, which has the adapter's tensors from then on
        Raises:  SourceError where it is not one for this model
        """
        embeddings = {op.weight for op in program.ops if isinstance(op, Embed)}  # a tied head is one of them
        shapes = {
            name: (out.width, op.x.width)
            for op in program.ops
            if isinstance(op, Linear)
            for out, name in zip(op.outs, op.weights, strict=True)
            if name not in embeddings
        }
        tensors: dict[str, F32] = {}
        ranks: dict[str, int] = {}
        for module, (a, b) in self.pairs.items():
            weight = self._find(module, shapes)
            if weight in ranks:
                raise SourceError(f"{self.folder}: two adapters of {show(weight)} arrived, the last as {show(module)}")
            if (len(b), a.shape[1]) != shapes[weight]:
                raise SourceError(
                    f"{self.folder}: {show(module)} takes {a.shape[1]} numbers to {len(b)}, this model's takes "
                    f"{shapes[weight][1]} to {shapes[weight][0]}: the adapter was trained on another model"
                )
            ranks[weight] = len(a)
            tensors |= {f"{weight}.lora_A": a, f"{weight}.lora_B": b}
        targets = self.targets or (lambda _: False)
        if bare := [name for name in shapes if name not in ranks and targets(name.removesuffix(".weight"))]:
            raise SourceError(
                f"{self.folder}: {len(bare)} modules that target_modules names have no adapter "
                f"(first: {show(bare[0])}): it is damaged, or was trained on another model"
            )
        checkpoint.add(tensors)
        changed = replace(program, buffers=dict(program.buffers), ops=[])
        for op in program.ops:
            down, up = _beside(op, ranks, changed) if isinstance(op, Linear) else ([], [])
            changed.add(*down, op, *up)
        return changed

    def _find(self, module: str, shapes: Mapping[str, Any]) -> str:
        """The weight that a module is; one of the two names may lack the base model's prefix (model., transformer.).

        Raises: SourceError
        """
        asked = f"{module}.weight"
        if asked in shapes:
            return asked
        close = [name for name in shapes if asked.endswith(f".{name}") or name.endswith(f".{asked}")]
        if len(close) != 1:
            raise SourceError(
                f"{self.folder}: an adapter of {show(module)} arrived, expected linear layers of this model (not "
                "embeddings, experts or a head tied to the embedding): train it with other target_modules"
            )
        return close[0]


def _beside(op: Linear, ranks: Mapping[str, int], program: Program) -> tuple[list[Linear], list[Linear]]:
    """What runs before `op` (which may overwrite its input), and after it. Mutates: the program's buffers"""
    adapted = [(out, name) for out, name in zip(op.outs, op.weights, strict=True) if name in ranks]
    if not adapted:
        return [], []
    width = sum(ranks[name] for _, name in adapted)
    narrow = program.buffer(f"{op.x.buffer} adapted {width}", width)  # as many rows as x has, before and after Select
    parts, start = [], 0
    for _, name in adapted:
        parts.append(narrow[start : start + ranks[name]])
        start += ranks[name]
    down = Linear(op.x, tuple(parts), tuple(f"{name}.lora_A" for _, name in adapted))
    return [down], [
        Linear(part, (out,), (f"{name}.lora_B",), add=True) for part, (out, name) in zip(parts, adapted, strict=True)
    ]


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuses what computes something else than LoRA of linear layers, and keys of a newer PEFT. Raises: SourceError"""
    if config.get("peft_type") != "LORA":
        raise SourceError(f"{where}: peft_type {show(config.get('peft_type'))} arrived, expected LORA")
    if type(config.get("use_rslora", False)) is not bool:
        raise SourceError(f"{where}: use_rslora {show(config['use_rslora'])} arrived, expected true or false")
    found = {key: value for key, value in config.items() if value and key not in _UNREAD | _READ}
    if config.get("bias", "none") != "none":
        found["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _BEGINNINGS:
        found["init_lora_weights"] = config["init_lora_weights"]
    for key, value in found.items():
        raise SourceError(
            f"{where}: {key if key.isidentifier() else show(key)} {show(value)} arrived, expected plain LoRA of linear "
            "layers: train it without"
        )


def _targets(config: Mapping[str, Any], where: Path) -> Callable[[str], bool] | None:
    """Which modules PEFT adapts: by target_modules, without exclude_modules, in layers_to_transform. None: no names.

    Raises: SourceError
    """

    def named(key: str) -> Callable[[str], bool]:
        given = config.get(key)
        if isinstance(given, str):
            try:
                found = re.compile(_pattern(given))
            except re.error:
                raise SourceError(f"{where}: {key} {show(given)} arrived, expected a regular expression") from None
            return lambda module: found.fullmatch(module) is not None
        if given is not None and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
            raise SourceError(f"{where}: {key} {show(given)} arrived, expected a list of names or an expression")
        names = tuple(given or ())
        return lambda module: module in names or module.endswith(tuple(f".{one}" for one in names))

    if config.get("target_modules") in (None, "all-linear"):
        return None
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(type(one) is int for one in layers)):
        raise SourceError(f"{where}: layers_to_transform {show(layers)} arrived, expected numbers of layers")
    wanted, left_out = named("target_modules"), named("exclude_modules")

    def chosen(module: str) -> bool:
        layer = re.search(r"\.(\d+)\.", module)
        return (
            wanted(module) and not left_out(module) and (not layers or (layer is not None and int(layer[1]) in layers))
        )

    return chosen


def _pattern(text: object) -> str:
    """A regular expression that takes no time to speak of: few repetitions, and none of a group. Raises: SourceError"""
    if (
        not isinstance(text, str)
        or len(text) > 500
        or len(re.findall(r"[*+{]", text)) > 8
        or re.search(r"\)[*+{]", text)
    ):
        raise SourceError(
            f"the pattern {show(text)} arrived, expected a short one that repeats no group: name the modules"
        )
    return text


def _rank_and_scale(config: Mapping[str, Any], module: str, where: Path) -> tuple[int, float]:
    """Raises: SourceError"""

    def of_module(key: str, patterns: str) -> Any:
        """What the first pattern says that is the module's name, or its end after a dot: as PEFT looks it up."""
        try:
            given = (config.get(patterns) or {}).items()
            return next((v for one, v in given if re.match(rf"(.*\.)?({_pattern(one)})$", module)), config.get(key))
        except (AttributeError, re.error, RecursionError, OverflowError):
            raise SourceError(
                f"{where}: {patterns} {show(config[patterns])} arrived, expected numbers by regular expressions"
            ) from None

    rank, alpha = of_module("r", "rank_pattern"), of_module("lora_alpha", "alpha_pattern")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise SourceError(f"{where}: r {show(rank)} arrived for {show(module)}, expected 1 to {MOST_RANK}")
    if type(alpha) not in (int, float) or not abs(alpha) <= MOST_ALPHA:
        raise SourceError(f"{where}: lora_alpha {show(alpha)} arrived for {show(module)}, expected a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_tensors(folder: Path) -> dict[tuple[str, str], F32]:
    """By module and A or B. Raises: SourceError, FormatError"""
    stored: dict[tuple[str, str], F32] = {}
    shard = Shard(folder, WEIGHTS)
    try:
        for name, entry in shard.entries.items():
            key = _TENSOR.fullmatch(name)
            if key is None or entry.spec.dtype not in ("F32", "F16", "BF16"):
                raise SourceError(
                    f"{folder}: tensor {show(name)} of {entry.spec.dtype} arrived, expected "
                    "base_model.model.MODULE.lora_A.weight and lora_B.weight, in F32, F16 or BF16: train no others, "
                    "save with save_embedding_layers=False"
                )
            view = shard.view(name)
            stored[key[1], key[2]] = from_bf16(view) if entry.spec.dtype == "BF16" else np.array(view, np.float32)
    finally:
        shard.close()
    if not stored:
        raise SourceError(f"{folder}: {WEIGHTS} holds no tensors, expected lora_A and lora_B: save it again")
    return stored
