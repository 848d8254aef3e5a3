"""How far the planner's times are from measured ones, and where it differs from other planners' equations.

    python benchmarks/plan_accuracy.py FOLDER [--out FILE] [--seeds 5]

FOLDER: the planner's truth data. Printed and written as JSON lines:
1. servers (aiconfigurator's table): errors on shipped priors; after a fit of a random 20 % of each hardware, engine and
   version, on the rest; on models that the fit has not seen; beside aiconfigurator's own saved predictions.
2. batches (LLM-Inference-Bench): fitted on Meta-Llama-3-8B alone, tested on the other dense models.
3. weight-only products: int4 / bf16 after a probe of seven shapes each; and a table of medians where the curve fails.
4. parity with GenZ and LLM-Viewer at efficiency 1, with their known defects switched on one by one.
Errors are |predicted / measured - 1|: median, 90th percentile. Groups of fewer than 10 rows are not fitted.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from everybit.errors import SourceError
from everybit.plan.calibrate import Calibration, Sample, calibrate
from everybit.plan.cost import Cost, Parallel
from everybit.plan.curves import PROBE, Product, fit_curve
from everybit.plan.efficiency import IDEAL, Efficiency, prior
from everybit.plan.hardware import Hardware, read_hardware
from everybit.plan.importers import read_inference_bench, read_products, read_silicon
from everybit.plan.model import read_model
from everybit.plan.operators import Model
from everybit.plan.step import Step
from peers.served import commit, write_line

FITTED, LEAST_ROWS = 0.2, 10
Line = dict[str, Any]


def spread(errors: Iterable[float]) -> Line:
    found = np.abs(list(errors))
    return {
        "rows": len(found),
        "median_percent": round(100 * float(np.median(found)), 1),
        "p90_percent": round(100 * float(np.quantile(found, 0.9)), 1),
    }


def errors(samples: Sequence[Sample], efficiency: Efficiency | None, measure: str = "tpot_s") -> list[float]:
    """None: each sample's own prior."""
    return [
        getattr(one.predict(efficiency or prior(one.hardware, one.engine)), measure) / getattr(one, measure) - 1
        for one in samples
    ]


# --- servers
def servers(folder: Path, seeds: int) -> list[Line]:
    possible, impossible = [], 0
    for one in read_silicon(folder / "silicon_e2e.csv").samples:
        try:
            one.predict(IDEAL)
            possible.append(one)
        except SourceError:  # does not fit in memory as assumed, or over more devices than the card's links join
            impossible += 1
    parts = {
        True: [one for one in possible if dense(one.model)],
        False: [one for one in possible if not dense(one.model)],
    }
    lines: list[Line] = [{"what": "rows that the planner cannot have", "rows": impossible}]
    peers = read_peers(folder / "reference" / "aiconfigurator_0.12_predictions.csv")
    for is_dense, samples in parts.items():
        name = "dense" if is_dense else "moe"
        groups = defaultdict(list)
        for one in samples:
            groups[one.key].append(one)
        tested = held_out(groups, seeds)
        for measure in ("tpot_s", "ttft_s"):
            label = f"{name} {measure[:4]}"
            lines.append({"what": f"{label}, priors", **spread(errors(samples, None, measure))})
            found = [error for rows, fit in tested for error in errors(rows, fit.efficiency, measure)]
            lines.append({"what": f"{label}, calibrated", "seeds": seeds, **spread(found)})
        lines += per_group(name, groups, tested)
        lines.append({"what": f"{name} pairs in order, priors", **ordered(samples, None)})
        right = [ordered(rows, fit.efficiency) for rows, fit in tested]
        pairs = sum(one["pairs"] for one in right)
        share = sum(one["pairs"] * one["percent"] for one in right) / pairs
        lines.append({"what": f"{name} pairs in order, calibrated", "pairs": pairs, "percent": round(share, 1)})
        lines += beside_peer(name, samples, tested, peers)
        lines += unseen(name, samples)
    return lines


def dense(model: Model) -> bool:
    return not any(layer.experts for layer in model.layers)


def held_out(groups: dict[Any, list[Sample]], seeds: int) -> list[tuple[list[Sample], Calibration]]:
    """Of each group and seed: the rows that were not fitted, and the fit."""
    found = []
    for samples, seed in itertools.product(groups.values(), range(seeds)):
        if len(samples) >= LEAST_ROWS:
            mixed = random.Random(seed).sample(samples, len(samples))
            cut = max(2, round(FITTED * len(mixed)))
            start = prior(samples[0].hardware, samples[0].engine)
            found.append((mixed[cut:], calibrate(mixed[:cut], start, draws=0)))
    return found


