"""Model cards: what quantizing says of itself, and what eval adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import everybit
from everybit.cli.main import main
from everybit.errors import FormatError, OutputError
from everybit.formats import Overlay
from everybit.quantize.card import BEGIN, END, model_card, write_quality


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    (folder / "text.txt").write_text("Once upon a time there was a card.\n" * 20)
    how = {"calibration": folder / "text.txt", "calibration_sequences": 2, "calibration_length": 16, "tune": False}
    everybit.quantize(tiny_llama, folder / "overlay", bits=(2, 3, 8), solver="tree", progress=False, **how)
    return folder / "overlay"


def test_the_card_says_sizes_calibration_and_how_to_load(overlay: Path) -> None:
    card = (overlay / "README.md").read_text()
    with Overlay.open(overlay) as opened:
        sizes = opened.sizes().rows
    for bits, size in sizes.items():
        assert f"| {bits} | {size.bpw:.2f} | {size.bytes:,} |" in card
    assert "calibration `text.txt` (2 sequences of up to 16 tokens)" in card
    for line in ("base_model: llama", 'everybit.load("this/folder", bits=3)', "--quantization everybit-3bit"):
        assert line in card
    assert "license" not in card


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("---\nlicense: cc0-1.0\nlanguage: en\n---\n# x\nlicense: mit\n", "license: cc0-1.0\n"),
        ("---\nlicense: other\nlicense_name: x-1\n---\n", "license: other\nlicense_name: x-1\n"),
        ("---\nlicense: [a, b]\ntags: x\n---\n", ""),
        ("license: mit\n", ""),
        (None, ""),
    ],
)
def test_the_licence_is_that_of_the_float_model(
    overlay: Path, tmp_path: Path, metadata: str | None, expected: str
) -> None:
    if metadata is not None:
        (tmp_path / "README.md").write_text(metadata)
    with Overlay.open(overlay) as opened:
        card = model_card(dict(opened.config), opened.sizes(), tmp_path)
    assert f"base_model_relation: quantized\n{expected}tags:" in card


def test_eval_writes_its_table_into_the_card(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(overlay.parent / "text.txt")
    for bits in ("2,8", "3"):
        assert main(["eval", str(overlay), "--text", text, "--bits", bits, "--card", "--threads", "1"]) == 0
        table = capsys.readouterr().out.rstrip()
        card = (overlay / "README.md").read_text()
        assert f"on `text.txt` in windows of 128, mode exact:\n\n```text\n{table}\n```\n{END}" in card
        assert card.count(BEGIN) == card.count(END) == 1
    assert card.startswith("---\n")
    assert main(["eval", str(overlay), "--tasks", "x", "--card"]) == 2
    assert "--card has no effect without --text" in capsys.readouterr().err


def test_cards_of_other_people(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not there"):
        write_quality(tmp_path, "table", "how")
    (tmp_path / "README.md").write_text("# Mine\n")
    write_quality(tmp_path, "table", "how")
    assert (tmp_path / "README.md").read_text() == f"# Mine\n\n{BEGIN}\nhow\n\n```text\ntable\n```\n{END}\n"
    (tmp_path / "README.md").write_text(f"{BEGIN}\nopen")
    with pytest.raises(OutputError, match="without"):
        write_quality(tmp_path, "table", "how")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_links_of_other_people(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("theirs")
    card = tmp_path / "model" / "README.md"
    card.parent.mkdir()
    card.write_text("# Mine\n")
    card.with_name("README.md.partial").symlink_to("../precious")
    write_quality(card.parent, "table", "how")
    assert (tmp_path / "precious").read_text() == "theirs"
    assert not card.is_symlink()
    card.unlink()
    card.symlink_to("../precious")
    with pytest.raises(FormatError, match="outside the folder"):
        write_quality(card.parent, "table", "how")


@pytest.mark.parametrize("name", ["a: b", "123", "null", "x\n---\nlicense: mit", "org/model-1.0"])
def test_any_name_is_one_text_of_yaml(overlay: Path, name: str) -> None:
    with Overlay.open(overlay) as opened:
        config = json.loads(json.dumps(opened.config))
        config["quantization_config"]["provenance"]["source"]["name"] = name
        card = model_card(config, opened.sizes())
    metadata = card.split("\n---\n")[0]
    assert yaml.safe_load(metadata.removeprefix("---\n"))["base_model"] == name
