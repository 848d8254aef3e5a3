"""Starting the CUDA kernels: which one, how many blocks, what it reads.

What runs fastest by shape was measured on an H200: benchmarks/gpu_linear.py, docs/log.md 2026-11-26.
"""

from __future__ import annotations

from functools import cache

import torch

from everybit.gpu.compile import HOPPER, Kernel, kernel
from everybit.gpu.layout import TILE_COLUMNS, TILE_ROWS, Tables

_FEW = 16  # tokens for gemv
FEW_AT_MOST = 64  # where rows are so few that gemm would leave most of the GPU idle
_ROWS_FOR_GEMM = 128  # row tiles from which on it does not
_CHUNK = 64  # columns of x in a stage of gemm
_STAGES_BYTES = 208 * 1024
_TABLE = 8192  # bytes in shared memory of a row tile's
_PITCH = 20  # in numbers, of a token's sums in gemv
_ALIGN, _RESERVED = 4096, 1024  # of shared memory: where tables begin, what CUDA has for itself before
_SMALL = (2, 4)  # depth and warps that fit the shared memory of every GPU (99 KB); those of mixed.cu
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


def times(x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int) -> torch.Tensor:
    """x W' by the kernel that suits the shape.

    Shapes: x [M, K] of F16 or BF16, contiguous, K a multiple of 8; planes u8[B, R, C, 32, 16] -> [M, rows]
    Needs:  a GPU of compute capability 8.0 or more
    """
    few = FEW_AT_MOST if planes.shape[1] < _ROWS_FOR_GEMM else _FEW
    if len(x) <= few:
        return gemv(whole_tiles(x), planes, tables, bits, rows)
    if torch.cuda.get_device_capability(x.device) == HOPPER:
        return gemm(x, planes, tables, bits, rows)
    x = whole_tiles(x)
    return torch.cat([gemv(part, planes, tables, bits, rows) for part in torch.split(x, FEW_AT_MOST)])


def whole_tiles(x: torch.Tensor) -> torch.Tensor:
    """x with columns of zeros up to whole column tiles. Shapes: [M, K] -> [M, 256C]"""
    more = -x.shape[1] % TILE_COLUMNS
    return torch.nn.functional.pad(x, (0, more)) if more else x


def gemv(x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, *how: int) -> torch.Tensor:
    """A few tokens: planes are read once, decoded in registers and multiplied by the tensor cores.

    `how`: tiles of planes under way for each warp, blocks on a multiprocessor, warps of a block.
    Shapes: x [M, 256C] of F16 or BF16, M <= 64; planes u8[B, R, C, 32, 16] -> [M, rows]
    """
    device, row_tiles = x.device.index, planes.shape[1]
    tiles = _token_tiles(len(x))
    depth, blocks, warps = how or _best_gemv(bits, tiles, row_tiles, device)
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)
    if not how and _gemv_shared(bits, tables.as_bytes, tiles, depth, warps) > most:
        (depth, warps), blocks = _SMALL, 1
    shared = _gemv_shared(bits, tables.as_bytes, tiles, depth, warps)
    constants = {"bits": bits, "tiles": tiles, "depth": depth, "blocks": blocks, "warps": warps}
    run = kernel("gemv", device, shared, **constants, **_variant(x, tables.as_bytes))
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    run(_persistent(run, row_tiles, 32 * warps, device), 32 * warps, *_weight(planes, tables, rows), *_in_out(x, y))
    return y


def mixed(
    x: torch.Tensor, planes: torch.Tensor, pointers: torch.Tensor, as_bytes: bool, chosen: torch.Tensor, rows: int
) -> torch.Tensor:
    """As `gemv`, every token at the precision that `chosen` has for it on the device.

    Shapes: x [M, 256C], M <= 64; pointers i64[9, 2], by bits, of a precision's entries and scales, 0 where there is
    none; chosen i32[M] -> [M, rows], NaN where there is none
    """
    device, (depth, warps) = x.device.index, _SMALL
    tiles = _token_tiles(len(x))
    run = kernel("mixed", device, _gemv_shared(8, False, tiles, depth, warps), tiles=tiles, **_variant(x, as_bytes))
    y = torch.full((len(x), rows), float("nan"), dtype=x.dtype, device=x.device)
    weight = (planes, pointers, rows, planes.shape[1], planes.shape[2])
    run(_persistent(run, planes.shape[1], 32 * warps, device), 32 * warps, *weight, *_in_out(x, y), chosen)
    return y


