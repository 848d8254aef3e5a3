"""Starting the CUDA kernels: which one, how many blocks, what it reads."""

from __future__ import annotations

import torch

from everybit.gpu.compile import kernel
from everybit.gpu.layout import TILE_COLUMNS, TILE_ROWS, Tables

MOST_FEW = 16  # tokens that gemv takes at once
_PITCH = 20  # in numbers, of a token's sums in gemv
_CHUNK = 64  # columns of x in a stage
_TABLE = 8192  # bytes in shared memory of a row tile's
_ALIGN, _RESERVED = 4096, 1024  # of shared memory: where tables begin, what CUDA has for itself before
_DEPTHS = {1: (6, 3), 2: (6, 3), 3: (4, 3), 4: (2, 3), 5: (2, 3), 6: (3, 2), 7: (3, 2), 8: (2, 2)}
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


def gemv(
    x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, *how: int
) -> torch.Tensor:
    """A few tokens: planes are read once, decoded in registers and multiplied by the tensor cores.

    `how`: tiles of planes under way for each warp, blocks on a multiprocessor, warps of a block; else what measured best.
    Shapes: x [M, 256C] of F16 or BF16, M <= 16; planes u8[B, R, C, 32, 16] -> [M, rows]
    Needs:  a GPU of compute capability 8.0 or more; every stride of x a multiple of 8
    """
    tokens, device = len(x), x.device.index
    tiles = 1 if tokens <= 8 else 2
    depth, blocks, warps = how or (*_DEPTHS[bits], 8)
    constants = {"bits": bits, "tiles": tiles, "depth": depth, "blocks": blocks, "warps": warps, **_variant(x, tables)}
    tables_bytes = 2 * (16 if tables.as_bytes else _TABLE)
    sums_bytes = 2 * warps * tiles * 8 * _PITCH * 4
    shared = _ALIGN - _RESERVED + tables_bytes + sums_bytes + depth * bits * warps * 512
    run = kernel("gemv", device, shared, **constants)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    most = run.blocks_at_once(32 * warps) * torch.cuda.get_device_properties(device).multi_processor_count
    grid = (min(planes.shape[1], most), 1)
    run(grid, 32 * warps, *_weight(planes, tables, rows), x, x.stride(0), y, tokens)
    return y


def gemm(
    x: torch.Tensor,
    planes: torch.Tensor,
    tables: Tables,
    bits: int,
    rows: int,
    tile: int = 128,
    block: int = 128,
    groups: int = 2,
) -> torch.Tensor:
    """Many tokens, on a GPU of compute capability 9.0: codes become tensor-core operands in registers.

    A block takes `tile` tokens (32, 64, 128, 256) and `block` rows (64, 128), and has `groups` groups of 128 threads.
    Shapes: x [M, K] of F16 or BF16, K a multiple of 8; planes u8[B, R, C, 32, 16] -> [M, rows]
    """
    (tokens, columns), device = x.shape, x.device.index
    stage, tables_bytes = tile * _CHUNK * 2, 0 if tables.as_bytes else block // TILE_ROWS * _TABLE
    stages = min(12, (208 * 1024 - tables_bytes) // stage)
    shared = _ALIGN + tables_bytes + stages * (stage + 16) + 2048
    constants = {"bits": bits, "tokens": tile, "rows": block, "groups": groups, "stages": stages, **_variant(x, tables)}
    chunks, token_tiles = planes.shape[2] * (TILE_COLUMNS // _CHUNK), -(-tokens // tile)
    images = torch.empty(token_tiles * chunks * tile * _CHUNK, dtype=x.dtype, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    arrange = kernel("arrange", device, tokens=tile)
    arrange((-(-chunks * 2 // 64), token_tiles * tile // 4), 256, x, x.stride(0), tokens, columns, chunks, images)
    run = kernel("gemm", device, shared, **constants)
    run((-(-rows // block), token_tiles), 128 * groups + 128, *_weight(planes, tables, rows), images, y, tokens)
    return y


def _variant(x: torch.Tensor, tables: Tables) -> dict[str, str]:
    return {"type": _TYPES[x.dtype], "bytes": "true" if tables.as_bytes else "false"}


def _weight(planes: torch.Tensor, tables: Tables, rows: int) -> tuple[torch.Tensor | int, ...]:
    return planes, tables.entries, tables.scales, rows, planes.shape[1], planes.shape[2]
