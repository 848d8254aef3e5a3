"""Real trained models: every solver, every precision; the ternary model without loss at 2 bits; regression texts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import everybit
from everybit import evaluate
from everybit.engine.generate import generate
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.tokenizer import Tokenizer

MODELS = ("stories260k", "babyllama-105", "bitllama-3m")
TOKENS = 6_000

CONTINUATIONS = {
    "stories260k": "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.",
    "babyllama-105": "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. "
    "One day, she went to the park with her mommy and daddy. She saw a big box on the ground.",
    "bitllama-3m": "Once upon a time, there was a little girl named Lily. She loved to play outside and explore the "
    "world around her. One day, she saw a big, red ball. She was so happy and wanted to play with it.",
}


SOLVERS = ("guided", "tree", "upscale", "uniform")


@pytest.fixture(scope="module")
def overlays(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for name in MODELS:
        for solver, codebook in (*((solver, None) for solver in SOLVERS), ("tree", "table")):
            out = tmp_path_factory.mktemp("overlays") / f"{name}-{solver}-{codebook}"
            everybit.quantize(
                shared_data / "models" / name,
                out,
                calibration=shared_data / "text" / "tinystories_a.txt",
                calibration_sequences=12,
                calibration_length=256,
                solver=solver,
                codebook=codebook,
                tune=None if solver == "guided" else False,
                tune_steps=6,
                progress=False,
            )
            made[name, codebook or solver] = out
    return made


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MODELS)
def test_quality_at_every_precision(name: str, solver: str, shared_data: Path, overlays: Any) -> None:
    folder = shared_data / "models" / name
    documents = evaluate.read_documents(shared_data / "text" / "tinystories_a.txt")
    windows = evaluate.windows(Tokenizer.open(folder), documents[-60:], 256, truncate=True, max_tokens=TOKENS)
    model, reference = (evaluate.EngineModel.open(path, 256) for path in (overlays[name, solver], folder))
    report = evaluate.evaluate(
        model, model.bits, windows, reference, set_precision=model.set_precision, progress=False, threads=2
    )
    assert report.reference is not None
    kl = [row.kl_mean for row in report.rows]
    lossless = name == "bitllama-3m" and solver != "uniform"  # then at every precision
    if not lossless:
        assert all(a > b for a, b in pairwise(kl)), kl
    else:
        assert max(kl) < 1e-6, kl
    assert abs(report.rows[-1].ppl / report.reference.ppl - 1) < 1e-3


def test_ternary_model_is_lossless_at_two_bits(shared_data: Path, overlays: Any) -> None:
    folder = shared_data / "models" / "bitllama-3m"
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = everybit.load(overlays["bitllama-3m", "tree"], bits=2, dtype=torch.float32)
    for name, parameter in reference.named_parameters():
        if name in model.overlay.weights:
            module = model.get_submodule(name.removesuffix(".weight"))
            # -s, 0 and s are -q, 0 and q times a float32 scale: they come back bit for bit
            assert torch.equal(module.weight, parameter), name
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time there was", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_regression_text_at_eight_bits(name: str, shared_data: Path, overlays: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / name)
    model = everybit.load(overlays[name, "tree"], bits=8, dtype=torch.float32)
    ids = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    expected = CONTINUATIONS[name]
    count = len(tokenizer(expected)["input_ids"])
    out = model.generate(**ids, max_length=count, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == expected


@pytest.mark.parametrize("mode", ["exact", "default"])
@pytest.mark.parametrize("name", MODELS)
def test_regression_text_from_the_engine(name: str, mode: str, shared_data: Path, overlays: Any) -> None:
    # 8 bits of free tables: compact ones are 1e-4 nats from float, enough to turn a near tie of babyllama.
    for folder, bits in ((overlays[name, "table"], 8), (shared_data / "models" / name, None)):
        tokenizer = Tokenizer.open(folder)
        prompt, whole = tokenizer.encode("Once upon a time"), tokenizer.encode(CONTINUATIONS[name])
        with Runtime.open(folder, mode=mode, threads=2) as runtime:
            written = list(generate(runtime, prompt, Sampling(temperature=0), len(whole) - len(prompt), bits))
        assert tokenizer.decode([*prompt, *written]).strip() == CONTINUATIONS[name]