def gemm(x: torch.Tensor, planes: torch.Tensor, tables: Tables, bits: int, rows: int, *how: int) -> torch.Tensor:
    """Many tokens, on a GPU of compute capability 9.0: codes become tensor-core operands in registers.

    `how`: tokens of a block (32, 64, 128, 256), its rows (64, 128), its groups of 128 threads that multiply.
    Shapes: x [M, K] of F16 or BF16, K a multiple of 8; planes u8[B, R, C, 32, 16] -> [M, rows]
    """
    (tokens, columns), device = x.shape, x.device.index
    tile, block, groups = how or _best_gemm(tokens, rows, device)
    stage, tables_bytes = tile * _CHUNK * 2, 0 if tables.as_bytes else block // TILE_ROWS * _TABLE
    stages = min(12, (_STAGES_BYTES - tables_bytes) // stage)
    shared = _ALIGN + tables_bytes + stages * (stage + 16) + 1024
    constants = {"bits": bits, "tokens": tile, "rows": block, "groups": groups, "stages": stages}
    chunks, token_tiles = planes.shape[2] * (TILE_COLUMNS // _CHUNK), -(-tokens // tile)
    images = torch.empty(token_tiles * chunks * tile * _CHUNK, dtype=x.dtype, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    arrange = kernel("arrange", device, tokens=tile)
    arrange((token_tiles * tile // 4, -(-chunks * 2 // 64)), 256, x, x.stride(0), tokens, columns, chunks, images)
    run = kernel("gemm", device, shared, **constants, **_variant(x, tables.as_bytes))
    run((-(-rows // block), token_tiles), 128 * groups + 128, *_weight(planes, tables, rows), images, y, tokens)
    return y


def _best_gemv(bits: int, tiles: int, row_tiles: int, device: int) -> tuple[int, int, int]:
    if tiles > 2:  # sums fill the registers
        return 2, 1, 8
    each = row_tiles / _multiprocessors(device)
    if each <= 2:
        return (2 if bits == 8 else 3, 2, 8)
    if each <= 3:
        return (2, 3, 8) if bits <= 5 else (3, 4, 4)
    return (2, 4, 4) if bits <= 5 else (2, 2, 8)


def _best_gemm(tokens: int, rows: int, device: int) -> tuple[int, int, int]:
    tile = next((tile for tile in (32, 64, 128) if tokens <= tile), 256)
    blocks = -(-rows // 128) * -(-tokens // tile)
    return tile, 128 if blocks >= 0.9 * _multiprocessors(device) else 64, 2


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _token_tiles(tokens: int) -> int:
    """Of 8 tokens, a power of two."""
    return 1 << max(0, (tokens - 1).bit_length() - 3)


def _gemv_shared(bits: int, as_bytes: bool, tiles: int, depth: int, warps: int) -> int:
    tables = 2 * (16 if as_bytes else _TABLE)
    return _ALIGN - _RESERVED + tables + 2 * warps * tiles * 8 * _PITCH * 4 + depth * bits * warps * 512


def _persistent(run: Kernel, row_tiles: int, threads: int, device: int) -> tuple[int, int]:
    """As many blocks as the GPU holds at once, which then go from row tile to row tile."""
    return min(row_tiles, run.blocks_at_once(threads) * _multiprocessors(device)), 1


def _variant(x: torch.Tensor, as_bytes: bool) -> dict[str, str]:
    return {"type": _TYPES[x.dtype], "bytes": "true" if as_bytes else "false"}


def _weight(planes: torch.Tensor, tables: Tables, rows: int) -> tuple[torch.Tensor | int, ...]:
    return planes, tables.entries, tables.scales, rows, planes.shape[1], planes.shape[2]


def _in_out(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    return x, x.stride(0), y, len(x)
