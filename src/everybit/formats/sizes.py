"""How many bytes and bits per weight each precision of an overlay costs, codebooks counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from everybit.formats.tensors import TensorSpec
from everybit.formats.weights import WeightSpec


@dataclass(frozen=True)
class Size:
    """What a precision costs: `bpw` over the quantized parameters (planes and one codebook), `bytes` of everything
    that a deployment at this precision reads, the unquantized tensors included."""

    bpw: float
    bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Sizes of an overlay, written or planned.

    `parameters` are the quantized ones; `stored_bpw` counts every plane and every codebook in the folder; `original`
    is the float model, with the quantized parameters in the dtype of the largest tensor that was left as it is.
    """

    parameters: int
    plain_bytes: int
    stored_bytes: int
    stored_bpw: float
    original: Size
    rows: Mapping[int, Size]

    @classmethod
    def of(cls, weights: Iterable[WeightSpec], bits: Iterable[int], layout: Mapping[str, TensorSpec]) -> SizeReport:
        """From the weights, the precisions served and every stored tensor; a weight without one of the precisions
        is read at its `served_bits`."""
        weights = list(weights)
        parameters = sum(w.parameters for w in weights)
        own = {name for w in weights for name in w.tensors()}
        left = [spec for name, spec in layout.items() if name not in own]
        plain = sum(spec.nbytes for spec in left)
        stored = sum(spec.nbytes for spec in layout.values())
        rows = {}
        for b in bits:
            read = 0
            for w in weights:
                served = w.served_bits(b)
                read += served * w.plane_bytes
                read += sum(layout[name].nbytes for name in w.codebook_names(served).values())
            rows[b] = Size(read * 8 / parameters, read + plain)
        itemsize = max(left, key=lambda spec: spec.nbytes).itemsize if left else 4
        original = Size(8.0 * itemsize, parameters * itemsize + plain)
        return cls(parameters, plain, stored, (stored - plain) * 8 / parameters, original, rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized_parameters": self.parameters,
            "unquantized_bytes": self.plain_bytes,
            "stored_bytes": self.stored_bytes,
            "stored_bpw": self.stored_bpw,
            "rows": [{"bits": b, "bpw": size.bpw, "bytes": size.bytes} for b, size in self.rows.items()],
        }

    def __str__(self) -> str:
        lines = [f"{'bits':>5} {'bpw':>6} {'bytes':>14}"]
        lines += [f"{b:>5} {size.bpw:>6.2f} {size.bytes:>14,}" for b, size in self.rows.items()]
        lines += [f"float {self.original.bpw:>6.2f} {self.original.bytes:>14,}"]
        lines.append(
            f"{self.parameters:,} quantized parameters, {self.plain_bytes:,} bytes left as they are, "
            f"{self.stored_bytes:,} bytes on disk ({self.stored_bpw:.2f} bpw with every plane and codebook)"
        )
        return "\n".join(lines)
