"""The model to quantize: a Hugging Face folder, read one parameter at a time.

Parameters are yielded under the names that the model has in transformers, after its own checkpoint
conversions (old checkpoints of mixtures of experts hold one matrix per expert; the model holds one fused
tensor). Peak memory is one parameter and its sources.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from everybit.errors import SourceError, reason
from everybit.formats.recognize import PICKLES

DTYPES = ("F16", "BF16", "F32", "F64", "I64", "I32", "U8", "BOOL")  # integers: buffers only
FLOATS = DTYPES[:4]


@dataclass
class _Job:
    """One conversion: the checkpoint tensors that together make one or several parameters."""

    first_target: str
    transform: Any
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, checkpoint name)


class Source:
    """A folder with `config.json` and safetensors weights, opened on the meta device.

    Attributes: `folder`, `config` (the JSON object), `model` (on meta), `shapes` (parameters and persistent
    buffers that an overlay stores; tied ones once), `aliases` (tied name -> stored name).
    Raises: SourceError for everything that cannot be read, naming what was found and what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.model = empty_model(folder)
        self._files = _tensor_files(folder)
        self.aliases: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}) or {})
        state = self.model.state_dict()
        self.shapes = {name: tuple(t.shape) for name, t in state.items() if name not in self.aliases}
        self._dtypes: dict[str, str] = {}
        self._jobs = self._plan(state)
        if missing := sorted(set(self.shapes) - set(self._dtypes), key=dot_natural_key):
            raise SourceError(_missing(folder, missing))
        for name in self.shapes:
            if self._dtypes[name] not in DTYPES:
                raise SourceError(
                    f"{folder}: {name} is stored as {self._dtypes[name]}, expected one of {', '.join(DTYPES)}: "
                    "convert the model to one of them first"
                )

    def _plan(self, state: dict[str, torch.Tensor]) -> list[_Job]:
        """Which checkpoint tensors make which parameter, by transformers' own conversion mapping."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        jobs: dict[str, _Job] = {}
        for name in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state or target in self.aliases:
                continue  # unexpected keys and tied copies, as transformers itself treats them
            if pattern is None:
                jobs.setdefault(target, _Job(target, WeightRenaming(name, target))).sources.append((name, name))
            else:
                converter = by_pattern[pattern]
                jobs.setdefault(target, _Job(target, deepcopy(converter))).sources.append((pattern, name))
                for other in converter.target_patterns[1:]:  # one checkpoint tensor, several parameters
                    self._dtypes[target.replace(converter.target_patterns[0], other)] = self._files[name][1]
            self._dtypes[target] = self._files[name][1]
        return list(jobs.values())

    def dtype_of(self, target: str) -> str:
        """The safetensors dtype name of the checkpoint tensors that a parameter is made from."""
        return self._dtypes[target]

    def checksums(self, progress: bool) -> dict[str, str]:
        """The sha256 of config.json and of every weight file: what exactly the overlay was made from."""
        files = [self.folder / "config.json", *sorted({path for path, _ in self._files.values()})]
        total = sum(path.stat().st_size for path in files)
        sums = {}
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking source", disable=not progress) as bar:
            for path in files:
                digest = hashlib.sha256()
                with _readable(path), path.open("rb") as file:
                    while chunk := file.read(16 << 20):
                        digest.update(chunk)
                        bar.update(len(chunk))
                sums[path.name] = digest.hexdigest()
        return sums

    def parameters(self, under: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter (whose name begins with `under`) with its tensor, in a fixed order; the caller drops each
        before the next."""
        for job in self._jobs:
            if not job.first_target.startswith(under):
                continue
            for name, tensor in self._convert(job).items():
                if name not in self.shapes:
                    continue
                if tuple(tensor.shape) != self.shapes[name]:
                    raise SourceError(
                        f"{self.folder}: tensor {name} has shape {tuple(tensor.shape)}, config.json implies "
                        f"{self.shapes[name]}: the weights belong to another configuration"
                    )
                yield name, tensor

    def _convert(self, job: _Job) -> dict[str, torch.Tensor]:
        transform = deepcopy(job.transform)
        for pattern, name in job.sources:
            transform.add_tensor(job.first_target, name, pattern, lambda name=name: self._read(name))
        converted = transform.convert(job.first_target, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}

    def _read(self, name: str) -> torch.Tensor:
        """One checkpoint tensor; the file is closed again so that its pages leave this process."""
        path = self._files[name][0]
        with _readable(path), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: not a readable safetensors file ({error}): download it again") from error


