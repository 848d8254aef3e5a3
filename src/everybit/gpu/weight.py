"""A weight of an overlay on a GPU: all its planes once, its codebooks, and products at any precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from everybit.errors import PrecisionError, ShapeError
from everybit.formats import Overlay
from everybit.gpu.layout import Tables, make_tables, tile_planes
from everybit.gpu.ops import times, times_mixed


@dataclass(frozen=True)
class TiledWeight:
    """Shapes: planes u8[B, R, C, 32, 16]; tables by the weight's own bits, of one dtype of activations;
    pointers i64[9, 2], where these are in memory, for `times_mixed`
    """

    name: str
    planes: torch.Tensor
    tables: dict[int, Tables]
    rows: int
    columns: int
    pointers: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", dict(sorted(self.tables.items())))
        found = torch.zeros(9, 2, dtype=torch.int64)
        for b, tables in self.tables.items():
            found[b, 0], found[b, 1] = tables.entries.data_ptr(), tables.scales.data_ptr()
        object.__setattr__(self, "pointers", found.to(self.planes.device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have their own tables, and so their own pointers."""
        return TiledWeight, (self.name, self.planes, self.tables, self.rows, self.columns)

    @classmethod
    def of(
        cls,
        overlay: Overlay,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str,
        expert: int | None = None,
        most_bits: int | None = None,
    ) -> TiledWeight:
        """The weight `name` with every precision that it has; of a weight [E, N, K], one expert.

        `dtype` is that of the activations, F16 or BF16. `most_bits`: what a model at more bits would read is left out.
        Raises: PrecisionError where a codebook has no kernel (free tables above 4 bits), ShapeError, FormatError as the
        reader does
        """
        spec = overlay.weights[name]
        if dtype not in (torch.float16, torch.bfloat16):
            raise ShapeError(f"activations of {dtype} arrived, expected torch.float16 or torch.bfloat16")
        if (len(spec.shape) == 3) != (expert is not None) or (expert is not None and not 0 <= expert < spec.shape[0]):
            raise ShapeError(
                f"{name} has shape {list(spec.shape)} and expert is {expert}: name one of [E, N, K], none of [N, K]"
            )
        rows = slice(None) if expert is None else slice(expert * spec.shape[1], (expert + 1) * spec.shape[1])
        most = spec.planes if most_bits is None else spec.served_bits(most_bits)
        tables = {}
        for b in (b for b in spec.bits if b <= most):
            overlay.table(name, b)  # refuses numbers that are not finite
            arrays = {key: a.reshape(-1, a.shape[-1])[rows] for key, a in overlay.codebook(name, b).items()}
            tables[b] = make_tables(spec.book, arrays, b, dtype).to(device)
        stored = np.stack([plane.reshape(spec.rows, -1)[rows] for plane in overlay.planes(name, most)])
        planes = tile_planes(torch.from_numpy(stored).to(device), spec.columns)
        return cls(name, planes, tables, len(stored[0]), spec.columns)

    def times(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """x W' at `bits`, one of the weight's own. Shapes: [..., K] -> [..., N]. Raises: PrecisionError, ShapeError"""
        tables = self.tables.get(bits)
        if tables is None:
            raise PrecisionError(f"{self.name} has {', '.join(map(str, self.tables))} bits, not {bits}")
        flat = self._flat(x)
        y: torch.Tensor = times(flat, self.planes, tables.entries, tables.scales, bits, self.rows)
        return y.view(*x.shape[:-1], self.rows)

    def times_mixed(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x W', token m at chosen[m] bits, which stay on the device and may change between replays of a graph.

        Shapes: [M, K], i32[M] -> [M, N], NaN where the weight does not have these bits
        """
        entries, scales = [t.entries for t in self.tables.values()], [t.scales for t in self.tables.values()]
        y: torch.Tensor = times_mixed(
            self._flat(x), self.planes, self.pointers, entries, scales, list(self.tables), chosen, self.rows
        )
        return y

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """As the operators want it. Raises: ShapeError"""
        if not x.ndim or x.shape[-1] != self.columns:
            raise ShapeError(f"x of shape {list(x.shape)} arrived, expected [..., {self.columns}] for {self.name}")
        return x.reshape(-1, self.columns).contiguous()
