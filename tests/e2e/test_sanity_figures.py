"""The evaluation protocol reproduces the perplexities that were measured independently for the shared models."""

from __future__ import annotations

from pathlib import Path

import pytest

from everybit import evaluate as ev
from everybit.tokenizer import Tokenizer

CONTEXT = {"stories260k": 512, "babyllama-105": 256, "bitllama-3m": 512}


@pytest.mark.parametrize(
    ("name", "stories", "tokens", "ppl", "bits_per_byte"),
    [
        # The shared README's figures on the first 200 stories, to its four decimals.
        ("babyllama-105", 200, 51_000, 1.9537, None),
        ("stories260k", 200, 71_403, 4.0047, None),
        # All stories; the README has bits per byte for these.
        pytest.param("stories260k", None, 367_978, 4.0730, 0.9962, marks=pytest.mark.slow),
        pytest.param("babyllama-105", None, 243_525, 1.9604, 0.9782, marks=pytest.mark.slow),
        pytest.param("bitllama-3m", None, 367_978, 3.7431, 0.9363, marks=pytest.mark.slow),
    ],
)
def test_float_perplexity(
    shared_data: Path, name: str, stories: int | None, tokens: int, ppl: float, bits_per_byte: float | None
) -> None:
    folder = shared_data / "models" / name
    documents = ev.read_documents(shared_data / "text" / "tinystories_a.txt")[:stories]
    with ev.EngineModel.open(folder, CONTEXT[name]) as model:
        windows = ev.windows(Tokenizer.open(folder), documents, CONTEXT[name], truncate=True)
        report = ev.evaluate(model, (8,), windows, set_precision=lambda bits: None, progress=False)
    assert windows.tokens == tokens
    assert report.rows[0].ppl == pytest.approx(ppl, abs=5.1e-5)  # half a unit of the figure's last decimal
    if bits_per_byte is not None:
        assert report.rows[0].bits_per_byte == pytest.approx(bits_per_byte, abs=5.1e-5)
