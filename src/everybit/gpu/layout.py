"""An overlay's weight as the GPU kernels read it: planes in tiles, codebooks as tables in its activations' dtype.

Planes lie in tiles of 16 rows x 256 columns, 512 bytes a plane, so that a warp reads a tile of a plane with one 16-byte
load a lane and each lane then holds just the bits that its part of the tensor-core operand needs (cuda/decode.cuh).
Reading b bits reads the first b planes, as in the file.

Shape letters: B planes, N rows, K columns, R row tiles, C column tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from everybit.errors import PrecisionError
from everybit.formats.codebook import Arrays, Codebook
from everybit.formats.grid import CELL_BITS, Grid

TILE_ROWS, TILE_COLUMNS = 16, 256
# The columns, of eight, that the nibbles of a word hold: so that pairs come out as neighbours (cuda/decode.cuh).
INDEX_ORDER, RESIDUAL_ORDER = [0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Tables:
    """The codebook of one precision in units of `scales`, for activations of one dtype.

    Either integers of -127 to 127 as bytes, + 128 (for F16), or 16 pairs a row in the activations' dtype: a number and,
    above 4 bits, the width of which an odd multiple is added to it.
    Shapes: entries u8[16R, 4 or 8] or F16 or BF16 [16R, 32]; scales f32[16R]
    """

    entries: torch.Tensor
    scales: torch.Tensor

    @property
    def as_bytes(self) -> bool:
        return self.entries.dtype == torch.uint8

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.float16 if self.as_bytes else self.entries.dtype

    def to(self, device: torch.device | str) -> Tables:
        return Tables(self.entries.to(device), self.scales.to(device))


def tile_planes(planes: torch.Tensor, columns: int) -> torch.Tensor:
    """Planes as stored to planes in tiles; rows and columns beyond the weight are zero bits.

    Shapes: u8[B, N, ceil(K/8)] -> u8[B, R, C, 32, 16]: [.., lane 4g + t, ..] is rows g and g + 8 of the tile, two
    words each, little-endian
    """
    B, N, _ = planes.shape
    R, C = -(-N // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padded = torch.zeros(R * TILE_ROWS, C * TILE_COLUMNS // 8, dtype=torch.uint8, device=planes.device)
    out = torch.empty(B, R, C, 32, 16, dtype=torch.uint8, device=planes.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    for k in range(B):
        padded[:N, : planes.shape[2]] = planes[k]
        bits = (padded[..., None] >> shifts) & 1
        # row = 8h + g; column = 256c + 128q + 32i + 8t + order[p]; bit 4p + i of word (h, q) of lane 4g + t
        bits = bits.view(R, 2, 8, C, 2, 4, 4, 8).permute(0, 3, 2, 6, 1, 4, 7, 5)  # R C g t h q p i
        bits = bits[:, :, :, :, :, :, RESIDUAL_ORDER if k >= CELL_BITS else INDEX_ORDER]
        words = bits.reshape(R, C, 32, 16, 8)
        out[k] = (words << shifts).sum(-1, dtype=torch.uint8)
    return out


def make_tables(codebook: Codebook, arrays: Arrays, bits: int, dtype: torch.dtype) -> Tables:
    """The codebook that `bits` reads, rounded to `dtype` except where its numbers are small integers.

    Raises: PrecisionError where it is a free table above 4 bits; ShapeError, FormatError as the codebook does
    """
    grid = _grid(codebook, arrays, bits)
    values = codebook.expand(arrays, bits) if grid is None else grid.centres
    unit = codebook.unit(arrays, bits) if grid is None else None
    as_bytes = unit is not None and dtype == torch.float16 and bits < CELL_BITS
    if unit is not None:
        scales = np.where(unit > 0, unit, np.float32(1))
    else:  # a power of two, which loses nothing
        most = np.abs(values).max(axis=1) if grid is None else np.abs(grid.ends(bits)).max(axis=(1, 2))
        scales = np.exp2(np.floor(np.log2(np.where(most > 0, most, 1)))).astype(np.float32)
    numbers = values / scales[:, None]
    more = -len(scales) % TILE_ROWS
    if as_bytes:
        filled = np.full((len(scales) + more, 4 if bits < 3 else 8), 128, np.uint8)
        filled[: len(scales), : numbers.shape[1]] = np.rint(numbers) + 128
        entries = torch.from_numpy(filled)
    else:
        pairs = np.zeros((len(scales) + more, 16, 2), np.float32)
        pairs[: len(scales), : numbers.shape[1], 0] = numbers
        if grid is not None:
            steps = grid.steps * np.float32(16 >> (bits - CELL_BITS)) / scales
            pairs[: len(scales), :, 1] = grid.ladders * steps[:, None]
        entries = torch.from_numpy(pairs).to(dtype).flatten(1)
    return Tables(entries, torch.from_numpy(np.pad(scales, (0, more))))


def _grid(codebook: Codebook, arrays: Arrays, bits: int) -> Grid | None:
    """Above 4 bits as a grid, which an even line is too."""
    if bits <= CELL_BITS:
        return None
    grid = codebook.grid(arrays, bits)
    if grid is None and codebook.plane_linear:
        alpha, constant = (a.astype(np.float64) for a in codebook.coefficients(arrays, bits))
        signs = 2 * (np.arange(1 << CELL_BITS)[:, None] >> np.arange(CELL_BITS - 1, -1, -1) & 1) - 1
        centres = constant[:, None] + alpha[:, :CELL_BITS] @ signs.T
        # the last plane's alpha is half the distance of neighbours, which a ladder of 1 makes step * (16 / n)
        steps = alpha[:, -1] / (16 >> (bits - CELL_BITS))
        grid = Grid(centres.astype(np.float32), np.ones(centres.shape, np.uint8), steps.astype(np.float32))
    if grid is None:
        raise PrecisionError(
            f"{bits} bits of a {codebook.kind} codebook arrived, expected a grid above {CELL_BITS} bits (compact, "
            f"cells, affine): quantize with compact codebooks, or serve at {CELL_BITS} bits or fewer"
        )
    return grid
