"""ggml's K-quants: superblocks of 256 weights, whose blocks have scales that are integers times one float16.

    Q2_K, Q4_K, Q5_K   value = d * scale * code - dmin * offset
    Q3_K, Q6_K         value = d * scale * (code - half the codes)

Source: the layouts are those of ggml (ggml-common.h), as gguf.quants reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.integrations.gguf.fit import F32, REFINEMENTS, fit_offset, fit_scale

U8 = NDArray[np.uint8]
I16 = NDArray[np.int16]
F16 = NDArray[np.float16]
SUPERBLOCK = 256
_CHUNK = 512  # superblocks worked on at a time: the arrays of a search stay in the processor's cache


@dataclass(frozen=True)
class Kind:
    """`block` weights share a scale of `scale_bits`; a code has `bits`; `offset`: whether blocks have one."""

    block: int
    bits: int
    scale_bits: int
    offset: bool


KINDS = {
    "Q2_K": Kind(16, 2, 4, True),
    "Q3_K": Kind(16, 3, 6, False),
    "Q4_K": Kind(32, 4, 6, True),
    "Q5_K": Kind(32, 5, 6, True),
    "Q6_K": Kind(16, 6, 8, False),
}


@dataclass(frozen=True)
class Superblocks:
    """Shapes: codes u8[M, 256]; scales and offsets, i16[M, 256 / block]; d and dmin f16[M, 1].

    Without offsets these are zero, and the codes count from half their number.
    """

    kind: Kind
    codes: U8
    scales: I16
    offsets: I16
    d: F16
    dmin: F16

    def values(self) -> F32:
        """What a reader makes of it. Shapes: -> f32[M, 256]"""
        codes = self.codes.reshape(len(self.codes), -1, self.kind.block).astype(np.float32)
        scales, offsets = _times(self.d, self.scales), _times(self.dmin, self.offsets)
        if not self.kind.offset:
            codes -= 1 << (self.kind.bits - 1)
        return (scales[:, :, None] * codes - offsets[:, :, None]).reshape(len(codes), SUPERBLOCK)


def quantize(name: str, weights: F32) -> U8:
    """The bytes of a matrix in one of KINDS.

    Shapes: f32[N, K] -> u8[N, bytes]; 256 divides K
    """
    rows = weights.reshape(-1, SUPERBLOCK)
    parts = [pack(name, fit(name, rows[i : i + _CHUNK])) for i in range(0, len(rows), _CHUNK)]
    return np.concatenate(parts).reshape(len(weights), -1)


def fit(name: str, weights: F32) -> Superblocks:
    """Superblocks of small weighted error. Shapes: f32[M, 256]"""
    kind = KINDS[name]
    blocks = weights.reshape(-1, kind.block)
    highest = (1 << kind.scale_bits) - 1
    if kind.offset:
        importance = _by_size(blocks) if kind.bits == 2 else _by_size_and_spread(blocks)
        found, wanted = fit_offset(blocks, kind.bits, importance)
        scales, d = _integers(found.reshape(len(weights), -1), 0, highest)
        offsets, dmin = _integers(wanted.reshape(len(weights), -1), 0, highest)
    else:
        importance, half = blocks * blocks, highest // 2 + 1
        scales, d = _integers(fit_scale(blocks, kind.bits).reshape(len(weights), -1), -half, half - 1)
        offsets, dmin = np.zeros_like(scales), np.zeros_like(d)
    importance = importance.reshape(weights.shape)
    best = _encode(kind, weights, scales, offsets, d, dmin)
    least = _error(best, weights, importance)
    for _ in range(REFINEMENTS):
        tried = _encode(kind, weights, scales, offsets, *_solve_units(best, weights, importance))
        error = _error(tried, weights, importance)
        better = (error < least)[:, None]
        least = np.minimum(error, least)
        codes = np.where(better, tried.codes, best.codes)
        d, dmin = np.where(better, tried.d, best.d), np.where(better, tried.dmin, best.dmin)
        best = Superblocks(kind, codes, scales, offsets, d, dmin)
    return best


def _encode(kind: Kind, weights: F32, scales: I16, offsets: I16, d: F16, dmin: F16) -> Superblocks:
    """The nearest codes."""
    lowest = 0 if kind.offset else -(1 << (kind.bits - 1))
    steps, shifts = (np.repeat(_times(*one), kind.block, 1) for one in ((d, scales), (dmin, offsets)))
    quotients = np.divide(weights + shifts, steps, out=np.zeros_like(weights), where=steps != 0)
    codes = np.clip(np.rint(quotients), lowest, lowest + (1 << kind.bits) - 1) - lowest
    return Superblocks(kind, codes.astype(np.uint8), scales, offsets, d, dmin)


def _error(blocks: Superblocks, weights: F32, importance: F32) -> F32:
    """Shapes: -> f32[M]"""
    off = blocks.values() - weights
    return np.asarray(np.einsum("mk,mk,mk->m", importance, off, off), np.float32)


def _solve_units(blocks: Superblocks, weights: F32, importance: F32) -> tuple[F16, F16]:
    """The d and dmin of least weighted squared error for integers as they are. Shapes: two f16[M, 1]"""
    one = np.ones_like(blocks.d)
    a = replace(blocks, d=one, dmin=np.zeros_like(one)).values()
    b = replace(blocks, d=np.zeros_like(one), dmin=-one).values()
    aa, ab, bb, ax, bx = (
        np.einsum("mk,mk,mk->m", importance, left, right, dtype=np.float64)[:, None]
        for left, right in ((a, a), (a, b), (b, b), (a, weights), (b, weights))
    )
    spread = aa * bb - ab * ab
    joint = spread > 1e-9 * aa * bb
    spread = np.where(joint, spread, 1)
    d = np.where(joint, (ax * bb - bx * ab) / spread, np.divide(ax, aa, out=np.zeros_like(ax), where=aa > 0))
    dmin = np.where(joint, (ax * ab - bx * aa) / spread, 0)
    return d.astype(np.float16), dmin.astype(np.float16)


def _by_size(blocks: F32) -> F32:
    return np.abs(blocks) + np.float32(1e-20)


def _by_size_and_spread(blocks: F32) -> F32:
    spread: F32 = np.sqrt(np.mean(blocks * blocks, 1, keepdims=True))
    return _by_size(blocks) + spread


def _times(unit: F16, integers: I16) -> F32:
    return unit.astype(np.float32) * integers.astype(np.float32)


def _integers(values: F32, lowest: int, highest: int) -> tuple[I16, F16]:
    """Integers and their float16 unit: the largest value of a row takes the end of the range that reaches furthest."""
    largest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
    d = (largest / (lowest or highest)).astype(np.float16)
    unit = d.astype(np.float32)
    quotients = np.divide(values, unit, out=np.zeros_like(values), where=unit != 0)
    return np.clip(np.rint(quotients), lowest, highest).astype(np.int16), d


def pack(name: str, blocks: Superblocks) -> U8:
    """Shapes: M superblocks -> u8[M, bytes]"""
    codes, scales, offsets = blocks.codes, blocks.scales, blocks.offsets
    d, dmin = blocks.d.view(np.uint8), blocks.dmin.view(np.uint8)
    if name == "Q2_K":
        parts = [scales | offsets << 4, _crumbs(codes), d, dmin]
    elif name == "Q3_K":
        parts = [_single_bits(codes >> 2), _crumbs(codes & 3), _scales_of_q3(scales + 32), d]
    elif name == "Q6_K":
        parts = [_nibbles(codes & 15, 64), _crumbs(codes >> 4), scales, d]
    else:
        high = [_single_bits(codes >> 4)] if name == "Q5_K" else []
        parts = [d, dmin, _scales_of_q4(scales, offsets), *high, _nibbles(codes & 15, 32)]
    return np.hstack([part.astype(np.uint8) for part in parts])


def _nibbles(codes: Any, apart: int) -> Any:
    """Two codes a byte, from places `apart` from each other; the earlier is the low one."""
    pairs = codes.reshape(len(codes), -1, 2, apart)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _crumbs(codes: Any) -> Any:
    """Four 2-bit codes a byte, from places 32 apart; the earliest is the lowest."""
    a, b, c, d = np.moveaxis(codes.reshape(len(codes), 2, 4, 32), 2, 0)
    return (a | b << 2 | c << 4 | d << 6).reshape(len(codes), -1)


def _single_bits(bits: Any) -> Any:
    """Eight bits a byte, from places 32 apart; the earliest is the lowest."""
    return np.packbits(bits.reshape(len(bits), 8, 32), axis=1, bitorder="little").reshape(len(bits), 32)


def _scales_of_q4(scales: I16, offsets: I16) -> I16:
    """Eight 6-bit scales and offsets in 12 bytes: 4 + 4 whole ones, the high bits of the others above them, then the
    low nibbles of the others."""
    heads = [one[:, :4] | one[:, 4:] >> 4 << 6 for one in (scales, offsets)]
    tails = scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4
    return np.hstack([*heads, tails])


def _scales_of_q3(scales: I16) -> I16:
    """Sixteen 6-bit scales in 12 bytes: the low nibbles of 8 + 8, then the high bits, four of them a byte."""
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    a, b, c, d = np.moveaxis((scales >> 4).reshape(-1, 4, 4), 1, 0)
    return np.hstack([low, a | b << 2 | c << 4 | d << 6])