def per_group(name: str, groups: dict[Any, list[Sample]], tested: list[tuple[list[Sample], Calibration]]) -> list[Line]:
    lines = []
    for key, samples in sorted(groups.items()):
        mine = [(rows, fit) for rows, fit in tested if rows[0].key == key]
        if not mine:
            continue
        found = [error for rows, fit in mine for error in errors(rows, fit.efficiency)]
        inside = [
            abs(math.log1p(error)) < 1.645 * fit.of(rows[0].model).efficiency.spread
            for rows, fit in mine
            for error in errors(rows, fit.efficiency)
        ]
        lines.append(
            {
                "what": f"{name} tpot, {' '.join(filter(None, key))}",
                "priors": spread(errors(samples, None)),
                "calibrated": spread(found),
                "inside_90_percent_interval": round(100 * sum(inside) / len(inside), 1),
            }
        )
    return lines


def ordered(samples: Sequence[Sample], efficiency: Efficiency | None) -> Line:
    """Pairs of one hardware, load and model that differ by more than 15 %: is the faster one told?"""
    groups = defaultdict(list)
    for one in samples:
        predicted = one.predict(efficiency or prior(one.hardware, one.engine)).tpot_s
        groups[one.concurrency].append((one.tpot_s, predicted))
    right = pairs = 0
    for rows in groups.values():
        for (a, x), (b, y) in itertools.combinations(rows, 2):
            if max(a, b) > 1.15 * min(a, b):
                pairs += 1
                right += (a < b) == (x < y)
    return {"pairs": pairs, "percent": round(100 * right / max(pairs, 1), 2)}


def read_peers(path: Path) -> dict[str, float]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["id"]: float(row["aic_tpot"]) / 1e3 for row in csv.DictReader(file)}


def beside_peer(
    name: str, samples: list[Sample], tested: list[tuple[list[Sample], Calibration]], peers: dict[str, float]
) -> list[Line]:
    """On the rows that aiconfigurator predicted; calibrated: the mean over the seeds that held the row out."""
    both = [one for one in samples if one.source in peers]
    ours: defaultdict[str, list[float]] = defaultdict(list)
    for rows, fit in tested:
        for one in rows:
            if one.source in peers:
                ours[one.source].append(math.log(one.predict(fit.efficiency).tpot_s))
    held = [one for one in both if one.source in ours]
    return [
        {
            "what": f"{name} tpot, aiconfigurator's rows, its own",
            **spread(peers[s.source] / s.tpot_s - 1 for s in both),
        },
        {"what": f"{name} tpot, aiconfigurator's rows, priors", **spread(errors(both, None))},
        {
            "what": f"{name} tpot, aiconfigurator's rows, calibrated",
            **spread(math.exp(np.mean(ours[s.source])) / s.tpot_s - 1 for s in held),
        },
    ]


def unseen(name: str, samples: list[Sample]) -> list[Line]:
    """One model left out of the fit of each hardware and engine, versions together; dense models that share none are
    fitted on the other GPU of the generation."""
    lines, everything = [], []
    groups = defaultdict(list)
    for one in samples:
        groups[one.key[:2]].append(one)
    for key, rows in sorted(groups.items()):
        for left in sorted({one.model.name for one in rows}):
            seen = [one for one in rows if one.model.name != left]
            test = [one for one in rows if one.model.name == left]
            if len(seen) >= LEAST_ROWS and len(test) >= LEAST_ROWS:
                fit = calibrate(seen, prior(rows[0].hardware, key[1]), draws=0)
                found = errors(test, fit.efficiency)
                everything += found
                lines.append({"what": f"{name} tpot, unseen {left}, {' '.join(key)}", **spread(found)})
    if name == "dense":
        for a, b in itertools.permutations(("H100 SXM", "H200 SXM"), 2):
            seen, test = groups[a, "trtllm"], groups[b, "trtllm"]
            fit = calibrate(seen, prior(seen[0].hardware, "trtllm"), draws=0)
            found = errors(test, fit.efficiency)
            everything += found
            lines.append({"what": f"dense tpot, unseen {test[0].model.name}, {b}, fitted on {a}", **spread(found)})
    return [*lines, {"what": f"{name} tpot, unseen models", **spread(everything)}]


