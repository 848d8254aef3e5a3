"""Every family: the reference back end gives transformers' logits, from float folders and from overlays."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import everybit
from everybit.engine import models
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import rope
from everybit.engine.models.config import Config
from everybit.engine.ops import Columns, Rope
from everybit.engine.program import Step
from everybit.engine.reference import Reference, rotate
from everybit.errors import FormatError, ModelError, PrecisionError, ShapeError
from tests.e2e.architectures import FAMILIES, VARIANTS, make

# Two float32 evaluations of some 30 sums of up to 64 terms each, relative to the largest logit. Measured: at most 1e-6
# (see the assertion's message). A lost norm, bias, window or sink of these models is above 1e-3.
TOLERANCE = 1e-5
BLOCK = 4
FUSED = ("mixtral", "qwen3_moe")  # transformers saves one matrix per expert
LONG, SHORT = (np.random.default_rng(seed).integers(3, 96, length) for seed, length in ((0, 44), (1, 31)))


def save(model: Any, folder: Path) -> None:
    """As transformers does it, but with the parameters as the model holds them: experts stay fused."""
    if not model.config.model_type.startswith(FUSED):
        model.save_pretrained(folder)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file({name: one.contiguous() for name, one in model.named_parameters()}, folder / "model.safetensors")


def step(*parts: tuple[NDArray[np.int64], int, list[int]]) -> Step:
    """A step of (new tokens, past, blocks) for each sequence; all logits are wanted."""
    lengths = [len(tokens) for tokens, _, _ in parts]
    most = max(len(blocks) for _, _, blocks in parts)
    return Step(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]).astype(np.int32),
        starts=np.cumsum([0, *lengths]).astype(np.int32),
        past=np.array([past for _, past, _ in parts], np.int32),
        blocks=np.array([[*blocks, *[-1] * (most - len(blocks))] for _, _, blocks in parts], np.int32),
        rows=np.arange(sum(lengths), dtype=np.int32),
    )


def in_chunks(reference: Reference, bits: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The logits of LONG and SHORT: 17 tokens of one, then one by one while the other joins, in scattered blocks."""
    scattered = np.random.default_rng(2).permutation(24)
    mine, other = scattered[:11].tolist(), scattered[11:19].tolist()
    first = [reference.run(step((LONG[:17], 0, mine)), bits)]
    second: list[NDArray[np.float32]] = []
    done = 0
    for at in range(17, len(LONG)):
        joining = SHORT[done : done + (20 if not done else 1)]
        if len(joining):
            logits = reference.run(step((LONG[at : at + 1], at, mine), (joining, done, other)), bits)
            second.append(logits[1:])
            done += len(joining)
        else:
            logits = reference.run(step((LONG[at : at + 1], at, mine)), bits)
        first.append(logits[:1])
    return np.concatenate(first), np.concatenate(second)


def expected(model: Any) -> tuple[NDArray[np.float32], ...]:
    with torch.no_grad():
        return tuple(model(torch.from_numpy(ids)[None]).logits[0].float().numpy() for ids in (LONG, SHORT))


