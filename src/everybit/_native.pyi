"""Typed signatures of the C++ module (native/src/bindings.cc); outputs are the arrays passed last."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def pack_planes(codes: NDArray[np.uint8], packed: NDArray[np.uint8], threads: int) -> None: ...
def unpack_codes(planes: Sequence[NDArray[np.uint8]], codes: NDArray[np.uint8], threads: int) -> None: ...
def dequantize(
    planes: Sequence[NDArray[np.uint8]], table: NDArray[np.float32], values: NDArray[np.float32], threads: int
) -> None: ...
def solve_upscale(
    weights: NDArray[np.float32],
    sensitivity: NDArray[np.float32] | None,
    bits: Sequence[int],
    seed: int,
    codes: NDArray[np.uint8],
    codebooks: Sequence[NDArray[np.float32]],
    threads: int,
) -> None: ...

solve_tree = solve_upscale
solve_uniform = solve_upscale

def solve_cells(
    weights: NDArray[np.float32],
    sensitivity: NDArray[np.float32] | None,
    bits: Sequence[int],
    codes: NDArray[np.uint8],
    centres: Sequence[NDArray[np.float32]],
    ladders: Sequence[NDArray[np.uint8]],
    steps: Sequence[NDArray[np.float32]],
    threads: int,
) -> None: ...
def solve_guided(
    weights: NDArray[np.float32],
    hessians: NDArray[np.float32],
    bits: Sequence[int],
    importance: Sequence[float],
    rounds: int,
    sweeps: int,
    codes: NDArray[np.uint8],
    tables: Sequence[NDArray[np.int8]],
    scales: NDArray[np.float32],
    centres: NDArray[np.int8] | None,
    ladders: NDArray[np.uint8] | None,
    steps: NDArray[np.float32] | None,
    threads: int,
) -> None: ...
def find_bad_row(values: NDArray[np.float32], refuse_negative: bool, threads: int) -> int: ...

# The engine (native/src/bind_engine.cc).

_Place = tuple[int, int, int]  # buffer, first column, columns
_Ints = NDArray[np.int32]

BLOCK_TOKENS: int

class StepError(RuntimeError): ...

class Program:
    def __init__(
        self,
        threads: int,
        pin: Sequence[int],
        isa: str,
        mode: str,
        debug: bool,
        most_tokens: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        kv_blocks: int,
        kv_dtype: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
    def add_buffer(self, width: int, /) -> int: ...
    def add_plain(
        self,
        name: str,
        data: NDArray[np.uint8],
        dtype: str,
        experts: int,
        rows: int,
        columns: int,
        transposed: bool,
        /,
    ) -> int: ...
    def add_planes(self, name: str, planes: Sequence[NDArray[np.uint8]], experts: int, columns: int, /) -> int: ...
    def has_tables(self, weight: int, bits: int, /) -> bool: ...
    def prepare(
        self,
        weight: int,
        bits: int,
        values: NDArray[np.float32],
        unit: NDArray[np.float32] | None,
        threads: int,
        /,
    ) -> None: ...
    def prepare_cells(
        self,
        weight: int,
        bits: int,
        centres: NDArray[np.float32],
        ladders: NDArray[np.uint8],
        steps: NDArray[np.float32],
        /,
    ) -> None: ...
    def add_embed(
        self, label: str, out: _Place, weight: int, positions: bool, offset: int, scale: float, add: bool, /
    ) -> None: ...
    def add_norm(
        self,
        label: str,
        out: _Place,
        x: _Place,
        weight: Sequence[float],
        bias: Sequence[float],
        kind: str,
        eps: float,
        unit_offset: bool,
        groups: int,
        /,
    ) -> None: ...
    def add_linear(
        self,
        label: str,
        x: _Place,
        outs: Sequence[_Place],
        weights: Sequence[int],
        biases: Sequence[Sequence[float]],
        add: bool,
        /,
    ) -> None: ...
    def add_rope(
        self, label: str, x: _Place, heads: int, inv_freq: Sequence[float], scale: float, interleaved: bool, /
    ) -> None: ...
    def add_attention(
        self,
        label: str,
        out: _Place,
        q: _Place,
        k: _Place,
        v: _Place,
        layer: int,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: Sequence[float],
        /,
    ) -> None: ...
    def add_activate(
        self, label: str, out: _Place, gate: _Place, up: _Place, has_up: bool, kind: str, limit: float, /
    ) -> None: ...
    def add_add(self, label: str, out: _Place, x: _Place, y: _Place, /) -> None: ...
    def add_softcap(self, label: str, x: _Place, cap: float, /) -> None: ...
    def add_select(self, label: str, out: _Place, x: _Place, /) -> None: ...
    def add_experts(
        self,
        label: str,
        out: _Place,
        x: _Place,
        scores: _Place,
        gate_up: int,
        down: int,
        top_k: int,
        routing: str,
        normalize: bool,
        gate_up_bias: Sequence[float],
        down_bias: Sequence[float],
        kind: str,
        limit: float,
        interleaved: bool,
        add: bool,
        /,
    ) -> None: ...
    def set_logits(self, out: _Place, /) -> None: ...
    def run(
        self,
        tokens: _Ints,
        starts: _Ints,
        past: _Ints,
        blocks: _Ints,
        rows: _Ints,
        served: NDArray[np.uint8],
        logits: NDArray[np.float32],
    ) -> None: ...

def isas() -> list[str]: ...
def usable_processors() -> int: ...
def sample(
    logits: NDArray[np.float32],
    tokens: _Ints,
    generated: _Ints,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    seed: int,
    position: int,
    top: int,
) -> tuple[int, int, float, list[tuple[int, float]]]: ...

# The probe (native/src/bind_probe.cc).

def read_bandwidth(threads: int) -> float: ...
def measure_bandwidth(kernel: str, threads: int, array_bytes: int, runs: int) -> tuple[float, float]: ...
def last_level_cache() -> int: ...
def stream_array_bytes() -> int: ...
