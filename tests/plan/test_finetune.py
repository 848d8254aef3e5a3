"""Fine-tuning: published memory and time, the batch that fits, offload by hand, bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everybit.cli.main import main
from everybit.errors import ModelError, SourceError
from everybit.plan.finetune import Devices, finetune
from everybit.plan.finetune_memory import (
    Offload,
    Recipe,
    activation_bytes,
    active_weights,
    state_parts,
    trained_weights,
)
from everybit.plan.finetune_moe import MoeLaw, MoeRun, fit_moe_law, read_moe_runs, sparsity_of
from everybit.plan.model import read_model
from everybit.plan.operators import Attention, Experts, Layer, Linear, Model
from tests.plan.test_model import BASE, COUNTED, MOE


def make(
    name: str, hidden: int, layers: int, heads: int, wide: int, vocabulary: int, gated: bool, experts: int = 0
) -> Model:
    feed = tuple(Linear(one, wide, hidden) for one in (("gate", "up") if gated else ("up",)))
    feed += (Linear("down", hidden, wide, split="row"),)
    attention = (*(Linear(one, hidden, hidden) for one in "qkv"), Linear("o", hidden, hidden, split="row"))
    layer = Layer(
        layers,
        attention if experts else attention + feed,
        Attention(heads, heads, hidden // heads, hidden // heads, 2 * hidden),
        Experts(feed, experts, 2) if experts else None,
    )
    table = Linear("embedding", vocabulary, hidden, split="none")
    return Model(name, hidden, vocabulary, 4096, (layer,), table, table)


GPT3 = make("gpt-3", 12288, 96, 96, 4 * 12288, 51200, gated=False)
LLAMA2 = make("llama-2-7b", 4096, 32, 32, 11008, 32000, gated=True)
LLAMA65 = make("llama-65b", 8192, 80, 64, 22016, 32000, gated=True)
MIXTRAL = make("mixtral-like", 4096, 32, 32, 14336, 32000, gated=True, experts=8)
A100 = Devices(memory_bytes=80e9, flops=312e12)


# --- memory
@pytest.mark.parametrize(("stage", "gb"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, gb: float) -> None:
    """Figure 1: 7.5e9 parameters, 64 devices, Adam in mixed precision."""
    linears = (Linear("up", 10_000, 10_000),)
    model = Model("7.5b", 10_000, 1, 1024, (Layer(75, linears),), Linear("embedding", 1, 1), None)
    parts = state_parts(model, Recipe("full", 1024, zero=stage), 64)
    assert (parts.weights + parts.gradients + parts.optimizer) / 1e9 == pytest.approx(gb, abs=0.05)


def test_a_full_finetune_of_llama_2_7b_keeps_112_gb() -> None:
    parts = state_parts(LLAMA2, Recipe("full", 1024), 1)
    assert parts.fixed / 1e9 == pytest.approx(112, rel=0.05)  # 16 bytes of "7" billion; there are 6.74
    assert state_parts(LLAMA2, Recipe("full", 1024, optimizer="adam8bit"), 1).optimizer == parts.optimizer / 2


def test_activations_are_those_of_korthikanti() -> None:
    """Section 4: a layer keeps s * h * (34 + 5 a s / h), and 5 a s / h is 80 for GPT-3; the head is on top."""
    unit, head = 2048 * 12288, 4 * 2048 * (12288 + 51200)
    assert activation_bytes(GPT3, 2048, "none") == 96 * unit * (34 + 80) + head
    assert activation_bytes(GPT3, 2048, "selective") == 96 * unit * 34 + head
    assert activation_bytes(GPT3, 2048, "full") == 96 * unit * 2 + 34 * unit + head


def test_a_window_bounds_the_scores() -> None:
    (layer,) = LLAMA2.layers
    assert layer.attention
    narrow = replace(LLAMA2, layers=(replace(layer, attention=replace(layer.attention, window=512)),))
    saved = activation_bytes(LLAMA2, 2048, "none") - activation_bytes(narrow, 2048, "none")
    assert saved == 32 * 5 * 32 * 2048 * (2048 - 512)


LORA = Recipe("lora", 512)
# Rank 16, "all-linear". Phi-3 has qkv and gate_up fused, Llama has not; of Mixtral only attention has linear modules.
USUAL = {
    "meta-llama/Llama-2-7b-hf": 39_976_960,
    "meta-llama/Meta-Llama-3-8B": 41_943_040,
    "microsoft/Phi-3-mini-4k-instruct": 25_165_824,
    "mistralai/Mixtral-8x7B-v0.1": 13_631_488,
}


@pytest.mark.parametrize("name", USUAL)
def test_lora_trains_the_usual_number_of_weights(name: str) -> None:
    assert trained_weights(read_model(name), LORA) == USUAL[name]


# Beside llama, those that fuse or that keep what others call linears in bare parameters.
TREES: list[tuple[str, dict[str, Any]]] = [
    *((family, config) for family, config, _ in COUNTED),
    ("phi3", {**BASE, "pad_token_id": 0}),
    ("glm4", {**BASE, "head_dim": 16, "pad_token_id": 0}),
    ("gpt_neox", {**BASE, "num_key_value_heads": 4}),
    ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 200, "seq_length": 128}),
    ("mpt", {"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 200, "max_seq_len": 128}),
    ("phimoe", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("glm4_moe", {**BASE, **MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}),
]


@pytest.mark.parametrize(("family", "config"), TREES, ids=[one[0] for one in TREES])
def test_adapters_are_those_of_all_linear(family: str, config: dict[str, Any]) -> None:
    """PEFT takes each Linear, and GPT-2's Conv1D, of the tree but the output head."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kinds = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    with torch.device("meta"):
        tree = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
    adapted = [one for one in tree.modules() if isinstance(one, kinds) and one is not tree.get_output_embeddings()]
    assert adapted
    found = trained_weights(read_model({"model_type": family, **config}), replace(LORA, rank=4))
    assert found == 4 * sum(sum(one.weight.shape) for one in adapted)


