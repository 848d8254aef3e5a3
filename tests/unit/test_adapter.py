"""LoRA adapters in our engine: a model with one is the model whose weights hold it; what cannot be run is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import everybit
from everybit.batching.batcher import Batcher
from everybit.batching.fluidity import Target
from everybit.batching.scheduler import Request
from everybit.cli.main import main
from everybit.engine.adapter import Adapter
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.generate import generate
from everybit.engine.models import build
from everybit.engine.native import make_step
from everybit.engine.ops import Linear
from everybit.engine.plan import Plan
from everybit.engine.reference import Reference
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import EverybitError
from everybit.gpu.engine import Device
from everybit.server.opening import Opening, close
from tests.e2e.architectures import make

F32 = NDArray[np.float32]
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}
TOKENS = [5, 9, 33, 7, 2, 80, 41, 3, 3, 64]
GREEDY = Sampling(temperature=0)
# Float32 sums of up to 104 terms in two layers, of weights that were rounded to float32 once more where they hold the
# adapter; relative to the largest logit. Measured: at most 8e-7. An adapter that is left out is above 1e-2.
TOLERANCE = 1e-5


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def rank(module: str) -> int:
    return 5 if module.endswith("layers.1.mlp.down_proj") else 3


def tensors_for(folder: Path) -> dict[str, torch.Tensor]:
    """Random A and B of all linear layers that are no tied head, by PEFT's names."""
    torch.manual_seed(1)
    found = {}
    with Checkpoint.open(folder) as checkpoint:
        for op in build(checkpoint).ops:
            if not isinstance(op, Linear):
                continue
            for out, name in zip(op.outs, op.weights, strict=True):
                if "embed" not in name and "wte" not in name:
                    module = name.removesuffix(".weight")
                    found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank(module), op.x.width) * 0.1
                    found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out.width, rank(module)) * 0.1
    return found


