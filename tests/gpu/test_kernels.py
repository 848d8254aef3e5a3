"""The CUDA kernels against the reference, on a CPU that stands in for the GPU (emulate.h)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everybit.errors import PrecisionError
from everybit.formats.codebooks import CODEBOOKS
from everybit.gpu import reference
from everybit.gpu.compile import source
from everybit.gpu.layout import make_tables, tile_planes
from tests.gpu.emulator import mixture, times
from tests.gpu.weights import KINDS, arrays_of, planes_of

DTYPES = (torch.float16, torch.bfloat16)
# y is rounded to half a unit of its last place, sums are float32: relative to the norm 2^-11 (2^-8) / sqrt(3), twice.
LIMITS = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


def case(kind: str, rows: int, columns: int, tokens: int, dtype: torch.dtype):
    rng = np.random.default_rng([rows, columns, tokens, KINDS.index(kind)])
    codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
    x = torch.from_numpy(rng.normal(0, 1, (tokens, columns)).astype(np.float32)).to(dtype)
    return codes, arrays_of(kind, rows, rng), tile_planes(planes_of(codes), columns), x


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_reference_reads_the_weight_of_the_format(kind: str, bits: int) -> None:
    if kind == "table" and bits > 4:
        pytest.skip("free tables above 4 bits have no kernel, see test_free_tables_are_refused")
    codes, arrays, planes, _ = case(kind, 37, 300, 1, torch.float16)
    want = np.take_along_axis(CODEBOOKS[kind].expand(arrays, bits), (codes >> (8 - bits)).astype(np.int64), 1)
    for dtype, rounding in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        tables = make_tables(CODEBOOKS[kind], arrays, bits, dtype)
        got = reference.dense(planes, tables, bits, 37, 300, dtype)
        exact = kind == "compact" and bits <= 4
        # a number, its width and their sum are each rounded; no value is larger than twice the row's scale of two
        limit = 0 if exact else 3 * rounding * np.abs(want).max(axis=1, keepdims=True)
        assert (np.abs(got.numpy() - want) <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(16, 256, 1), (37, 300, 3), (52, 1100, 9)])
def test_gemv(kind: str, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    _, arrays, planes, x = case(kind, rows, columns, tokens, dtype)
    padded = torch.nn.functional.pad(x, (0, -columns % 256)).contiguous()
    for bits in range(2, 5 if kind == "table" else 9):
        tables = make_tables(CODEBOOKS[kind], arrays, bits, dtype)
        want = x.double() @ reference.dense(planes, tables, bits, rows, columns, dtype).double().T
        assert error(times(padded, planes, tables, bits, rows), want) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "tile", "block"),
    [(37, 304, 20, 32, 64), (150, 1104, 40, 32, 64), (200, 600, 70, 64, 64), (300, 256, 65, 64, 128)],
)
def test_gemm(rows: int, columns: int, tokens: int, tile: int, block: int, dtype: torch.dtype) -> None:
    _, arrays, planes, x = case("compact", rows, columns, tokens, dtype)
    for bits in (2, 3, 4, 5, 8):
        tables = make_tables(CODEBOOKS["compact"], arrays, bits, dtype)
        want = x.double() @ reference.dense(planes, tables, bits, rows, columns, dtype).double().T
        assert error(times(x, planes, tables, bits, rows, tile, block), want) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_at_its_own_precision(dtype: torch.dtype) -> None:
    _, arrays, planes, x = case("compact", 37, 512, 8, dtype)
    tables = {b: make_tables(CODEBOOKS["compact"], arrays, b, dtype) for b in range(2, 8)}
    chosen = torch.tensor([3, 2, 7, 3, 8, 5, 4, 6], dtype=torch.int32)
    y = mixture(x, planes, tables, chosen, 37)
    assert y[4].isnan().all()  # 8 bits are not there
    for token, bits in enumerate(chosen.tolist()):
        if bits in tables:
            weight = reference.dense(planes, tables[bits], bits, 37, 512, dtype).double()
            assert error(y[token], weight @ x[token].double()) < LIMITS[dtype]


def test_fewer_planes_are_read_for_fewer_bits() -> None:
    _, arrays, planes, x = case("compact", 16, 256, 1, torch.float16)
    tables = make_tables(CODEBOOKS["compact"], arrays, 3, torch.float16)
    assert torch.equal(times(x, planes, tables, 3, 16), times(x, planes[:3].contiguous(), tables, 3, 16))


def test_sixteen_tokens_of_mixed_precision() -> None:
    _, arrays, planes, x = case("compact", 37, 512, 13, torch.bfloat16)
    tables = {b: make_tables(CODEBOOKS["compact"], arrays, b, torch.bfloat16) for b in range(2, 9)}
    chosen = torch.arange(13, dtype=torch.int32) % 7 + 2
    y = mixture(x, planes, tables, chosen, 37)
    for token, bits in enumerate(chosen.tolist()):
        weight = reference.dense(planes, tables[bits], bits, 37, 512, torch.bfloat16).double()
        assert error(y[token], weight @ x[token].double()) < LIMITS[torch.bfloat16]


def test_free_tables_are_refused() -> None:
    with pytest.raises(PrecisionError, match="5 bits of a table codebook arrived, expected a grid above 4 bits"):
        make_tables(CODEBOOKS["table"], {"lut5": np.zeros((3, 32), np.float16)}, 5, torch.float16)


def test_source_is_one_text_without_includes() -> None:
    for name in ("gemv", "gemm", "mixed", "arrange"):
        text = source(name, {"tokens": 64, "bits": 3})
        assert "#include" not in text
        assert f" {name}(" in text
