"""Starting the CUDA kernels: which one, how many blocks, what it reads."""

from __future__ import annotations

import torch

from everybit.gpu.compile import kernel
from everybit.gpu.layout import TILE_COLUMNS, Tables

MOST_FEW = 64  # tokens that gemv takes at once
WARPS = 8  # of a gemv block
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


def gemv(
    x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, warps: int = WARPS
) -> torch.Tensor:
    """A few tokens: planes are read once, decoded in registers and multiplied by the tensor cores.

    Shapes: x [M, 256C] of F16 or BF16, M <= 64; planes u8[B, R, C, 32, 16] -> [M, rows]
    Needs:  a GPU of compute capability 8.0 or more; every stride of x a multiple of 8
    """
    tokens = len(x)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    tiles = 1 << max(0, (tokens - 1).bit_length() - 3)
    run = kernel(
        "gemv", x.device.index, type=_TYPES[x.dtype], bits=bits, int8=_flag(tables), tiles=tiles, warps=warps
    )
    args = [*_weight(planes, tables, rows), x, x.stride(0), y, tokens]
    run(grid=(planes.shape[1], 1, 1), block=(32 * warps, 1, 1), args=args)
    return y


def gemm(
    x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, tile: int = 0, stages: int = 0
) -> torch.Tensor:
    """Many tokens, on a GPU of compute capability 9.0: codes become tensor-core operands in registers.

    Shapes: x [M, K] of F16 or BF16, K a multiple of 8; planes u8[B, R, C, 32, 16] -> [M, rows]
    """
    tokens, columns = x.shape
    tile = tile or 128
    stages = stages or (5 if tile == 256 else 8)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    chunks, token_tiles = planes.shape[2] * (TILE_COLUMNS // 64), -(-tokens // tile)
    images = torch.empty(token_tiles * chunks * tile * 64, dtype=x.dtype, device=x.device)
    constants = {"type": _TYPES[x.dtype], "bits": bits, "int8": _flag(tables), "tokens": tile, "stages": stages}
    arrange = kernel("arrange", x.device.index, tokens=tile)
    run = kernel("gemm", x.device.index, **constants)
    shared = stages * tile * 128 + stages * 16 + 2048
    run.set_shared_memory_config(shared)
    arrange(
        grid=(-(-chunks * 2 // 64), token_tiles * tile // 4, 1),
        block=(256, 1, 1),
        args=[x, x.stride(0), tokens, columns, chunks, images],
    )
    args = [*_weight(planes, tables, rows), images, y, tokens]
    run(grid=(-(-planes.shape[1] // 8), token_tiles, 1), block=(384, 1, 1), args=args, shared_mem=shared)
    return y


def _flag(tables: Tables) -> str:
    return "true" if tables.int8 else "false"


def _weight(planes: torch.Tensor, tables: Tables, rows: int) -> list[torch.Tensor | int]:
    return [planes, tables.tables, tables.steps, tables.scales, rows, planes.shape[1], planes.shape[2]]
