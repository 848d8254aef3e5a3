"""How many bytes and bits per weight each precision of an overlay costs, codebooks counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from everybit.formats.tensors import TensorSpec
from everybit.formats.weights import WeightSpec


@dataclass(frozen=True)
class SizeRow:
    """One precision: `bpw` over the quantized parameters (planes and that one codebook), `bytes` of the whole
    deployment (the unquantized tensors included)."""

    bits: int
    bpw: float
    bytes: int


@dataclass(frozen=True)
class SizeReport:
    """`parameters` are the quantized ones; `stored_bpw` counts every plane and every codebook in the folder."""

    parameters: int
    plain_bytes: int
    stored_bytes: int
    stored_bpw: float
    rows: tuple[SizeRow, ...]

    @classmethod
    def of(cls, weights: Iterable[WeightSpec], bits: Iterable[int], layout: Mapping[str, TensorSpec]) -> SizeReport:
        """From the weights, the precisions served and every stored tensor; a weight without one of the precisions
        is read at its `served_bits`."""
        weights = list(weights)
        parameters = sum(w.parameters for w in weights)
        own = {name for w in weights for name in w.tensors()}
        plain = sum(spec.nbytes for name, spec in layout.items() if name not in own)
        stored = sum(spec.nbytes for spec in layout.values())
        rows = []
        for b in bits:
            read = 0
            for w in weights:
                served = w.served_bits(b)
                read += served * w.plane_bytes + layout[w.codebook_name(served)].nbytes
            rows.append(SizeRow(b, read * 8 / parameters, read + plain))
        return cls(parameters, plain, stored, (stored - plain) * 8 / parameters, tuple(rows))

    def row(self, bits: int) -> SizeRow:
        """The row of one precision. Raises: KeyError when it is not among them."""
        for row in self.rows:
            if row.bits == bits:
                return row
        raise KeyError(bits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized_parameters": self.parameters,
            "unquantized_bytes": self.plain_bytes,
            "stored_bytes": self.stored_bytes,
            "stored_bpw": self.stored_bpw,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = ["bits    bpw        bytes"]
        lines += [f"{row.bits:>4} {row.bpw:>6.2f} {row.bytes:>12,}" for row in self.rows]
        lines.append(
            f"{self.parameters:,} quantized parameters, {self.plain_bytes:,} bytes left as they are, "
            f"{self.stored_bytes:,} bytes on disk ({self.stored_bpw:.2f} bpw with every plane and codebook)"
        )
        return "\n".join(lines)
