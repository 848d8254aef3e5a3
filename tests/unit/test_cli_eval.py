"""`everybit eval` in front of a stand-in overlay: order of refusals, streams, the JSON document, the plot."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import everybit
from everybit import formats
from everybit.cli.main import main
from everybit.formats.sizes import Size, SizeReport


class StandIn:
    """An overlay of 2, 4 and 8 bits; also its own context manager."""

    bits = (2, 4, 8)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def sizes(self) -> SizeReport:
        return SizeReport(1000, 0, 0, 0.0, Size(32.0, 4000), {b: Size(b + 0.5, b * 1000) for b in self.bits})


@pytest.fixture
def overlay(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A float model posing as an overlay: every precision is the float model, so KL is exactly zero."""

    def load(folder: str, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        model.overlay, model.set_precision = StandIn(), lambda bits: None
        print("a library talks on stdout")
        return model

    monkeypatch.setattr(formats.Overlay, "open", lambda folder: StandIn())
    monkeypatch.setattr(everybit, "load", load, raising=False)
    return str(tiny_llama)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("Once upon a time.\n<|endoftext|>\nThe end, " * 20)
    return str(tmp_path / "text.txt")


def test_json_is_one_document_on_stdout(
    overlay: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "q.svg"
    assert main(["eval", overlay, "--text", text, "--reference", overlay, "--plot", str(plot), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["float"]["bytes"] == 4000
    assert document["float"]["bpw"] == 32
    assert [(row["bits"], row["bpw"], row["bytes"], row["kl_mean"]) for row in document["rows"]] == [
        (2, 2.5, 2000, 0.0),
        (4, 4.5, 4000, 0.0),
        (8, 8.5, 8000, 0.0),
    ]
    assert plot.read_text().startswith("<?xml")


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
