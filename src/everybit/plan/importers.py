"""Measurements of others as samples: server runs, offline batches, phase times, replays, and kernel tables.

Formats: aiconfigurator's `silicon_sample` table, LLM-Inference-Bench's results, Splitwise's perf_model, LLMServingSim's
replays, and an everybit bench result. Kernel tables become `curves.Product`s.
"""

from __future__ import annotations

import csv
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from everybit.errors import ModelError, SourceError, reason
from everybit.plan.calibrate import Sample
from everybit.plan.cost import Parallel
from everybit.plan.curves import Product
from everybit.plan.hardware import Hardware, read_hardware
from everybit.plan.model import read_model
from everybit.plan.operators import Model

Row = dict[str, str]

_SYSTEMS = {
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "gb300": "gb300",
    "a100-80gb": "a100-80-sxm",
    "h100-80gb": "h100-sxm",
    "Nvidia A100 GPU": "a100-40-sxm",
    "Nvidia H100 GPU": "h100-sxm",
    "Nvidia GH200 GPU": "gh200",
}
_ENGINES = {"vLLM": "vllm", "TensorRT-LLM": "trtllm", "vllm": "vllm", "trtllm": "trtllm", "sglang": "sglang"}
# aiconfigurator's gemm modes: weights, and the bits of activations and cache that go with them. Servers of fp8 and fp4
# checkpoints were run with fp8 caches: at 16 bits the rows do not fit in memory as they did.
_MODES: dict[str, tuple[float | str, float, float]] = {
    "": (16, 16, 16),
    "bfloat16": (16, 16, 16),
    "fp8": ("fp8", 8, 8),
    "fp8_block": ("fp8_block", 8, 16),
    "nvfp4": ("nvfp4", 4, 8),
    "int4_wo": ("int4", 16, 16),
}


@dataclass(frozen=True)
class Imported:
    """`skipped`: why rows were left out, with how many of each."""

    samples: tuple[Sample, ...]
    skipped: dict[str, int]


def read_silicon(path: str | Path) -> Imported:
    """aiconfigurator's table of aggregated server runs; `batch_size` is the number of clients.

    Rows of separate prefill and decode pools are skipped. Raises: SourceError
    """
    return _import(path, ("model_path", "gemm_quant_mode", "attention_dp_size", "silicon_tpot_ms"), _silicon)


def read_inference_bench(path: str | Path) -> Imported:
    """LLM-Inference-Bench: batches that read and write the same number of tokens. Raises: SourceError"""
    return _import(path, ("Hardware", "Framework", "Input Output Length", "Latency"), _inference_bench)


def read_splitwise(path: str | Path) -> Imported:
    """Splitwise's measured phases; the rows of a capped H100 are derived, not measured, and are skipped.

    Raises: SourceError
    """
    return _import(path, ("prompt_time", "token_time", "tensor_parallel", "token_size"), _splitwise)


def read_replay(
    path: str | Path, model: Model, hardware: Hardware, parallel: Parallel, engine: str, version: str = ""
) -> Sample:
    """The requests of one of LLMServingSim's replays as one sample of their means. Raises: SourceError"""
    rows = _rows(path, ("input_tokens", "output_tokens", "queued_s", "first_token_s", "last_token_s"))
    requests = []
    for row in rows:
        queued, first, last = (_number(row, name) for name in ("queued_s", "first_token_s", "last_token_s"))
        requests.append((_number(row, "input_tokens"), _number(row, "output_tokens"), queued, first, last))
    return _mean(path, requests, model, hardware, parallel, engine, version)


def read_bench(
    path: str | Path, model: Model, hardware: Hardware, parallel: Parallel, version: str = "", engine: str = "everybit"
) -> Sample:
    """The `result.json` of everybit bench run as one sample: means of its complete requests after the warm-up.

    Raises: SourceError
    """
    try:
        table = json.loads(Path(path).read_text("utf-8"))["requests"]
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        kept = [row for row in rows if row["scored"] and not row["error"] and row["first_ms"] is not None]
        if any(row["prompt"] is None for row in kept):
            raise SourceError(f"{path}: the server told no prompt tokens: measure one that reports its usage")
        requests = [
            (row["prompt"], row["tokens"], *(row[name] / 1e3 for name in ("sent_ms", "first_ms", "end_ms")))
            for row in kept
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{path}: {type(error).__name__}: {reason(error)}; expected the result.json of everybit bench run"
        ) from None
    return _mean(path, requests, model, hardware, parallel, engine, version)


def read_products(path: str | Path, dtype: str) -> list[Product]:
    """A kernel table of aiconfigurator, the rows of one dtype (`bfloat16`, `fp8`, `int4_wo`). Raises: SourceError"""
    rows = _rows(path, ("gemm_dtype", "m", "n", "k", "latency_ms"))
    names = ("m", "n", "k", "latency_ms")
    found = [[_number(row, name) for name in names] for row in rows if row["gemm_dtype"] == dtype]
    if not found:
        raise SourceError(f"{path}: no rows of {dtype}, expected one of {sorted({row['gemm_dtype'] for row in rows})}")
    return [Product(int(m), int(n), int(k), ms / 1e3) for m, n, k, ms in found]


