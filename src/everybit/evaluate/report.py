"""The result of an evaluation: dataclasses, one JSON document, a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from everybit.evaluate.intervals import LEAST_BLOCKS, LEVEL, RESAMPLES, Interval, Sums, plus_minus


@dataclass(frozen=True)
class FloatQuality:
    """The float model on the same tokens. Size is None where the caller did not say."""

    ppl: float
    bits_per_byte: float
    bpw: float | None
    bytes: int | None


@dataclass(frozen=True)
class Row:
    """One precision, or a plan by its name. KL is in nats per token, float to this model; None without a float model.

    Intervals are of 95 %, (low, high), by `intervals`; None also where the text has too few blocks for one.
    """

    bits: int | str
    bpw: float | None
    bytes: int | None
    ppl: float
    bits_per_byte: float
    kl_mean: float | None
    kl_p99: float | None
    top1: float | None  # share of tokens at which both models rank the same token first
    kl_interval: Interval | None = None
    ppl_ratio: float | None = None  # to the float model's
    ppl_ratio_interval: Interval | None = None


@dataclass(frozen=True)
class Report:
    """Every precision of a model on one text, beside the float model where there is one."""

    reference: FloatQuality | None
    rows: list[Row]
    tokens: int  # scored
    text_bytes: int  # of the scored tokens
    sums: Sums | None = field(default=None, repr=False, compare=False)  # of blocks of text, for intervals

    def document(self) -> dict[str, Any]:
        """The JSON document `{"float": {...} or null, "rows": [...], "intervals": {...} or null}`.

        A number that is not finite becomes null; an interval is [low, high] or null.
        """
        blocks = (
            {"level": LEVEL, "resamples": RESAMPLES, "of": self.sums.of, "blocks": len(self.sums.tokens)}
            if (self.sums and self.reference)
            else None
        )
        return {
            "float": _finite(asdict(self.reference)) if self.reference else None,
            "rows": [_finite(asdict(row)) for row in self.rows],
            "intervals": blocks,
        }

    def average(self, precisions: Sequence[int], bits: int) -> Row:
        """One row for several that differ in their seed only: the mean of their figures (perplexity: geometric).

        Intervals are of that mean over texts, the seeds being what they are.
        """
        rows = [row for row in self.rows if row.bits in precisions]

        def mean(name: str) -> float | None:
            values = [getattr(row, name) for row in rows]
            return None if None in values else math.fsum(values) / len(values)

        def geometric(name: str) -> float | None:
            values = [getattr(row, name) for row in rows]
            return None if None in values else float(np.exp(np.mean(np.log(values))))

        return Row(
            bits=bits,
            bpw=rows[0].bpw,
            bytes=rows[0].bytes,
            ppl=geometric("ppl") or math.nan,
            bits_per_byte=mean("bits_per_byte") or math.nan,
            kl_mean=mean("kl_mean"),
            kl_p99=mean("kl_p99"),
            top1=mean("top1"),
            kl_interval=self.sums.kl_interval(*precisions) if self.sums else None,
            ppl_ratio=geometric("ppl_ratio"),
            ppl_ratio_interval=self.sums.ratio_interval(*precisions) if self.sums else None,
        )

    def json(self) -> str:
        return json.dumps(self.document(), allow_nan=False)

    def table(self) -> str:
        """Aligned columns for a terminal."""
        head = ["bits", "bpw", "bytes", "perplexity", "bits/byte", "ppl / float", "KL mean", "KL p99", "top-1"]
        lines = [head]
        if self.reference:
            r = self.reference
            lines.append(
                ["float", _number(r.bpw, ".2f"), _count(r.bytes), *_likelihood(r.ppl, r.bits_per_byte), *[""] * 4]
            )
        for row in self.rows:
            lines.append(
                [
                    str(row.bits),
                    _number(row.bpw, ".2f"),
                    _count(row.bytes),
                    *_likelihood(row.ppl, row.bits_per_byte),
                    _number(row.ppl_ratio, ".4f") + plus_minus(row.ppl_ratio_interval),
                    _number(row.kl_mean, ".3g") + plus_minus(row.kl_interval),
                    _number(row.kl_p99, ".3g"),
                    _number(row.top1, ".2%"),
                ]
            )
        foot = f"{self.tokens:,} tokens, {self.text_bytes:,} bytes of text; KL in nats per token"
        return f"{align(lines)}\n{foot}{self.how()}"

    def how(self) -> str:
        """What the intervals are, or why there are none; nothing without a float model."""
        if self.sums is None or not self.reference:
            return ""
        count = len(self.sums.tokens)
        if count < LEAST_BLOCKS:
            return f"; no intervals: {count} {self.sums.of}, at least {LEAST_BLOCKS} are needed"
        return f"; ±: 95 % intervals, {RESAMPLES:,} paired resamples of {count} {self.sums.of}"


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
