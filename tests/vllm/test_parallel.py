"""Tensor parallelism, rank by rank: each rank's stock loaders cut planes and codebooks as they cut a dense weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from everybit.errors import ShapeError
from everybit.formats import Overlay
from everybit.integrations.vllm.config import OverlayConfig
from everybit.kernels import dequantize
from tests.vllm import engine
from tests.vllm.overlays import build

LAYER = "model.layers.0."
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen2", tmp_path_factory.mktemp("qwen2"), override={"k_proj": (8,), "lm_head": (4,)})


def dense(opened: Overlay, name: str, bits: int) -> torch.Tensor:
    spec = opened.weights[name]
    own = spec.served_bits(bits)
    return torch.from_numpy(dequantize(opened.planes(name, own), opened.table(name, own), spec.columns))


def loaded(
    monkeypatch: pytest.MonkeyPatch,
    overlay: Path,
    rank: int,
    make: Callable[[OverlayConfig], Any],
    shards: dict[Any, str],
) -> Any:
    """The layer of one of two ranks, loaded by its parameters' loaders. `shards`: vLLM's id of a part -> weight."""
    for module in (linear, parameter, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 2)
    vllm_config = engine.configure(overlay, quantization="everybit-4bit")
    with Overlay.open(overlay) as opened, set_current_vllm_config(vllm_config):
        config = OverlayConfig.from_config({**opened.config["quantization_config"], "bits": [4]})
        config.packed_modules_mapping = FUSED
        layer = make(config)
        for shard, weight in shards.items():
            for name in opened.weights[weight].tensors():
                held = getattr(layer, "weight_" + name.removeprefix(f"{weight}_"), None)
                if held is not None:
                    tensor = torch.from_numpy(opened.tensor(name).copy())
                    held.weight_loader(held, tensor, *(() if shard is None else (shard,)))
                    config.seen.add(name)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer.quant_method.apply(layer, x)
    return found


def reference(overlay: Path, weights: list[str]) -> torch.Tensor:
    with Overlay.open(overlay) as opened:
        return torch.cat([dense(opened, weight, 4) for weight in weights])


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_fused_and_column_parallel(kv_heads: int, overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16 rows; with a single key head both ranks hold it."""
    names = {shard: f"{LAYER}self_attn.{shard}_proj.weight" for shard in "qkv"}
    if kv_heads == 1:  # 64 query rows and 32 of keys as 2 heads of 32 and 1
        size, heads = 32, 2
    else:
        size, heads = 16, 4
    x = torch.randn(3, 64)
    q, k, v = (x @ reference(overlay, [name]).T for name in names.values())

    def make(config: OverlayConfig) -> Any:
        return linear.QKVParallelLinear(
            64, size, heads, kv_heads, bias=False, quant_config=config, prefix=f"{LAYER}self_attn.qkv_proj"
        )

    for rank in range(2):
        found = product(loaded(monkeypatch, overlay, rank, make, dict(names)), x)
        halves = [q.chunk(2, 1)[rank], *((k, v) if kv_heads == 1 else (k.chunk(2, 1)[rank], v.chunk(2, 1)[rank]))]
        torch.testing.assert_close(found, torch.cat(halves, 1))


def test_gate_and_up(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {i: f"{LAYER}mlp.{part}_proj.weight" for i, part in enumerate(("gate", "up"))}
    x = torch.randn(3, 64)

    def make(config: OverlayConfig) -> Any:
        return linear.MergedColumnParallelLinear(
            64, [100, 100], bias=False, quant_config=config, prefix=f"{LAYER}mlp.gate_up_proj"
        )

    for rank in range(2):
        found = product(loaded(monkeypatch, overlay, rank, make, dict(names)), x)
        halves = [(x @ reference(overlay, [name]).T).chunk(2, 1)[rank] for name in names.values()]
        torch.testing.assert_close(found, torch.cat(halves, 1))


def test_row_parallel(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{LAYER}self_attn.o_proj.weight"
    x = torch.randn(3, 64)

    def make(config: OverlayConfig) -> Any:
        return linear.RowParallelLinear(64, 64, bias=False, quant_config=config, prefix=name.removesuffix(".weight"))

    parts = [product(loaded(monkeypatch, overlay, r, make, {None: name}), x.chunk(2, 1)[r]) for r in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], x @ reference(overlay, [name]).T)


def test_head(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 rows padded to 128: the second rank has 32 and as many of zeros."""
    x = torch.randn(3, 64)

    def make(config: OverlayConfig) -> Any:
        return vocab_parallel_embedding.ParallelLMHead(96, 64, quant_config=config, prefix="lm_head")

    parts = [product(loaded(monkeypatch, overlay, r, make, {None: "lm_head.weight"}), x) for r in range(2)]
    expected = x @ reference(overlay, ["lm_head.weight"]).T
    torch.testing.assert_close(torch.cat(parts, 1), torch.nn.functional.pad(expected, (0, 32)))


def test_a_byte_is_never_cut(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{LAYER}mlp.down_proj.weight"

    def make(config: OverlayConfig) -> Any:
        return linear.RowParallelLinear(100, 64, bias=False, quant_config=config, prefix=name.removesuffix(".weight"))

    with pytest.raises(ShapeError, match=r"down_proj.weight: 100 columns cut into parts of 50 .* multiple of 8"):
        loaded(monkeypatch, overlay, 0, make, {None: name})