# --- batches
def batches(folder: Path) -> list[Line]:
    samples = []
    for one in read_inference_bench(folder / "llm_inference_bench_a100_and_others.csv").samples:
        try:
            one.predict(IDEAL)
            samples.append(one)
        except SourceError:
            continue
    lines, everything = [], []
    for engine in ("vllm", "trtllm"):
        mine = [one for one in samples if one.engine == engine and dense(one.model)]
        seen = [one for one in mine if one.model.name == "meta-llama/Meta-Llama-3-8B"]
        fit = calibrate(seen, prior(seen[0].hardware, engine), draws=0)
        lines.append({"what": f"batches, A100 {engine}, priors", **spread(errors(mine, None, "e2e_s"))})
        for model in sorted({one.model.name for one in mine} - {seen[0].model.name}):
            found = errors([one for one in mine if one.model.name == model], fit.efficiency, "e2e_s")
            everything += found
            lines.append({"what": f"batches, A100 {engine}, unseen {model}", **spread(found)})
    return [*lines, {"what": "batches, unseen dense models", **spread(everything)}]


# --- weight-only products
def weight_only(folder: Path) -> list[Line]:
    lines = []
    for file, card in (("gemm_a100_sxm_trtllm1.0.0", "a100-80-sxm"), ("gemm_h200_sxm_trtllm1.2.0rc5", "h200-sxm")):
        hardware = read_hardware(card)
        peaks = hardware.main_memory.bytes_per_s, hardware.flops_of("bf16")
        tables = {name: table(folder / "ops" / f"{file}.csv", name) for name in ("bfloat16", "int4_wo", "int8_wo")}
        plain = fit_curve(probed(tables["bfloat16"]), 16, *peaks)
        for name, bits in (("int4_wo", 4.125), ("int8_wo", 8.0)):
            low = fit_curve(probed(tables[name]), bits, *peaks)
            shared = [
                (m, n, k)
                for m, n, k in tables[name]
                if min(n, k) >= 4096 and (m, n, k) not in PROBE and (m, n, k) in tables["bfloat16"]
            ]
            true = {one: tables[name][one] / tables["bfloat16"][one] for one in shared}
            curve = spread(low.seconds(*one) / plain.seconds(*one) / true[one] - 1 for one in shared)
            lines.append({"what": f"{name} / bf16, {hardware.name}, curve of 7 shapes", **curve})
            medians = {m: float(np.median([true[one] for one in shared if one[0] == m])) for m, _, _ in shared}
            lines.append(
                {
                    "what": f"{name} / bf16, {hardware.name}, median by rows",
                    **spread(medians[s[0]] / true[s] - 1 for s in shared),
                }
            )
    return lines


def table(path: Path, dtype: str) -> dict[tuple[int, int, int], float]:
    return {(one.m, one.n, one.k): one.seconds for one in read_products(path, dtype)}


def probed(products: dict[tuple[int, int, int], float]) -> list[Product]:
    return [Product(*shape, products[shape]) for shape in PROBE]


# --- parity
# File, name, column, our run, the rows that it is of, switches.
Case = tuple[str, str, str, Callable[[dict[str, str], Sequence[str]], float], dict[str, str], tuple[str, ...]]
GIB = 2**30 / 1e9 * (1 + 1e-9)  # exactly GiB, a card refuses as the mistake that it is
GENZ = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B", "mixtral": "mistralai/Mixtral-8x7B-v0.1",
}  # fmt: skip
GENZ_BITS = {"bf16": 16, "int8": 8, "int4": 4}
GENZ_CARDS = {"A100-80": "a100-80-sxm", "H100": "h100-sxm", "H200": "h200-sxm"}
VIEWER_BITS = {"w16a16kv16": (16, 16), "w8a8kv8": (8, 8), "w4a16kv16": (4, 16), "w3a16kv16": (3, 16)}
VIEWER_CARDS = {"nvidia_A100_80G": "a100-80-sxm", "nvidia_H100_SXM": "h100-sxm"}
VIEWER_H100_BYTES_PER_S = 3.072e12  # 3 x 1,024 GB/s, where the data sheet has 3.35 TB/s


def widths(model: Model, bits: float) -> Model:
    """All numbers of a model at `bits`, head included."""
    layers = tuple(
        replace(
            layer,
            linears=tuple(replace(one, bits=bits) for one in layer.linears),
            experts=layer.experts
            and replace(layer.experts, linears=tuple(replace(one, bits=bits) for one in layer.experts.linears)),
        )
        for layer in model.layers
    )
    assert model.head
    return replace(model, layers=layers, head=replace(model.head, bits=bits), kv_bits=bits)


