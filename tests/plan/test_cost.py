"""Step times by hand, what each efficiency changes, splits over devices, weight-only curves, offload, speculation."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from everybit.errors import SourceError
from everybit.plan.collectives import gather, levels, sends
from everybit.plan.cost import Cost, Parallel
from everybit.plan.curves import PROBE, Curve, Product, compare, fit_curve
from everybit.plan.efficiency import IDEAL, Efficiency, Reading, WeightOnly, prior
from everybit.plan.hardware import Hardware, cards, read_hardware
from everybit.plan.importers import read_products
from everybit.plan.model import read_model
from everybit.plan.offload import Placement, pin_and_stream, place_planes
from everybit.plan.operators import Model
from everybit.plan.speculation import Speculation
from everybit.plan.step import Step
from plan_accuracy import CASES, Case
from plan_accuracy import compare as compare_tools

DECODE = Step(decodes=(1024,) * 8)


@pytest.fixture(scope="module")
def h100() -> Hardware:
    return read_hardware("h100-sxm")


@pytest.fixture(scope="module")
def llama() -> Model:
    return read_model("meta-llama/Meta-Llama-3-8B")


def test_decoding_reads_weights_and_caches(llama: Model, h100: Hardware) -> None:
    """By hand: each weight but the embedding once, 2 * 8 * 128 numbers a token and layer, and small activations."""
    weights = llama.weight_bytes - llama.embedding.bytes
    cache = 8 * 1024 * 32 * 2 * 8 * 128 * 2
    found = Cost(llama, h100).times(DECODE)
    assert found.cache_s == pytest.approx(cache / 3.35e12)
    assert found.memory_s == pytest.approx(weights / 3.35e12, rel=0.01)
    assert found.memory_s > weights / 3.35e12
    assert found.compute_s == found.link_s == found.launch_s == 0
    assert found.binding == "reading weights"


def test_prompts_multiply_and_attend_to_half_a_square(llama: Model, h100: Hardware) -> None:
    linears = sum(one.weights * count for one, count in llama.linears if one.name != "head")
    flops = 2 * 4096 * linears + 32 * 2 * 32 * 256 * 4096 * 4097 / 2
    found = Cost(llama, h100).times(Step(chunks=((4096, 0),)))
    assert found.compute_s == pytest.approx(flops / 989.4e12)
    assert found.binding == "arithmetic"


def test_chunks_of_a_prompt_cost_its_arithmetic(llama: Model, h100: Hardware) -> None:
    cost = Cost(llama, h100)
    whole = cost.times(Step(chunks=((8192, 0),))).compute_s
    parts = sum(cost.times(Step(chunks=((2048, past),))).compute_s for past in range(0, 8192, 2048))
    assert parts == pytest.approx(whole)


def test_a_mixed_step_is_cheaper_than_two(llama: Model, h100: Hardware) -> None:
    cost = Cost(llama, h100)
    chunk = Step(chunks=((512, 0),))
    mixed = cost.seconds(Step(chunk.chunks, DECODE.decodes))
    assert max(cost.seconds(DECODE), cost.seconds(chunk)) < mixed < cost.seconds(DECODE) + cost.seconds(chunk)


def test_nothing_takes_no_time(llama: Model, h100: Hardware) -> None:
    assert Cost(llama, h100, efficiency=prior(h100)).seconds(Step()) == 0


def test_windows_bound_what_is_read(h100: Hardware) -> None:
    cost = Cost(read_model("mistralai/Mistral-7B-v0.1"), h100)
    assert cost.seconds(Step(decodes=(4096,))) == cost.seconds(Step(decodes=(20_000,)))
    far = cost.times(Step(chunks=((64, 20_000),)))
    assert far == cost.times(Step(chunks=((64, 10_000),)))


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"memory": 0.5}, "memory_s"),
        ({"cache": 0.5}, "cache_s"),
        ({"layer_s": 1e-5}, "launch_s"),
        ({"step_s": 1e-3}, "launch_s"),
        ({"sequence_s": 1e-5}, "launch_s"),
        ({"link": 0.5}, "link_s"),
        ({"link_s": 1e-5}, "link_s"),
    ],
)
def test_each_efficiency_has_its_part(llama: Model, h100: Hardware, changed: dict[str, float], part: str) -> None:
    split = Parallel(tp=2)
    ideal = Cost(llama, h100, split).times(DECODE)
    found = Cost(llama, h100, split, replace(IDEAL, **changed)).times(DECODE)  # type: ignore[arg-type]
    assert getattr(found, part) > getattr(ideal, part)
    assert found.total_s > ideal.total_s


def test_arithmetic_of_narrow_numbers_and_of_attention(h100: Hardware) -> None:
    step = Step(chunks=((8192, 0),))
    narrow = read_model("meta-llama/Meta-Llama-3-8B", weight_bits="fp8", activation_bits=8)
    wide = read_model("meta-llama/Meta-Llama-3-8B")
    slower = replace(IDEAL, narrow=0.5)
    assert Cost(narrow, h100, efficiency=slower).seconds(step) > 1.5 * Cost(narrow, h100).seconds(step)
    assert Cost(wide, h100, efficiency=slower).seconds(step) == Cost(wide, h100).seconds(step)
    assert Cost(wide, h100, efficiency=replace(IDEAL, attention=0.5)).seconds(step) > Cost(wide, h100).seconds(step)


def test_cards_without_narrow_arithmetic_multiply_wider() -> None:
    a100 = read_hardware("a100-80-sxm")
    model = read_model("meta-llama/Meta-Llama-3-8B", weight_bits="fp8", activation_bits=8)
    cost = Cost(model, a100)
    assert cost.peak(8, 8) == (624e12, 8)  # as int8
    assert cost.peak(4.5, 16) == (312e12, 16)
    assert Cost(model, read_hardware("b200")).peak(4.5, 4) == (9000e12, 4)
    only8 = Cost(model, read_hardware("flightllm-u280"))
    assert only8.peak(8, 8) == (24.5e12, 8)
    with pytest.raises(SourceError, match=r"multiplies int8 only, but the model needs 16 bits \(attention always 16\)"):
        only8.seconds(DECODE)


def test_int4_is_no_fixed_speed_up() -> None:
    card = read_hardware("h200-sxm")
    plain, low = read_model("meta-llama/Meta-Llama-3-8B"), read_model("meta-llama/Meta-Llama-3-8B", weight_bits="int4")
    efficiency = prior(card)

    def gain(rows: int) -> float:
        step = Step(decodes=(1,) * rows)
        return Cost(plain, card, efficiency=efficiency).seconds(step) / Cost(low, card, efficiency=efficiency).seconds(
            step
        )

    assert 1.5 < gain(1) < 3
    assert gain(8) < 0.8 * gain(1)
    assert gain(128) < 1.2


@pytest.mark.parametrize("engine", ["any", "everybit"])
@pytest.mark.parametrize("card", ["h100-sxm", "a100-80-sxm", "xeon-8480-plus"])
def test_more_bits_take_longer_and_none_jumps(card: str, engine: str) -> None:
    """Up to the width that is multiplied; ours are slower than plain products from 16 rows on, as measured."""
    hardware = read_hardware(card)
    models = [read_model("meta-llama/Meta-Llama-3-8B", weight_bits=bits / 4) for bits in range(12, 65)]
    for rows in (1, 4, 8, *(() if engine == "everybit" else (64,))):
        step = Step(decodes=(1,) * rows)
        found = [Cost(one, hardware, efficiency=prior(hardware, engine)).seconds(step) for one in models]
        assert all(1 - 1e-9 < b / a < 1.07 for a, b in itertools.pairwise(found))
        assert found[0] < found[-1]


def test_unpacking_takes_no_less_for_more_bits() -> None:
    """By hand: 1.17 bytes' time a weight however few its bits, then reading, then half way to two bytes."""
    low = WeightOnly(many=Reading(least=1.17), few=Reading(), few_rows=2, compute=0.8, extra_s=6e-6)
    assert [low.of(bits, 16, 64)[0] for bits in (2, 4.125, 8)] == [1.17] * 3
    assert low.of(12, 16, 64) == pytest.approx(((1.17 + 2) / 2, 0.9, 3e-6))
    assert low.of(16, 16, 64) == (2, 1, 0)
    assert [low.of(4, 16, rows)[0] for rows in (1, 2, 3, 4, 8)] == [0.5, 0.5, 0.75, 1, 1.17]
    assert [Reading(0.5, most=1.5).bytes_each(bits) for bits in (4, 8, 14)] == [1, 1.5, 1.75]


