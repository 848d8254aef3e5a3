"""What may be spent: bits per weight, bytes read, or milliseconds per token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from everybit.allocate.latency import deployment
from everybit.allocate.units import Unit
from everybit.errors import RequestError
from everybit.formats import Overlay

Kind = Literal["bpw", "bytes", "ms"]
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
EXPECTED = "a number with its unit, such as 3.4bpw, 1.2GB, 900MiB or 25ms/token"
_BUDGET = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(bpw|ms/token|ms|[kKMG]?i?B)", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A limit: `amount` bits per weight, bytes or milliseconds; `text` as it was given."""

    kind: Kind
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `3.4bpw`, `1.2GB` (10^9 bytes), `900MiB` (2^20) or `25ms/token`.

        Raises: RequestError
        """
        found = _BUDGET.fullmatch(text.strip())
        amount = float(found[1]) if found else 0.0
        unit = found[2] if found else ""
        if not found or not 0 < amount < math.inf or (unit.endswith("B") and unit not in UNITS):
            raise RequestError("--budget", f"{text!r}: expected {EXPECTED}")
        if unit in UNITS:
            return cls("bytes", amount * UNITS[unit], text.strip())
        return cls("bpw" if unit == "bpw" else "ms", amount, text.strip())

    def show(self, amount: float) -> str:
        """An amount of the same kind, in the unit of this budget."""
        if self.kind == "bpw":
            return f"{amount:.3f}bpw"
        if self.kind == "ms":
            return f"{amount:.3f}ms/token"
        unit = _BUDGET.fullmatch(self.text)
        name = unit[2] if unit else "B"
        return f"{amount / UNITS[name]:.4g}{name}" if name != "B" else f"{amount:.0f}B"

    def require(self, least: float, most: float) -> None:
        """Refuses what no plan keeps, and what the highest precisions keep with room to spare. Raises: RequestError"""
        if self.amount < least or self.amount > most:
            beyond = "below what any plan needs" if self.amount < least else "above what the highest precisions need"
            raise RequestError(
                "--budget",
                f"{self.text} is {beyond}: expected {self.show(least)} to {self.show(most)}"
                + ("" if self.amount < least else ", or --bits with the highest precision and no plan"),
            )


@dataclass(frozen=True)
class Prices:
    """What each choice of each unit takes from a budget: `of` in bytes read, or in milliseconds.

    A sum of prices is `scale * sum + fixed` in the budget's own measure.
    """

    of: dict[str, dict[int, float]]
    scale: float
    fixed: float

    def limit(self, budget: Budget) -> float:
        """The most that prices may sum to; a hair more, so that a budget that is some plan's own size admits it."""
        return (budget.amount - self.fixed) / self.scale * (1 + 1e-12)

    def require(self, budget: Budget) -> None:
        """Refuses a budget out of range. Raises: RequestError"""
        least, most = (
            sum(pick(of.values()) for of in self.of.values()) * self.scale + self.fixed for pick in (min, max)
        )
        budget.require(least * (1 - 1e-12), most * (1 + 1e-12))


def price_bytes(overlay: Overlay, units: Sequence[Unit], kind: Kind) -> Prices:
    """For budgets of bits per weight (as `SizeReport` counts them) or of bytes (plain tensors included)."""
    sizes = overlay.sizes()
    of = {unit.name: {choice: float(unit.read_bytes(overlay, choice)) for choice in unit.choices} for unit in units}
    return Prices(of, 8 / sizes.parameters, 0.0) if kind == "bpw" else Prices(of, 1.0, float(sizes.plain_bytes))


def price_ms(units: Sequence[Unit], share: Mapping[str, float], table: Mapping[int, float]) -> Prices:
    """For budgets of time; choices that no uniform deployment has, and so none could measure, are left out."""
    of: dict[str, dict[int, float]] = {}
    for unit in units:
        if unit.name not in share:  # no choice: its time is in all of the table
            of[unit.name] = {unit.choices[0]: 0.0}
            continue
        found = {choice: deployment(unit, choice, tuple(table)) for choice in unit.choices}
        of[unit.name] = {c: share[unit.name] * table[bits] for c, bits in found.items() if bits is not None}
    return Prices(of, 1.0, 0.0)
