"""The engine's back end on a GPU: the programs, block tables and steps of `engine.native`, in torch.

    with Runtime.open("overlay", backend=partial(Device, device="cuda")) as runtime:
        logits = runtime.prefill(0, tokens, bits=4)

Steps in which every sequence has one new token are captured as CUDA graphs, one for each precision, number of sequences
and longest sequence, both rounded up to powers of two. Models with experts run without graphs.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from everybit.engine import ops
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.native import BLOCK_TOKENS, MOST_SERVED
from everybit.engine.plan import Precision, own_bits, require_precision
from everybit.engine.program import Program, Step
from everybit.errors import ModelError, PrecisionError
from everybit.gpu.parameters import Parameters
from everybit.gpu.passes import Group, Inputs, Pass

F32 = NDArray[np.float32]
_KV = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MOST_GRAPHS = 64
_GB = 1e9
_FILLED = 0.9  # of the memory, by weights and cache; the rest is for activations and graphs


class Device:
    """As `Native`: one step at a time; the KV cache and all weights belong to it.

    `device`: a torch device. `dtype`: what products read, float16, bfloat16 or (dense weights, no kernels) float32.
    `most_bits`: planes beyond are not loaded. `graphs`: whether decoding is captured (on a CPU it is run as it would
    be replayed).

    `kv_bytes`: reserved for the KV cache. `bits`: the precisions that it serves. Logits depend in their last digits on
    who shares a step.

    Cost: planes and codebooks of all precisions to `most_bits` in the device's memory, once; plain parameters as they
    are stored.
    Raises: ModelError (no such device, too little memory: with what fits), FormatError, ChecksumError
    """

    def __init__(
        self,
        program: Program,
        checkpoint: Checkpoint,
        *,
        kv_blocks: int,
        kv_dtype: str = "F16",
        most_tokens: int = 512,
        debug: bool = False,
        device: str = "cuda",
        dtype: str = "float16",
        most_bits: int | None = None,
        graphs: bool = True,
    ) -> None:
        self.program, self.checkpoint, self.most_tokens, self._debug = program, checkpoint, most_tokens, debug
        self.device = open_device(device)
        if dtype not in _DTYPES:
            raise ModelError(f"dtype {dtype!r} arrived, expected one of {', '.join(_DTYPES)}")
        if most_bits is not None and most_bits not in checkpoint.bits:
            raise PrecisionError(
                f"most_bits {most_bits} arrived, expected one of the overlay's {', '.join(map(str, checkpoint.bits))}"
            )
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"torch {self.device}"
        self.isa = f"{name}, {dtype}"
        self.bits = tuple(b for b in checkpoint.bits if most_bits is None or b <= most_bits)
        self._parameters = Parameters(checkpoint, self.device, _DTYPES[dtype], most_bits)
        self._own: dict[Precision, Mapping[str, int]] = {}
        self._pool: Any = None  # of all graphs, which never run at once
        self._graphs: OrderedDict[tuple[Precision, int, int], _Graph] = OrderedDict()
        self._captures = graphs and not any(isinstance(op, ops.Experts) for op in program.ops)
        self._spare = kv_blocks  # one block more, where padding writes
        shape = (program.layers, 2, (kv_blocks + 1) * BLOCK_TOKENS, program.kv_heads * program.head_dim)
        self.kv_bytes = math.prod(shape) * _KV[kv_dtype].itemsize
        self._cache = self._place(lambda: torch.zeros(shape, dtype=_KV[kv_dtype], device=self.device))

    def prepare(self, bits: Precision) -> Mapping[str, int]:
        """Place the weights that `bits`, a number or a plan, needs: at which of its own bits each is read.

        Raises: PrecisionError, FormatError, ChecksumError, ModelError (too little memory)
        """
        overlay = self.checkpoint.overlay
        if overlay is None:
            bits = 0
        else:
            require_precision(bits, overlay)
        if bits not in self._own:
            most = self._parameters.most_bits
            own = {}
            for name in self._weights():
                if spec := self.checkpoint.quantized(name):
                    own[name] = own_bits(spec, bits)
                    if most is not None and own[name] > spec.served_bits(most):
                        raise PrecisionError(f"{bits} bits were asked, only planes of up to {most} bits are loaded")
                self._place(lambda name=name: self._parameters.prepare(name, own.get(name, 0)))  # type: ignore[misc]
            if len(self._own) >= MOST_SERVED:
                del self._own[next(iter(self._own))]
            self._own[bits] = own
        return self._own[bits]

    def run(self, step: Step, bits: Precision = 0) -> F32:
        """One forward pass at `bits`, a number or a plan; not looked at where the weights are float.

        Shapes: -> logits f32[R, V]
        Needs:  a step that `Runtime` made, or one as careful
        Raises: PrecisionError, FormatError, ModelError (debug: not finite; too little memory)
        """
        own = self.prepare(bits)
        logits = self._place(lambda: self._run(step, bits if self.checkpoint.overlay else 0, own))
        found: F32 = logits.float().cpu().numpy()
        if self._debug and not np.isfinite(found).all():
            raise ModelError(f"{self.checkpoint.folder}: logits are not finite: quantize again or use bfloat16")
        return found

    def _weights(self) -> list[str]:
        """Every parameter that a product reads."""
        names: dict[str, None] = {}
        for op in self.program.ops:
            match op:
                case ops.Linear():
                    names |= dict.fromkeys(op.weights)
                case ops.Experts():
                    names |= dict.fromkeys((op.gate_up, op.down))
                case ops.Embed() if self.checkpoint.quantized(op.weight):
                    raise ModelError(
                        f"{self.checkpoint.folder}: {op.weight} is quantized and used as an embedding, expected plain "
                        "numbers: quantize again with --ignore for its module"
                    )
        return list(names)

    def _run(self, step: Step, bits: Precision, own: Mapping[str, int]) -> torch.Tensor:
        sequences = len(step.past)
        every = len(step.rows) == len(step.tokens) == sequences and (step.rows == np.arange(sequences)).all()
        if self._captures and every and (np.diff(step.starts) == 1).all():
            return self._replay(step, bits, own)
        with torch.inference_mode():
            return self._pass(self._inputs(step), own).run()

    def _pass(self, inputs: Inputs, own: Mapping[str, int]) -> Pass:
        return Pass(self.program, self._parameters, self._cache, own, inputs)

    def _replay(self, step: Step, bits: Precision, own: Mapping[str, int]) -> torch.Tensor:
        sequences = len(step.past)
        padded, blocks = _round_up(sequences), _round_up(int(step.past.max()) // BLOCK_TOKENS + 1)
        key = bits, padded, blocks
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            graph = _Graph.of(padded, blocks, self._spare, self.device, lambda one: self._pass(one, own))
            if self.device.type == "cuda":
                self._capture(graph)
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        return self._graphs[key].run(step, self._spare)[:sequences]

    def _capture(self, graph: _Graph) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph.capture(self._pool)
        except torch.cuda.OutOfMemoryError:  # once more without the others
            self._graphs.clear()
            torch.cuda.empty_cache()
            graph.capture(self._pool)

    def _inputs(self, step: Step) -> Inputs:
        lengths = np.diff(step.starts)
        positions = np.concatenate([past + np.arange(n) for past, n in zip(step.past, lengths, strict=True)])
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        slots = step.blocks[sequence, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        groups = [self._group(step, first, last) for first, last in _runs_of_ones(lengths)]
        return Inputs(self._to(step.tokens), self._to(positions), self._to(slots), self._to(step.rows), groups)

    def _group(self, step: Step, first: int, last: int) -> Group:
        longest = int((step.past[first:last] + np.diff(step.starts)[first:last]).max())
        keys = _places(step.blocks[first:last, : -(-longest // BLOCK_TOKENS)])[:, :longest]
        return Group(int(step.starts[first]), int(step.starts[last]), self._to(keys))

    def _to(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)

    def _place(self, work: Callable[[], Any]) -> Any:
        """`work` on the device, and where memory is too little an error that says what fits."""
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                return work()
        except torch.cuda.OutOfMemoryError:
            raise ModelError(self._too_little()) from None

    def _too_little(self) -> str:
        total = torch.cuda.get_device_properties(self.device).total_memory
        overlay = self.checkpoint.overlay
        sizes = overlay.sizes().rows if overlay else {}
        fits = [b for b, size in sizes.items() if size.bytes + self.kv_bytes < _FILLED * total]
        advice = "lower the context or the sequences, or make room on the GPU"
        if fits and fits[-1] < self.bits[-1]:
            advice = f"planes of up to {fits[-1]} bits fit: load no more (most_bits), or {advice}"
        return f"{self.checkpoint.folder}: the {total / _GB:.1f} GB of {self.isa} are full: {advice}"


def open_device(name: str) -> torch.device:
    """Raises: ModelError where torch has no such device"""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} arrived, expected cuda, cuda:0, ... or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ModelError(f"device {name!r} arrived, expected cuda, cuda:0, ... or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(f"device {name!r} arrived, torch finds {count} NVIDIA GPUs here: leave the device out")
        device = torch.device("cuda", device.index or 0)
    return device


@dataclass
class _Graph:
    """A decoding step whose inputs are copied in. Without `graph` it is run as it would be captured."""

    inputs: Inputs
    make: Callable[[Inputs], Pass]
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None

    @classmethod
    def of(
        cls, sequences: int, blocks: int, spare: int, device: torch.device, make: Callable[[Inputs], Pass]
    ) -> _Graph:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        keys = zeros(sequences, blocks * BLOCK_TOKENS).fill_(spare * BLOCK_TOKENS)
        slots = zeros(sequences).fill_(spare * BLOCK_TOKENS)
        return cls(Inputs(zeros(sequences), zeros(sequences), slots, None, [Group(0, sequences, keys)]), make)

    @torch.inference_mode()
    def capture(self, pool: Any) -> None:
        """Run once, so that kernels are compiled and libraries set up, then record."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.make(self.inputs).run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.logits = self.make(self.inputs).run()
        self.graph = graph

    @torch.inference_mode()
    def run(self, step: Step, spare: int) -> torch.Tensor:
        """Shapes: -> f32[padded sequences, V], valid until the next run"""
        inputs, (group,) = self.inputs, self.inputs.groups
        padded, sequences = len(inputs.tokens), len(step.past)
        host = np.zeros((3, padded), np.int64)
        host[2] = spare * BLOCK_TOKENS
        host[0, :sequences], host[1, :sequences] = step.tokens, step.past
        table = np.full((padded, group.keys.shape[1] // BLOCK_TOKENS), spare, np.int64)
        blocks = step.blocks[:, : table.shape[1]]
        table[:sequences, : blocks.shape[1]] = blocks
        own = table[np.arange(sequences), step.past // BLOCK_TOKENS]
        host[2, :sequences] = own * BLOCK_TOKENS + step.past % BLOCK_TOKENS
        for target, source in zip((inputs.tokens, inputs.positions, inputs.slots), host, strict=True):
            target.copy_(torch.from_numpy(source))
        group.keys.copy_(torch.from_numpy(_places(table)))
        if self.graph is None:
            return self.make(inputs).run()
        self.graph.replay()
        assert self.logits is not None
        return self.logits


def _places(blocks: NDArray[Any]) -> NDArray[np.int64]:
    """Where the tokens of each line's blocks lie. Shapes: [S, blocks] -> i64[S, tokens]"""
    places = blocks[:, :, None].astype(np.int64) * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
    return places.reshape(len(blocks), -1)


def _runs_of_ones(lengths: NDArray[Any]) -> list[tuple[int, int]]:
    """Ranges of sequences: neighbours with one new token together, others alone."""
    found: list[tuple[int, int]] = []
    for s, length in enumerate(lengths.tolist()):
        if length == 1 and found and found[-1][1] == s and lengths[s - 1] == 1:
            found[-1] = found[-1][0], s + 1
        else:
            found.append((s, s + 1))
    return found


def _round_up(count: int) -> int:
    """To a power of two."""
    return 1 << max(0, count - 1).bit_length()
