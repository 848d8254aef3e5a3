"""What vLLM asks of a quantization: which precision, and who loads which layer's weight.

Layers that multiply (and an untied head) take planes and codebook as parameters (linear.py). Every other quantized
weight (experts, embeddings, what a model holds transposed) reaches its layer as a dense one (stream.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmConfig

from everybit.errors import ModelError, SourceError
from everybit.formats import ALL_BITS, QUANT_METHOD, QuantizationConfig, WeightSpec
from everybit.formats.weights import require_bits

TESTED = "0.33"  # of vLLM; its loaders change with every minor version

# Where transformers, whose names an overlay has, renamed what vLLM still knows as the original checkpoint has it.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "mixtral": {
        ".mlp.": ".block_sparse_moe.",
        ".experts.gate_up_proj": ".experts.w13",
        ".experts.down_proj": ".experts.w2",
    }
}


class OverlayConfig(VllmConfig):  # type: ignore[misc]
    """An overlay at one precision.

    `taken` are the weights whose layers hold planes, `seen` the tensors of these that came while loading.
    """

    alias_bits: ClassVar[int | None] = None  # of the method everybit-<bits>bit

    def __init__(self, quantization: QuantizationConfig | None = None, bits: int = 0) -> None:
        super().__init__()
        if quantization is None:  # how vLLM calls it for a model without a quantization_config
            raise SourceError("this model is not an overlay: run `everybit quantize MODEL OUT` and serve OUT")
        self.weights = quantization.weights
        self.bits = bits
        self.taken: set[str] = set()
        self.seen: set[str] = set()
        self.renamed: Mapping[str, str] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OverlayConfig:
        """The `quantization_config` at the method's precision, or the highest of its `bits` (a list, or one number).

        Raises: ModelError (a vLLM that was not tested), FormatError, PrecisionError
        """
        _require_version()
        asked = config.get("bits")
        quantization = QuantizationConfig.from_dict({**config, "bits": [asked]} if type(asked) is int else config)
        bits = cls.alias_bits or quantization.bits[-1]
        require_bits(bits, quantization.bits, "the overlay")
        return OverlayConfig(quantization, bits)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """The alias, where the user asked for it and the model is an overlay."""
        mine = cls.alias_bits is not None and user_quant == _alias(cls.alias_bits)
        return user_quant if mine and hf_quant_cfg.get("quant_method") == QUANT_METHOD else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.renamed = RENAMED.get(getattr(hf_config, "model_type", ""), {})

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # where there are no kernels weights are made dense

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> Any:
        """What vLLM puts every weight through before its layer sees it."""
        from everybit.integrations.vllm.stream import OverlayMapper

        return OverlayMapper(overlay=self)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from everybit.integrations.vllm.linear import OverlayLinear

        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        specs = self._specs(prefix)
        held = [spec for spec in specs if spec is not None]
        if not held or any(spec.transposed for spec in held):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        self.taken.update(spec.name for spec in held)
        return OverlayLinear(self, specs)

    def _specs(self, prefix: str) -> list[WeightSpec | None]:
        """What a layer is made of, from its first row: a weight, or those that vLLM fuses (None: not quantized)."""
        if f"{prefix}.weight" in self.weights:
            return [self.weights[f"{prefix}.weight"]]
        own = prefix.rpartition(".")[2]
        parents = prefix.removesuffix(own)
        return [self.weights.get(f"{parents}{name}.weight") for name in self.packed_modules_mapping.get(own, [own])]


def register_methods() -> None:
    """`everybit`, and `everybit-<bits>bit` for every precision that an overlay can have."""
    register_quantization_config(QUANT_METHOD)(OverlayConfig)
    for bits in ALL_BITS:
        alias = type(f"OverlayConfig{bits}", (OverlayConfig,), {"alias_bits": bits})
        register_quantization_config(_alias(bits))(alias)


def _alias(bits: int) -> str:
    return f"{QUANT_METHOD}-{bits}bit"


def _require_version() -> None:
    found = version("vllm")
    if found.split(".")[:2] != TESTED.split("."):
        raise ModelError(
            f"vllm {found} is installed, this everybit was tested with vllm {TESTED}: "
            f'pip install "vllm=={TESTED}.*", or an everybit for vllm {found}'
        )
