"""Solvers: one weight matrix and its sensitivities -> nested codes and a codebook per precision (no torch)."""

from everybit.quantize.solvers.solve import KINDS, Solution, codebook_kind, solve

__all__ = ["KINDS", "Solution", "codebook_kind", "solve"]
