"""Option values: bits in every spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everybit.cli.options import format_bits, parse_bits
from everybit.errors import PrecisionError


@pytest.mark.parametrize(
    ("text", "bits"),
    [("all", (2, 3, 4, 5, 6, 7, 8)), ("3", (3,)), ("2-8", (2, 3, 4, 5, 6, 7, 8)), ("8,2, 4-5", (2, 4, 5, 8))],
)
def test_spellings(text: str, bits: tuple[int, ...]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "x", "2-", "-3", "2,,4", "3.5", "2-4-6", "٣", "99999999999999999999"])
def test_what_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(PrecisionError) as error:
        parse_bits(text)
    assert f"cannot read bits from {text!r}; expected all, one number" in str(error.value)


@pytest.mark.parametrize("text", ["1", "9", "0-8", "2-9", "4-2"])
def test_outside_the_range(text: str) -> None:
    with pytest.raises(PrecisionError, match=r"not within 2\.\.8"):
        parse_bits(text)


def test_bits_must_be_in_the_overlay() -> None:
    assert parse_bits("all", (2, 4)) == (2, 4)
    with pytest.raises(PrecisionError, match="3,5-6 bits are not in the overlay; expected a choice from 2,4"):
        parse_bits("2-6", (2, 4))


@given(st.sets(st.integers(2, 8), min_size=1))
def test_format_and_parse_are_inverse(bits: set[int]) -> None:
    assert parse_bits(format_bits(bits)) == tuple(sorted(bits))
