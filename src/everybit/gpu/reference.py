"""What the kernels compute, in plain torch: tiles back to codes, codes to the numbers that tensor cores are given."""

from __future__ import annotations

import torch

from everybit.formats.grid import CELL_BITS
from everybit.gpu.layout import INDEX_ORDER, RESIDUAL_ORDER, TILE_COLUMNS, TILE_ROWS, Tables


def dense(planes: torch.Tensor, tables: Tables, bits: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight at one precision: numbers in `dtype`, as the kernels round them, times their row's scale in float32.

    Shapes: planes u8[B, R, C, 32, 16] -> f32[rows, columns]
    """
    codes = untile(planes[:bits])
    numbers = _numbers(codes, tables, bits, dtype)
    return (numbers * tables.scales[:, None])[:rows, :columns]


def untile(planes: torch.Tensor) -> torch.Tensor:
    """The codes of the first b planes, the inverse of `layout.tile_planes`.

    Shapes: u8[b, R, C, 32, 16] -> i64[16R, 256C]
    """
    bits, R, C = planes.shape[:3]
    codes = torch.zeros(R * TILE_ROWS, C * TILE_COLUMNS, dtype=torch.int64, device=planes.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    for k in range(bits):
        plane = (planes[k, ..., None] >> shifts & 1).view(R, C, 8, 4, 2, 2, 8, 4)  # R C g t h q p i
        order = torch.tensor(RESIDUAL_ORDER if k >= CELL_BITS else INDEX_ORDER, device=planes.device)
        plane = plane[:, :, :, :, :, :, order.argsort()].permute(0, 4, 2, 1, 5, 7, 3, 6)  # R h g C q i t j
        codes = codes << 1 | plane.reshape(codes.shape)
    return codes


def _numbers(codes: torch.Tensor, tables: Tables, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """In units of the scales. Shapes: i64[16R, 256C] -> f32[16R, 256C]"""
    index = codes >> max(0, bits - CELL_BITS)
    if tables.as_bytes:
        return tables.entries.to(torch.float32).gather(1, index) - 128
    halves = tables.entries.view(len(tables.entries), 16, 2).to(torch.float32)
    numbers = halves[..., 0].gather(1, index)
    if bits <= CELL_BITS:
        return numbers
    points = 1 << (bits - CELL_BITS)
    odd = (2 * (codes & (points - 1)) + 1 - points).to(torch.float32)
    return (numbers + halves[..., 1].gather(1, index) * odd).to(dtype).to(torch.float32)
