"""What fits, by hand; and what is said where nothing does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from everybit.cli.main import main
from everybit.errors import EverybitError, SourceError
from everybit.plan.cost import Parallel
from everybit.plan.hardware import read_hardware
from everybit.plan.memory import device_cache, device_weights, fit
from everybit.plan.model import read_model

H100 = read_hardware("h100-sxm")


def test_parts_by_hand() -> None:
    model = read_model("meta-llama/Meta-Llama-3-8B")
    found = fit(model, H100, context=4096)
    assert found.weight_bytes == model.weight_bytes
    assert found.cache_bytes == 4096 * 32 * 2 * 8 * 128 * 2
    assert found.reserve_bytes == pytest.approx(0.06 * 85.52e9 + 1.5e9)
    assert found.activation_bytes == 4096 * 2 * (3 * 4096 + 2 * 14336)
    parts = found.weight_bytes + found.reserve_bytes + found.activation_bytes
    assert found.sequences == int((85.52e9 - parts) / found.cache_bytes)
    assert found.why == ""


def test_a_cache_of_half_the_bits_holds_twice_as_many() -> None:
    name = "meta-llama/Meta-Llama-3-8B"
    wide, narrow = (fit(read_model(name, kv_bits=bits), H100, context=8192) for bits in (16, 8))
    assert narrow.sequences in (2 * wide.sequences, 2 * wide.sequences + 1)


def test_splits() -> None:
    model = read_model("mistralai/Mixtral-8x7B-v0.1")
    whole = device_weights(model, Parallel())
    assert whole == model.weight_bytes
    assert device_weights(model, Parallel(tp=4)) == pytest.approx(whole / 4, rel=0.01)
    experts = sum(one.bytes for one in model.layers[0].experts.linears) * 8 * 32  # type: ignore[union-attr]
    assert device_weights(model, Parallel(dp=4)) == pytest.approx(whole - experts * 3 / 4)
    assert device_cache(model, Parallel(tp=16), 1000) == device_cache(model, Parallel(tp=8), 1000)  # 8 key heads
    assert device_cache(model, Parallel(pp=2), 1000) == device_cache(model, Parallel(), 1000) / 2


def test_groups_have_memory_of_their_own() -> None:
    model = read_model("meta-llama/Meta-Llama-3-8B")
    assert fit(model, H100, Parallel(dp=4), context=8192).sequences == 4 * fit(model, H100, context=8192).sequences


def test_tied_heads_are_stored_once() -> None:
    model = read_model("meta-llama/Llama-3.2-1B")
    assert model.tied
    assert device_weights(model, Parallel()) == model.weight_bytes


def test_why_not_and_the_nearest_that_fits() -> None:
    model = read_model("meta-llama/Llama-3.1-70B")
    found = fit(model, H100, context=4096)
    assert found.sequences == 0
    assert "weights 141.1 + a cache of 4096 tokens 1.3" in found.why
    assert "> 85.5 GB of each device" in found.why
    assert "tp 2" in found.why
    assert fit(model, H100, Parallel(tp=2), context=4096).sequences > 0
    bits = float(found.why.split(" bits a weight")[0].rpartition(" ")[2])
    assert fit(read_model("meta-llama/Llama-3.1-70B", weight_bits={"default": bits}), H100, context=4096).sequences > 0


def test_the_longest_context_that_fits_is_exact() -> None:
    model = read_model("meta-llama/Llama-3.1-70B", weight_bits="fp8")
    found = fit(model, H100, context=100_000)
    longest = int(found.why.rpartition("nearest that fits: a context of ")[2].split()[0])
    assert fit(model, H100, context=longest).sequences == 1
    assert fit(model, H100, context=longest + 2).sequences == 0


def test_what_fits_nowhere_on_a_node() -> None:
    tiny = replace(H100, devices_per_node=1)
    found = fit(read_model("moonshotai/Kimi-K2.5"), tiny, context=1024)
    assert "tp" not in found.why.partition("nearest")[2]


def test_what_cannot_be_split_is_no_way_out() -> None:
    wide = {"hidden_size": 9216, "intermediate_size": 28672, "num_hidden_layers": 80}
    for heads, said in ((9, False), (8, True)):
        model = read_model({**LLAMA, **wide, "num_attention_heads": heads, "num_key_value_heads": heads})
        assert ("tp 4" in fit(model, H100).why) == said


def test_states_do_not_grow() -> None:
    model = read_model("state-spaces/mamba-2.8b-hf")
    assert fit(model, H100, context=1000).cache_bytes == fit(model, H100, context=100_000).cache_bytes > 0


def test_encoders_are_limited_by_their_steps() -> None:
    assert fit(read_model("google-bert/bert-base-uncased"), H100).sequences > 0


def test_bad_contexts() -> None:
    with pytest.raises(SourceError, match="a context of 0 tokens arrived"):
        fit(read_model("meta-llama/Meta-Llama-3-8B"), H100, context=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("memory --on a100-80-sxm --bits fp8", "multiplies no fp8: pass w8a16"),
        ("memory --on h100-sxm --tp 3", "tp 3 does not divide 32 attention heads"),
        ("memory --on h100-sxm --pp 1000", "1000 pipeline stages for 32 layers"),
        ("memory --on h100-sxm --context 10000000", "has a context of 131072 tokens: shorten it"),
        ("roofline --on h100-sxm --tp 3", "tp 3 does not divide 32 attention heads"),
        ("roofline --on h100-sxm --prompt 100000000", "--prompt 100000000: meta-llama/Llama-3.1-8B has a context of"),
        ("roofline --on h100-sxm --users 100000000000", "--users 100000000000: expected at most 1048576"),
    ],
)
def test_commands_refuse_what_cannot_be(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    command, *options = words.split()
    assert main(["plan", command, "meta-llama/Llama-3.1-8B", *options], ("plan",)) == 2
    assert said in capsys.readouterr().err


def test_a_card_that_can_stands_beside_one_that_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan memory meta-llama/Llama-3.1-8B --on a100-80-sxm --on h100-sxm --bits fp8 --context 8192 --json"
    assert main(line.split(), ("plan",)) == 0
    a100, h100 = json.loads(capsys.readouterr().out)
    assert (a100["sequences"], "multiplies no fp8" in a100["why"]) == (0, True)
    assert (h100["sequences"] > 1, h100["why"]) == (True, "")


LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 200,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0}, {"hidden_size": -64}, {"hidden_size": 10**400}, {"vocab_size": "200"},
        {"num_attention_heads": None}, {"num_key_value_heads": 0}, {"head_dim": float("inf")}, {"sliding_window": 0},
        {"max_position_embeddings": 10**12}, {"text_config": {"text_config": {}}}, {"text_config": [1]},
        {"layer_types": [None] * 6}, {"num_experts": 8}, {"num_experts": 8, "num_experts_per_tok": 0},
        {"moe_layers": [[1], {}], "num_experts": 8, "num_experts_per_tok": 1}, {"dtype": {"a": 1}},
        {"quantization_config": {"quant_method": ["x"]}}, {"is_encoder_decoder": True}, {"_name_or_path": "a\nb" * 999},
        {"model_type": "nemotron_h", "hybrid_override_pattern": "EEEEEE"}, {"tie_word_embeddings": "yes"},
        {"hidden_size": 10**6, "num_attention_heads": 10**4, "num_hidden_layers": 10**4, "vocab_size": 10**6,
         "intermediate_size": 10**6, "max_position_embeddings": 10**9},
        {"hidden_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1},
    ],
)  # fmt: skip
def test_hostile_configs_are_told_in_one_line(change: dict[str, Any]) -> None:
    said = ""
    try:
        said = fit(read_model({**LLAMA, **change}), H100, Parallel(tp=2)).why
    except EverybitError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
