"""The model families that llama.cpp runs as our engine does, and what its code for each of them takes for granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from everybit.engine.models import FAMILIES as KNOWN
from everybit.errors import ModelError
from everybit.formats.tensors import show


@dataclass(frozen=True)
class Family:
    """What llama.cpp's `architecture` computes.

    theta       the rope's base where config.json has none, by transformers
    activation  of the MLPs
    pairs       whether neighbours (2i, 2i + 1) are rotated instead of halves
    windows     every so manyth layer sees everything, the others a window (0: no windows)
    rotated     every so manyth layer does not rotate (0: all do)
    biases      those it reads, by the end of their names
    head        whether the output head is the embedding, one of its own, or either
    large       the number of layers of the size whose attention scale is another
    ropes       the rope types it can be told
    """

    architecture: str
    theta: float = 1e4
    activation: str = "silu"
    pairs: bool = False
    windows: int = 0
    rotated: int = 0
    biases: tuple[str, ...] = ()
    head: Literal["any", "tied", "own"] = "any"
    large: int = 0
    ropes: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")


_QKV = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_LLAMA = Family(
    "llama",
    pairs=True,
    biases=(*_QKV, "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"),
    ropes=("default", "dynamic", "linear", "yarn", "llama3"),
)

# by the architecture in config.json
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": Family("llama", theta=1e6, pairs=True),
    "Qwen2ForCausalLM": Family("qwen2", biases=_QKV),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe"),
    "Gemma2ForCausalLM": Family("gemma2", activation="gelu_tanh", windows=2, head="tied", large=46),
    "Gemma3ForCausalLM": Family("gemma3", theta=1e6, activation="gelu_tanh", windows=6, large=62),
    "Phi3ForCausalLM": Family("phi3", ropes=("default", "dynamic", "longrope")),
    "Olmo2ForCausalLM": Family("olmo2", head="own"),
    "SmolLM3ForCausalLM": Family("smollm3", theta=2e6, pairs=True, rotated=4),
    "GPT2LMHeadModel": Family("gpt2", activation="gelu_tanh", biases=(".bias",)),
    "BitNetForCausalLM": Family("bitnet", theta=5e5, head="tied"),
}


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json that the engine has accepted. Raises: ModelError"""
    named, kind = config.get("architectures"), config.get("model_type")
    if named and not (isinstance(named, list) and isinstance(named[0], str)):
        raise ModelError(f"{where}: architectures {show(named)} arrived, expected a list of names: correct it")
    name = named[0] if named else KNOWN[str(kind)][0]
    if name not in FAMILIES:
        raise ModelError(
            f"{where}: architecture {show(name)} arrived, GGUF export has {', '.join(FAMILIES)}: "
            "export to safetensors instead"
        )
    return FAMILIES[name]
