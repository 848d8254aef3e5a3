"""Model code: one file per family, each a `build(config, checkpoint) -> Program`. `build` here picks the family."""

from __future__ import annotations

from collections.abc import Callable

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.models import bitnet, gemma, gpt2, llama, mistral, moe, olmo2, opt, phi3, qwen2, smollm3
from everybit.engine.models.check import check
from everybit.engine.models.config import Config
from everybit.engine.program import Program
from everybit.errors import ModelError
from everybit.formats.tensors import show

Build = Callable[[Config, Checkpoint], Program]

# model_type -> (architecture, builder)
FAMILIES: dict[str, tuple[str, Build]] = {
    "llama": ("LlamaForCausalLM", llama.build),
    "mistral": ("MistralForCausalLM", mistral.build),
    "qwen2": ("Qwen2ForCausalLM", qwen2.build_qwen2),
    "qwen3": ("Qwen3ForCausalLM", qwen2.build_qwen3),
    "gemma2": ("Gemma2ForCausalLM", gemma.build_gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", gemma.build_gemma3),
    "phi3": ("Phi3ForCausalLM", phi3.build),
    "olmo2": ("Olmo2ForCausalLM", olmo2.build),
    "smollm3": ("SmolLM3ForCausalLM", smollm3.build),
    "opt": ("OPTForCausalLM", opt.build),
    "gpt2": ("GPT2LMHeadModel", gpt2.build),
    "bitnet": ("BitNetForCausalLM", bitnet.build),
    "mixtral": ("MixtralForCausalLM", moe.build_mixtral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", moe.build_qwen3_moe),
    "gpt_oss": ("GptOssForCausalLM", moe.build_gpt_oss),
}


def build(checkpoint: Checkpoint, context: int | None = None) -> Program:
    """The program of the model in `checkpoint`, for sequences of up to `context` tokens (None: the model's most).

    config.json's `architectures` decides, or its `model_type` where that is missing.
    Raises: ModelError for a family, a switch or a context this engine does not have, and for parameters that are
        missing, left over or of another shape than config.json implies
    """
    where = f"{checkpoint.folder}/config.json"
    config = Config(checkpoint.config, where, context)
    program = _family(config)(config, checkpoint)
    config.finish()
    check(program, checkpoint)
    return program


def _family(config: Config) -> Build:
    named, kind = config.get("architectures"), config.get("model_type")
    if isinstance(named, list) and named:
        for architecture, builder in FAMILIES.values():
            if named[0] == architecture:
                return builder
    elif isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind][1]
    found = named[0] if isinstance(named, list) and named else kind
    known = ", ".join(architecture for architecture, _ in FAMILIES.values())
    raise ModelError(
        f"{config.where}: architecture {show(found)} arrived, the engine has {known}: run it with transformers instead"
    )
