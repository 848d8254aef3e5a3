"""Bit plans: a precision for each weight, chosen for a budget of bits per weight, bytes or milliseconds per token.

    found = allocate("overlay", "3.4bpw", text="calibration.txt")
    found.plan.save("overlay-3.4bpw.plan.json")
    runtime.prefill(0, tokens, bits=Plan.open("overlay-3.4bpw.plan.json", overlay))

Plans themselves, and the reader of their files, are in everybit.engine.plan: running one needs nothing from here.
"""

from __future__ import annotations

from everybit.allocate.budget import Budget
from everybit.allocate.choose import MAX_TOKENS, METHODS, Allocation, allocate, beside
from everybit.allocate.units import GROUPS

__all__ = ["GROUPS", "MAX_TOKENS", "METHODS", "Allocation", "Budget", "allocate", "beside"]
