"""Native plane kernels = numpy reference, byte for byte, over bits x remainders x rows x threads."""

from __future__ import annotations

import numpy as np
import pytest

from everybit import kernels
from everybit.kernels import reference

# 2000 takes the pair table up to 4 bits (4 * 4^bits <= K), the others every remainder of 8.
COLUMNS = [1, 2, 3, 7, 8, 9, 31, 105, 172, 352, 2000, 2003]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 3])
def test_planes_match_the_reference(bits: int, columns: int, rows: int) -> None:
    rng = np.random.default_rng(1000 * bits + columns)
    codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
    table = rng.standard_normal((rows, 2**bits)).astype(np.float32)
    packed = reference.pack_planes(codes, bits)
    for threads in (1, 2, 3, 4):
        assert (kernels.pack_planes(codes, bits, threads) == packed).all()
        assert (kernels.unpack_codes(packed, columns, threads) == reference.unpack_codes(packed, columns)).all()
        values = kernels.dequantize(list(packed), table, columns, threads)
        assert (values == reference.dequantize(packed, table, columns)).all()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_many_chunks_of_rows(threads: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (500, 1001), np.uint8)  # 66 rows a chunk
    packed = kernels.pack_planes(codes, 4, threads)
    assert (packed == reference.pack_planes(codes, 4)).all()
    assert (kernels.unpack_codes(packed, 1001, threads) == codes).all()
