"""The fast back end: Program and a Checkpoint handed over to C++ (native/src/engine/); weights stay in their files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit import _native
from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.ops import Columns
from everybit.engine.plan import Plan, Precision, own_bits, require_precision
from everybit.engine.program import Program, Step
from everybit.errors import FormatError, ModelError
from everybit.formats import Overlay

F32 = NDArray[np.float32]
Served = NDArray[np.uint8]
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
# A table of even grids is made for a few rows at a time, not kept, where it would outweigh the 92 bytes a row that it
# is made of and the row is long enough to hide the making.
MADE_BITS, MADE_COLUMNS = 7, 1024
BLOCK_TOKENS: int = _native.BLOCK_TOKENS
MOST_SERVED = 64  # numbers and plans remembered: measuring tries hundreds, and looking one up again costs little


class Native:
    """Runs a program natively. One step at a time; the KV cache and all buffers belong to it.

    `mode` is exact, default or fast (docs/design/0002); `isa` an instruction set or "" for the best; `pin` processors
    for the threads. `kv_blocks` blocks of BLOCK_TOKENS tokens are reserved, and take memory when first written.

    Cost: planes stay in the mapped file; tables of a precision are built when `prepare` or `run` first sees it, and
    shared: a weight has one set for each of its own precisions, however many plans there are.
    Raises: ModelError (a weight of a dtype it cannot multiply), FormatError, ChecksumError
    """

    def __init__(
        self,
        program: Program,
        checkpoint: Checkpoint,
        *,
        threads: int = 1,
        pin: Sequence[int] = (),
        isa: str = "",
        mode: str = "default",
        kv_blocks: int,
        kv_dtype: str = "F16",
        most_tokens: int = 512,
        debug: bool = False,
    ) -> None:
        self.program = program
        self.checkpoint = checkpoint
        self.bits = checkpoint.bits
        self.most_tokens = most_tokens
        self._threads = threads
        self._mode = mode
        self._native = _native.Program(
            threads,
            list(pin),
            isa,
            mode,
            debug,
            most_tokens,
            program.layers,
            program.kv_heads,
            program.head_dim,
            kv_blocks,
            kv_dtype,
        )
        self.isa: str = self._native.isa
        self._weights: dict[str, int] = {}
        self._prepared: set[tuple[str, int]] = set()  # weights, each with a precision of its own
        self._served: dict[Precision, Served] = {}
        self._buffers = {name: self._native.add_buffer(width) for name, width in program.buffers.items()}
        for index, op in enumerate(program.ops):
            self._add(op, f"op {index}")
        self._native.set_logits(self._place(program.buffer("logits", program.vocabulary)))

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for the KV cache."""
        return int(self._native.kv_bytes)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables built so far."""
        return int(self._native.table_bytes)

    def prepare(self, bits: Precision) -> Served:
        """Verify the planes and build the tables that `bits`, a number or a plan, needs; nothing if they are there.

        Shapes: -> u8[weights], which of its own precisions each is read at; 0 for plain ones
        Raises: PrecisionError, FormatError, ChecksumError
        """
        overlay = self.checkpoint.overlay
        if overlay is None:
            bits = 0
        elif type(bits) is not int and not isinstance(bits, Plan):
            require_precision(bits, overlay)  # before it is hashed: 4.0 == 4, and a list has no hash
        if (known := self._served.get(bits)) is not None:
            return known
        served = np.zeros(len(self._weights), np.uint8)
        if overlay is not None:
            require_precision(bits, overlay)
            for name, weight in self._weights.items():
                if spec := self.checkpoint.quantized(name):
                    served[weight] = own_bits(spec, bits)
            self._prepare_tables(overlay, [(name, int(served[weight])) for name, weight in self._weights.items()])
        if len(self._served) >= MOST_SERVED:
            del self._served[next(iter(self._served))]
        self._served[bits] = served
        return served

    def _prepare_tables(self, overlay: Overlay, wanted: list[tuple[str, int]]) -> None:
        """Verify planes and hand over codebooks of weights at precisions of their own, where that was not done."""
        new = [(name, own) for name, own in wanted if own and (name, own) not in self._prepared]
        with ThreadPoolExecutor(self._threads) as pool:  # hashing leaves the interpreter lock, so threads share it
            list(pool.map(lambda one: overlay.planes(*one), new))
        for name, own in new:
            self._prepare_weight(overlay, name, own)
            self._prepared.add((name, own))

    def _prepare_weight(self, overlay: Overlay, name: str, own: int) -> None:
        """Hand over the codebook of one weight at one of its own precisions."""
        spec, weight = overlay.weights[name], self._weights[name]
        if self._mode != "exact" and own >= MADE_BITS and spec.columns >= MADE_COLUMNS:
            grid = overlay.grid(name, own)
            if grid is not None:
                self._native.prepare_cells(weight, own, grid.centres, grid.ladders, grid.steps)
                return
        self._native.prepare(weight, own, overlay.table(name, own), overlay.unit(name, own), self._threads)

    def run(self, step: Step, bits: Precision = 0) -> F32:
        """One forward pass at `bits`, a number or a plan; not looked at where the weights are float.

        Shapes: -> logits f32[R, V]
        Needs:   a step that `Runtime` made, or one as careful: token ids, blocks and rows are not checked again
        Raises:  PrecisionError, FormatError (a weight file cut short, a plan for another overlay), ModelError
                 (debug: not finite)
        """
        served = self.prepare(bits)
        logits = np.empty((len(step.rows), self.program.vocabulary), np.float32)
        try:
            self._native.run(step.tokens, step.starts, step.past, step.blocks, step.rows, served, logits)
        except _native.StepError as error:
            raise (FormatError if "cut short" in str(error) else ModelError)(
                f"{self.checkpoint.folder}: {error}"
            ) from None
        return logits

    def _place(self, columns: Columns) -> tuple[int, int, int]:
        return (self._buffers[columns.buffer], columns.start, columns.width)

    def _weight(self, name: str, transposed: bool = False) -> int:
        """The native id of a parameter, registered at its first use. Reads no data."""
        if name in self._weights:
            return self._weights[name]
        spec = self.checkpoint.quantized(name)
        if spec is not None and self.checkpoint.overlay is not None:
            overlay = self.checkpoint.overlay
            planes = [overlay.mapped(spec.plane_name(k)).reshape(spec.rows, -1) for k in range(spec.planes)]
            experts = spec.shape[0] if len(spec.shape) == 3 else 1
            found = self._native.add_planes(name, planes, experts, spec.columns)
        else:
            view, dtype = self.checkpoint.raw(name)
            if dtype not in PLAIN:
                raise ModelError(
                    f"{self.checkpoint.folder}: {name} is stored as {dtype}, expected {', '.join(PLAIN)}: "
                    "convert the model first"
                )
            *lead, rows, columns = view.shape
            if transposed:
                rows, columns = columns, rows
            experts = lead[0] if lead else 1
            data = np.ascontiguousarray(view).reshape(-1).view(np.uint8)
            found = self._native.add_plain(name, data, dtype, experts, rows, columns, transposed)
        self._weights[name] = int(found)
        return int(found)

    def _vector(self, name: str | None) -> list[float]:
        return [] if name is None else self.checkpoint.plain(name).reshape(-1).tolist()

    def _add(self, op: ops.Op, label: str) -> None:
        native, place = self._native, self._place
        match op:
            case ops.Embed():
                if self.checkpoint.quantized(op.weight):
                    raise ModelError(
                        f"{self.checkpoint.folder}: {op.weight} is quantized and used as an embedding, expected plain "
                        "numbers: quantize again with --ignore for its module"
                    )
                native.add_embed(
                    op.weight,
                    place(op.out),
                    self._weight(op.weight),
                    op.source == "positions",
                    op.offset,
                    op.scale,
                    op.add,
                )
            case ops.Norm():
                native.add_norm(
                    op.weight or label,
                    place(op.out),
                    place(op.x),
                    self._vector(op.weight),
                    self._vector(op.bias),
                    op.kind,
                    op.eps,
                    op.unit_offset,
                    op.groups,
                )
            case ops.Linear():
                biases = [self._vector(bias) for bias in op.biases]
                weights = [self._weight(name, op.transposed) for name in op.weights]
                native.add_linear(op.weights[0], place(op.x), [place(out) for out in op.outs], weights, biases, op.add)
            case ops.Rope():
                native.add_rope(label, place(op.x), op.heads, list(op.inv_freq), op.scale, op.interleaved)
            case ops.Attention():
                native.add_attention(
                    f"attention of layer {op.layer}",
                    place(op.out),
                    place(op.q),
                    place(op.k),
                    place(op.v),
                    op.layer,
                    op.heads,
                    op.scale,
                    op.window,
                    op.softcap,
                    self._vector(op.sinks),
                )
            case ops.Activate():
                up = place(op.up) if op.up else (0, 0, 0)
                native.add_activate(label, place(op.out), place(op.gate), up, op.up is not None, op.kind, op.limit)
            case ops.Add():
                native.add_add(label, place(op.out), place(op.x), place(op.y))
            case ops.Softcap():
                native.add_softcap(label, place(op.x), op.cap)
            case ops.Select():
                native.add_select(label, place(op.out), place(op.x))
            case ops.Experts():
                native.add_experts(
                    op.gate_up,
                    place(op.out),
                    place(op.x),
                    place(op.scores),
                    self._weight(op.gate_up, op.transposed),
                    self._weight(op.down, op.transposed),
                    op.top_k,
                    op.routing,
                    op.normalize,
                    self._vector(op.gate_up_bias),
                    self._vector(op.down_bias),
                    op.kind,
                    op.limit,
                    op.interleaved,
                    op.add,
                )


def make_step(parts: Sequence[tuple[Any, int, Any]], rows: Sequence[int]) -> Step:
    """A step from (new tokens, past, block table) of each sequence; `rows` are those whose logits are wanted."""
    most = max(len(blocks) for _, _, blocks in parts)
    table = np.zeros((len(parts), most), np.int32)
    for line, (_, _, blocks) in zip(table, parts, strict=True):
        line[: len(blocks)] = blocks
    starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)], dtype=np.int32)
    return Step(
        np.concatenate([np.asarray(tokens, np.int32) for tokens, _, _ in parts]),
        starts,
        np.asarray([past for _, past, _ in parts], np.int32),
        table,
        np.asarray(rows, np.int32),
    )
