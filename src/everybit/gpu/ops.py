"""The kernels as torch operators: with fake implementations for torch.compile, a CPU path, and `times` a gradient.

`everybit::times` has its bits as a number of the call; `everybit::times_mixed` reads them from the device, token by
token, so that one captured graph serves every precision. On a CPU both are the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from everybit.errors import ShapeError
from everybit.gpu import launch, reference
from everybit.gpu.layout import TILE_COLUMNS, Tables


@torch.library.custom_op("everybit::times", mutates_args=())
def times(
    x: torch.Tensor,
    planes: torch.Tensor,
    entries: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    rows: int,
) -> torch.Tensor:
    """x W' at `bits`.

    Shapes: x [M, K] F16 or BF16 contiguous; planes u8[B, R, C, 32, 16]; entries, scales as in `Tables` -> [M, rows]
    Raises: ShapeError
    """
    tables = Tables(entries, scales)
    _check(x, planes, tables, bits)
    if x.is_cuda:
        return launch.times(_in_eights(x), planes, tables, bits, rows) if len(x) else x.new_empty(0, rows)
    return _dense_times(x, reference.dense(planes, tables, bits, rows, x.shape[1], x.dtype))


@times.register_fake
def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Of both operators: `rows` is their last argument."""
    return x.new_empty(x.shape[0], rest[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, planes, entries, scales, bits, rows = inputs
    ctx.save_for_backward(planes, entries, scales)
    ctx.rest = bits, rows, x.shape[1], x.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    planes, entries, scales = ctx.saved_tensors
    bits, rows, columns, dtype = ctx.rest
    weight = reference.dense(planes, Tables(entries, scales), bits, rows, columns, dtype)
    return (gradient.float() @ weight).to(dtype), None, None, None, None, None


times.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("everybit::times_mixed", mutates_args=())
def times_mixed(
    x: torch.Tensor,
    planes: torch.Tensor,
    pointers: torch.Tensor,
    entries: list[torch.Tensor],
    scales: list[torch.Tensor],
    bits: list[int],
    chosen: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """x W', each token at the precision that `chosen` names; NaN where that is none of `bits`.

    Shapes: x [M, K], M <= 64 on a GPU; pointers i64[9, 2] as in `launch.mixed`; of entries and scales one for each of
    bits, ascending; chosen i32[M] -> [M, rows]
    Raises: ShapeError
    """
    tables = [Tables(*pair) for pair in zip(entries, scales, strict=True)]
    for b, one in zip(bits, tables, strict=True):
        _check(x, planes, one, b, chosen, pointers)
    if chosen.dtype != torch.int32 or chosen.shape != x.shape[:1] or not chosen.is_contiguous():
        raise ShapeError(f"{chosen.dtype} {list(chosen.shape)} arrived, expected the bits of {len(x)} tokens as int32")
    if x.is_cuda:
        if len(x) > launch.FEW_AT_MOST:
            raise ShapeError(
                f"{len(x)} tokens of mixed precision arrived, expected at most {launch.FEW_AT_MOST}: split them"
            )
        return launch.mixed(launch.whole_tiles(_in_eights(x)), planes, pointers, tables[0].as_bytes, chosen, rows)
    y = torch.full((len(x), rows), float("nan"), dtype=x.dtype)
    for b, one in zip(bits, tables, strict=True):
        here = chosen == b
        y[here] = _dense_times(x[here], reference.dense(planes, one, b, rows, x.shape[1], x.dtype))
    return y


times_mixed.register_fake(_fake)


def _dense_times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.T).to(x.dtype)


def _in_eights(x: torch.Tensor) -> torch.Tensor:
    """Rows of whole 16-byte units from a multiple of 16 bytes on, as the kernels load them."""
    if x.shape[1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return x.clone() if x.data_ptr() % 16 else x


def _check(x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, *others: torch.Tensor) -> None:
    columns = planes.shape[2] * TILE_COLUMNS if planes.ndim == 5 else 0
    if x.ndim != 2 or not x.is_contiguous():
        raise ShapeError(
            f"x arrived as {list(x.shape)} with strides {list(x.stride())}, expected contiguous [M, K]: call "
            ".contiguous()"
        )
    if x.dtype != tables.dtype:
        raise ShapeError(f"{x.dtype} activations arrived, expected {tables.dtype}: make the weight for the other dtype")
    if not columns - TILE_COLUMNS < x.shape[1] <= columns or bits > len(planes):
        raise ShapeError(
            f"x [M, {x.shape[1]}] at {bits} bits arrived, expected up to {columns} columns and {len(planes)} planes: "
            "pass the activations of this weight"
        )
    if len({t.device for t in (x, planes, tables.entries, tables.scales, *others)}) > 1:
        raise ShapeError(f"x is on {x.device}, not all of the weight and of the bits are: move them there")
