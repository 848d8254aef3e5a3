"""One view of a model's parameters, over an overlay or over a plain Hugging Face folder of float weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.plan import Plan, Precision, own_bits
from everybit.errors import FormatError
from everybit.formats import QUANT_METHOD, Overlay, TensorSpec, WeightSpec
from everybit.formats.files import read_inside
from everybit.formats.inventory import find_shards
from everybit.formats.jsontext import parse_object
from everybit.formats.recognize import refuse_pickle, require_config, require_folder
from everybit.formats.shard import Shard
from everybit.formats.tensors import from_bf16, show
from everybit.formats.weights import require_bits
from everybit.kernels import dequantize

F32 = NDArray[np.float32]


class Checkpoint:
    """An opened model folder. Make one with `Checkpoint.open`.

    `folder`, `config` (the whole config.json), `bits` (the precisions it serves; none for float weights), `names`
    (every parameter, quantized or not, by its name in the model), `overlay` (None for float weights).
    """

    def __init__(self, folder: Path, config: dict[str, Any], overlay: Overlay | None, shards: list[Shard]) -> None:
        self.folder = folder
        self.config = config
        self.overlay = overlay
        self.bits: tuple[int, ...] = overlay.bits if overlay else ()
        self._weights: Mapping[str, WeightSpec] = overlay.weights if overlay else {}
        self._shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.entries}
        plain = overlay.plain_names() if overlay else list(self._shard_of)
        self.names: tuple[str, ...] = tuple(sorted([*plain, *self._weights]))
        self._names = frozenset(self.names)
        self._added: dict[str, F32] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> Checkpoint:
        """Opens and checks a folder; reads JSON and shard headers, no tensor data.

        `verify=False` skips the checksums of an overlay's data. Plain folders have none; their shards pass the same
        structural checks.
        Raises: FormatError
        """
        folder = Path(folder)
        names = require_folder(folder)
        require_config(folder, names)
        config = parse_object(read_inside(folder, "config.json"), str(folder / "config.json"))
        method = config.get("quantization_config")
        if isinstance(method, Mapping) and method.get("quant_method") == QUANT_METHOD:
            overlay = Overlay.open(folder, verify)
            return cls(folder, overlay.config, overlay, [])
        if method or "anyprec" in config:
            found = method.get("quant_method") if isinstance(method, Mapping) else method or "Any-Precision"
            raise FormatError(
                f"{folder} is quantized with {show(found)}, expected an overlay or float weights: "
                "run everybit quantize on the original model"
            )
        if not any(name.endswith(".safetensors") for name in names):
            refuse_pickle(folder, names)
        shards: list[Shard] = []
        try:
            find_shards(folder, names, shards)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(folder, config, None, shards)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, tensors: Mapping[str, F32]) -> None:
        """Serve plain tensors beside the model's own, under names that it does not have. `names` stay the model's."""
        self._added |= tensors

    def quantized(self, name: str) -> WeightSpec | None:
        """What is stored of a quantized parameter, or None for a plain one."""
        return self._weights.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape: output-first for quantized parameters, the model's own for plain ones.

        Raises: FormatError
        """
        spec = self._weights.get(name)
        return spec.shape if spec else self._spec(name).shape

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a plain parameter.

        Raises: FormatError
        """
        return self._spec(name).dtype

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """A plain parameter as a read-only view on the file, with its safetensors dtype; BF16 comes as uint16.

        Raises: FormatError, ChecksumError
        """
        if name in self._added:
            return self._added[name], "F32"
        spec = self._spec(name)
        view = self.overlay.tensor(name) if self.overlay else self._shard_of[name].view(name)
        return view, spec.dtype

    def plain(self, name: str) -> F32:
        """A plain parameter as float32; a view where it is stored so.

        Raises: FormatError, ChecksumError
        """
        view, dtype = self.raw(name)
        if dtype == "BF16":
            return from_bf16(view)
        if dtype not in ("F16", "F32", "F64"):
            raise FormatError(
                f"{self.folder}: parameter {show(name)} is stored as {dtype}, expected F32, F16 or BF16: "
                "convert the model first"
            )
        return np.asarray(view, dtype=np.float32)

    def dense(self, name: str, bits: Precision) -> F32:
        """A parameter as float32 in its stored orientation; `bits` is what the model is served at, a number or a plan.

        A quantized weight without that precision is read at its `served_bits`; plain ones are what they are.
        Shapes: [N, K] or [E, N, K] where quantized
        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec = self._weights.get(name)
        if spec is None or self.overlay is None:
            return self.plain(name)
        if not isinstance(bits, Plan):
            require_bits(bits, self.bits, "the overlay")
        own = own_bits(spec, bits)
        values = dequantize(self.overlay.planes(name, own), self.overlay.table(name, own), spec.columns)
        return values.reshape(spec.shape)

    def close(self) -> None:
        """Closes the files; arrays already handed out stay valid."""
        if self.overlay:
            self.overlay.close()
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        if name in self._added:
            return TensorSpec("F32", self._added[name].shape)
        if name in self._weights:
            raise FormatError(f"{self.folder}: parameter {show(name)} is quantized: read it with dense()")
        if name not in self._names:
            raise FormatError(f"{self.folder} has no parameter {show(name)}: names lists its {len(self.names)}")
        return self.overlay.spec_of(name) if self.overlay else self._shard_of[name].entries[name].spec