def test_experts_are_adapted_where_asked() -> None:
    mixtral = read_model("mistralai/Mixtral-8x7B-v0.1")
    both = trained_weights(mixtral, replace(LORA, experts=True))
    assert both - trained_weights(mixtral, LORA) == 32 * 8 * 16 * ((2 * 14336 + 4096) + (4096 + 14336))


def test_qlora_trains_65b_on_48_gb() -> None:
    """QLoRA's abstract: 65B on one 48 GB device, where 16-bit fine-tuning takes more than 780 GB."""
    card = Devices(memory_bytes=48e9, flops=155e12)
    paged = Offload(bytes=64e9, bytes_per_s=50e9, link_bytes_per_s=25e9)  # its optimizer's states may leave the device
    recipe = Recipe("qlora", 512, rank=64, recompute="full", offload=paged)
    found = finetune(LLAMA65, recipe, card, 1e6)
    assert found.fits
    assert 33e9 < found.parts.weights < 38e9
    assert not finetune(LLAMA65, replace(recipe, method="lora"), card, 1e6).fits
    assert finetune(LLAMA65, replace(recipe, method="full", offload=None), card, 1e6).parts.total > 780e9


def test_the_batch_fills_the_device_and_no_more() -> None:
    recipe = Recipe("lora", 2048, recompute="selective")
    found = finetune(LLAMA2, recipe, A100, 1e6)
    assert found.batch > 1
    assert found.parts.total <= 80e9
    assert finetune(LLAMA2, replace(recipe, batch=found.batch), A100, 1e6).fits
    more = finetune(LLAMA2, replace(recipe, batch=found.batch + 1), A100, 1e6)
    assert not more.fits
    assert more.parts.total > 80e9


def test_it_says_why_not_and_what_would_fit() -> None:
    found = finetune(LLAMA2, Recipe("full", 2048), A100, 1e6)
    assert not found.fits
    assert found.seconds is None
    assert found.usd is None
    assert re.match(
        r"full, ZeRO 0, recompute none needs \d+\.\d GB of 80\.0 GB a device: weights 13\.5,", found.why or ""
    )
    assert found.nearest
    assert (found.nearest.method, found.nearest.zero) == ("lora", 0)
    assert finetune(LLAMA2, found.nearest, A100, 1e6).fits
    shared = finetune(LLAMA2, Recipe("full", 2048), replace(A100, count=8), 1e6).nearest
    assert shared
    assert (shared.method, shared.zero) == ("full", 1)
    much = finetune(LLAMA2, Recipe("lora", 2048, batch=1000, recompute="full"), A100, 1e6)
    assert (much.why or "").startswith("lora, ZeRO 0, recompute full, batch 1000 needs")
    assert much.nearest
    assert 1 < (much.nearest.batch or 0) < 1000
    assert str(much.nearest) == f"lora, ZeRO 0, recompute full, batch {much.nearest.batch}"
    assert not finetune(LLAMA2, replace(much.nearest, batch=(much.nearest.batch or 0) + 1), A100, 1e6).fits
    nowhere = finetune(LLAMA65, Recipe("full", 2048), replace(A100, memory_bytes=8e9), 1e6)
    assert nowhere.why
    assert nowhere.nearest is None


