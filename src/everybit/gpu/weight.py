"""A weight of an overlay on a GPU: all its planes once, its codebooks, and products at any precision."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from everybit.errors import PrecisionError
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
        found = torch.zeros(9, 2, dtype=torch.int64)
        for b, tables in self.tables.items():
            found[b, 0], found[b, 1] = tables.entries.data_ptr(), tables.scales.data_ptr()
        object.__setattr__(self, "pointers", found.to(self.planes.device))

    @classmethod
    def of(cls, overlay: Overlay, name: str, dtype: torch.dtype, device: torch.device | str) -> TiledWeight:
        """The weight `name` with every precision that it has. [N, K] only: slice experts yourself.

        Raises: PrecisionError where a codebook has no kernel (free tables above 4 bits), FormatError as the reader does
        """
        spec = overlay.weights[name]
        if len(spec.shape) != 2:
            raise PrecisionError(f"{name} has shape {list(spec.shape)}, expected [N, K]: experts are decoded at load")
        tables = {b: make_tables(spec.book, overlay.codebook(name, b), b, dtype).to(device) for b in spec.bits}
        planes = torch.stack([torch.from_numpy(plane) for plane in overlay.planes(name, spec.planes)]).to(device)
        return cls(name, tile_planes(planes, spec.columns), tables, spec.rows, spec.columns)

    def times(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """x W' at `bits`, one of the weight's own. Shapes: [..., K] -> [..., N]. Raises: PrecisionError, ShapeError"""
        tables = self.tables.get(bits)
        if tables is None:
            raise PrecisionError(f"{self.name} has {', '.join(map(str, self.tables))} bits, not {bits}")
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: torch.Tensor = times(flat, self.planes, tables.entries, tables.scales, tables.as_bytes, bits, self.rows)
        return y.view(*x.shape[:-1], self.rows)

    def times_mixed(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x W', token m at chosen[m] bits, which stay on the device and may change between replays of a graph.

        Shapes: [M, K], i32[M] -> [M, N], NaN where the weight does not have these bits
        """
        bits, tables = list(self.tables), list(self.tables.values())
        y: torch.Tensor = times_mixed(
            x, self.planes, self.pointers, [t.entries for t in tables], [t.scales for t in tables],
            [t.as_bytes for t in tables], bits, chosen, self.rows,
        )  # fmt: skip
        return y