# --- one row
def _silicon(row: Row) -> Sample | str:
    if row["mode"] != "agg":
        return "not one pool"
    system, mode = row["system"], row["gemm_quant_mode"]
    if system not in _SYSTEMS or mode not in _MODES:
        return f"no card of {system}" if system not in _SYSTEMS else f"no mode {mode}"
    hardware = _card(_SYSTEMS[system])
    bits, activation, cache = _MODES[mode]
    if activation < 8 and "fp4" not in hardware.flops:
        activation = 16  # fp4 checkpoints run weight-only there
    model = _model(row["model_path"], bits, activation, cache)
    parallel = Parallel(
        _whole(row, "tp_size"),
        _whole(row, "pp_size"),
        _whole(row, "attention_dp_size", 1),
    )
    return Sample(
        model,
        hardware,
        parallel,
        _whole(row, "batch_size"),
        _whole(row, "isl"),
        _whole(row, "osl"),
        row["backend"],
        row["backend_version"],
        ttft_s=_number(row, "silicon_ttft_ms") / 1e3,
        tpot_s=_number(row, "silicon_tpot_ms") / 1e3,
        source=row["id"],
    )


def _inference_bench(row: Row) -> Sample | str:
    if row["Hardware"] not in _SYSTEMS or row["Framework"] not in _ENGINES:
        return f"no card or prior of {row['Hardware']} x {row['Framework']}"
    length = _whole(row, "Input Output Length")
    return Sample(
        _model(row["Model"], 16, 16, 16),
        _card(_SYSTEMS[row["Hardware"]]),
        Parallel(tp=_whole(row, "Num of Hardware")),
        _whole(row, "Batch Size"),
        length,
        length,
        _ENGINES[row["Framework"]],
        e2e_s=_number(row, "Latency"),
        closed=False,
        source="LLM-Inference-Bench",
    )


def _splitwise(row: Row) -> Sample | str:
    if row["hardware"] not in _SYSTEMS:
        return f"{row['hardware']} is derived, or has no card"
    name = {"llama2-70b": "meta-llama/Llama-2-70b-hf", "bloom-176b": "bigscience/bloom"}.get(row["model"])
    if name is None:
        return f"no config of {row['model']}"
    return Sample(
        _model(name, 16, 16, 16),
        _card(_SYSTEMS[row["hardware"]]),
        Parallel(tp=_whole(row, "tensor_parallel")),
        _whole(row, "batch_size"),
        _whole(row, "prompt_size"),
        _whole(row, "token_size"),
        "vllm",
        ttft_s=_number(row, "prompt_time") / 1e3,
        tpot_s=_number(row, "token_time") / 1e3,
        closed=False,
        source="Splitwise",
    )


def _mean(
    path: str | Path,
    requests: Sequence[tuple[float, ...]],
    model: Model,
    hardware: Hardware,
    parallel: Parallel,
    engine: str,
    version: str,
) -> Sample:
    """Requests are (prompt, output, sent, first, last): how many run at once is Little's law."""
    long = [one for one in requests if one[1] > 1]
    if not long:
        raise SourceError(f"{path}: no complete request of two or more tokens, expected some: measure again")
    span_s = max(one[4] for one in long) - min(one[2] for one in long)
    return Sample(
        model,
        hardware,
        parallel,
        max(1, round(sum(one[4] - one[2] for one in long) / span_s)),
        round(fmean(one[0] for one in long)),
        round(fmean(one[1] for one in long)),
        engine,
        version,
        ttft_s=fmean(one[3] - one[2] for one in long),
        tpot_s=fmean((one[4] - one[3]) / (one[1] - 1) for one in long),
        source=Path(path).name,
    )


# --- reading
def _import(path: str | Path, columns: tuple[str, ...], read: Callable[[Row], Sample | str]) -> Imported:
    """A row that the planner cannot have (an unknown model, a split that does not divide) is counted, not guessed."""
    samples, skipped = [], Counter[str]()
    for row in _rows(path, columns):
        try:
            found = read(row)
        except ModelError as error:
            found = str(error)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            samples.append(found)
    if not samples:
        raise SourceError(f"{path}: no row that can be used: {dict(skipped.most_common(3))}")
    return Imported(tuple(samples), dict(skipped))


def _rows(path: str | Path, columns: tuple[str, ...]) -> list[Row]:
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: cannot be read: {reason(error)}") from None
    if not rows:
        raise SourceError(f"{path}: no rows, expected a table with a header: download it again")
    if missing := [name for name in columns if name not in rows[0]]:
        raise SourceError(f"{path}: no column {', '.join(missing)}, found {', '.join(rows[0])}: pass the right table")
    return rows


def _number(row: Row, name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e12:
        raise SourceError(f"{name} is {row[name]!r}, expected a number from 0: fix the table")
    return value


def _whole(row: Row, name: str, default: int | None = None) -> int:
    if default is not None and not row[name]:
        return default
    return int(_number(row, name))


@functools.cache
def _card(name: str) -> Hardware:
    return read_hardware(name)


@functools.cache
def _model(name: str, weight_bits: float | str, activation_bits: float, kv_bits: float) -> Model:
    try:
        return read_model(name, weight_bits=weight_bits, activation_bits=activation_bits, kv_bits=kv_bits)
    except SourceError:
        raise ModelError(f"no config of {name}") from None