def test_unpacking_goes_as_fast_as_fp32() -> None:
    """H100 unpacks as H200 does, and reads 3.35 / 4.8 as fast; L4 has less memory still for its lanes."""
    h200, h100, l4 = (prior(read_hardware(one)).weight_only.many.least for one in ("h200-sxm", "h100-sxm", "l4"))
    assert h100 == pytest.approx(h200 * 3.35 / 4.8)
    assert l4 < 0.2


def test_our_kernels_on_a_gpu_are_as_measured() -> None:
    """Of the products that the prior was fitted to; launches, which a server hides, are 3 us each."""
    hardware = read_hardware("h200-sxm")
    efficiency = prior(hardware, "everybit")
    shapes = {"q, o": (4096, 4096), "qkv": (6144, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
    errors = []
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-26-gpu-linear.jsonl"
    for row in map(json.loads, path.read_text().splitlines()):
        if row["figure"] == "ours" and row["shape"] in shapes:
            (n, k), rows, bits = shapes[row["shape"]], row["M"], row["bits"]
            each, share, _ = efficiency.weight_only.of(bits, 16, rows)
            reading_s = (n * k * each + 2 * rows * (n + k)) / hardware.main_memory.bytes_per_s / efficiency.memory
            arithmetic_s = 2 * rows * n * k / hardware.flops["bf16"] / efficiency.compute / share
            errors.append(abs((3e-6 + max(reading_s, arithmetic_s)) / (row["us"] * 1e-6) - 1))
    assert len(errors) > 200
    assert statistics.median(errors) < 0.12
    assert statistics.quantiles(errors, n=10)[-1] < 0.3


def test_tensor_parallelism(h100: Hardware) -> None:
    model = read_model("meta-llama/Llama-3.1-70B")
    one, four = (Cost(model, h100, Parallel(tp=n)).times(DECODE) for n in (1, 4))
    assert four.memory_s == pytest.approx(one.memory_s / 4, rel=0.01)
    assert four.cache_s == pytest.approx(one.cache_s / 4)
    assert four.link_s == pytest.approx(80 * 2 * (2 * 3 / 4 * 8 * 8192 * 2 / 450e9 + 4 * 0.87e-6))
    assert Cost(model, h100, Parallel(tp=4), replace(IDEAL, link_s=1e-5)).times(DECODE).link_s == pytest.approx(
        four.link_s + 160 * 1e-5
    )


def test_cache_heads_are_split_no_further_than_they_go(llama: Model, h100: Hardware) -> None:
    eight = Cost(llama, h100, Parallel(tp=8)).times(DECODE)
    fewer = replace(
        llama,
        layers=tuple(replace(one, attention=replace(one.attention, kv_heads=2)) for one in llama.layers),  # type: ignore[type-var]
    )
    assert Cost(fewer, h100, Parallel(tp=8)).times(DECODE).cache_s == pytest.approx(4 * eight.cache_s)


# --- links
HOP_S, FAR_S = 0.87e-6, 8.4e-6  # of the H100's NVLink and InfiniBand


def test_a_group_is_cut_by_the_links_that_join_it(h100: Hardware) -> None:
    def cut(hardware: Hardware, devices: int) -> list[tuple[float, str]]:
        return [(one.parts, one.link.kind) for one in levels(hardware, devices)]

    assert cut(h100, 1) == []
    assert cut(h100, 8) == [(8, "nvswitch")]
    assert cut(h100, 16) == [(8, "nvswitch"), (2, "infiniband")]
    assert cut(h100, 12) == [(6, "nvswitch"), (2, "infiniband")]
    assert cut(read_hardware("h100-pcie"), 8) == [(2, "nvlink"), (4, "pcie")]
    assert cut(read_hardware("gb200"), 16) == [(16, "nvswitch")]
    with pytest.raises(SourceError, match="no link joins 16 devices"):
        levels(read_hardware("a10g"), 16)


def test_an_all_reduce_over_two_nodes(llama: Model, h100: Hardware) -> None:
    """By hand: an eighth of the bytes leaves the node."""
    found = Cost(llama, h100, Parallel(tp=16), replace(IDEAL, link=0.5, link_s=1e-5)).times(DECODE).link_s
    moved = 8 * 4096 * 2
    bytes_s = (7 / 8 * moved / 450e9 + 1 / 2 * moved / 8 / 50e9) / 0.5
    assert found == pytest.approx(64 * (1e-5 + 2 * (3 * HOP_S + FAR_S + bytes_s)))


@pytest.mark.parametrize("name", ["h100-sxm", "h100-pcie", "mi300x", "v100-sxm2"])
@pytest.mark.parametrize("step", [DECODE, Step(chunks=((4096, 0),))], ids=["decode", "prefill"])
def test_crossing_is_never_faster_than_staying(llama: Model, name: str, step: Step) -> None:
    """The same 8 devices, with fewer and fewer of them in a node; the far link's own latency is told too low."""
    card = read_hardware(name)
    far = replace(card.links[-1], bytes_per_s=12.5e9, devices=64, latency_s=0.0)
    cut = [replace(card, links=(replace(card.links[0], devices=inside), far)) for inside in (8, 4, 2, 1)]
    for split in (Parallel(tp=8), Parallel(tp=4, pp=2), Parallel(pp=8)):
        found = [Cost(llama, one, split, prior(card)).times(step).link_s for one in cut]
        assert found == sorted(found)
        assert found[0] < found[-1]


def test_a_card_tells_its_own_latency(llama: Model, h100: Hardware) -> None:
    slow = replace(h100, links=tuple(replace(one, latency_s=1e-4) for one in h100.links))
    split = Parallel(tp=2)
    assert Cost(llama, slow, split).times(DECODE).link_s - Cost(llama, h100, split).times(DECODE).link_s == (
        pytest.approx(64 * 2 * (1e-4 - HOP_S))
    )


def test_a_pipeline_sends_between_stages(llama: Model, h100: Hardware) -> None:
    one, two = (Cost(llama, h100, Parallel(pp=n), replace(IDEAL, link_s=1e-5)).times(DECODE) for n in (1, 2))
    assert two.total_s - one.total_s == pytest.approx(1e-5 + HOP_S + 8 * 4096 * 2 / 450e9)


def test_sends_cross_nodes_where_stages_do(h100: Hardware) -> None:
    def cross(stage: int, stages: int) -> list[tuple[int, str]]:
        return [(many, link.kind) for many, link in sends(h100, stage, stages)]

    assert cross(8, 1) == []
    assert cross(2, 4) == [(3, "nvswitch")]
    assert cross(4, 4) == [(2, "nvswitch"), (1, "infiniband")]
    assert cross(8, 2) == [(1, "infiniband")]
    with pytest.raises(SourceError, match="no link joins 16 devices"):
        sends(read_hardware("a10g"), 8, 2)


def test_replicas_of_dense_models_tell_each_other_nothing(llama: Model, h100: Hardware) -> None:
    one, many = (Cost(llama, h100, Parallel(tp=8, dp=n)).times(DECODE) for n in (1, 1024))
    assert one == many


@pytest.mark.parametrize(("table", "card"), [("a100_dgx", "a100-80-sxm"), ("h100_dgx", "h100-sxm")])
def test_large_all_reduces_of_a_node(shared_data: Path, table: str, card: str) -> None:
    """Short ones of this table are mostly launches (7 to 60 us for the same size), which engines capture in graphs."""
    hardware, errors = read_hardware(card), []
    efficiency = prior(hardware)
    with (shared_data / "planner" / "ops" / f"allreduce_{table}_vidur.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            devices, size = int(row["num_workers"]), float(row["size_bytes"])
            if row["devices_per_node"] == row["num_workers"] and size >= 8e6:
                half = gather(levels(hardware, devices), size)
                took_s = efficiency.link_s + 2 * (half.steps_s + half.bytes_s / efficiency.link)
                errors.append(abs(took_s / (float(row["median_ms"]) / 1e3) - 1))
    assert len(errors) > 1000
    assert sorted(errors)[len(errors) // 2] < 0.3


def test_experts_that_wake_are_read() -> None:
    model, h200 = read_model("mistralai/Mixtral-8x7B-v0.1"), read_hardware("h200-sxm")
    cost = Cost(model, h200)
    experts = [work for work in cost.works(Step(decodes=(1,) * 32)) if work.name.startswith("expert")]
    layer = model.layers[0].experts
    assert layer
    weights = sum(one.bytes for one in layer.linears) * 8 * (1 - 0.75**32) / 4.8e12
    assert sum(work.memory_s for work in experts) == pytest.approx(weights, rel=0.01)
    assert cost.seconds(Step(decodes=(1,) * 32)) > 2.5 * cost.seconds(Step(decodes=(1,)))


def test_experts_over_data_parallel_groups(h100: Hardware) -> None:
    """Eight groups of 8 wake the experts of 64 tokens, an eighth of them on each device; attention is whole on each."""
    model = read_model("Qwen/Qwen3-30B-A3B")
    spread, alone = Cost(model, h100, Parallel(dp=8)), Cost(model, h100)
    read = [work.memory_s for work in spread.works(DECODE) if work.name == "expert_down"]
    whole = [work.memory_s for work in alone.works(Step(decodes=(1024,) * 64)) if work.name == "expert_down"]
    assert read[0] == pytest.approx(whole[0] / 8)
    assert spread.times(DECODE).cache_s == alone.times(DECODE).cache_s
    assert any(work.name == "all_to_all" for work in spread.works(DECODE))


def test_latent_attention_expands_for_prompts_only() -> None:
    model, h200 = read_model("deepseek-ai/DeepSeek-V3"), read_hardware("h200-sxm")
    cost = Cost(model, h200, Parallel(tp=8))
    prefill = sum(one.compute_s * one.many for one in cost.works(Step(chunks=((4096, 0),))) if one.name == "prefill")
    assert prefill == pytest.approx(61 * 2 * 128 / 8 * (192 + 128) * 4096 * 4097 / 2 / 989.4e12)
    decode = sum(one.compute_s * one.many for one in cost.works(Step(decodes=(4096,))) if one.name == "decode")
    assert decode == pytest.approx(61 * 2 * 128 / 8 * (576 + 512) * 4096 / 989.4e12)


def test_states_are_read_and_written(h100: Hardware) -> None:
    model = read_model("state-spaces/mamba-2.8b-hf")
    cost = Cost(model, h100)
    assert cost.seconds(Step(decodes=(10,))) == cost.seconds(Step(decodes=(10_000,)))
    assert cost.times(DECODE).cache_s == pytest.approx(8 * 2 * model.cache_bytes(0) / 3.35e12)


def test_steps_at_each_precision_of_an_overlay(llama: Model, h100: Hardware) -> None:
    by_bits = {bits: read_model("meta-llama/Meta-Llama-3-8B", weight_bits=float(bits)) for bits in (2, 8)}
    cost = Cost(llama, h100, by_bits=by_bits)
    assert cost.seconds(DECODE, 2) < cost.seconds(DECODE, 8) < cost.seconds(DECODE)
    with pytest.raises(SourceError, match=r"a step at 3 bits arrived, expected one of \[2, 8\]"):
        cost.seconds(DECODE, 3)


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"tp": 0}, "numbers from 1"),
        ({"tp": 3}, "does not divide 32 attention heads"),
        ({"pp": 33}, "33 pipeline stages for 32 layers"),
        ({"tp": 32, "pp": 64}, "no link joins 2048 devices"),
    ],
)
def test_splits_that_cannot_be(llama: Model, h100: Hardware, split: dict[str, int], told: str) -> None:
    with pytest.raises(SourceError, match=told):
        Cost(llama, h100, Parallel(**split))


