"""An overlay's weight as the GPU kernels read it: planes in tiles, codebooks as byte tables.

Planes lie in tiles of 16 rows x 256 columns, 512 bytes a plane, so that a warp reads a tile of a plane with one 16-byte
load a lane and each lane then holds just the bits that its part of the tensor-core operand needs (cuda/decode.cuh).
Reading b bits reads the first b planes, as in the file.

Shape letters: B planes, N rows, K columns, R row tiles, C column tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.errors import PrecisionError
from everybit.formats.codebook import F32, Arrays, Codebook
from everybit.formats.grid import CELL_BITS, Grid

TILE_ROWS, TILE_COLUMNS = 16, 256
_RESIDUAL_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight columns of a word's nibbles, in planes that hold residuals
_MOST_STEPS = 2048.0  # of an F16: beyond, centres are no integers near it


@dataclass(frozen=True)
class Tables:
    """The codebook of one precision in units of `scales`, for activations of one dtype.

    Shapes: tables u8[16R, width], steps i16[16R] (the bits of an F16 or BF16; empty up to 4 bits), scales f32[16R]
    """

    tables: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor
    int8: bool


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
        # row = 8h + g; column = 256c + 128q + 32i + 8t + j; bit 4j + i of word (h, q) of lane 4g + t
        bits = bits.view(R, 2, 8, C, 2, 4, 4, 8).permute(0, 3, 2, 6, 1, 4, 7, 5)  # R C g t h q j i
        if k >= CELL_BITS:
            bits = bits[:, :, :, :, :, :, _RESIDUAL_ORDER]
        words = bits.reshape(R, C, 32, 16, 8)
        out[k] = (words << shifts).sum(-1, dtype=torch.uint8)
    return out


def byte_tables(codebook: Codebook, arrays: Arrays, bits: int, dtype: torch.dtype) -> Tables:
    """The codebook that `bits` reads, rounded to `dtype` except where its numbers are small integers.

    Raises: PrecisionError where it is a free table above 4 bits; ShapeError, FormatError as the codebook does
    """
    grid = _grid(codebook, arrays, bits)
    values = codebook.expand(arrays, bits) if grid is None else grid.centres
    unit = codebook.unit(arrays, bits) if grid is None else grid.unit
    steps = None if grid is None else grid.steps * np.float32(16 >> (bits - CELL_BITS))
    int8 = unit is not None and dtype == torch.float16
    if int8:
        scales = np.where(unit > 0, unit, np.float32(1))
        int8 = steps is None or bool(((steps == 0) | ((unit > 0) & (steps / scales < _MOST_STEPS))).all())
    if not int8:  # a power of two, which loses nothing
        most = np.abs(values).max(axis=1) if grid is None else np.abs(grid.ends(bits)).max(axis=(1, 2))
        scales = np.exp2(np.floor(np.log2(np.where(most > 0, most, 1)))).astype(np.float32)

    def rows(array: NDArray[Any], width: int = 0) -> NDArray[Any]:
        """Padded to whole tiles, and to `width` columns."""
        more = -len(array) % TILE_ROWS
        return np.pad(array, ((0, more), (0, max(0, width - array.shape[1]))) if array.ndim == 2 else (0, more))

    numbers = rows(values / scales[:, None], 4)
    parts = [(np.rint(numbers) + 128).astype(np.uint8)] if int8 else list(_split(numbers, dtype))
    if grid is not None:
        high, low = _split(rows(grid.ladders.astype(np.float32)), dtype)
        parts += [high] if int8 else [high, low]
    return Tables(
        torch.from_numpy(np.concatenate(parts, axis=1)),
        torch.from_numpy(rows(np.zeros(0, np.float32) if steps is None else steps / scales))
        .to(dtype)
        .view(torch.int16),
        torch.from_numpy(rows(scales)),
        int8,
    )


def _split(numbers: F32, dtype: torch.dtype) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """High and low bytes of the numbers rounded to `dtype`."""
    bits = torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return (bits >> 8).astype(np.uint8), (bits & 255).astype(np.uint8)


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