def resolve(model: str | Path) -> Path:
    """The local folder of `model`: a path, or a Hugging Face hub id that is downloaded (or found in the cache)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise SourceError(f"{folder} is a file: pass the folder that holds config.json and the safetensors weights")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SourceError(f"no folder {name}: pass a model folder or a Hugging Face id such as org/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen types; all mean that the model did not come
        raise SourceError(
            f"model {name} is neither a folder nor to be had from the hub ({reason(error)}): check the name or the "
            "network, or for a gated model accept its licence and run `hf auth login`"
        ) from error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder or hub id. Raises: SourceError"""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # many types; all mean that there is none to use
        raise SourceError(f"{folder} has no usable tokenizer ({reason(error)}): copy tokenizer.json into it") from error


def load_float(folder: Path) -> Any:
    """The float model in a folder, in float32. Raises: SourceError, also when a parameter has no weights there"""
    _read_config(folder)  # refuses overlays and other quantized models, by name
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # many types; all mean that it cannot be loaded
        why = reason(error)
        raise SourceError(f"no float model can be loaded from {folder} ({why}): pass its folder or id") from error
    if missing := sorted(info["missing_keys"]):
        raise SourceError(_missing(folder, missing))
    return model.eval()


def _missing(folder: Path, names: list[str]) -> str:
    return (
        f"{folder}: {len(names)} parameters of the model are not in its weight files (first: {names[0]}): "
        "download the model again"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} holds no config.json: pass a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds a {type(config).__name__}, expected a JSON object: download it again")
    if "anyprec" in config:
        raise SourceError(
            f"{folder} is an original Any-Precision checkpoint: run everybit import {folder}, "
            "or quantize the float model instead"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        what = "already an overlay" if method == "everybit" else f"already quantized ({method})"
        raise SourceError(f"{folder} is {what}: pass the float model it was made from")
    return config


def empty_model(folder: Path) -> PreTrainedModel:
    """The architecture of a folder's config.json on the meta device, without weights. Raises: SourceError"""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here; every one means "cannot build this model"
        raise SourceError(
            f"{folder}/config.json: transformers cannot build a causal language model from it ({reason(error)}): "
            "expected an architecture with a *ForCausalLM class (remote code is never run)"
        ) from error


def _tensor_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoint tensor name -> (file, dtype); every header is read, no data."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise SourceError(f"{index} is not a valid index ({error!r}): download it again") from error
        absent = sorted(named - {f.name for f in files})
        if absent:
            raise SourceError(f"{folder}: the index names {absent[0]}, which is not there: download the model again")
        files = [f for f in files if f.name in named]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if not files:
        if any(file.name.endswith(PICKLES) for file in folder.iterdir()):
            raise SourceError(
                f"{folder} holds pickle weights only (*.bin), which can run code when opened: "
                "convert them to safetensors first"
            )
        raise SourceError(f"{folder} holds no *.safetensors weights: download the model again")
    tensors: dict[str, tuple[Path, str]] = {}
    for path in files:
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                dtype = file.get_slice(name).get_dtype()
                if name in tensors:
                    raise SourceError(f"{path}: tensor {name} is also in {tensors[name][0].name}: download it again")
                tensors[name] = (path, dtype)
    return tensors
