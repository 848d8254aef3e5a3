"""Models to export, and what their files hold, for the tests of GGUF export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.engine.checkpoint import Checkpoint
from everybit.engine.generate import generate
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from tests.e2e import architectures

WORDS = 96  # the vocabulary of the tiny models of architectures.py


def save_tiny(family: str, folder: Path, **changed: Any) -> Path:
    """A tiny random model of a family with a byte-level tokenizer of a few characters and one merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config_class, arguments, parts = {**architectures.FAMILIES, **architectures.VARIANTS}[family]
    architectures.FAMILIES["changed"] = (config_class, {**arguments, **changed}, parts)
    try:
        architectures.make("changed").save_pretrained(folder)
    finally:
        del architectures.FAMILIES["changed"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: WORDS - 4]
    vocabulary = {token: i for i, token in enumerate(["<p>", "<s>", "</s>", *letters, "AB"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("A", "B")]))
    tokenizer.add_special_tokens(["<p>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder


def read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a file, as gguf dequantizes it."""
    import gguf

    return {
        one.name: np.asarray(gguf.quants.dequantize(one.data, one.tensor_type), np.float32).reshape(
            [int(size) for size in one.shape[::-1]]
        )
        for one in gguf.GGUFReader(path).tensors
    }


def read_types(path: Path) -> dict[str, str]:
    """The type of every tensor of a file."""
    import gguf

    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def restore(model: Path, path: Path, folder: Path) -> Path:
    """A Llama's file as a float folder for our engine: `model`'s config and names, the file's dequantized values."""
    import gguf
    from safetensors.numpy import save_file

    with Checkpoint.open(model) as checkpoint:
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        parameters = {names.get_name(name, (".weight",)): name for name in checkpoint.names}
    values = {parameters[name]: array for name, array in read_tensors(path).items()}
    for name, array in values.items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # neighbours to halves
                pairs = array.reshape(config[heads], -1, 2, array.shape[1])
                values[name] = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(array.shape)
    folder.mkdir()
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def open_exact(folder: Path) -> Runtime:
    """Our engine without its shortcuts."""
    return Runtime.open(folder, threads=1, mode="exact", kv_dtype="float32")


def greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """What the engine says after `prompt`."""
    with open_exact(folder) as runtime:
        return list(generate(runtime, prompt, Sampling(temperature=0), tokens))
