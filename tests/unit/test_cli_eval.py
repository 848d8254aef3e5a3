"""`everybit eval`: order of refusals, streams, the JSON document, the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import everybit
from everybit.cli.main import main
from everybit.formats import Overlay


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An overlay of 2, 4 and 8 bits."""
    out = tmp_path_factory.mktemp("eval") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 4, 8), progress=False)
    return str(out)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("Once upon a time.\n<|endoftext|>\nThe end, " * 20)
    return str(tmp_path / "text.txt")


def test_json_is_one_document_on_stdout(
    overlay: str, tiny_llama: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "q.svg"
    assert main(["eval", overlay, "--text", text, "--reference", str(tiny_llama), "--plot", str(plot), "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    with Overlay.open(overlay) as opened:
        sizes = opened.sizes()
    assert (document["float"]["bpw"], document["float"]["bytes"]) == (32, sizes.original.bytes)
    assert [(row["bits"], row["bpw"], row["bytes"]) for row in document["rows"]] == [
        (bits, size.bpw, size.bytes) for bits, size in sizes.rows.items()
    ]
    kl = [row["kl_mean"] for row in document["rows"]]
    assert kl[0] > 10 * kl[1] > 10 * kl[2] > 0
    assert document["rows"][2]["ppl"] == pytest.approx(document["float"]["ppl"], rel=1e-2)
    assert plot.read_text().startswith("<?xml")
    assert "thread" in err
    assert "exact mode" in err


def test_a_float_model_against_itself_is_exact(tiny_llama: Path, text: str) -> None:
    from everybit import evaluate
    from everybit.tokenizer import Tokenizer

    windows = evaluate.windows(Tokenizer.open(tiny_llama), evaluate.read_documents(text), 128)
    model, reference = (evaluate.EngineModel.open(tiny_llama, 128, threads=threads) for threads in (1, 2))
    report = evaluate.evaluate(model, (8,), windows, reference, set_precision=lambda bits: None, progress=False)
    assert (report.rows[0].kl_mean, report.rows[0].top1) == (0.0, 1.0)  # and threads change nothing


def test_modes_are_told_apart(overlay: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for mode in ("exact", "default"):
        assert main(["eval", overlay, "--text", text, "--json", "--mode", mode, "--threads", "1"]) == 0
        out, err = capsys.readouterr()
        assert f"1 thread, {mode} mode" in err
        found.append([row["ppl"] for row in json.loads(out)["rows"]])
    assert found[0] != found[1]
    # Activations rounded to 8 bits: relative errors of 2^-8 that mostly cancel in sums of 48 and 88.
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_the_table_and_the_chosen_bits(overlay: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", overlay, "--text", text, "--bits", "4", "--max-tokens", "30", "--context", "16"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["bits", "4", "30"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bits", "9"], "not within 2..8"),
        (["--bits", "3"], "3 bits are not in the overlay; expected a choice from 2,4,8"),
        (["--plot", "q.pdf"], "cannot plot to '.pdf'"),
        (["--context", "129"], "beyond this model's 128"),
        (["--reference", "absent-folder"], "no folder absent-folder: pass a model folder"),
    ],
)
def test_refusals(overlay: str, text: str, capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    assert main(["eval", overlay, "--text", text, *extra]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("everybit: error:")]
    assert out == ""
    assert len(errors) == 1
    assert message in errors[0]
