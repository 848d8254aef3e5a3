"""Plan files that nobody vouches for: each is refused in one line, before anything is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import everybit
from everybit.engine.plan import Plan, identity
from everybit.errors import EverybitError, FormatError, OutputError, PrecisionError
from everybit.formats import Overlay

HEAD = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    out = tmp_path_factory.mktemp("plans") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 4, 8), override={"layers.0.mlp.down_proj": (3,)}, progress=False)
    return Overlay.open(out)


@pytest.fixture
def saved(overlay: Overlay, tmp_path: Path) -> Path:
    bits = {name: spec.served_bits(4) for name, spec in overlay.weights.items()}
    Plan.of(overlay, bits, budget="4bpw", predicted_kl=0.0, provenance={"a": 1}).save(tmp_path / "p.json")
    return tmp_path / "p.json"


def test_what_is_saved_is_read(overlay: Overlay, saved: Path) -> None:
    plan = Plan.open(saved, overlay)
    assert plan.bits == {name: 3 if name == HEAD else 4 for name in overlay.weights}
    size = overlay.sizes().rows[4]
    assert (plan.bpw, plan.bytes) == (pytest.approx(size.bpw), size.bytes)
    assert (plan.budget, plan.predicted_kl, plan.provenance) == ("4bpw", 0.0, {"a": 1})
    plan.save(saved)  # a plan may be replaced
    assert list(saved.parent.iterdir()) == [saved]


def other(name: str) -> Callable[[dict[str, Any]], Any]:
    """Sets the precision of one weight."""
    return lambda d: d["bits"].update({name: 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(bit={}), "unknown key 'bit', expected only"),
        (lambda d: d.pop("budget"), "the key 'budget' is missing"),
        (lambda d: d.pop("everybit_plan"), "has no key 'everybit_plan'"),
        (lambda d: d.update(everybit_plan=2), "everybit_plan 2 arrived, this everybit reads up to 1"),
        (lambda d: d.update(everybit_plan=True), "everybit_plan True arrived, expected an integer"),
        (lambda d: d.update(overlay="AB" * 32), "overlay 'ABAB.* expected 64 lower-case hex digits"),
        (lambda d: d.update(overlay=3), "overlay 3 arrived"),
        (lambda d: d.update(bits=[2]), "expected an object of weight names and whole numbers"),
        (lambda d: d["bits"].update({HEAD: 3.0}), "expected an object of weight names and whole numbers"),
        (lambda d: d["bits"].update({HEAD: True}), "expected an object of weight names and whole numbers"),
        (lambda d: d["bits"].pop(HEAD), f"weight '{HEAD}' is left out .1 such.: the plan must name the 14"),
        (other("lm_head.weight"), "weight 'lm_head.weight' is not in it"),
        (other(HEAD), f"bits 2 asked, weight '{HEAD}' has 3"),
        (lambda d: d["bits"].update({HEAD: 2**70}), f"weight '{HEAD}' has 3"),
        (lambda d: d["bits"].update({HEAD: -1}), f"weight '{HEAD}' has 3"),
        (lambda d: d.update(bpw="4"), "bpw '4' arrived, expected a number above 0"),
        (lambda d: d.update(bpw=float("nan")), "bpw nan arrived"),
        (lambda d: d.update(bpw=1.0), "the file was edited"),
        (lambda d: d.update(bytes=1), "states 1 bytes .* the file was edited"),
        (lambda d: d.update(bytes=1.5), "bytes 1.5 arrived"),
        (lambda d: d.update(budget=3), "budget 3 arrived, expected text"),
        (lambda d: d.update(predicted_kl=-1), "predicted_kl -1 arrived, expected a number from 0"),
        (lambda d: d.update(predicted_kl=float("inf")), "predicted_kl inf arrived"),
        (lambda d: d.update(provenance=[]), "provenance .* expected an object"),
    ],
)
def test_contents(overlay: Overlay, saved: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = json.loads(saved.read_text())
    change(document)
    saved.write_text(json.dumps(document))
    with pytest.raises(EverybitError, match=message) as caught:
        Plan.open(saved, overlay)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "expected an object"),
        (b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b'{"everybit_plan": 1, "everybit_plan": 1}', "twice"),
        (b"{}", "has no key 'everybit_plan'"),
    ],
)
def test_bytes(overlay: Overlay, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "p.json").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        Plan.open(tmp_path / "p.json", overlay)


def test_files_that_are_none(overlay: Overlay, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("absent.json", "pipe.json", "."):
        with pytest.raises(FormatError, match="no such file, expected a plan"):
            Plan.open(tmp_path / name, overlay)


def test_another_overlay_is_refused_with_both_checksums(
    overlay: Overlay, saved: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    everybit.quantize(tiny_llama, tmp_path / "other", bits=(2, 4, 8), solver="uniform", progress=False)
    with Overlay.open(tmp_path / "other") as other_overlay:
        assert identity(other_overlay) != identity(overlay)
        with pytest.raises(FormatError) as caught:
            Plan.open(saved, other_overlay)
    assert identity(overlay) in str(caught.value)
    assert identity(other_overlay) in str(caught.value)
    with pytest.raises(PrecisionError, match="float weights, which have one precision"):
        Plan.open(saved, None)


def test_the_identity_reads_no_data_and_knows_no_provenance(overlay: Overlay, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in overlay.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["provenance"] = {"moved": "yes"}
    (copy / "config.json").write_text(json.dumps(config))
    with Overlay.open(copy) as opened:
        assert identity(opened) == identity(overlay)
        assert not opened.touched


def test_a_file_that_is_no_plan_is_not_replaced(overlay: Overlay, saved: Path, tmp_path: Path) -> None:
    plan = Plan.open(saved, overlay)
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "folder.json").mkdir()
    for name in ("mine.json", "folder.json"):
        with pytest.raises(OutputError, match="exists and is not a plan"):
            plan.save(tmp_path / name)
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'
    with pytest.raises(OutputError, match=r"cannot write .*No such file"):
        plan.save(tmp_path / "absent" / "p.json")