def test_every_card_with_figures_has_a_prior() -> None:
    for name in cards():
        found = prior(read_hardware(name))
        assert 0 < found.memory <= 1
        assert found.spread > 0
        assert "assumed" in found.source or "rounded" in found.source or "guess" in found.source
    with pytest.raises(SourceError, match="engine 'tgi' has no prior, expected one of any, vllm"):
        prior(read_hardware("h100-sxm"), "tgi")


# --- curves
def test_a_probe_finds_its_curve() -> None:
    true = Curve(4.125, 2e12, 300e12, memory=0.6, few=0.8, compute=0.5, fixed_s=8e-6)
    found = fit_curve([Product(*one, true.seconds(*one)) for one in PROBE], 4.125, 2e12, 300e12)
    for m, n, k in ((1, 8192, 8192), (32, 12288, 4096), (2048, 8192, 8192)):
        assert found.seconds(m, n, k) == pytest.approx(true.seconds(m, n, k), rel=0.03)
    plain = replace(true, bits=16, memory=0.9, few=0.9, compute=0.7, fixed_s=9e-6)
    low = compare(true, plain)
    assert low == WeightOnly(Reading(least=4.125 / 8 * 0.9 / 0.6), Reading(0.8 / 0.9), 2, 0.5 / 0.7, 0.0)
    assert low.of(4.125, 16, 16)[0] == pytest.approx(4.125 / 8 * 0.9 / 0.6)
    with pytest.raises(SourceError, match="3 products arrived"):
        fit_curve([Product(1, 1, 1, 1.0)] * 3, 16, 1e12, 1e14)