def scaled(hardware: Hardware, bandwidth: float = 1.0, flops: float = 1.0, links: float = 1.0) -> Hardware:
    """Of others' defects; their links have no hops, only what the caller gives as `link_s`."""
    main = replace(hardware.main_memory, bytes_per_s=hardware.main_memory.bytes_per_s * bandwidth)
    return replace(
        hardware,
        memory=(main, *hardware.memory[1:]),
        flops={name: rate * flops for name, rate in hardware.flops.items()},
        links=tuple(replace(link, bytes_per_s=link.bytes_per_s * links, latency_s=0.0) for link in hardware.links),
    )


def genz(row: dict[str, str], switches: Sequence[str]) -> float:
    """Seconds with some of GenZ's ways switched on."""
    bits, batch, context, tp = GENZ_BITS[row["bits"]], int(row["batch"]), int(row["ctx"]), int(row["tp"])
    model, fewer = widths(read_model(GENZ[row["model"]]), bits), 16 / bits
    hardware = scaled(
        read_hardware(GENZ_CARDS[row["system"]]),
        GIB if "GB are GiB" in switches else 1,
        fewer if "bits divide FLOPs" in switches else 1,
        fewer if "bits shrink messages" in switches else 1,
    )
    routed = any(layer.experts for layer in model.layers)
    if "experts: top-k" in switches:
        layers = tuple(
            replace(one, experts=one.experts and replace(one.experts, count=one.experts.chosen)) for one in model.layers
        )
        model = replace(model, layers=layers)
    hop_s = 5e-6 + 2 * (tp - 1) * 1e-6 if "5 us and hops" in switches else 0.0
    cost = Cost(model, hardware, Parallel(tp), replace(IDEAL, link_s=hop_s))
    tokens = batch * (context if row["phase"] == "prefill" else 1)
    step = Step(chunks=((context, 0),) * batch) if tokens > batch else Step(decodes=(context,) * batch)
    seconds, flops = cost.seconds(step), cost.peak(bits, 16)[0]
    if "a third collective for experts" in switches and routed:
        seconds += sum(layer.count for layer in model.layers) * hop_s
    if tokens > batch and "two heads a prompt token" in switches:
        seconds += 4 * tokens * model.hidden * model.vocabulary / tp / flops
    if tokens > batch and "no causal half" in switches:
        seconds += square(model, batch, context) / tp / flops
    return seconds


def square(model: Model, batch: int, context: int) -> float:
    """FLOPs of attention above the diagonal."""
    return sum(
        layer.count * layer.attention.heads * (layer.attention.key_dim + layer.attention.value_dim) * batch * context**2
        for layer in model.layers
        if layer.attention
    )


def viewed(row: dict[str, str], switches: Sequence[str]) -> tuple[Model, Hardware, int]:
    """Of a row of LLM-Viewer's: also the bits of activations and cache."""
    weight, other = VIEWER_BITS[row["bits"]]
    name = row["model"].replace("Llama-3-8B", "Meta-Llama-3-8B")
    model = replace(widths(read_model(name, activation_bits=other), weight), kv_bits=float(other))
    hardware = read_hardware(VIEWER_CARDS[row["hw"]])
    if "H100 at 3,072 GB/s" in switches and row["hw"] == "nvidia_H100_SXM":
        hardware = scaled(hardware, VIEWER_H100_BYTES_PER_S / hardware.main_memory.bytes_per_s)
    return model, hardware, other


def viewer(row: dict[str, str], switches: Sequence[str]) -> float:
    """Seconds of a decoding step with some of LLM-Viewer's ways switched on."""
    model, hardware, other = viewed(row, switches)
    if "flash ignores GQA" in switches and row["attn"] == "flash":
        layers = []
        for one in model.layers:
            assert one.attention
            times = one.attention.heads // one.attention.kv_heads
            attention = replace(one.attention, cache_numbers=one.attention.cache_numbers * times)
            layers.append(replace(one, attention=attention))
        model = replace(model, layers=tuple(layers))
    batch, context = int(row["batch"]), int(row["seqlen"])
    seconds = Cost(model, hardware).seconds(Step(decodes=(context,) * batch))
    if "naive moves scores" in switches and row["attn"] == "naive":  # written and read, before and after the softmax
        heads = sum(one.count * one.attention.heads for one in model.layers if one.attention)
        seconds += 4 * batch * context * heads * other / 8 / hardware.main_memory.bytes_per_s
    return seconds