def merge(folder: Path, tensors: dict[str, torch.Tensor], out: Path) -> Path:
    """The float model whose weights hold an adapter of lora_alpha 5, and 7 of q_proj."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = (7 if module.endswith(".q_proj") else 5) / rank(module)
        delta = scale * (tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double())
        weights[f"{module}.weight"] += (delta.T if ".c_" in module else delta).float()  # Conv1D is stored [K, N]
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def native(folder: Path, adapter: Path | None = None, bits: Any = 0, **options: Any) -> F32:
    """The logits of TOKENS, some at once and some one by one, in two threads."""
    options = {"threads": 2, "mode": "exact", "kv_dtype": "float32", **options}
    with Runtime.open(folder, adapter=adapter, **options) as runtime:
        return np.concatenate([*runtime.score(0, TOKENS[:7], bits), *(runtime.decode([t], bits) for t in TOKENS[7:])])


def reference(folder: Path, adapter: Path, bits: int = 0) -> F32:
    with Checkpoint.open(folder) as checkpoint:
        program = Adapter.open(adapter).put_on(build(checkpoint), checkpoint)
        return Reference(program, checkpoint).run(make_step([(TOKENS, 0, [0])], range(len(TOKENS))), bits)


def difference(one: F32, other: F32) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "llama"
    make("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def overlay(llama: Path) -> Path:
    everybit.quantize(llama, llama.parent / "overlay", bits=(2, 3, 8), progress=False)
    return llama.parent / "overlay"


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return write(llama.parent / "lora", tensors_for(llama), rank_pattern={r"layers\.1\.mlp\.down_\w+": 5})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm", "phi3", "gemma2", "mixtral"])
def test_it_is_the_model_whose_weights_hold_it(family: str, tmp_path: Path) -> None:
    model, folder = make(family), tmp_path / "model"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})
    tensors = tensors_for(folder)
    patterns = {"rank_pattern": {r"layers\.1\.mlp\.down_\w+": 5}, "alpha_pattern": {"q_proj": 7}}
    adapter = write(tmp_path / "lora", tensors, **patterns)
    merged = native(merge(folder, tensors, tmp_path / "merged"))
    assert difference(native(folder), merged) > 0.01
    assert difference(native(folder, adapter), merged) < TOLERANCE
    assert difference(reference(folder, adapter), merged) < TOLERANCE


def test_every_precision_and_plan_has_it(overlay: Path, adapter: Path) -> None:
    for bits in (2, 3, 8):
        wanted = reference(overlay, adapter, bits)
        assert difference(native(overlay, adapter, bits), wanted) < TOLERANCE
        assert difference(native(overlay, None, bits), wanted) > 0.01
        assert difference(native(overlay, adapter, bits, mode="default"), wanted) < 0.1
    with Runtime.open(overlay, adapter=adapter, threads=1) as runtime:
        assert runtime.checkpoint.overlay is not None
        plan = Plan.of(runtime.checkpoint.overlay, dict.fromkeys(runtime.checkpoint.overlay.weights, 3))
        planned = runtime.prefill(0, TOKENS, plan)
        runtime.reset()
        np.testing.assert_array_equal(planned, runtime.prefill(0, TOKENS, 3))


def test_dtypes_and_scales(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found: list[Adapter] = []
    for dtype, config in (
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"use_rslora": True, "lora_alpha": 5 / 3**0.5}),
        (torch.float32, {"r": 4, "rank_pattern": {name: 3}, "lora_alpha": 1, "alpha_pattern": {"^model.*q_proj": 5}}),
    ):
        a, b = torch.arange(120.0).reshape(3, 40) / 64, torch.arange(120.0).reshape(40, 3) / 64  # exact in all
        tensors = {f"base_model.model.{name}.lora_{i}.weight": one.to(dtype) for i, one in (("A", a), ("B", b))}
        found.append(Adapter.open(write(tmp_path / str(len(found)), tensors, **config)))
    for one in found:
        np.testing.assert_allclose(one.pairs[name][1], found[0].pairs[name][1], rtol=1e-6)
        np.testing.assert_array_equal(one.pairs[name][0], found[0].pairs[name][0])
    assert len({one.checksum for one in found[:3]}) == 1


def test_names_without_the_base_models_prefix(llama: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {
        name.replace("base_model.model.model.", "base_model.model."): one for name, one in tensors_for(llama).items()
    }
    short = write(tmp_path / "short", tensors, rank_pattern={"1.mlp.down_proj": 5})  # of an AutoModel
    np.testing.assert_array_equal(native(llama, short), native(llama, adapter))


def test_torch_runs_it(overlay: Path, adapter: Path) -> None:
    with Runtime.open(overlay, adapter=adapter, backend=partial(Device, device="cpu"), kv_dtype="float32") as runtime:
        found = np.concatenate([*runtime.score(0, TOKENS[:7], 3), *(runtime.decode([t], 3) for t in TOKENS[7:])])
    assert difference(found, reference(overlay, adapter, 3)) < 0.01  # products in float16


def test_a_token_gets_the_same_logits_in_any_company(overlay: Path, adapter: Path) -> None:
    for mode in ("fast", "exact"):
        with Runtime.open(overlay, adapter=adapter, threads=2, mode=mode) as runtime:
            together = np.concatenate([*runtime.score(0, TOKENS, 3)])
            runtime.reset()
            np.testing.assert_array_equal(together, np.concatenate([runtime.decode([t], 3) for t in TOKENS]))


def test_drafts_have_it_too(overlay: Path, adapter: Path) -> None:
    with Runtime.open(overlay, adapter=adapter, threads=2, context=60, mode="fast") as runtime:
        wanted = list(generate(runtime, TOKENS, GREEDY, 40, 8))
        runtime.reset()
        batcher = Batcher(runtime, draft_bits=2)
        batcher.submit(Request(1, tuple(TOKENS), 40, 8), GREEDY, ())
        found = []
        while batcher.busy:
            found += [event.token for event in batcher.step() if event.token is not None]
    assert found == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' arrived, expected LORA"),
        ({"use_dora": True}, "use_dora True arrived, expected plain LoRA"),
        ({"bias": "lora_only"}, "bias 'lora_only' arrived"),
        ({"lora_bias": True}, "lora_bias True arrived"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] arrived"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices \[3\] arrived"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters .* arrived"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' arrived"),
        ({"a_switch_of_next_year": {"x": 1}}, "a_switch_of_next_year .* arrived"),
        ({"use_rslora": "yes"}, "use_rslora 'yes' arrived"),
        ({"r": 4}, r"lora_A \[3, 40\] and lora_B \[40, 3\], expected \[4, inputs\]"),
        ({"r": 10**400}, "r 1000.* arrived for"),
        ({"r": None}, "r None arrived for 'model.layers.0.self_attn.q_proj'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan arrived"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000.* arrived for"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern \{'\(': 3\} arrived, expected numbers by regular expressions"),
        ({"alpha_pattern": [3]}, r"alpha_pattern \[3\] arrived"),
        ({"rank_pattern": {"(([a-z_.]+)+)+#": 8}}, "expected a short one that repeats no group"),
        ({"target_modules": {"a": 1}}, "target_modules .* arrived, expected a list of names or an expression"),
    ],
)
def test_configs_that_are_refused(llama: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    refused(llama, write(tmp_path, pair("model.layers.0.self_attn.q_proj"), **config), message)


def test_a_config_and_tensors_that_contradict_each_other(llama: Path, tmp_path: Path) -> None:
    tensors = tensors_for(llama)
    how = {"rank_pattern": {r"layers\.1\.mlp\.down_\w+": 5}}
    names = sorted({name.split(".")[-3] for name in tensors})
    Runtime.open(llama, adapter=write(tmp_path, tensors, target_modules=names, **how), threads=1).close()
    Runtime.open(llama, adapter=write(tmp_path, tensors, target_modules=r".*(_proj|head)", **how), threads=1).close()
    refused(llama, write(tmp_path, tensors, target_modules=["q_proj"], **how), "that target_modules .* leaves out")
    refused(llama, write(tmp_path, tensors, target_modules=names, exclude_modules=["up_proj"], **how), "leaves out")
    refused(llama, write(tmp_path, tensors, target_modules=names, layers_to_transform=[0], **how), "leaves out")
    half = {name: one for name, one in tensors.items() if "layers.0." in name}
    refused(llama, write(tmp_path, half, target_modules=names), "have no adapter")
    only = {name: one for name, one in tensors.items() if "layers.1." in name}
    Runtime.open(
        llama, adapter=write(tmp_path, only, target_modules=names, layers_to_transform=1, **how), threads=1
    ).close()


def pair(module: str, outputs: int = 40, inputs: int = 40) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(3, inputs), f"{name}.lora_B.weight": torch.ones(outputs, 3)}


def refused(folder: Path, adapter: Path, message: str) -> None:
    with pytest.raises(EverybitError, match=message) as found:
        Runtime.open(folder, adapter=adapter, threads=1)
    assert "\n" not in str(found.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("model.layers.2.self_attn.q_proj"), "an adapter of 'model.layers.2.self_attn.q_proj' arrived"),
        (pair("q_proj"), "an adapter of 'q_proj' arrived, expected linear layers of this model"),
        (pair("model.embed_tokens", 96), "an adapter of 'model.embed_tokens' arrived, .*not embeddings"),
        (pair("model.layers.0.mlp.experts"), "an adapter of 'model.layers.0.mlp.experts' arrived"),
        (pair(Q) | pair(Q.removeprefix("model.")), f"two adapters of '{Q}.weight' arrived"),
        (pair(Q, 44), "takes 40 numbers to 44, this model's takes 40 to 40"),
        (pair(Q, 40, 44), "takes 44 numbers to 40"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 40)}, "has lora_A alone, expected both"),
        ({f"{Q}.lora_A.weight": torch.ones(3), f"{Q}.lora_B.weight": torch.ones(40, 3)}, r"has lora_A \[3\] and"),
        (pair(Q) | {f"{Q}.lora_A.weight": torch.full((3, 40), torch.inf)}, "numbers that are not finite"),
        (pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(40)}, "lora_magnitude_vector' of F32 arrived"),
        (pair(Q) | {"lm_head.base_layer.weight": torch.ones(3)}, "lm_head.base_layer.weight' .* save_embedding_layers"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 40, dtype=torch.int8)}, "of I8 arrived, expected .* F32, F16 or BF16"),
        ({}, "holds no tensors"),
    ],
)
def test_tensors_that_are_refused(llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    tensors = {f"base_model.model.{name.removeprefix('base_model.model.')}": one for name, one in tensors.items()}
    refused(llama, write(tmp_path, tensors), message)


def test_adapters_of_a_tied_head_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    refused(tiny_llama, write(tmp_path, pair("lm_head", 258, 48)), "'lm_head' arrived, .* or a head tied")
    refused(tiny_llama, write(tmp_path, pair("model.embed_tokens", 258, 48)), "'model.embed_tokens' arrived")


def test_folders_that_are_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path / "none", r"none: there is no adapter_config\.json, expected a folder that PeftModel")
    write(tmp_path, pair(Q))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    refused(llama, tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refused(llama, tmp_path, r"pickle \(adapter_model.bin\), which everybit never loads")
    (tmp_path / "adapter_model.bin").unlink()
    refused(llama, tmp_path, r"there is no adapter_model\.safetensors")


def test_commands(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write(tmp_path, tensors_for(tiny_llama), rank_pattern={"1.mlp.down_proj": 5}, lora_alpha=50)
    texts = []
    for option in ([], ["--adapter", str(adapter)]):
        assert main(["generate", str(tiny_llama), "--prompt", "The", "--json", "--max-tokens", "8", *option]) == 0
        found = capsys.readouterr()
        texts.append(json.loads(found.out)["text"])
        assert json.loads(found.out)["adapter"] == (str(adapter) if option else None)
        assert (f"float weights with the adapter {adapter}" in found.err) == bool(option)
    assert texts[0] != texts[1]
    assert main(["serve", f"a={tiny_llama}", f"b={tiny_llama}", "--adapter", str(adapter), "--port", "0"]) == 2
    assert "is for one model, 2 arrived" in capsys.readouterr().err
    assert main(["eval", str(tiny_llama), "--text", "x", "--card", "--adapter", str(adapter)]) == 2
    assert "--card writes into the overlay" in capsys.readouterr().err


def test_a_served_models_fingerprint_names_it(tiny_llama: Path, tmp_path: Path) -> None:
    tensors, patterns = tensors_for(tiny_llama), {"rank_pattern": {"1.mlp.down_proj": 5}}
    one, other = (
        write(tmp_path / "one", tensors, **patterns),
        write(tmp_path / "other", tensors, lora_alpha=6, **patterns),
    )
    same = write(tmp_path / "same", tensors, lora_dropout=0.1, **patterns)
    prints = []
    for adapter in (None, one, other, same):
        opening = Opening(
            {"m": tiny_llama}, "auto", {}, 1, "fast", 64, 1, "float16", 64, 4, Target(1, 1), True, None, adapter
        )
        opened = opening.open()
        prints.append(opened["m"].fingerprint)
        assert ("with the adapter" in opening.about(opened)) == bool(adapter)
        close(opened)
    assert len(set(prints)) == 3
    assert prints[1] == prints[3]
