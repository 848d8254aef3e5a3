"""The result of an evaluation: dataclasses, one JSON document, a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FloatQuality:
    """The float model on the same tokens. Size is None where the caller did not say."""

    ppl: float
    bits_per_byte: float
    bpw: float | None
    bytes: int | None


@dataclass(frozen=True)
class Row:
    """One precision. KL is in nats per token, float model to this one; None without a float model."""

    bits: int
    bpw: float | None
    bytes: int | None
    ppl: float
    bits_per_byte: float
    kl_mean: float | None
    kl_p99: float | None
    top1: float | None  # share of tokens at which both models rank the same token first


@dataclass(frozen=True)
class Report:
    """Every precision of a model on one text, beside the float model where there is one."""

    reference: FloatQuality | None
    rows: list[Row]
    tokens: int  # scored
    text_bytes: int  # of the scored tokens

    def document(self) -> dict[str, Any]:
        """The JSON document `{"float": {...} or null, "rows": [...]}`; a number that is not finite becomes null."""
        return {
            "float": _finite(asdict(self.reference)) if self.reference else None,
            "rows": [_finite(asdict(row)) for row in self.rows],
        }

    def json(self) -> str:
        return json.dumps(self.document(), allow_nan=False)

    def table(self) -> str:
        """Aligned columns for a terminal."""
        head = ["bits", "bpw", "bytes", "perplexity", "bits/byte", "KL mean", "KL p99", "top-1"]
        lines = [head]
        if self.reference:
            r = self.reference
            lines.append(
                ["float", _number(r.bpw, ".2f"), _count(r.bytes), *_likelihood(r.ppl, r.bits_per_byte), *[""] * 3]
            )
        for row in self.rows:
            lines.append(
                [
                    str(row.bits),
                    _number(row.bpw, ".2f"),
                    _count(row.bytes),
                    *_likelihood(row.ppl, row.bits_per_byte),
                    _number(row.kl_mean, ".3g"),
                    _number(row.kl_p99, ".3g"),
                    _number(row.top1, ".2%"),
                ]
            )
        return f"{align(lines)}\n{self.tokens:,} tokens, {self.text_bytes:,} bytes of text; KL in nats per token"


def align(lines: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, two spaces apart; empty columns vanish."""
    columns = [c for c in zip(*lines, strict=True) if any(c[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _likelihood(ppl: float, bits_per_byte: float) -> list[str]:
    return [f"{ppl:.4f}" if ppl < 1e5 else f"{ppl:.3g}", f"{bits_per_byte:.4f}"]
