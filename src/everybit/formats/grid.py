"""Precisions above 4 bits: the top 4 bits of a code choose a cell, the others a point of the cell's even grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everybit.errors import FormatError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
CELL_BITS = 4  # the top bits of a code, which choose the cell
CELLS = 1 << CELL_BITS
LADDERS = 8  # widths a cell can have, in steps of its row


@dataclass(frozen=True)
class Grid:
    """With c the top 4 bits of a code of b bits, r the others and n = 2^(b-4),
    value = centre[c] + step * (ladder[c] * (2r + 1 - n) * (16 / n)), rounded to f32 after product and sum.

    Shapes: centres f32[rows, 16], ladders u8[rows, 16] within 1..8, steps f32[rows]
    """

    centres: F32
    ladders: U8
    steps: F32

    def values(self, bits: int) -> F32:
        """Of every code of `bits` bits; not finite where they overflow. Shapes: -> f32[rows, 2^bits]"""
        n = 1 << (bits - CELL_BITS)
        return self._at((2 * np.arange(n) + 1 - n) * (16 // n)).reshape(len(self.centres), -1)

    def ends(self, bits: int) -> F32:
        """The least and the greatest value of every cell. Shapes: -> f32[rows, 16, 2]"""
        most = 16 - (16 >> (bits - CELL_BITS))
        return self._at(np.array([-most, most]))

    def _at(self, places: NDArray[np.int_]) -> F32:
        brackets = (self.ladders[:, :, None].astype(np.int32) * places).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values: F32 = self.centres[:, :, None] + self.steps[:, None, None] * brackets
        return values


def pack_nibbles(ladders: U8) -> U8:
    """`ladder - 1` of sixteen cells in eight bytes, the low nibble first. Shapes: u8[rows, 16] -> u8[rows, 8]"""
    nibbles = ladders - np.uint8(1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << np.uint8(4)


def unpack_nibbles(pairs: U8) -> U8:
    """The ladders of `pack_nibbles`. Shapes: u8[rows, 8] -> u8[rows, 16] within 1..8. Raises: FormatError"""
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, CELLS)
    if (nibbles >= LADDERS).any():
        row, cell = (int(i) for i in np.argwhere(nibbles >= LADDERS)[0])
        raise FormatError(
            f"row {row} has {nibbles[row, cell]}, expected a nibble of 0 to {LADDERS - 1}: quantize again, or "
            "download it again"
        )
    return nibbles + np.uint8(1)
