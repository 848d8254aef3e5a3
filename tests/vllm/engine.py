"""vLLM's own loading and forward pass on a CPU, from its Python alone (no compiled kernels, no paged attention)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.model_loader import get_model


def configure(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    """What `vllm serve FOLDER` would configure; loads the plug-ins."""
    args = EngineArgs(
        model=str(folder),
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        **options,
    )
    config = args.create_engine_config()
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.custom_ops = ["none"]
    return config


@contextmanager
def model(folder: Path, dtype: str = "float32", **options: Any) -> Iterator[tuple[Any, Any]]:
    """The model as vLLM's loader leaves it, and its configuration; attention of one sequence by torch."""
    config = configure(folder, dtype, **options)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
        parallel_state.initialize_model_parallel(1)  # a model with experts has a group that others lack
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Attention, "forward", _attend)
                patched.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
                patched.setattr(cpu_moe, "cpu_fused_moe", _experts)
                patched.setattr(torch.accelerator, "empty_cache", lambda: None)  # raises where there is no accelerator
                yield get_model(vllm_config=config), config
        finally:
            parallel_state.destroy_model_parallel()


def logits(loaded: tuple[Any, Any], ids: list[int]) -> torch.Tensor:
    """Of every position. Shapes: -> [T, V]"""
    module, config = loaded
    with torch.inference_mode(), set_forward_context(None, config):
        hidden = module(torch.tensor(ids), torch.arange(len(ids)))
        found: torch.Tensor = module.compute_logits(hidden)
    return found[:, : config.model_config.get_vocab_size()].float()


def _attend(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
) -> torch.Tensor:
    q = query.view(-1, self.num_heads, self.head_size).transpose(0, 1)
    k = key.view(-1, self.num_kv_heads, self.head_size).transpose(0, 1)
    v = value.view(-1, self.num_kv_heads, self.head_size).transpose(0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=self.impl.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(len(query), -1)


def _experts(
    output: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    bias13: None,
    bias2: None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *rest: Any,
) -> None:
    output.zero_()
    for slot in range(experts.shape[1]):
        chosen = experts[:, slot].long()
        gate, up = torch.einsum("th,tih->ti", x, w13[chosen]).chunk(2, dim=1)
        down = torch.einsum("ti,thi->th", torch.nn.functional.silu(gate) * up, w2[chosen])
        output += weights[:, slot, None] * down