def worst(got: tuple[NDArray[np.float32], ...], wanted: tuple[NDArray[np.float32], ...]) -> float:
    """The largest difference, relative to the largest logit."""
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_float_folder(family: str, tmp_path: Path) -> None:
    model = make(family)
    save(model, tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert (checkpoint.bits, checkpoint.overlay) == ((), None)
        difference = worst(in_chunks(Reference(models.build(checkpoint), checkpoint, BLOCK)), expected(model))
    assert difference < TOLERANCE, f"{family}: {difference:.1e}"


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe_mixed", "opt_post_norm"])
def test_overlay(family: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "float")
    everybit.quantize(tmp_path / "float", tmp_path / "overlay", bits=(2, 4), progress=False)
    loaded = everybit.load(tmp_path / "overlay")
    with Checkpoint.open(tmp_path / "overlay") as checkpoint:
        assert checkpoint.bits == (2, 4)
        reference = Reference(models.build(checkpoint), checkpoint, BLOCK)
        for bits in (2, 4):
            loaded.set_precision(bits)
            difference = worst(in_chunks(reference, bits), expected(loaded))
            assert difference < TOLERANCE, f"{family} at {bits}: {difference:.1e}"
        with pytest.raises(PrecisionError, match="bits 3 asked"):
            reference.run(step((LONG[:3], 0, [0])), 3)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_ropes"])
def test_half_cache_rounds_keys_and_values_only(family: str, tmp_path: Path) -> None:
    model = make(family)
    save(model, tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        reference = Reference(models.build(checkpoint), checkpoint, BLOCK, half_cache=True)
        difference = worst(in_chunks(reference), expected(model))
    # A value rounded to float16 is off by up to 2^-11 = 4.9e-4; two layers of them, of which most cancel.
    assert 1e-5 < difference < 3e-3


def test_blocks_and_rows_are_honoured(tmp_path: Path) -> None:
    model = make("llama")
    save(model, tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        program = models.build(checkpoint)
        whole = expected(model)[0]
        for block_size in (1, 7, 64):
            reference = Reference(program, checkpoint, block_size)
            blocks = list(range(3, 3 + -(-44 // block_size)))[::-1]
            one = step((LONG[:40], 0, blocks))
            asked = Step(one.tokens, one.starts, one.past, one.blocks, np.array([39, 0, 5, 5], np.int32))
            assert worst((reference.run(asked),), (whole[[39, 0, 5, 5]],)) < TOLERANCE
            # A second sequence that shares the first full blocks, as a prefix cache would have it.
            shared = 40 // block_size * block_size
            again = reference.run(step((LONG[shared - 1 :], shared - 1, blocks))) if shared > 1 else None
            assert again is None or worst((again,), (whole[shared - 1 :],)) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "past", "blocks", "rows", "message"),
    [
        ([96], 0, [0], [0], "tokens 96 to 96 arrived, expected 0 to 95"),
        ([-1], 0, [0], [0], "tokens -1 to -1 arrived"),
        ([5], 0, [0], [1], "rows 1 to 1 arrived, expected 0 to 0"),
        ([5], 4, [0], [0], "5 tokens and the blocks .0. of 4: give it enough blocks"),
        ([5], 4, [0, -1], [0], "give it enough blocks"),
        ([5], 64, list(range(17)), [0], "65 tokens, the program was built for 64"),
    ],
)
def test_refused_steps(
    tokens: list[int], past: int, blocks: list[int], rows: list[int], message: str, tmp_path: Path
) -> None:
    save(make("llama"), tmp_path)
    one = step((np.array(tokens), past, blocks))
    with Checkpoint.open(tmp_path) as checkpoint:
        reference = Reference(models.build(checkpoint), checkpoint, BLOCK)
        with pytest.raises(ShapeError, match=message):
            reference.run(Step(one.tokens, one.starts, one.past, one.blocks, np.array(rows, np.int32)))


def test_interleaved_rope_is_the_other_order_of_the_same_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2 * 10)).astype(np.float32)
    positions, order = np.array([0, 5, 70]), [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]  # 3 pairs rotated, 4 numbers left
    columns = Columns("x", 0, 20)
    halves = rotate(x, positions, Rope(columns, 2, (1.0, 0.1, 0.01), 1.5))
    shuffled = x.reshape(3, 2, 10)[..., order].reshape(3, 20)
    pairs = rotate(shuffled, positions, Rope(columns, 2, (1.0, 0.1, 0.01), 1.5, interleaved=True))
    assert np.array_equal(pairs, halves.reshape(3, 2, 10)[..., order].reshape(3, 20))
    first = x[1, 0] * np.cos(5.0) - x[1, 3] * np.sin(5.0)
    assert halves[1, 0] == pytest.approx(1.5 * first, rel=1e-6)
    assert np.array_equal(halves[:, 6:10], x[:, 6:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make("llama").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with Checkpoint.open(tmp_path) as checkpoint:
        view, name = checkpoint.raw("model.norm.weight")
        assert (view.dtype.itemsize, view.flags.owndata, name) == (
            2,
            False,
            "BF16" if dtype == torch.bfloat16 else "F16",
        )
        assert np.array_equal(checkpoint.plain("model.norm.weight"), model.model.norm.weight.detach().float().numpy())
        got = in_chunks(Reference(models.build(checkpoint), checkpoint, BLOCK))
    wanted = type(model).from_pretrained(tmp_path, dtype=torch.float32)  # .float() would keep a rounded rope
    assert worst(got, expected(wanted)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [40, 44, 2304, 3072])
def test_embedding_scale_is_rounded_to_the_stored_dtype(dtype: torch.dtype, hidden: int, tmp_path: Path) -> None:
    save_file({"embedding": torch.zeros(1, dtype=dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        scale = models.gemma._embed_scale(hidden, "embedding", checkpoint)
    assert scale == torch.tensor(hidden**0.5).to(dtype).item()


def edit(folder: Path, **changes: Any) -> Checkpoint:
    """The folder with changed config keys; DROP removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: one for key, one in {**config, **changes}.items() if one is not DROP}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


DROP = object()


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """The hub's GPT-2 holds the base model's names, and buffers; tied models may hold their head as well, or alone."""
    gpt2, opt, llama = make("gpt2"), make("opt"), make("llama_rope_llama3")
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    old = dict(llama.named_parameters())
    for case, (model, tensors) in enumerate(
        (
            (gpt2, {n.removeprefix("transformer."): t for n, t in gpt2.named_parameters()} | buffers),
            (opt, {n.removeprefix("model."): t for n, t in opt.named_parameters()}),
            (llama, old | {head: old[embedding].clone()}),
            (llama, {n: t for n, t in old.items() if n != embedding} | {head: old[embedding]}),
        )
    ):
        folder = tmp_path / str(case)
        model.save_pretrained(folder)
        save_file({name: one.detach().clone() for name, one in tensors.items()}, folder / "model.safetensors")
        with Checkpoint.open(folder) as checkpoint:
            assert worst(in_chunks(Reference(models.build(checkpoint), checkpoint, BLOCK)), expected(model)) < TOLERANCE


ROPES: list[tuple[dict[str, Any], int]] = [
    ({"rope_type": "default", "rope_theta": 500000.0}, 128),
    ({"rope_type": "linear", "factor": 2.5}, 64),
    ({"rope_type": "dynamic", "factor": 4.0}, 64),
    ({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}, 128),
    ({"rope_type": "yarn", "factor": 4.0}, 128),
    ({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "truncate": False, "rope_theta": 150000.0}, 64),
    ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_slow": 2.0}, 64),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "rope_theta": 2.0}, 16),
]


@pytest.mark.parametrize("old_spelling", [False, True])
@pytest.mark.parametrize(("parameters", "head_dim"), ROPES)
def test_frequencies(parameters: dict[str, Any], head_dim: int, old_spelling: bool) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    full = {"rope_theta": 10000.0, "original_max_position_embeddings": 1024, **parameters}
    sizes: dict[str, Any] = {"head_dim": head_dim, "num_attention_heads": 2, "hidden_size": 2 * head_dim}
    theirs = LlamaConfig(**sizes, max_position_embeddings=4096, rope_parameters=copy.deepcopy(full))
    kind = parameters["rope_type"]
    init = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    inverse, scale = init(theirs)
    if old_spelling:
        values = {"rope_theta": full.pop("rope_theta"), "rope_scaling": {"type": full.pop("rope_type"), **full}}
    else:
        values = {"rope_parameters": full}
    read = rope.read(Config({**values, "max_position_embeddings": 4096}, "config.json"))
    got = rope.frequencies(read, head_dim, 4096)
    # Half a unit in the last place (6e-8) for each of the power, its inverse, the blend and the division.
    assert np.allclose(got.inv_freq, inverse.numpy(), rtol=3e-7, atol=0)
    assert got.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("kind", ["longrope", "su"])
@pytest.mark.parametrize("factor", [None, 8.0])
def test_longrope_is_chosen_by_the_context(kind: str, factor: float | None) -> None:
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "type": kind,
        "short_factor": [1.0 + i / 10 for i in range(12)],
        "long_factor": [2.0 + i for i in range(12)],
    }
    if factor:
        scaling["factor"] = factor
    values: dict[str, Any] = {
        "rope_scaling": scaling,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
    }
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    standard = {**scaling, "type": "longrope", "rope_type": "longrope", "original_max_position_embeddings": 512}
    theirs = Phi3Config(**sizes, **{**copy.deepcopy(values), "rope_scaling": copy.deepcopy(standard)})
    read = rope.read(Config(values, "config.json"), partial=True, aliases={"su": "longrope", "yarn": "longrope"})
    for context in (512, 513, 4096):
        inverse, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=context)
        got = rope.frequencies(read, 32, context)
        assert np.allclose(got.inv_freq, inverse.numpy(), rtol=3e-7, atol=0)
        assert got.scale == pytest.approx(scale, rel=1e-12)


def test_a_short_context_has_the_short_factors(tmp_path: Path) -> None:
    model = make("phi3_longrope")
    save(model, tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        reference = Reference(models.build(checkpoint, context=16), checkpoint, BLOCK)
        got = reference.run(step((LONG[:16], 0, [3, 1, 0, 2])))
    with torch.no_grad():
        wanted = model(torch.from_numpy(LONG[:16])[None]).logits[0].numpy()
    assert worst((got,), (wanted,)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (  # Llama 3.2 as the hub has it
            "llama_rope_llama3",
            {
                "rope_parameters": DROP,
                "rope_theta": 1000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "head_dim": DROP,
            },
        ),
        (
            "gemma3_ropes",
            {
                "rope_parameters": DROP,
                "rope_theta": 1e6,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "layer_types": DROP,
                "sliding_window_pattern": 2,
                "tie_word_embeddings": DROP,
            },
        ),
        ("smollm3", {"no_rope_layers": DROP, "no_rope_layer_interval": 2, "max_window_layers": 28}),
        ("qwen2_window", {"layer_types": DROP, "use_mrope": False, "rope_scaling": None}),
        ("gpt2", {"n_ctx": 64, "tie_word_embeddings": DROP, "summary_type": "cls_index", "n_inner": DROP}),
        ("opt", {"prefix": "</s>", "tie_word_embeddings": DROP, "word_embed_proj_dim": DROP}),
        ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 4096}),
        ("phi3", {"interpolate_factor": 1, "full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False}),
        ("mistral", {"architectures": DROP}),
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "attention_bias": DROP, "mlp_bias": DROP}),
    ],
)
def test_spellings_of_the_hub(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(family)
    save(model, tmp_path)
    with edit(tmp_path, **changes) as checkpoint:
        assert worst(in_chunks(Reference(models.build(checkpoint), checkpoint, BLOCK)), expected(model)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"architectures": ["FalconForCausalLM"]},
            "architecture 'FalconForCausalLM' arrived.*LlamaForCausalLM",
        ),
        ("llama", {"architectures": DROP, "model_type": DROP}, "architecture None arrived"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' arrived, expected one of silu"),
        ("llama", {"attention_bias": True}, "'model.layers.0.self_attn.q_proj.bias' is missing"),
        ("qwen3_window", {"attention_bias": False}, "'model.layers.0.self_attn.k_proj.bias' is stored, but"),
        ("llama", {"mlp_bias": 1}, "mlp_bias 1 arrived, expected true or false"),
        (
            "llama",
            {"vocab_size": 97},
            r"'model.embed_tokens.weight' has shape \[96, 40\], config.json implies \[97, 40\]",
        ),
        ("llama", {"head_dim": 12}, "q_proj.weight' has shape"),
        ("llama", {"num_attention_heads": 3}, "num_key_value_heads 2 arrived, expected a divisor"),
        ("llama", {"rms_norm_eps": DROP}, "rms_norm_eps is missing"),
        ("llama", {"num_hidden_layers": 1}, "'model.layers.1.input_layernorm.weight' is stored"),
        ("llama", {"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ("llama", {"tie_word_embeddings": None, "attention_multiplier": 0.5}, "attention_multiplier 0.5 arrived"),
        ("llama", {"sliding_window": 16}, "sliding_window 16 arrived"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 arrived, expected 1"),
        ("llama", {"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope' arrived, expected one of default"),
        ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section.*expected only"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope factor is missing"),
        ("llama", {"head_dim": 5, "rope_parameters": {}}, "5 numbers of each head are rotated"),
        ("mistral", {"layer_types": ["full_attention", "full_attention"]}, "layer_types .* arrived"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "expected a window"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types .* expected 2 of full_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True arrived"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 arrived, expected null"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters .* full_attention and sliding"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope short_factor .* a list of 5"),
        ("phi3", {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": DROP}, "is missing"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True arrived"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5 arrived, expected 1.702"),
        ("gpt_oss", {"rope_parameters": DROP}, "rope_parameters is missing"),
        ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok 4 arrived, expected at most the 3"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "'model.layers.1.mlp.gate_proj.weight' is missing"),
    ],
)
def test_refused(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(make(family), tmp_path)
    with edit(tmp_path, **changes) as checkpoint, pytest.raises(ModelError, match=message) as caught:
        models.build(checkpoint)
    assert "\n" not in str(caught.value)


def test_refused_folders(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "hub")
    missing = "'model.layers.0.mlp.gate.weight' is missing.*one matrix per expert"
    with Checkpoint.open(tmp_path / "hub") as checkpoint, pytest.raises(ModelError, match=missing):
        models.build(checkpoint)
    for family in ("opt", "llama"):
        make(family).save_pretrained(tmp_path / family)
        for context in (0, 65):
            asked = f"a context of {context} tokens was asked for"
            with Checkpoint.open(tmp_path / family) as checkpoint, pytest.raises(ModelError, match=asked):
                models.build(checkpoint, context)
    with pytest.raises(FormatError, match="quantized with 'mxfp4', expected an overlay or float weights"):
        edit(tmp_path / "opt", quantization_config={"quant_method": "mxfp4"})


ODD = (None, True, -1, 0, 7, 2**31 - 1, 2**70, 0.5, -1e300, float("nan"), "x", [], [1], ["x"], {}, {"x": 1})


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_ropes", "phi3_longrope", "llama_rope_yarn", "llama_rope_llama3"])
def test_any_config_value_is_a_model_or_a_model_error(family: str, tmp_path: Path) -> None:
    save(make(family), tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        good = checkpoint.config
        ropes = good.get("rope_parameters") or {}
        cases = [{**good, key: odd} for key in good for odd in ODD]
        cases += [{**good, "rope_parameters": {**ropes, key: odd}} for key in ropes for odd in ODD]
        if "full_attention" in ropes:
            full = ropes["full_attention"]
            nested = [{**ropes, "full_attention": {**full, key: odd}} for key in full for odd in ODD]
            cases += [{**good, "rope_parameters": one} for one in nested]
        refused = 0
        for checkpoint.config in cases:
            try:
                models.build(checkpoint)
            except ModelError as error:
                refused += 1
                message = str(error)
                assert "\n" not in message
        assert refused > len(cases) / 3