# --- time
def test_gpt_3_takes_34_days_on_1024_a100() -> None:
    """Narayanan et al. 2021, section 5.1: 300e9 tokens at 140 TFLOP/s a device, all activations recomputed."""
    devices = Devices(
        memory_bytes=80e9,
        flops=312e12,
        count=1024,
        mfu=140 / 312,
        usd_per_h=2.0,
        power_w=400,
        pue=1.25,
        gco2_per_kwh=300,
    )
    found = finetune(GPT3, Recipe("full", 2048, batch=1, recompute="full", zero=3), devices, 300e9)
    assert found.fits
    assert found.seconds
    assert found.seconds / 86400 == pytest.approx(34, rel=0.04)
    hours = found.seconds / 3600 * 1024
    assert found.usd == pytest.approx(2 * hours)
    assert found.kwh == pytest.approx(hours * 0.5)
    assert found.gco2 == pytest.approx(hours * 150)
    assert found.bound == "compute"


@pytest.mark.parametrize(
    ("method", "recompute", "passes"), [("full", "none", 6), ("full", "full", 8), ("lora", "none", 4)]
)
def test_flops_of_each_method(method: str, recompute: str, passes: int) -> None:
    big = Devices(memory_bytes=1e13, flops=1e15, mfu=1.0)
    found = finetune(LLAMA2, Recipe(method, 64, batch=1, rank=1, recompute=recompute), big, 64)
    assert found.seconds == pytest.approx(passes * active_weights(LLAMA2) * 64 / 1e15, rel=0.01)


def test_a_token_meets_its_experts_only() -> None:
    dense, each = 32 * 4 * 4096**2 + 4096 * 32000, 32 * 3 * 4096 * 14336
    assert active_weights(MIXTRAL) == dense + 2 * each
    assert MIXTRAL.parameters == dense + 8 * each + 4096 * 32000


def test_the_network_binds_when_it_is_slow() -> None:
    slow = Devices(memory_bytes=80e9, flops=312e12, count=8, network_bytes_per_s=1e9)
    found = finetune(LLAMA2, Recipe("full", 512, batch=1, zero=3), slow, 1e6)
    assert found.bound == "network"
    assert found.step_s == pytest.approx(6 * LLAMA2.parameters * 7 / 8 / 1e9)  # ZeRO: 3 weights' worth of 2 bytes
    earlier = finetune(LLAMA2, Recipe("full", 512, batch=1, zero=2), slow, 1e6)
    assert earlier.step_s == pytest.approx(4 * LLAMA2.parameters * 7 / 8 / 1e9)


def test_collectives_take_hops_and_bytes() -> None:
    """Alpha-beta: a ring of n devices takes n - 1 hops to gather or to reduce, here once for each of 32 layers."""
    card = Devices(memory_bytes=1e12, flops=312e12, count=8, network_bytes_per_s=50e9, network_latency_s=5e-6)
    moved = 2 * LLAMA2.parameters * 7 / 8 / 50e9  # all weights, or all gradients

    def network_s(**values: Any) -> float | None:
        return finetune(LLAMA2, replace(Recipe("full", 512, batch=1), **values), card, 1e6).network_s

    assert network_s() == pytest.approx(2 * moved + 2 * 32 * 7 * 5e-6)
    assert network_s(zero=2, accumulate=4) == pytest.approx(5 * moved + 5 * 32 * 7 * 5e-6)
    assert network_s(zero=3, accumulate=4) == pytest.approx(12 * moved + 12 * 32 * 7 * 5e-6)
    adapters = 2 * trained_weights(LLAMA2, LORA) * 7 / 8 / 50e9
    assert network_s(method="lora") == pytest.approx(2 * adapters + 2 * 32 * 7 * 5e-6)
    assert finetune(LLAMA2, LORA, A100, 1e6).network_s == 0


