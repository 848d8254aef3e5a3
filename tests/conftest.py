"""Fixtures and settings for every test: no network, one torch thread, real models when they lie beside the checkout."""

from __future__ import annotations

import os

# Before any import of torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models: two threads on a busy two-core machine were 5x slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import settings
from scripts import screenshots

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REPOSITORY = Path(__file__).resolve().parent.parent

# Deadlines measure the machine, not the code: a busy two-core runner would fail correct tests.
settings.register_profile("everybit", deadline=None, print_blob=True)
settings.load_profile("everybit")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts: $EVERYBIT_SHARED or ../shared/data.

    Absent, the test is skipped; with EVERYBIT_REQUIRE_SHARED=1 it fails, so that CI cannot pass by skipping.
    """
    folder = Path(os.environ.get("EVERYBIT_SHARED") or REPOSITORY.parent / "shared" / "data")
    if folder.is_dir():
        return folder
    message = f"shared data not found at {folder}; set EVERYBIT_SHARED to its folder"
    if os.environ.get("EVERYBIT_REQUIRE_SHARED") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def gpu() -> str:
    """The torch device "cuda". Absent, the test is skipped; with REQUIRE_GPU=1 it fails."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    message = "no CUDA device is there: torch.cuda.is_available() is False"
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, under playwright. Absent, the test is skipped; with EVERYBIT_REQUIRE_BROWSER=1 it fails."""
    with contextlib.ExitStack() as stack:
        try:
            from playwright.sync_api import Error, sync_playwright
        except ImportError:
            without_browser("the package playwright is not installed")
        playwright = stack.enter_context(sync_playwright())
        try:
            opened = screenshots.open_browser(playwright)
        except Error as error:
            without_browser(f"no browser: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


def without_browser(reason: str) -> NoReturn:
    if os.environ.get("EVERYBIT_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on disk (2 layers, widths 48 and 88, one token per byte, about 60 k parameters), seeded.

    Wide initial weights make its predictions far from uniform, so that precisions differ measurably.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=128
    ).save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
