"""The torch operators: on a CPU the reference with everything that torch asks of an operator, on a GPU the kernels."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from everybit.errors import PrecisionError, ShapeError
from everybit.formats import Overlay
from everybit.formats.codebooks import CODEBOOKS
from everybit.gpu import TiledWeight, reference
from everybit.gpu.layout import make_tables, tile_planes
from tests.gpu.weights import arrays_of, planes_of

LIMITS = {torch.float16: 6e-4, torch.bfloat16: 5e-3}  # as in test_kernels.py


def weight_of(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", kind: str = "compact") -> TiledWeight:
    rng = np.random.default_rng([rows, columns])
    planes = planes_of(rng.integers(0, 256, (rows, columns)).astype(np.uint8)).to(device)
    arrays, book = arrays_of(kind, rows, rng), CODEBOOKS[kind]
    tables = {b: make_tables(book, arrays, b, dtype).to(device) for b in range(2, 9)}
    return TiledWeight("w", tile_planes(planes, columns), tables, rows, columns)


def dense_of(weight: TiledWeight, bits: int, dtype: torch.dtype) -> torch.Tensor:
    return reference.dense(weight.planes, weight.tables[bits], bits, weight.rows, weight.columns, dtype)


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def test_torch_accepts_the_operators() -> None:
    weight, x = weight_of(20, 40, torch.float16), torch.randn(3, 40).half()
    tables = weight.tables[3]
    args = (x, weight.planes, tables.entries, tables.scales, 3, 20)
    torch.library.opcheck(torch.ops.everybit.times.default, args, test_utils=("test_schema", "test_faketensor"))
    chosen, every = torch.tensor([2, 8, 5], dtype=torch.int32), list(weight.tables.values())
    mixed = ([t.entries for t in every], [t.scales for t in every], list(range(2, 9)))
    args = (x, weight.planes, torch.zeros(9, 2, dtype=torch.int64), *mixed, chosen, 20)
    torch.library.opcheck(torch.ops.everybit.times_mixed.default, args, test_utils=("test_schema", "test_faketensor"))


def test_gradient_of_x_is_that_of_the_dense_weight() -> None:
    weight = weight_of(20, 40, torch.bfloat16)
    x = torch.randn(3, 40, dtype=torch.bfloat16, requires_grad=True)
    weight.times(x, 4).sum().backward()
    want = dense_of(weight, 4, torch.bfloat16).sum(0).expand(3, 40)
    assert x.grad is not None
    assert error(x.grad, want.double()) < LIMITS[torch.bfloat16]


def test_a_compiled_model_changes_precision_without_compiling_again() -> None:
    weight, x = weight_of(20, 40, torch.float16), torch.randn(2, 40).half()
    torch._dynamo.reset()
    compiled = torch.compile(weight.times_mixed, backend="aot_eager", fullgraph=True)
    first = compiled(x, torch.tensor([3, 4], dtype=torch.int32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = compiled(x, torch.tensor([8, 3], dtype=torch.int32))
    assert torch.equal(first[0], weight.times(x[:1], 3)[0])
    assert torch.equal(second[0], weight.times(x[:1], 8)[0])


def test_a_slice_that_begins_anywhere_is_taken() -> None:
    weight, x = weight_of(20, 100, torch.float16), torch.randn(5, 100).half()
    assert torch.equal(weight.times(x[1:], 3), weight.times(x, 3)[1:])


def test_a_copy_points_to_its_own_tables() -> None:
    weight = weight_of(20, 40, torch.float16)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert twin.pointers[3, 0] == twin.tables[3].entries.data_ptr() != weight.pointers[3, 0]
        assert torch.equal(twin.planes, weight.planes)


@pytest.mark.parametrize("name", ["overlay", "overlay-2", "overlay-3"])
def test_every_weight_of_the_golden_overlays(name: str) -> None:
    """Experts, weights with their own bits, every kind: against the reader's own tables and codes."""
    with Overlay.open(Path(__file__).parent.parent / "golden" / name) as overlay:
        for spec in overlay.weights.values():
            if spec.codebook == "table" and max(spec.bits) > 4:
                continue
            for expert in range(spec.shape[0]) if len(spec.shape) == 3 else [None]:
                weight = TiledWeight.of(overlay, spec.name, torch.float16, "cpu", expert)
                for bits in spec.bits:
                    codes = reference.untile(weight.planes[:bits])[: weight.rows, : weight.columns].numpy()
                    table = overlay.table(spec.name, bits)
                    if expert is not None:
                        table = table.reshape(spec.shape[0], spec.shape[1], -1)[expert]
                    want = np.take_along_axis(table.reshape(weight.rows, -1), codes, 1)
                    got = dense_of(weight, bits, torch.float16).numpy()
                    assert (np.abs(got - want) <= 3 * 2**-11 * np.abs(want).max(axis=1, keepdims=True)).all()