@pytest.mark.parametrize(
    ("file", "card"),
    [("gemm_a100_sxm_trtllm1.0.0", "a100-80-sxm"), ("gemm_h200_sxm_trtllm1.2.0rc5", "h200-sxm")],
)
def test_seven_shapes_predict_int4_over_bf16(shared_data: Path, file: str, card: str) -> None:
    path, hardware = shared_data / "planner" / "ops" / f"{file}.csv", read_hardware(card)
    peaks = hardware.main_memory.bytes_per_s, hardware.flops_of("bf16")
    tables = {name: {one[:3]: one for one in read_products(path, name)} for name in ("int4_wo", "bfloat16")}
    low, plain = (
        fit_curve([tables[name][shape] for shape in PROBE], bits, *peaks)
        for name, bits in (("int4_wo", 4.125), ("bfloat16", 16))
    )
    errors = sorted(
        abs(
            low.seconds(*one) / plain.seconds(*one) * tables["bfloat16"][one].seconds / tables["int4_wo"][one].seconds
            - 1
        )
        for one in tables["int4_wo"]
        if min(one[1:]) >= 4096 and one not in PROBE and one in tables["bfloat16"]
    )
    assert len(errors) > 1000
    assert errors[len(errors) // 2] < 0.15


# --- parity
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_parity_when_the_defects_of_others_are_switched_on(shared_data: Path, case: Case) -> None:
    found = compare_tools(shared_data / "planner", case, len(case[-1]))
    assert found["rows"] > 100
    assert found["median_percent"] < 0.5
    assert found["p90_percent"] < 2.5


# --- offload
def test_streaming_takes_over(llama: Model, h100: Hardware) -> None:
    none = pin_and_stream(10e9, 20e9, h100)
    assert (none.streamed_bytes, none.stream_s) == (0, 0)
    part = pin_and_stream(16e9, 10e9, h100)
    assert part.stream_s == pytest.approx(6e9 / 64e9)
    found = Cost(llama, h100, placements={None: part}).times(DECODE)
    assert found.total_s == part.stream_s
    assert found.binding == "streaming weights from slower memory"
    with pytest.raises(SourceError, match="more than all its memory holds"):
        pin_and_stream(900e9, 10e9, h100)


def test_top_planes_are_pinned(h100: Hardware) -> None:
    assert place_planes(1e9, 8, 3.5e9, h100)[0] == 3
    assert place_planes(1e9, 8, 3.5e9, h100)[1].streamed_bytes == 5e9
    assert place_planes(1e9, 3, 3.5e9, h100)[1].streamed_bytes == 0  # a step at 3 bits needs no other plane
    with pytest.raises(SourceError, match="planes of 0 bytes"):
        place_planes(0, 8, 1e9, h100)


def test_a_step_streams_the_planes_of_its_own_bits(llama: Model, h100: Hardware) -> None:
    by_bits = {bits: read_model("meta-llama/Meta-Llama-3-8B", weight_bits=float(bits)) for bits in (3, 8)}
    placements: dict[int | None, Placement] = {bits: place_planes(1e9, bits, 3.5e9, h100)[1] for bits in by_bits}
    cost = Cost(llama, h100, by_bits=by_bits, placements=placements)
    assert cost.seconds(DECODE, 8) == pytest.approx(5e9 / 64e9)
    assert cost.seconds(DECODE, 3) < 0.01
    assert cost.seconds(Step(), 8) == 0


# --- speculation
@pytest.mark.parametrize(("draft", "acceptance"), [(0.18, 0.68), (0.23, 0.74), (0.30, 0.80)])
def test_acceptance_that_speculation_needs(draft: float, acceptance: float) -> None:
    """docs/log.md, 2026-11-26: 1.25x needs .68 at 2 bits, .74 at 3, .80 at 4, with the best of three lengths."""
    verify = {2: 1.38, 4: 1.42, 8: 1.66}
    best = max(Speculation(n, acceptance, 2).gain(draft, verify[n]) for n in verify)
    assert best == pytest.approx(1.25, abs=0.04)


def test_limits_of_speculation() -> None:
    assert Speculation(4, 1, 2).tokens == 5
    assert Speculation(4, 0, 2).tokens == 1
    assert Speculation(4, 0.999999, 2).tokens == pytest.approx(5, rel=1e-4)
    with pytest.raises(SourceError, match="an acceptance from 0 to 1"):
        Speculation(4, 1.1, 2)


def test_ideal_is_never_slower(llama: Model, h100: Hardware) -> None:
    for efficiency in (prior(h100), prior(h100, "vllm"), Efficiency(compute=0.5, memory=0.5)):
        assert Cost(llama, h100, efficiency=efficiency).seconds(DECODE) > Cost(llama, h100).seconds(DECODE)
        assert math.isfinite(Cost(llama, h100, efficiency=efficiency).seconds(DECODE))
