"""A linear layer of vLLM that holds planes: loaded by its stock loaders, then multiplied by our kernels or made dense.

Fused layers (QKV, gate and up) hold the rows of several weights one after another, each perhaps at bits and with a
codebook of its own, or not quantized at all. Parameters have all rows; a weight's rows are read where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from everybit.errors import PrecisionError, ShapeError
from everybit.formats import WeightSpec
from everybit.gpu.layout import make_tables, tile_planes
from everybit.gpu.ops import times
from everybit.integrations.vllm.decode import codebook, decode
from everybit.integrations.vllm.stream import require_all

if TYPE_CHECKING:
    from everybit.integrations.vllm.config import OverlayConfig

logger = init_logger(__name__)
# Of parameters: tables that may be stored as F16 or F32 are loaded into F32, which loses nothing.
DTYPES = {"F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}


@dataclass(frozen=True)
class Rows:
    """Rows of a layer that are read alike: `begin` to `end`, by the `bits` and codebook of `spec` (None: dense)."""

    begin: int
    end: int
    spec: WeightSpec | None
    bits: int


@register_weight_loader_v2_supported_method
class OverlayLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """The method of one layer, made of `specs` from its first row on."""

    supports_pre_processed_weights = False

    def __init__(self, overlay: OverlayConfig, specs: list[WeightSpec | None]) -> None:
        super().__init__()
        self.overlay = overlay
        self.specs = specs
        self.rows: list[Rows] = []
        self.columns = 0
        self.tiled = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises: ShapeError where tensor parallelism would cut a byte of a plane"""
        self.columns = input_size_per_partition
        if self.columns != input_size and self.columns % 8:
            raise ShapeError(
                f"{_names(self.specs)}: {input_size} columns cut into parts of {self.columns} arrived, expected a "
                "multiple of 8 for each GPU: serve with a smaller --tensor-parallel-size"
            )
        sizes = output_partition_sizes if len(self.specs) > 1 else [sum(output_partition_sizes)]
        self.rows = _merge(self.specs, sizes, self.overlay.bits)
        total = sum(sizes)
        loader = extra_weight_attrs.pop("weight_loader")
        whole = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        for plane in range(max(rows.bits for rows in self.rows)):
            data = torch.empty(total, -(-self.columns // 8), dtype=torch.uint8)
            layer.register_parameter(f"weight_plane{plane}", ModelWeightParameter(data=data, **whole))
        parts = {p.suffix: p for rows in self.rows if rows.spec for p in rows.spec.book.parts(rows.bits)}
        for suffix, part in parts.items():
            data = torch.empty(total, part.width, dtype=DTYPES[part.dtypes[-1]])
            parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            layer.register_parameter(f"weight_{suffix}", parameter)
        if None in self.specs:
            data = torch.empty(total, self.columns, dtype=params_dtype)
            layer.register_parameter("weight", ModelWeightParameter(data=data, **whole))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Planes in tiles where the kernels run, else one dense weight.

        Raises: FormatError where a tensor did not come or holds impossible numbers
        """
        for spec in filter(None, self.specs):
            require_all(spec, self.overlay.bits, self.overlay.seen)
        loaded = {
            name.removeprefix("weight_"): p.data for name, p in layer.named_parameters(recurse=False) if name != "bias"
        }
        self.tiled = kernels_run(loaded["plane0"].device, layer.params_dtype) and self._tile(layer, loaded)
        dense = None if self.tiled else torch.cat([self._dense(rows, loaded, layer.params_dtype) for rows in self.rows])
        for name in loaded:
            delattr(layer, name if name == "weight" else f"weight_{name}")
        if dense is not None:
            layer.register_parameter("weight", Parameter(dense, requires_grad=False))
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: [..., K] -> [..., N]"""
        if not self.tiled:
            dense: torch.Tensor = super().apply(layer, x, bias)
            return dense
        flat = x.reshape(-1, self.columns).contiguous()
        parts = []
        for i, rows in enumerate(self.rows):
            if rows.spec is None:
                parts.append(torch.nn.functional.linear(flat, getattr(layer, f"rows{i}_dense")))
            else:
                held = [getattr(layer, f"rows{i}_{name}") for name in ("planes", "entries", "scales")]
                parts.append(times(flat, *held, rows.bits, rows.end - rows.begin))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (y if bias is None else y + bias).view(*x.shape[:-1], y.shape[1])

    def _tile(self, layer: Any, loaded: dict[str, torch.Tensor]) -> bool:
        """Adds the planes in tiles; False where a codebook has no kernel."""
        found: dict[str, torch.Tensor] = {}
        for i, rows in enumerate(self.rows):
            if rows.spec is None:
                found[f"rows{i}_dense"] = loaded["weight"][rows.begin : rows.end].clone()
                continue
            planes, tensors = _cut(rows, loaded)
            arrays = codebook(rows.spec, rows.bits, tensors)
            try:
                tables = make_tables(rows.spec.book, arrays, rows.bits, layer.params_dtype).to(planes[0].device)
            except PrecisionError as error:
                logger.warning_once("%s: made dense", error)
                return False
            found |= {f"rows{i}_planes": tile_planes(torch.stack(planes), self.columns)}
            found |= {f"rows{i}_entries": tables.entries, f"rows{i}_scales": tables.scales}
        for name, tensor in found.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        return True

    def _dense(self, rows: Rows, loaded: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        if rows.spec is None:
            return loaded["weight"][rows.begin : rows.end]
        planes, tensors = _cut(rows, loaded)
        return decode(rows.spec, rows.bits, planes, tensors, self.columns).to(planes[0].device, dtype)


@cache
def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether everybit.gpu multiplies activations of `dtype` there."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        import_module("cuda.bindings.nvrtc")
    except ImportError:
        logger.warning('weights are made dense: the GPU kernels need cuda-bindings: pip install "everybit[gpu]"')
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _merge(specs: list[WeightSpec | None], sizes: list[int], bits: int) -> list[Rows]:
    """The rows of `specs`, those of neighbours that are read alike as one."""
    read = [(spec.codebook, spec.served_bits(bits)) if spec else ("", 0) for spec in specs]
    found, end = [], 0
    for (_, own), group in groupby(range(len(specs)), key=read.__getitem__):
        members = list(group)
        begin, end = end, end + sum(sizes[i] for i in members)
        found.append(Rows(begin, end, specs[members[0]], own))
    return found


def _cut(rows: Rows, loaded: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The planes of some rows, and what else was loaded for them, by suffix."""
    cut = {name: tensor[rows.begin : rows.end] for name, tensor in loaded.items()}
    return [cut[f"plane{k}"] for k in range(rows.bits)], cut


def _names(specs: list[WeightSpec | None]) -> str:
    return ", ".join(spec.name for spec in specs if spec)
