"""GGUF files read back with the gguf package: names, shapes, values, metadata, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import everybit
from everybit.engine.checkpoint import Checkpoint
from everybit.errors import EverybitError, ModelError, OutputError, PrecisionError, SourceError
from everybit.integrations.gguf import TYPES, export_gguf
from everybit.integrations.gguf.families import find_family
from everybit.integrations.gguf.packing import pack
from tests.e2e.architectures import LLAMA3
from tests.export.gguf_models import read_tensors, read_types, save_tiny

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and of 96 weights; heads of their own for queries and keys."""
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 64}
    return save_tiny("llama", tmp_path_factory.mktemp("gguf") / "llama", **sizes)


@pytest.fixture(scope="module")
def overlay(llama: Path) -> Path:
    out = llama.with_name("overlay")
    everybit.quantize(llama, out, bits=(3, 8), progress=False)
    return out


def field(path: Path, name: str) -> Any:
    return gguf.GGUFReader(path).get_field(name).contents()


def test_values_are_the_overlays(llama: Path, overlay: Path, tmp_path: Path) -> None:
    for bits in (None, 3, 8):
        export_gguf(overlay, tmp_path / f"{bits}.gguf", type="F32", bits=bits, progress=False)
    export_gguf(overlay, tmp_path / "source.gguf", type="F32", source=llama, progress=False)
    best, three, eight, source = (read_tensors(tmp_path / f"{name}.gguf") for name in (None, 3, 8, "source"))
    with Checkpoint.open(overlay) as checkpoint, Checkpoint.open(llama) as floats:
        for ours, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
            parameter = f"model.layers.1.{name}.weight"
            np.testing.assert_array_equal(three[f"blk.1.{ours}.weight"], checkpoint.dense(parameter, 3))
            np.testing.assert_array_equal(best[f"blk.1.{ours}.weight"], checkpoint.dense(parameter, 8))
            np.testing.assert_array_equal(source[f"blk.1.{ours}.weight"], floats.dense(parameter, 0))
        q = checkpoint.dense("model.layers.0.self_attn.q_proj.weight", 8)
        # Head 1: pair i of halves (i, i + 32) stands at (2i, 2i + 1).
        np.testing.assert_array_equal(eight["blk.0.attn_q.weight"][64 + 2 * 5], q[64 + 5])
        np.testing.assert_array_equal(eight["blk.0.attn_q.weight"][64 + 2 * 5 + 1], q[64 + 32 + 5])
        assert len(eight) == len(checkpoint.names)