def viewer_prefill(row: dict[str, str], switches: Sequence[str]) -> float:
    """Seconds of a prompt with some of LLM-Viewer's ways switched on (its model_analyzer.py, 472f71f)."""
    model, hardware, other = viewed(row, switches)
    batch, tokens, each = int(row["batch"]), int(row["seqlen"]), other / 8
    bandwidth = hardware.main_memory.bytes_per_s
    works = Cost(model, hardware).works(Step(chunks=((tokens, 0),) * batch))
    seconds = sum(work.many * max(work.compute_s, work.memory_s) for work in works if work.kind != "attention")
    if "norms, sums, activations apart" in switches:  # 4 that read and write a hidden state, and 1 that reads two
        seconds += sum(layer.count for layer in model.layers) * 11 * batch * tokens * model.hidden * each / bandwidth
    attention = [work for work in works if work.kind == "attention"]
    if "no causal half" not in switches:
        return seconds + sum(work.many * max(work.compute_s, work.memory_s) for work in attention)
    peak = Cost(model, hardware).peak(16 if other == 16 else 8, other)[0]
    for layer in model.layers:
        assert layer.attention
        heads, size = layer.attention.heads, layer.attention.key_dim
        pairs, softmax = batch * tokens**2 * heads, 5 / peak
        product, flash = 2 * size / peak, row["attn"] == "flash"
        if "scores in memory" not in switches:
            seconds += layer.count * 2 * pairs * product
            continue
        rows = batch * tokens * size * heads * each
        few = rows * layer.attention.kv_heads / heads
        if flash:  # its output has the size of the scores, and is written twice; keys are read for each 128 rows
            moved = rows + 2 * pairs * each + 2 * math.ceil(tokens / min(128, size)) * rows
            seconds += layer.count * max(pairs * (2 * product + softmax), moved / bandwidth)
        else:
            seconds += layer.count * max(pairs * product, (2 * few + pairs * each) / bandwidth)
            seconds += layer.count * max(pairs * product, (few + rows + pairs * each) / bandwidth)
            seconds += layer.count * max(pairs * softmax, 2 * pairs * each / bandwidth)
    return seconds


CASES: list[Case] = [
    ("genz_0.0.16_outputs.csv", "GenZ decode", "latency_ms", genz, {"phase": "decode"},
     ("GB are GiB", "5 us and hops", "experts: top-k", "bits divide FLOPs", "bits shrink messages",
      "a third collective for experts")),
    ("genz_0.0.16_outputs.csv", "GenZ prefill", "latency_ms", genz, {"phase": "prefill"},
     ("GB are GiB", "5 us and hops", "experts: top-k", "bits divide FLOPs", "bits shrink messages",
      "a third collective for experts", "two heads a prompt token", "no causal half")),
    ("llm_viewer_outputs.csv", "LLM-Viewer decode", "decode_ms", viewer, {},
     ("H100 at 3,072 GB/s", "flash ignores GQA", "naive moves scores")),
    ("llm_viewer_outputs.csv", "LLM-Viewer prefill", "prefill_ms", viewer_prefill, {},
     ("H100 at 3,072 GB/s", "norms, sums, activations apart", "no causal half", "scores in memory")),
]  # fmt: skip


def compare(folder: Path, case: Case, on: int) -> Line:
    """The error with the first `on` switches."""
    file, _, column, run, only, switches = case
    with (folder / "reference" / file).open(encoding="utf-8", newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if only.items() <= row.items()]
    rows = [row for row in rows if not row[column].startswith("ERR")]  # did not fit in memory
    return spread(run(row, switches[:on]) / (float(row[column]) / 1e3) - 1 for row in rows)


def parity(folder: Path) -> list[Line]:
    """The error after each switch, so that every difference has its name."""
    lines = []
    for case in CASES:
        for on in range(len(case[-1]) + 1):
            label = f"+ {case[-1][on - 1]}" if on else "as it is"
            lines.append({"what": f"parity, {case[1]}, {label}", **compare(folder, case, on)})
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common = {"benchmark": "plan_accuracy", "commit": commit()}
    lines = [*servers(args.folder, args.seeds), *batches(args.folder), *weight_only(args.folder), *parity(args.folder)]
    for line in lines:
        write_line(args.out, {**common, **line})
    print()
    for line in lines:
        shown = line.get("calibrated", line)
        figures = ", ".join(f"{key.removesuffix('_percent')} {value}" for key, value in shown.items() if key != "what")
        print(f"{line['what']:75} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