def test_offload_makes_room_and_takes_time() -> None:
    host = Offload(bytes=200e9, bytes_per_s=50e9, link_bytes_per_s=25e9)
    recipe = Recipe("full", 1024, batch=1, recompute="full", offload=host)
    found = finetune(LLAMA2, recipe, A100, 1e6)
    alone = finetune(LLAMA2, replace(recipe, offload=None), replace(A100, memory_bytes=1e12), 1e6)
    assert found.fits
    assert found.parts.optimizer == 0
    assert found.parts.offloaded == 12 * LLAMA2.parameters
    # 16 bytes a weight read and written where they lie, and 2 come back; gradients go out beside the passes.
    update_s = LLAMA2.parameters * (32 / 50e9 + 2 / 25e9)
    assert alone.step_s
    assert found.step_s == pytest.approx(max(alone.step_s, 2 * LLAMA2.parameters / 25e9) + update_s)
    assert found.bound == "update"
    hidden = finetune(LLAMA2, replace(recipe, offload=replace(host, hidden=1.0)), A100, 1e6)
    assert hidden.step_s == pytest.approx(2 * LLAMA2.parameters / 25e9 + update_s)
    assert hidden.bound == "link"


def test_weights_go_away_too() -> None:
    disk = Offload(bytes=500e9, bytes_per_s=6e9, link_bytes_per_s=25e9, weights=True)
    card = Devices(memory_bytes=24e9, flops=165e12)
    found = finetune(LLAMA2, Recipe("full", 1024, batch=1, recompute="full", offload=disk), card, 1e6)
    assert found.fits
    assert found.parts.weights == 0
    assert found.parts.offloaded == 14 * LLAMA2.parameters
    assert found.step_s == pytest.approx(LLAMA2.parameters * (8 + 32) / 6e9)  # ZeRO-Infinity, section 4
    small = finetune(LLAMA2, Recipe("full", 1024, offload=replace(disk, bytes=50e9)), card, 1e6)
    assert "offloads 94.3 GB a device, and there is room for 50.0 GB" in (small.why or "")


# --- mixtures of experts
def test_the_moe_law_is_found_again() -> None:
    law = MoeLaw(c0=2.5e-6, c1=0.8, c2=0.9, c3=1.0, c4=0.3)
    rows = []
    for sparsity in (0.25, 1.0):
        for memory in (48e9, 80e9):
            batch = 2.5e-6 * (memory - 24e9) / (128 * (0.2 + 0.8 * sparsity))
            rows.append(MoeRun(memory, 24e9, 128, sparsity, round(batch), law.queries_per_s(round(batch), sparsity)))
    found = fit_moe_law(rows)
    assert (found.c2, found.c4) == pytest.approx((0.9, 0.3))
    assert (found.c0, found.c1) == pytest.approx((2.5e-6, 0.8), rel=2e-3)  # batches are whole
    assert found.batch(80e9, 24e9, 128, 0.25) == pytest.approx(2734, abs=3)
    assert found.batch(20e9, 24e9, 128, 0.25) == 0


def test_the_law_stands_in_for_parts_and_mfu() -> None:
    law, card = MoeLaw(c0=2.5e-6, c1=0.8, c2=0.9, c3=1.0, c4=0.3), replace(A100, usd_per_h=2.0)
    found = finetune(MIXTRAL, Recipe("qlora", 128), card, 128 * 2e6, law)
    assert sparsity_of(MIXTRAL) == 0.25
    assert found.batch == law.batch(80e9, found.parts.weights, 128, 0.25)
    assert found.parts.total <= 80e9 < found.parts.total + law.sequence_bytes(128, 0.25)
    assert found.usd == pytest.approx(2e6 / law.queries_per_s(found.batch, 0.25) / 3600 * 2, rel=2e-3)
    many = finetune(MIXTRAL, Recipe("qlora", 128, batch=found.batch + 1), card, 1e6, law)
    assert many.nearest == Recipe("qlora", 128, batch=found.batch)
    two = replace(card, count=2, network_bytes_per_s=1e5)
    assert finetune(MIXTRAL, Recipe("qlora", 128), two, 1e6, law).bound == "network"
    with pytest.raises(SourceError, match="leave out ZeRO"):
        finetune(MIXTRAL, Recipe("qlora", 128, zero=1), card, 1e6, law)
    with pytest.raises(ModelError, match="has no experts"):
        finetune(LLAMA2, Recipe("qlora", 128), card, 1e6, law)


RUNS = """memory_bytes,model_bytes,sequence,sparsity,batch,queries_per_s
48e9,24e9,128,0.25,8,7.8
48e9,24e9,128,1,2,0.9
80e9,24e9,128,0.25,20,11.1
"""


