"""Other people's readers of our GGUF files: llama.cpp, by llama-cpp-python, and transformers.

They are not among the packages that `make setup` installs. Put them there with

    pip install llama-cpp-python gguf accelerate
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import everybit
from everybit.integrations.gguf import export_gguf
from everybit.integrations.gguf.vocabulary import SPLITS, add_vocabulary
from everybit.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.e2e.architectures import VARIANTS
from tests.export.gguf_models import WORDS, greedy, open_exact, read_types, restore, save_tiny

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
PROMPT, TOKENS = "Once upon a time", 64
YARN = VARIANTS["llama_rope_yarn"][1]["rope_parameters"]


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module", params=["prose-10m", "stories260k"])
def model(request: pytest.FixtureRequest) -> Path:
    """The model that comes with the project, and one of the shared ones."""
    if request.param == "prose-10m":
        return REPOSITORY / "examples" / "models" / "prose-10m"
    return Path(request.getfixturevalue("shared_data")) / "models" / "stories260k"


@contextmanager
def loaded(llama_cpp: Any, path: Path, **options: Any) -> Iterator[Any]:
    found = llama_cpp.Llama(str(path), n_threads=1, verbose=False, **options)
    try:
        yield found
    finally:
        found.close()


def next_logits(llama_cpp: Any, llama: Any, tokens: list[int]) -> NDArray[np.float32]:
    """Of the token after these."""
    llama.eval(tokens)
    pointer = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).copy()


def llama_cpp_greedy(llama_cpp: Any, path: Path, prompt: list[int]) -> list[int]:
    with loaded(llama_cpp, path, n_ctx=256) as llama:
        said = [int(next_logits(llama_cpp, llama, prompt).argmax())]
        while len(said) < TOKENS:
            said.append(int(next_logits(llama_cpp, llama, said[-1:]).argmax()))
        return said


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_llama_cpp_says_what_our_engine_says(llama_cpp: Any, model: Path, kind: str, tmp_path: Path) -> None:
    """The same text as the file's weights, dequantized, in our engine."""
    out = tmp_path / "out.gguf"
    export_gguf(model, out, type=kind, progress=False)
    prompt = Tokenizer.open(model).encode(PROMPT)
    with loaded(llama_cpp, out, vocab_only=True) as llama:
        assert llama.tokenize(PROMPT.encode(), add_bos=True, special=True) == prompt
    said = llama_cpp_greedy(llama_cpp, out, prompt)
    assert said == greedy(restore(model, out, tmp_path / "restored"), prompt, TOKENS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_K_M", "Q2_K"])
def test_llama_cpp_strays_only_where_two_tokens_are_as_good(
    llama_cpp: Any, model: Path, kind: str, tmp_path: Path
) -> None:
    """llama.cpp rounds activations to 8 bits: measured, that turns at most 2 of 64 choices, between logits at most 0.13
    from each other (the spread of logits is above 2)."""
    out = tmp_path / "out.gguf"
    export_gguf(model, out, type=kind, progress=False)
    prompt = Tokenizer.open(model).encode(PROMPT)
    said = llama_cpp_greedy(llama_cpp, out, prompt)
    with open_exact(restore(model, out, tmp_path / "restored")) as runtime:
        logits = [np.asarray(runtime.prefill(0, prompt, 0)).ravel()]
        logits += [np.asarray(runtime.decode([token], 0))[0] for token in said[:-1]]
    behind = [float(row.max() - row[token]) for row, token in zip(logits, said, strict=True)]
    assert max(behind) < 0.25
    assert sum(gap > 0 for gap in behind) <= 4


def test_an_overlay_says_in_llama_cpp_what_it_says_here(llama_cpp: Any, shared_data: Path, tmp_path: Path) -> None:
    everybit.quantize(shared_data / "models" / "stories260k", tmp_path / "overlay", bits=(3, 4), progress=False)
    export_gguf(tmp_path / "overlay", tmp_path / "out.gguf", type="F32", progress=False)
    prompt = Tokenizer.open(tmp_path / "overlay").encode(PROMPT)
    assert llama_cpp_greedy(llama_cpp, tmp_path / "out.gguf", prompt) == greedy(tmp_path / "overlay", prompt, TOKENS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q2_K"])
def test_types_and_size_are_llama_quantizes(llama_cpp: Any, model: Path, kind: str, tmp_path: Path) -> None:
    ours, base, theirs = (tmp_path / f"{name}.gguf" for name in ("ours", "base", "theirs"))
    export_gguf(model, ours, type=kind, progress=False)
    export_gguf(model, base, type="F16", progress=False)
    how = llama_cpp.llama_model_quantize_default_params()
    how.nthread, how.ftype = 1, int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    assert llama_cpp.llama_model_quantize(str(base).encode(), str(theirs).encode(), ctypes.byref(how)) == 0
    assert read_types(ours) == read_types(theirs)
    assert ours.stat().st_size == pytest.approx(theirs.stat().st_size, rel=0.01)


# llama.cpp takes GELU from a table of float16: Gemma and GPT-2 differ by its rounding.
@pytest.mark.parametrize(
    ("family", "changed", "tolerance"),
    [
        ("llama_rope_llama3", {}, 1e-4),
        ("llama_rope_linear", {}, 1e-4),
        ("llama_rope_yarn", {}, 1e-4),
        ("mistral", {}, 1e-4),
        ("qwen2", {"rope_parameters": YARN}, 1e-4),
        ("qwen3", {}, 1e-4),
        ("olmo2", {}, 1e-4),
        ("phi3_longrope", {"sliding_window": None}, 1e-4),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, 1e-4),
        ("bitnet", {"hidden_act": "silu", "tie_word_embeddings": True}, 1e-4),
        ("gpt2", {}, 1e-2),
        ("gemma2", {"num_hidden_layers": 4, "sliding_window": 12}, 1e-2),
        ("gemma3", {"num_hidden_layers": 7, "sliding_window": 12}, 1e-2),
        ("mixtral", {}, 1e-4),
        ("qwen3_moe", {"norm_topk_prob": True}, 1e-4),
    ],
)
def test_families_compute_the_same(
    llama_cpp: Any, family: str, changed: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from everybit.quantize.source import Source

    folder = save_tiny(family, tmp_path / "m", **changed)
    parameters = {name: tensor.contiguous() for name, tensor in Source(folder).parameters()}  # experts fused
    save_file(parameters, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "out.gguf", type="F32", progress=False)
    tokens = [int(one) for one in np.random.default_rng(0).integers(3, WORDS, 60)]
    with open_exact(folder) as runtime:
        want = [np.asarray(runtime.prefill(0, tokens[:40], 0)).ravel()]
        want += [np.asarray(runtime.decode([token], 0))[0] for token in tokens[40:]]
    with loaded(llama_cpp, tmp_path / "out.gguf", n_ctx=64, type_k=0, type_v=0) as llama:
        found = [next_logits(llama_cpp, llama, part) for part in (tokens[:40], *([one] for one in tokens[40:]))]
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * float(np.std(want)))


TEXTS = [
    "Hello world 12345 3.14 don't I'LL  we'Ve\n\n\n  x = y+1;\r\n\tfoo\u00a0bar",
    "caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c \ud55c\uad6d\uc5b4 \U0001f600 a/b//c ABCdef $1,000.00 \u0660\u2167",
    " leading and trailing  ",
    "\n",
    "",
]


def train(split: str, whole_words: bool, folder: Path) -> None:
    """A byte-level tokenizer with a given way to split text, trained on a little of it."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    simple = split.endswith("gpt-2")
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=simple)]
    if not simple:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    elif split != "gpt-2":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend = Backend(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (REPOSITORY / "examples" / "text" / "heldout.txt").read_text(encoding="utf-8")[:50_000]
    backend.train_from_iterator([text, *TEXTS * 3], trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")


def same_tokens(llama_cpp: Any, folder: Path, text: str) -> None:
    tokenizer = Tokenizer.open(folder)
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, folder, tokenizer.vocabulary + 2)
    for add, number in ((writer.add_block_count, 1), (writer.add_context_length, 8), (writer.add_head_count, 1)):
        add(number)
    writer.add_embedding_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file(folder / "vocabulary.gguf")
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with loaded(llama_cpp, folder / "vocabulary.gguf", vocab_only=True) as llama:
        for one in (text, *TEXTS):
            assert llama.tokenize(one.encode(), add_bos=True, special=True) == tokenizer.encode(one)


@pytest.mark.parametrize("split", SPLITS.items(), ids=lambda split: split[1])
def test_llama_cpp_splits_words_the_same(llama_cpp: Any, split: tuple[tuple[str, bool], str], tmp_path: Path) -> None:
    train(*split[0], tmp_path)
    text = (REPOSITORY / "examples" / "text" / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    same_tokens(llama_cpp, tmp_path, f"{text} <tool> x<tool>")


@pytest.mark.parametrize("place", ["models/stories260k", "tokenizers/minimind-6400", "tokenizers/gpt2-50257"])
def test_llama_cpp_tokenizes_as_real_tokenizers(llama_cpp: Any, place: str, shared_data: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / place / name, tmp_path / name)
    text = (shared_data / "text" / "c4_a.txt").read_text(encoding="utf-8")[:20_000]
    same_tokens(llama_cpp, tmp_path, text)


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_transformers_says_what_our_engine_says(model: Path, kind: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="accelerate, which transformers wants for GGUF, is not installed")
    export_gguf(model, tmp_path / "out.gguf", type=kind, progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    prompt = Tokenizer.open(model).encode(PROMPT)
    assert tokenizer(PROMPT)["input_ids"] == prompt
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    said = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )
    assert said[0].tolist()[len(prompt) :] == greedy(
        restore(model, tmp_path / "out.gguf", tmp_path / "r"), prompt, TOKENS
    )
