"""From float tables and grids to codebook kind `compact`, and the codes that fit what was rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.formats import Compact
from everybit.formats.compact import round_step, row_scale, to_int8
from everybit.formats.grid import CELL_BITS, CELLS, Grid

Values = NDArray[np.float32]
Codes = NDArray[np.uint8]
# What the grid is fitted for where 5 to 8 bits share it. Fitted for 8, its squared error is 1 to 8 % greater at 5 to 7
# bits and 6 to 9 % less at 8, where it is least (normal and heavy-tailed rows of 1,024 and 4,096, GPT-2's queries).
FITTED_BITS = 7
BLOCK_WEIGHTS = 1 << 20  # what is looked at together: a few arrays of 4 to 8 MB


def compact(tables: dict[int, Values], grid: Grid | None) -> dict[str, NDArray[Any]]:
    """The arrays of a codebook `compact` by suffix: each row's scale is the least that clips nothing.

    Shapes: tables bits -> f32[N, 2^bits], all up to 4 bits; one of tables and grid may be missing
    """
    numbers = [*tables.values(), *([] if grid is None else [grid.centres])]
    scale = row_scale(np.max([np.abs(values).max(axis=1) for values in numbers], axis=0))
    luts = {b: to_int8(table, scale) for b, table in tables.items()}
    if grid is None:
        return Compact.pack(scale, luts)
    return Compact.pack(scale, luts, to_int8(grid.centres, scale), grid.ladders, round_step(grid.steps))


def fit_grid(weights: Values, sensitivity: Values | None, bits: list[int], cells: Codes, threads: int) -> Grid:
    """One grid for all of `bits`, which are above 4. Shapes: cells u8[N, K], the codes of 4 bits"""
    fitted = bits[-1] if len(bits) == 1 else min(bits[-1], FITTED_BITS)
    rows, codes = len(weights), cells.copy()
    grid = Grid(np.empty((rows, CELLS), np.float32), np.empty((rows, CELLS), np.uint8), np.empty(rows, np.float32))
    _native.solve_cells(weights, sensitivity, [fitted], codes, [grid.centres], [grid.ladders], [grid.steps], threads)
    return grid


def nearest_codes(weights: Values, arrays: dict[str, NDArray[Any]], bits: int, cells: Codes) -> Codes:
    """The codes of `bits` above 4: of each weight the nearest point of its cell's grid as it is stored.

    Points of fewer bits lie amid those that they become, so that the first bits are nearest, too.
    Shapes: cells u8[N, K], the codes of 4 bits -> u8[N, K]
    """
    grid = Compact().grid(arrays, bits)
    assert grid is not None
    codes = np.empty_like(cells)
    n, rows = 1 << (bits - CELL_BITS), max(BLOCK_WEIGHTS // weights.shape[1], 1)
    with np.errstate(over="ignore", invalid="ignore"):  # of values that overflow, and are refused
        spacing = 2 * (16 // n) * grid.steps[:, None] * grid.ladders
        for begin in range(0, len(weights), rows):
            part = slice(begin, begin + rows)
            index = cells[part].astype(np.intp)
            off = weights[part] - np.take_along_axis(grid.centres[part], index, axis=1)
            apart = np.take_along_axis(spacing[part], index, axis=1)
            place = np.divide(off, apart, out=np.zeros_like(off), where=apart > 0)
            residual = np.clip(np.rint(place + np.float32((n - 1) / 2)), 0, n - 1).astype(np.uint8)
            codes[part] = cells[part] << np.uint8(bits - CELL_BITS) | residual
    return codes