def test_metadata_is_complete(overlay: Path, tmp_path: Path) -> None:
    export_gguf(overlay, tmp_path / "out.gguf", progress=False)
    found = {
        name: field(tmp_path / "out.gguf", name)
        for name in (
            *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")),
            *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.dimension_count"),
            *("llama.rope.freq_base", "llama.vocab_size", "general.name", "general.file_type"),
            *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "merges", "bos_token_id", "eos_token_id")),
            *("tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"),
        )
    }
    assert list(found.values()) == [
        *(2, 64, 256, 96),
        *(4, 2, 64),
        *(10000.0, 96, "llama", int(gguf.LlamaFileType.MOSTLY_Q4_K_M)),
        *("gpt2", "gpt-2", ["A B"], 1, 2),
        *(0, False, "{{ messages }}"),
    ]
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.tokens")[:4] == ["<p>", "<s>", "</s>", "!"]
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_near_the_model_and_as_large_as_reported(llama: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    report = export_gguf(llama, out, type=kind, progress=False)
    types = read_types(out)
    assert out.stat().st_size == report.bytes
    assert report.tensors == {one: list(types.values()).count(one) for one in types.values()}
    assert [one.name for one in tmp_path.iterdir()] == ["out.gguf"]  # nothing temporary is left
    assert ("instead of" in " ".join(report.notes)) == ("_K" in kind)  # rows of 96 weights
    tensors = read_tensors(out)
    stored_bytes = sum(one.n_bytes for one in gguf.GGUFReader(out).tensors)
    assert report.bpw == pytest.approx(stored_bytes * 8 / sum(array.size for array in tensors.values()))
    with Checkpoint.open(llama) as checkpoint:
        for ours, name in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            want = checkpoint.dense(f"model.layers.0.{name}.weight", 0)
            error = ((tensors[f"blk.0.{ours}.weight"] - want) ** 2).sum() / (want**2).sum()
            assert error < {"2": 0.15, "3": 0.03, "4": 0.01, "5": 0.003}.get(kind[1], 0.001)


def test_rope_of_llama_3_is_a_tensor(tmp_path: Path) -> None:
    folder = save_tiny("llama_rope_llama3", tmp_path / "m")
    export_gguf(folder, tmp_path / "out.gguf", type="F32", progress=False)
    factors = read_tensors(tmp_path / "out.gguf")["rope_freqs.weight"]
    share = (16 / (2 * math.pi) - 1) / (4 - 1)  # the first wave turns 16 / 2 pi times in the original context
    assert factors[0] == pytest.approx(1 / ((1 - share) / 8 + share))
    assert factors[-1] == pytest.approx(8)  # the longest wave is stretched by `factor`


def test_experts_are_split(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from everybit.quantize.source import Source

    folder = save_tiny("mixtral", tmp_path / "m")
    fused = {name: tensor.contiguous() for name, tensor in Source(folder).parameters()}
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "out.gguf", type="F32", progress=False)
    both = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    found = read_tensors(tmp_path / "out.gguf")
    np.testing.assert_array_equal(found["blk.1.ffn_gate_exps.weight"], both[:, : both.shape[1] // 2])
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"], both[:, both.shape[1] // 2 :])


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("opt", {}, "architecture 'OPTForCausalLM' arrived, GGUF export has LlamaForCausalLM"),
        ("gpt_oss", {}, "architecture 'GptOssForCausalLM' arrived"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu, llama.cpp has silu"),
        ("qwen3", {"attention_bias": True}, "q_proj.bias' has no place in llama.cpp's qwen3"),
        ("smollm3", {}, "rotates other layers"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "scales attention scores"),
        ("gemma3", {"final_logit_softcapping": 1.0}, "caps its logits"),
        ("olmo2", {"tie_word_embeddings": True}, "has one beside the embedding"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}}, "rope of type llama3"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(family: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "m", **changed)
    with pytest.raises(ModelError, match=message) as caught:
        export_gguf(folder, tmp_path / "out.gguf", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("found", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_are_a_list_of_names(found: Any) -> None:
    with pytest.raises(ModelError, match=r"config: architectures .* arrived, expected a list of names"):
        find_family({"architectures": found, "model_type": "llama"}, "config")


def test_windows_shorten_the_context(tmp_path: Path) -> None:
    folder = save_tiny("mistral_window", tmp_path / "m")
    report = export_gguf(folder, tmp_path / "out.gguf", type="F16", progress=False)
    assert field(tmp_path / "out.gguf", "llama.context_length") == 12
    assert any("the context is cut from 64 to 12" in note for note in report.notes)


def tokenizer(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    return edit


def template(found: Any) -> Any:
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))


def begins_with(token: str, ids: list[int]) -> dict[str, Any]:
    """A post-processor that puts a token before every text, and has `<s>` with these ids."""
    both: list[Any] = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": both, "pair": both, "special_tokens": special}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (tokenizer(lambda t: t["model"].update(merges=[])), "without merges"),
        (tokenizer(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "the pre-tokenizer"),
        (tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})), "the normalizer"),
        (tokenizer(lambda t: t["model"].update(byte_fallback=True)), "no token for byte 0"),
        (tokenizer(lambda t: t["model"]["vocab"].update(zz=96)), "token id 96 arrived, the model has 96"),
        (tokenizer(lambda t: t.update(post_processor=begins_with("<s>", []))), "tokens that stand for one id"),
        (tokenizer(lambda t: t.update(post_processor=begins_with("<x>", [1]))), "tokens that stand for one id"),
        (template([{"name": 1, "template": 2}]), "chat_template .* expected text or a list of names and templates"),
        (template([{"name": "a"}]), "chat_template .* expected text"),
        (template({"a": "b"}), "chat_template .* expected text"),
        (template("\ud800"), r"chat_template '\\ud800' arrived, expected text"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(llama: Path, tmp_path: Path, edit: Any, message: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    edit(folder)
    with pytest.raises(SourceError, match=message):
        export_gguf(folder, tmp_path / "out.gguf", progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"type": "Q4_K"}, SourceError, "GGUF type 'Q4_K' arrived, expected one of F32, F16"),
        ({"bits": 5}, PrecisionError, "bits 5 asked, the overlay has 3, 8"),
        ({"bits": 3, "source": "llama"}, PrecisionError, "leave the other out"),
        ({"source": "other"}, SourceError, "is not the float model of"),
        ({"out": "there.gguf"}, OutputError, "there.gguf exists"),
        ({"out": "no/folder.gguf"}, OutputError, "No such file"),
        ({"out": "cut.gguf"}, OutputError, "cut.gguf.partial is there, of a run that was cut off"),
    ],
)
def test_options_are_refused(
    overlay: Path, tmp_path: Path, options: dict[str, Any], error: type[EverybitError], message: str
) -> None:
    (tmp_path / "there.gguf").write_bytes(b"mine")
    (tmp_path / "cut.gguf.partial").write_bytes(b"cut")
    if source := options.get("source"):
        other = save_tiny("llama", tmp_path / "other") if source == "other" else overlay.with_name("llama")
        options = {**options, "source": other}
    options = dict(options)
    with pytest.raises(error, match=message):
        export_gguf(overlay, tmp_path / options.pop("out", "out.gguf"), progress=False, **options)
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert (tmp_path / "cut.gguf.partial").read_bytes() == b"cut"


def test_a_file_that_appears_meanwhile_stays(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"

    def pack_slowly(kind: str, values: Any) -> Any:
        out.write_bytes(b"theirs")
        return pack(kind, values)

    monkeypatch.setattr("everybit.integrations.gguf.file.pack", pack_slowly)
    with pytest.raises(OutputError, match=r"out\.gguf exists: choose another file"):
        export_gguf(llama, out, type="F16", progress=False)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("out.gguf", b"theirs")]


def test_a_full_disk_is_seen_before_packing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"out\.gguf needs \d+ bytes, the disk has 1000 free"):
        export_gguf(llama, tmp_path / "out.gguf", progress=False)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_are_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"blk.0.ffn_up.weight' has values beyond 65504, which F16 cannot hold"):
        export_gguf(folder, tmp_path / "out.gguf", type="F16", progress=False)
    export_gguf(folder, tmp_path / "out.gguf", type="BF16", progress=False)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m", "out.gguf"]
