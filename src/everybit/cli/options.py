"""Option values that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from everybit.errors import PrecisionError

LOWEST_BITS, HIGHEST_BITS = 2, 8
_EXPECTED = "expected all, one number, a range or a list of them within 2..8, such as 3, 2-8 or 2,4,8"


def parse_bits(text: str, available: Sequence[int] | None = None) -> tuple[int, ...]:
    """The precisions that `all`, `3`, `2-8` or `2,4-6,8` name, ascending; `all` is `available`, or 2..8 without it.

    Raises: PrecisionError when the text names none, or one outside 2..8 or not in `available`
    """
    if text.strip() == "all":
        return tuple(sorted(available)) if available is not None else tuple(range(LOWEST_BITS, HIGHEST_BITS + 1))
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        ends = (low, high if dash else low)
        if not all(end.isascii() and end.isdigit() and len(end) <= 3 for end in ends):
            raise PrecisionError(f"cannot read bits from {text!r}; {_EXPECTED}")
        first, last = map(int, ends)
        if first < LOWEST_BITS or last > HIGHEST_BITS or first > last:
            raise PrecisionError(f"bits {text!r} are not within {LOWEST_BITS}..{HIGHEST_BITS}; {_EXPECTED}")
        found.update(range(first, last + 1))
    if available is not None and not found <= set(available):
        absent = format_bits(found - set(available))
        raise PrecisionError(f"{absent} bits are not in the overlay; expected a choice from {format_bits(available)}")
    return tuple(sorted(found))


def plan_file(text: str) -> Path | None:
    """The plan file that the value of a --bits option names; None where it names precisions."""
    return Path(text).expanduser() if text.endswith(".json") or "/" in text else None


def format_bits(bits: Iterable[int]) -> str:
    """The shortest text that `parse_bits` reads back: (2, 3, 4, 8) -> `2-4,8`."""
    runs: list[list[int]] = []
    for b in sorted(set(bits)):
        if runs and b == runs[-1][-1] + 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def processors(text: str) -> tuple[int, ...]:
    """An argparse type: processor numbers such as 0,2-3, in the order given."""
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        ends = (low, high if dash else low)
        if not all(end.isascii() and end.isdigit() and len(end) <= 5 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of processors such as 0,2-3")
        found.extend(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(found)


def add_machine_options(parser: argparse._ActionsContainer, mode: str, why: str) -> None:
    """The options that say how the engine uses this machine; `mode` is the default, and `why`."""
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads (default: one per processor this process may use)"
    )
    parser.add_argument(
        "--mode",
        choices=("exact", "default", "fast"),
        default=mode,
        help=f"arithmetic: exact (float weights and sums), default (rounded activations) or fast; {why}",
    )
