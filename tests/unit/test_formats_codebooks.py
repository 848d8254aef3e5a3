"""Codebook kinds: hand-computed values, and the plane-linear reading equal to the expanded one."""

from __future__ import annotations

import numpy as np
import pytest

from everybit.errors import ShapeError
from everybit.formats import ALL_BITS, CODEBOOKS, WeightSpec


def test_registry_names_each_kind_once() -> None:
    assert {kind: book.kind for kind, book in CODEBOOKS.items()} == {"table": "table", "affine": "affine"}
    assert len({book.suffix for book in CODEBOOKS.values()}) == len(CODEBOOKS)


def test_table_is_the_stored_numbers() -> None:
    lut = np.array([[-1.5, 0.0, 0.25, 7.0]], np.float16)
    values = CODEBOOKS["table"].expand(lut, 2)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-1.5, 0.0, 0.25, 7.0]])


def test_affine_is_offset_plus_scale_times_code() -> None:
    stored = np.array([[0.5, -1.0], [2.0, 10.0]], np.float32)
    np.testing.assert_array_equal(
        CODEBOOKS["affine"].expand(stored, 2), [[-1.0, -0.5, 0.0, 0.5], [10.0, 12.0, 14.0, 16.0]]
    )


def test_affine_coefficients_by_hand() -> None:
    # scale 0.5, offset -1, 3 bits: planes weigh 4, 2, 1 codes; a sign moves half of each; the middle is -1 + 0.5 * 3.5
    alpha, constant = CODEBOOKS["affine"].coefficients(np.array([[0.5, -1.0]], np.float32), 3)
    np.testing.assert_array_equal(alpha, [[1.0, 0.5, 0.25]])
    np.testing.assert_array_equal(constant, [0.75])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_plane_linear_reading_equals_the_expanded_table(bits: int) -> None:
    rng = np.random.default_rng(bits)
    stored = rng.normal(size=(5, 2)).astype(np.float32)
    book = CODEBOOKS["affine"]
    alpha, constant = book.coefficients(stored, bits)
    assert (alpha.dtype, alpha.shape, constant.dtype, constant.shape) == (np.float32, (5, bits), np.float32, (5,))
    codes = np.arange(1 << bits)
    signs = np.stack([np.where(codes >> (bits - 1 - plane) & 1, 1.0, -1.0) for plane in range(bits)])
    linear = constant[:, None].astype(np.float64) + alpha.astype(np.float64) @ signs
    # expand() rounds twice, constant once: at most 3 half-ulps of the largest magnitude in the row.
    largest = np.abs(stored[:, :1]) * (1 << bits) + np.abs(stored[:, 1:])
    assert np.all(np.abs(linear - book.expand(stored, bits)) <= 1.5 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_experts_become_rows(kind: str) -> None:
    book = CODEBOOKS[kind]
    spec = WeightSpec("w", (2, 3, 16), codebook=kind)
    stored = np.arange(np.prod(book.tensor_shape(spec, 2)), dtype=np.float32).reshape(book.tensor_shape(spec, 2))
    assert book.expand(stored, 2).shape == (6, 4)
    np.testing.assert_array_equal(book.expand(stored, 2)[3], book.expand(stored[1], 2)[0])


def test_table_has_no_plane_linear_form() -> None:
    assert not CODEBOOKS["table"].plane_linear
    with pytest.raises(ShapeError, match="a table codebook has no plane-linear form"):
        CODEBOOKS["table"].coefficients(np.zeros((1, 4), np.float32), 2)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"3-bit table codebook of shape \[1, 4\] arrived, expected \[N, 8\]"):
        CODEBOOKS["table"].expand(np.zeros((1, 4), np.float32), 3)
    with pytest.raises(ShapeError, match=r"of shape \[4\] arrived"):
        CODEBOOKS["affine"].expand(np.zeros(4, np.float32), 3)
