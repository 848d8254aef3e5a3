"""How long a request takes with the machine to itself: idealised runtime (Narayanan et al., 2023, arXiv 2305.02440).

Fitted to requests made one at a time. The first token takes a + b·prompt (+ c·prompt² where that clearly fits better),
each later one d (+ e·context, likewise). Measured over idealised time says how much waiting and sharing cost; the first
token's prediction also serves as its deadline.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from everybit.bench.records import Record
from everybit.errors import SourceError

_LEAST = 3  # requests of one length: a median of fewer is no defence against one slow request
_WIDTH = 1.1  # lengths within 10 % are one length
_GAIN = 0.01  # a further term must halve the relative error, and lower it by this


@dataclass(frozen=True)
class Ideal:
    """Nanoseconds. `first_error`, `gap_error`: root mean square of the fit's relative errors.

    `shortest`, `longest`: prompts that were measured, in tokens; what lies outside is extrapolated.
    """

    first_base_ns: float
    first_token_ns: float
    first_square_ns: float
    gap_base_ns: float
    gap_context_ns: float
    first_error: float
    gap_error: float
    shortest: int
    longest: int
    requests: int

    def first_ns(self, prompt_tokens: int) -> int:
        """From send to first token."""
        return round(self.first_base_ns + self.first_token_ns * prompt_tokens + self.first_square_ns * prompt_tokens**2)

    def end_ns(self, prompt_tokens: int, output_tokens: int) -> int:
        """From send to last token: the i-th of the later ones has prompt + i tokens before it."""
        later = output_tokens - 1
        contexts = later * prompt_tokens + later * output_tokens / 2
        return self.first_ns(prompt_tokens) + round(later * self.gap_base_ns + contexts * self.gap_context_ns)

    def covers(self, prompt_tokens: int) -> bool:
        return self.shortest <= prompt_tokens <= self.longest

    def document(self) -> dict[str, float | int]:
        return asdict(self)


def fit(records: Sequence[Record]) -> Ideal:
    """From requests made one at a time on an idle endpoint, at several prompt lengths. Raises: SourceError"""
    firsts: list[tuple[float, float]] = []
    gaps: list[tuple[float, float]] = []
    for record in records:
        prompt, came, sent = record.usage_prompt, record.first_ns, record.sent_ns
        if not record.complete or not record.streamed or record.stalled or not prompt or came is None or sent is None:
            continue
        firsts.append((prompt, came - sent))
        if len(record.times_ns) > 1:
            tokens = record.output_tokens
            gaps.append((prompt + tokens / 2, (record.times_ns[-1] - came) / (tokens - 1)))
    first_points, gap_points = _medians(firsts), _medians(gaps)
    if len(first_points) < 2 or not gap_points:
        raise SourceError(
            f"an ideal cannot be fitted to {len(records)} requests, {len(firsts)} of them streamed with usage: expected"
            f" {_LEAST} or more, of several tokens each, at 2 or more prompt lengths 10 % apart"
        )
    first, first_error = _best(first_points, (0, 1), (0, 1, 2))
    gap, gap_error = _best(gap_points, (0,), (0, 1))
    lengths = [int(length) for length, _ in firsts]
    return Ideal(
        first_base_ns=first[0],
        first_token_ns=first[1],
        first_square_ns=first[2],
        gap_base_ns=gap[0],
        gap_context_ns=gap[1],
        first_error=first_error,
        gap_error=gap_error,
        shortest=min(lengths),
        longest=max(lengths),
        requests=len(firsts),
    )


def read_ideal(path: Path) -> Ideal:
    """What `Ideal.document` gave, as JSON. Raises: SourceError"""
    try:
        return parse_ideal(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, SourceError) as error:
        raise SourceError(f"{path}: not an ideal that everybit bench wrote ({error})") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None


def parse_ideal(document: Any) -> Ideal:
    """Raises: SourceError"""
    names = {one.name for one in fields(Ideal)}
    if not isinstance(document, dict) or set(document) != names:
        raise SourceError(f"expected an object of {', '.join(sorted(names))}")
    for name, value in document.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise SourceError(f"{name} is {value!r}: expected a number, 0 or more")
    return Ideal(**document)


def _medians(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of nearly one length as one, by medians; too few of a length are left out."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(one for one in points if one[1] > 0):  # errors are relative
        if not groups or point[0] > groups[-1][0][0] * _WIDTH:
            groups.append([])
        groups[-1].append(point)
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups if len(group) >= _LEAST]


def _best(
    points: list[tuple[float, float]], simple: tuple[int, ...], rich: tuple[int, ...]
) -> tuple[list[float], float]:
    """Coefficients of x^0, x^1, x^2 and the relative error, with the powers `rich` where they clearly fit better."""
    plain = _least_squares(points, simple)
    if len(points) < len(rich) + 1:  # a curve through every point proves nothing
        return plain
    full = _least_squares(points, rich)
    return full if full[1] < plain[1] / 2 and full[1] < plain[1] - _GAIN else plain


def _least_squares(points: list[tuple[float, float]], powers: tuple[int, ...]) -> tuple[list[float], float]:
    """Non-negative coefficients with the least relative errors.

    At the optimum those that are not zero solve the unconstrained problem of their own columns (Lawson and Hanson,
    1974, chapter 23); with three columns all subsets can be tried.
    """
    scale = max(x for x, _ in points)
    best, best_error = [0.0] * 3, 1.0  # all zero: wrong by all of it
    for count in range(1, len(powers) + 1):
        for subset in itertools.combinations(powers, count):
            rows = [[(x / scale) ** power / y for power in subset] for x, y in points]
            solved = _solve(rows)
            if solved is None or min(solved) < 0:
                continue
            errors = [sum(c * a for c, a in zip(solved, row, strict=True)) - 1 for row in rows]
            error = math.sqrt(sum(e * e for e in errors) / len(errors))
            if error < best_error:
                best, best_error = [0.0] * 3, error
                for power, value in zip(subset, solved, strict=True):
                    best[power] = value / scale**power
    return best, best_error


def _solve(rows: list[list[float]]) -> list[float] | None:
    """The least squares solution of rows · c = 1, by the normal equations; None where they are singular."""
    n = len(rows[0])
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(n)] + [sum(row[i] for row in rows)] for i in range(n)
    ]
    whole = [matrix[i][i] for i in range(n)]
    for i in range(n):
        if matrix[i][i] <= 1e-12 * whole[i]:
            return None
        for j in range(n):
            if j != i:
                factor = matrix[j][i] / matrix[i][i]
                matrix[j] = [a - factor * b for a, b in zip(matrix[j], matrix[i], strict=True)]
    return [matrix[i][n] / matrix[i][i] for i in range(n)]