def test_leading_dimensions_are_kept() -> None:
    weight, x = weight_of(20, 40, torch.float16), torch.randn(2, 5, 40).half()
    assert torch.equal(weight.times(x, 3), torch.stack([weight.times(part, 3) for part in x]))


def test_bad_input_is_refused_in_one_line() -> None:
    weight, x = weight_of(20, 40, torch.float16), torch.randn(2, 40).half()
    with pytest.raises(PrecisionError, match="w has 2, 3, 4, 5, 6, 7, 8 bits, not 9"):
        weight.times(x, 9)
    for dtype, other in (
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ):
        made, wrong = weight_of(20, 40, dtype), torch.zeros(2, 40, dtype=other)
        for bits in range(2, 9):
            with pytest.raises(ShapeError, match=f"{other} activations arrived, expected {dtype}"):
                made.times(wrong, bits)
        with pytest.raises(ShapeError, match=f"{other} activations arrived, expected {dtype}"):
            made.times_mixed(wrong, torch.tensor([3, 4], dtype=torch.int32))
    for columns in (39, 41, 256):
        with pytest.raises(ShapeError, match=rf"x of shape \[1, {columns}\] arrived, expected \[\.\.\., 40\] for w"):
            weight.times(torch.zeros(1, columns).half(), 3)
    with pytest.raises(ShapeError, match="expected the bits of 2 tokens as int32"):
        weight.times_mixed(x, torch.tensor([3, 4]))
    tables = weight.tables[3]
    args = (weight.planes, tables.entries, tables.scales, 3, 20)
    with pytest.raises(ShapeError, match="expected contiguous"):
        torch.ops.everybit.times(torch.randn(40, 2).half().T, *args)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (300, 1096), (129, 517), (2200, 264)])
def test_on_a_gpu_every_precision_and_number_of_tokens(gpu: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = weight_of(rows, columns, dtype, gpu)
    for bits in range(2, 9):
        dense = dense_of(weight, bits, dtype).double()
        for tokens in (0, 1, 8, 9, 16, 17, 64, 65, 300):
            x = torch.randn(tokens, columns, device=gpu).to(dtype)
            y = weight.times(x, bits)
            assert y.shape == (tokens, rows)
            if tokens:
                assert error(y, x.double() @ dense.T) < LIMITS[dtype], (bits, tokens)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_on_a_gpu_one_graph_serves_every_precision(gpu: str, dtype: torch.dtype) -> None:
    weight = weight_of(700, 1300, dtype, gpu)
    x = torch.randn(5, 1300, device=gpu).to(dtype)
    chosen = torch.full((5,), 3, dtype=torch.int32, device=gpu)
    weight.times_mixed(x, chosen)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weight.times_mixed(x, chosen)
    for bits in ([2, 3, 4, 5, 6], [8, 8, 8, 8, 8], [7, 2, 2, 7, 9]):
        chosen.copy_(torch.tensor(bits, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for token, b in enumerate(bits):
            if b == 9:
                assert y[token].isnan().all()
            else:
                want = dense_of(weight, b, dtype).double() @ x[token].double()
                assert error(y[token], want) < LIMITS[dtype], (bits, token)
