"""`everybit.load(kernels=...)`: planes give what dense copies give, on a processor and, where there is one, a GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import everybit
from everybit.errors import EverybitError, ModelError
from everybit.integrations.transformers import products
from tests.e2e.architectures import make

IDS = torch.tensor([[1, 5, 9, 33, 2, 64, 7, 8]])


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("llama", "gpt2", "qwen2", "gpt_oss", "table"):  # gpt2: Conv1D; qwen2: biases; gpt_oss: experts
        folder = tmp_path_factory.mktemp("kernels")
        codebook = "table" if name == "table" else None
        make("llama" if name == "table" else name).save_pretrained(folder / "model")
        everybit.quantize(folder / "model", folder / "out", bits=(2, 3, 6), progress=False, codebook=codebook)
        found[name] = folder / "out"
    return found


def tiled(model: Any) -> list[bool]:
    """Of every weight, whether its planes are in tiles."""
    return [slot._tiled is not None for slot in model._slots]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_oss", "table"])
def test_planes_give_what_dense_copies_give(overlays: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    options = {"experts_implementation": "eager"} if name == "gpt_oss" else {}  # torch groups no products so narrow
    planes = everybit.load(overlays[name], kernels="reference", dtype=dtype, **options)
    dense = everybit.load(overlays[name], kernels="dense", dtype=dtype, **options)
    exact = everybit.load(overlays[name], dtype=torch.float32, **options)
    with torch.no_grad():
        for bits in (3, 6, 2):
            for model in (planes, dense, exact):
                model.set_precision(bits)
            a, b, c = (model(IDS).logits.float() for model in (planes, dense, exact))
            # Both round weights to `dtype`, planes before the row's scale, dense ones after: the errors are alike.
            assert (a - c).norm() < 2 * (b - c).norm() + 1e-4 * c.norm()
            without = {"gpt_oss": 4, "table": len(planes._slots) if bits == 6 else 0}.get(name, 0)
            assert tiled(planes).count(False) == without
            assert [slot._dense is not None for slot in planes._slots].count(True) == without


def test_fewer_bits_cost_nothing_and_more_read_planes(overlays: dict[str, Path]) -> None:
    model = everybit.load(overlays["llama"], 3, kernels="reference", dtype=torch.bfloat16)
    with torch.no_grad():
        model(IDS)
        first = [slot._tiled for slot in model._slots]
        assert {len(t.planes) for t in first if t} == {3}
        model(IDS, bits=2)
        assert all(slot._tiled is t for slot, t in zip(model._slots, first, strict=True))
        model(IDS, bits=6)
        assert {len(slot._tiled.planes) for slot in model._slots} == {6}
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 40, requires_grad=True)
        model.model.layers[0].self_attn.q_proj(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_gradients_reach_the_input_as_through_dense_weights(overlays: dict[str, Path]) -> None:
    found = []
    for kernels in ("reference", "dense"):
        model = everybit.load(overlays["llama"], 6, kernels=kernels, dtype=torch.bfloat16)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x, labels=IDS).loss.backward()
        found.append(x.grad.float())
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()  # bfloat16 has 8 bits; two layers


def test_wishes_that_cannot_be_met(overlays: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = overlays["llama"]
    with pytest.raises(ModelError, match="expected one of auto, gpu, reference, dense"):
        everybit.load(folder, kernels="fast")
    with pytest.raises(ModelError, match=r"float32: load it with dtype=torch\.float16"):
        everybit.load(folder, kernels="reference", dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch sees no CUDA device"):
        everybit.load(folder, kernels="gpu")


def test_old_gpus_and_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    products.obstacle_to_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda", 0)
    with pytest.raises(ModelError, match=r"compute capability 7\.5: use one of 8\.0 or more, or leave kernels out"):
        products.Products("gpu").by_planes(gpu, torch.float16)
    auto = products.Products()
    with pytest.warns(UserWarning, match="dense copies instead of the GPU kernels: the GPU has compute"):
        assert auto.by_planes(gpu, torch.float16) is False
    assert auto.by_planes(gpu, torch.float16) is False  # told once: a second warning would be an error
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    products.obstacle_to_kernels.cache_clear()
    assert "cuda-bindings is not installed" in str(products.obstacle_to_kernels(gpu, torch.float16, False))
    products.obstacle_to_kernels.cache_clear()


def test_a_full_gpu_says_what_fits(overlays: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = everybit.load(overlays["llama"])
    sizes = model.overlay.sizes().rows
    total = type("Properties", (), {"total_memory": (sizes[3].bytes + 1) / 0.9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    gpu = torch.device("cuda")
    with pytest.raises(ModelError, match="at most 3 bits fit"), products.naming_what_fits(model.overlay, gpu):
        raise torch.cuda.OutOfMemoryError


def test_writing_into_a_weight_is_refused(overlays: dict[str, Path]) -> None:
    weight = everybit.load(overlays["llama"]).model.layers[0].mlp.up_proj.weight
    for write in (lambda: weight.data.add_(1), lambda: setattr(weight, "data", weight + 1)):
        with pytest.raises(EverybitError, match="cannot be written"):
            write()
    assert type(weight + 1) is torch.Tensor


def test_from_pretrained_chooses_by_itself(overlays: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(overlays["llama"], dtype=torch.bfloat16)
    model(IDS)
    assert not any(tiled(model))  # a processor: dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_on_a_gpu(overlays: dict[str, Path], name: str, gpu: str) -> None:
    options = {"dtype": torch.float16} | ({"experts_implementation": "eager"} if name == "gpt_oss" else {})
    planes = everybit.load(overlays[name], kernels="gpu", **options)
    dense = everybit.load(overlays[name], kernels="dense", **options).to(gpu)
    ids = IDS.to(gpu)
    with torch.no_grad():
        for bits in (3, 6, 2):
            a, b = (model(ids, bits=bits).logits.float() for model in (planes, dense))
            assert (a - b).norm() < 0.02 * b.norm()
    assert any(tiled(planes))