def test_the_command_takes_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs.csv"
    runs.write_text(RUNS)
    line = "plan finetune mistralai/Mixtral-8x7B-v0.1 --on h100-sxm --method qlora --tokens 1e6 --sequence"
    base = line.split()
    assert main([*base, "128", "--moe-runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cost"]
    law = fit_moe_law(read_moe_runs(runs))
    assert found["tokens_per_s"] == pytest.approx(128 * law.queries_per_s(found["batch"], 0.25))
    assert main([*base, "128", "--moe-runs", str(runs)]) == 0
    assert "rests on: the law fitted to" in capsys.readouterr().out
    for words, said in (
        (["128", "--mfu", "0.3"], "--mfu and --moe-runs were given"),
        (["4096"], "the runs of --moe-runs have 128 to 128 tokens"),
    ):
        assert main([*base, *words, "--moe-runs", str(runs)]) == 2
        assert said in capsys.readouterr().err
    for text, said in (
        ("a,b\n", "no column batch, expected memory_bytes"),
        (RUNS + "1,2,x\n", "not a table of numbers"),
        (RUNS + "1,2\n", "not a table of numbers"),
        (RUNS + "80e9,24e9,inf,0.25,20,11\n", "not a table of numbers"),
    ):
        runs.write_text(text)
        assert main([*base, "128", "--moe-runs", str(runs)]) == 2
        assert said in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert main([*base, "128", "--moe-runs", str(tmp_path / "none.csv")]) == 2


def test_the_moe_law_needs_runs_that_differ() -> None:
    run = MoeRun(48e9, 24e9, 128, 0.25, 16, 2.0)
    with pytest.raises(SourceError, match="0 runs with the same sparsities"):
        fit_moe_law([])
    with pytest.raises(SourceError, match="2 runs with the same sparsities"):
        fit_moe_law([run, replace(run, batch=8)])
    with pytest.raises(SourceError, match="no room"):
        fit_moe_law([run, replace(run, sparsity=1.0, model_bytes=50e9)])
    with pytest.raises(SourceError, match="sparsity is 4"):
        MoeLaw(1, 1, 1, 1, 1).queries_per_s(2, 4)
    with pytest.raises(SourceError, match="-1 bytes a sequence at sparsity"):
        MoeLaw(1, 4, 1, 1, 1).sequence_bytes(1, 0.5)


# --- bad input
@pytest.mark.parametrize(
    ("recipe", "devices", "message"),
    [
        (Recipe("lorra", 512), A100, "method is 'lorra': give one of full, lora, qlora"),
        (Recipe("full", 512, optimizer="lion"), A100, "optimizer is 'lion'"),
        (Recipe("full", 512, recompute="some"), A100, "recompute is 'some'"),
        (Recipe("full", 512, zero=4), A100, "zero is 4"),
        (Recipe("full", 0), A100, "sequence is 0"),
        (Recipe("full", 4097), A100, "sequence is 4097: give at most 4096, the context of 'llama-2-7b'"),
        (Recipe("full", 512, base_bits=4), A100, "no frozen weights"),
        (Recipe("lora", 512, base_bits=400), A100, "base_bits is 400: give at most 64"),
        (Recipe("lora", 512, rank=4097), A100, "rank is 4097: give at most 4096, the hidden size of 'llama-2-7b'"),
        (Recipe("lora", 512, experts=True), A100, "adapters beside experts were asked"),
        (Recipe("lora", 512), replace(A100, network_latency_s=-1), "network_latency_s is -1"),
        (Recipe("lora", 512), replace(A100, mfu=40), "parts of 1"),
        (Recipe("lora", 512), replace(A100, usd_per_h=-1), "usd_per_h is -1"),
        (Recipe("lora", 512), replace(A100, flops=float("nan")), "flops is nan"),
        (Recipe("lora", 512), replace(A100, pue=0.8), "pue is 0.8"),
        (Recipe("full", 512, offload=Offload(1e9, 0, 1e9)), A100, "bytes_per_s is 0"),
    ],
)
def test_bad_input_is_told(recipe: Recipe, devices: Devices, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)):
        finetune(LLAMA2, recipe, devices, 1e6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method full --rank 7", "--rank 7: a full fine-tune has no adapters"),
        ("--method lora --tokens 1e300", "tokens is 1e+300: give at most 1e+15"),
        ("--method lora --sequence 16384", "sequence is 16384: give at most 8192"),
        ("--method lora --batch 1000", "nearest that fits: lora, ZeRO 0, recompute selective, batch "),
    ],
)
def test_bad_options_are_told(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    line = "plan finetune meta-llama/Meta-Llama-3-8B --on h100-sxm --tokens 1e6"
    assert main([*line.split(), *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_layers_is_told() -> None:
    with pytest.raises(ModelError, match="no linear layers"):
        finetune(replace(LLAMA2, layers=()), Recipe("full", 512), A100, 1e6)
