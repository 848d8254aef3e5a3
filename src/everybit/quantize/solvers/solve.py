"""One door to every solver: checks what arrived, allocates the outputs, calls the C++ solver.

Shape letters: N out-features (rows), K in-features (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.errors import ShapeError, SourceError
from everybit.formats import CODEBOOKS, check_bits
from everybit.formats.grid import CELL_BITS
from everybit.quantize.solvers.compact import compact, fit_grid, nearest_codes

Kind = Literal["table", "affine", "compact"]
Values = NDArray[np.float32]

_NATIVE = {"tree": _native.solve_tree, "upscale": _native.solve_upscale, "uniform": _native.solve_uniform}
# The kind a solver's result has before it is made compact; guided (guided.py) makes nothing else.
KINDS: dict[str, Kind] = {"guided": "compact", "tree": "table", "upscale": "table", "uniform": "affine"}


def codebook_kind(solver: str, codebook: str = "compact") -> Kind:
    """The kind that a weight gets: `codebook` is compact or table, where the solver leaves the choice.

    Raises: SourceError
    """
    if codebook not in ("compact", "table"):
        raise SourceError(f"unknown codebook {codebook!r}: expected compact or table")
    if solver == "guided" and codebook != "compact":
        raise SourceError("the solver guided makes compact codebooks only: choose the solver tree for tables")
    return "compact" if KINDS[solver] == "table" and codebook == "compact" else KINDS[solver]


@dataclass(frozen=True)
class Solution:
    """Nested codes of one matrix and the codebook of every precision.

    codes     u8[N, K], the code of the highest precision; the b-bit code is `codes >> (max(bits) - b)`
    bits      the precisions, ascending
    codebook  its tensors as `formats.CODEBOOKS[kind]` expands them, by suffix (lut2, scale, ...); tables are float32
    kind      table, affine or compact
    """

    codes: NDArray[np.uint8]
    bits: tuple[int, ...]
    codebook: dict[str, NDArray[Any]]
    kind: Kind

    def codes_at(self, bits: int) -> NDArray[np.uint8]:
        """The codes of one precision, u8[N, K]."""
        return self.codes >> np.uint8(self.bits[-1] - bits)

    def table_at(self, bits: int) -> Values:
        """The value of every code of one precision, f32[N, 2^bits]."""
        return CODEBOOKS[self.kind].expand(self.codebook, bits)

    def values_at(self, bits: int) -> Values:
        """The dequantized weights of one precision, f32[N, K]."""
        return np.take_along_axis(self.table_at(bits), self.codes_at(bits).astype(np.intp), axis=1)


def solve(
    weights: Values,
    sensitivity: Values | None,
    bits: Sequence[int],
    solver: str = "tree",
    seed: int = 0,
    threads: int = 0,
    codebook: str = "table",
) -> Solution:
    """Quantize one matrix to all the precisions in `bits` at once, row by row.

    Minimizes, per row and precision, sum of sensitivity * (weight - value)^2:
      tree     precisions up to 4 bits are chosen jointly, then every cell is split in the best place
      upscale  the original Any-Precision: k-means at the lowest precision, then two-means splits
      uniform  an even grid over the row's range, with a fitted scale and offset per precision

    With codebook "compact" the solver gives codes and tables up to 4 bits, which are rounded to int8; above, each
    4-bit cell gets an even grid that all precisions share (native/src/cells.cc). It makes no difference to uniform.

    Shapes:  weights f32[N, K], sensitivity f32[N, K] or None (all equal) -> codes u8[N, K], codebook as in Solution
    Needs:   finite weights; finite sensitivities >= 0; bits ascending within 2..8; K >= 1
    Mutates: nothing. Threads: deterministic for any count; 0 = one per processor. Only upscale uses the seed
    Raises:  ShapeError, SourceError (a value that is not finite or a negative sensitivity), PrecisionError
    Source:  Any-Precision LLM (Park et al., ICML 2024) section 3 for upscale; tree is ours (native/src/tree.cc)
    """
    if solver not in _NATIVE:
        raise SourceError(f"unknown solver {solver!r}; choose one of {', '.join(_NATIVE)}")
    wanted = list(check_bits(list(bits)))
    weights = _matrix(weights, "weights")
    if weights.shape[1] == 0:
        raise ShapeError(f"weights have shape {list(weights.shape)}; a row needs at least one weight")
    _refuse_bad_row(weights, "weight", False, threads)
    if sensitivity is not None:
        sensitivity = _matrix(sensitivity, "sensitivity")
        if sensitivity.shape != weights.shape:
            raise ShapeError(
                f"sensitivity has shape {list(sensitivity.shape)}, expected the weights' {list(weights.shape)}; "
                "pass one sensitivity per weight, or None"
            )
        _refuse_bad_row(sensitivity, "sensitivity", True, threads)
    kind = codebook_kind(solver, codebook)
    grid = kind == "compact" and wanted[-1] > CELL_BITS
    solved = [b for b in wanted if b < CELL_BITS] + [CELL_BITS] if grid else wanted
    codes = np.empty(weights.shape, np.uint8)
    found = {b: np.empty((len(weights), CODEBOOKS[KINDS[solver]].parts(b)[0].width), np.float32) for b in solved}
    _NATIVE[solver](weights, sensitivity, solved, seed & (2**64 - 1), codes, list(found.values()), threads)
    if kind != "compact":
        suffixes = {b: CODEBOOKS[kind].parts(b)[0].suffix for b in solved}
        return Solution(codes, tuple(wanted), {suffixes[b]: book for b, book in found.items()}, kind)
    tables = {b: found[b] for b in wanted if b in found}
    if not grid:
        return Solution(codes, tuple(wanted), compact(tables, None), kind)
    upper = [b for b in wanted if b > CELL_BITS]
    arrays = compact(tables, fit_grid(weights, sensitivity, upper, codes, threads))
    return Solution(nearest_codes(weights, arrays, wanted[-1], codes), tuple(wanted), arrays, kind)


def _matrix(array: object, what: str) -> Values:
    result = np.asarray(array)
    if result.dtype != np.float32 or result.ndim != 2:
        raise ShapeError(
            f"{what} arrived as {result.dtype}{list(result.shape)}, expected float32[N, K]; "
            "convert with astype(np.float32) and reshape experts to rows"
        )
    return np.ascontiguousarray(result)


def _refuse_bad_row(values: Values, what: str, refuse_negative: bool, threads: int) -> None:
    row = _native.find_bad_row(values, refuse_negative, threads)
    if row >= 0:
        rule = "finite and not negative" if refuse_negative else "finite"
        raise SourceError(
            f"row {row} has a {what} that is not {rule}; check the checkpoint or the calibration that made it"
        )
