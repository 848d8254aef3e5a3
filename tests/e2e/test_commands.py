"""The command line on a tiny model: every command, its JSON, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import everybit
from everybit.cli.main import main
from tests.e2e.commands import refused

TEXT = "The quick brown fox jumps over the lazy dog while nobody is looking.\n" * 20


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("commands") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 3, 4, 8), progress=False)
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_quantize_reports_and_dry_run_agrees(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--bits", "2-4", "--json")
    planned = json.loads(run(capsys, "quantize", tiny_llama, tmp_path / "out", "--dry-run", *options))
    done = json.loads(run(capsys, "quantize", tiny_llama, tmp_path / "out", *options))
    assert planned["rows"] == done["rows"]
    assert [row["bits"] for row in done["rows"]] == [2, 3, 4]
    assert (planned["dry_run"], done["dry_run"]) == (True, False)


def test_codebooks(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    bpw, stored = {}, {}
    for name, options in {"compact": (), "table": ("--codebook", "table"), "affine": ("--solver", "uniform")}.items():
        report = json.loads(run(capsys, "quantize", tiny_llama, tmp_path / name, "--bits", "4,5,8", "--json", *options))
        bpw[name] = {row["bits"]: row["bpw"] for row in report["rows"]}
        stored[name] = report["stored_bpw"]
        document = json.loads(run(capsys, "inspect", tmp_path / name, "--json"))
        assert document["format_version"] == (3 if name == "compact" else 1)
        assert {layer["codebook"] for layer in document["layers"]} == {document["codebook"]} == {name}
        assert f"codebook `{name}`" in (tmp_path / name / "README.md").read_text()
        assert [row["bpw"] for row in document["sizes"]["rows"]] == list(bpw[name].values())
        assert f" {name}  " in run(capsys, "inspect", tmp_path / name)
    # 20 bytes a row (a scale and 16 int8) in place of 32 (16 float16); at 8 bits 30 (scale and record) in place of 512.
    assert bpw["compact"][4] - 4 == pytest.approx((bpw["table"][4] - 4) * 20 / 32)
    assert bpw["compact"][8] - 8 == pytest.approx((bpw["table"][8] - 8) * 30 / 512)
    assert bpw["compact"][5] - 5 == pytest.approx(bpw["compact"][8] - 8)
    # On disk the three have the same planes beside 46 (4 + 16 + 26) and 608 bytes a row.
    assert stored["compact"] - 8 == pytest.approx((stored["table"] - 8) * 46 / 608)


def test_uniform_has_a_codebook_of_its_own(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    for option in (("--codebook", "compact"), ("--table-dtype", "float32")):
        line = refused(capsys, "quantize", tiny_llama, tmp_path / "out", "--solver", "uniform", *option)
        assert f"{option[0]} has no effect with --solver uniform, which stores no tables: drop it" in line


def test_compact_has_no_table_dtype(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    for dtype in ("float16", "float32"):
        line = refused(capsys, "quantize", tiny_llama, tmp_path / "out", "--table-dtype", dtype)
        assert f"table dtype '{dtype}' has no effect with the codebook compact: ask for codebook table" in line


def test_a_weight_of_few_bits_in_a_compact_overlay(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    everybit.quantize(tiny_llama, out, bits=(4, 8), override={"down_proj": (3,)}, progress=False)
    overlay = everybit.load(out).overlay
    assert {spec.codebook for spec in overlay.weights.values()} == {"compact"}
    down = [name for name in overlay.names() if "down_proj" in name and "_plane" not in name]
    assert {name.rpartition("_")[2] for name in down} == {"scale", "lut3"}


def test_self_calibration_is_seeded(tiny_llama: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        everybit.quantize(
            tiny_llama,
            tmp_path / name,
            bits=(2,),
            calibration="self",
            calibration_sequences=3,
            calibration_length=32,
            seed=seed,
            progress=False,
        )
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_generate(overlay: Path, capsys: Any) -> None:
    arguments = ("generate", overlay, "--prompt", "The", "--max-tokens", 5, "--bits", 3)
    document = json.loads(run(capsys, *arguments, "--json"))
    assert (document["bits"], document["new_tokens"]) == (3, 5)
    assert document["text"].strip() in run(capsys, *arguments)
    sampled = [run(capsys, *arguments, "--json", "--temperature", 1.0, "--seed", s) for s in (1, 1, 2)]
    texts = [json.loads(s)["text"] for s in sampled]
    assert texts[0] == texts[1] != texts[2]


def test_generate_stops_at_the_context(overlay: Path, capsys: Any) -> None:
    document = json.loads(run(capsys, "generate", overlay, "--prompt", "x" * 120, "--max-tokens", 50, "--json"))
    assert document["prompt_tokens"] + document["new_tokens"] <= 128
    assert "tokens, expected 1 to 127" in refused(capsys, "generate", overlay, "--prompt", "x" * 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "5"), "bits 5 asked, the overlay has 2, 3, 4, 8"),
        (("--bits", "9"), "bits '9' are not within 2..8"),
        (("--bits", "2.5"), "cannot read bits from '2.5'"),
        (("--bits", "2-3"), "--bits 2-3: expected one precision"),
        (("--seed", "1"), "--seed has no effect at temperature 0"),
        (("--max-tokens", "x"), "invalid int value: 'x' (see everybit generate --help)"),
        (("--max-tokens", "0"), "--max-tokens 0: expected 1 or more"),
        (("--temperature", "-1"), "--temperature -1.0: expected 0, or 0.01 to 100"),
        (("--temperature", "nan"), "--temperature nan: expected 0, or 0.01 to 100"),
        (("--top-p", "0"), "--top-p 0.0: expected above 0"),
        (("--temperature", "1", "--top-k", "-1"), "--top-k -1: expected 0 (off) or a whole number above"),
        (("--min-p", "0.1"), "--min-p has no effect at temperature 0"),
        (("--repetition-penalty", "0"), "--repetition-penalty 0.0: expected 0.01 to 100"),
        (("--threads", "-1"), "-1 threads arrived, expected 0 (one per processor) to"),
        (("--threads", "1000"), "1000 threads arrived, expected 0 (one per processor) to"),
        (("--isa", "foo"), "instruction set 'foo' arrived"),
        (("--pin", "1-0"), "'1-0' is not a list of processors such as 0,2-3"),
        (("--pin", "9999"), "9999"),
        (("--mode", "quick"), "invalid choice: 'quick'"),
        (("--context", "129"), "a context of 129 tokens"),
        (("--context", "2"), "the prompt has 4 tokens, expected 1 to 1 (the context is 2)"),
    ],
)
def test_generate_refusals(overlay: Path, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, "generate", overlay, "--prompt", "The", *arguments)


def test_generate_options(overlay: Path, capsys: Any) -> None:
    arguments = ("generate", overlay, "--prompt", "The", "--max-tokens", 8, "--json")
    drawn = ("--temperature", 1.5, "--seed", 5)
    plain, *others = (
        json.loads(run(capsys, *arguments, *drawn, *more))["text"]
        for more in ((), ("--top-k", 3), ("--top-p", 0.2), ("--min-p", 0.5), ("--presence-penalty", 2))
    )
    assert all(text != plain for text in others)
    greedy = json.loads(run(capsys, *arguments))
    assert json.loads(run(capsys, *arguments, *drawn, "--top-k", 1))["text"] == greedy["text"]
    penalized = json.loads(run(capsys, *arguments, "--repetition-penalty", 100))
    assert len(set(penalized["text"])) == 8 or penalized["text"] != greedy["text"]
    threads = ("--threads", 2, "--pin", "0", "--isa", "scalar", "--mode", "exact", "--kv-dtype", "float32")
    document = json.loads(run(capsys, *arguments, *threads, "--debug-numerics"))
    assert (document["threads"], document["isa"], document["mode"]) == (2, "scalar", "exact")
    assert document["text"] == json.loads(run(capsys, *arguments, "--mode", "exact", "--kv-dtype", "float32"))["text"]
    assert document["prefill_s"] > 0
    assert document["tokens_per_s"] == pytest.approx((document["new_tokens"] - 1) / document["decode_s"])


def test_generate_says_what_it_runs_on(overlay: Path, capsys: Any) -> None:
    assert (
        main(["generate", str(overlay), "--prompt", "The", "--bits", "2", "--max-tokens", "2", "--threads", "1"]) == 0
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(", 1 thread, default mode, 2 bits")
    document = json.loads(run(capsys, "generate", overlay, "--prompt", "x" * 120, "--context", 124, "--json"))
    assert (document["prompt_tokens"], document["new_tokens"], document["reason"]) == (121, 3, "context")


def test_inspect(overlay: Path, capsys: Any) -> None:
    document = json.loads(run(capsys, "inspect", overlay, "--json"))
    assert document["bits"] == [2, 3, 4, 8]
    assert len(document["layers"]) == 14
    layer = document["layers"][0]
    assert len(layer["plane_entropy"]) == layer["planes"] == 8
    assert all(0 <= e <= 1 for e in layer["plane_entropy"])
    assert layer["plane_entropy"][0] > 0.8  # the most significant bit halves a symmetric row
    assert document["provenance"]["calibration"] == {"kind": "none"}
    quick = json.loads(run(capsys, "inspect", overlay, "--json", "--quick"))
    assert "plane_entropy" not in quick["layers"][0]
    assert "model.layers.0.mlp.down_proj.weight" in run(capsys, "inspect", overlay)


def test_inspect_finds_a_flipped_bit(overlay: Path, tmp_path: Path, capsys: Any) -> None:
    data = bytearray((overlay / "model.safetensors").read_bytes())
    data[-10] ^= 1
    for file in overlay.iterdir():
        (tmp_path / file.name).write_bytes(data if file.name == "model.safetensors" else file.read_bytes())
    assert "the file is damaged, download it again" in refused(capsys, "inspect", tmp_path)


def test_a_float_model_generates_and_is_not_an_overlay(tiny_llama: Path, capsys: Any) -> None:
    document = json.loads(run(capsys, "generate", tiny_llama, "--prompt", "x", "--max-tokens", 3, "--json"))
    assert (document["bits"], document["new_tokens"]) == (None, 3)
    assert "everybit quantize" in refused(capsys, "generate", tiny_llama, "--prompt", "x", "--bits", "4")
    assert "everybit quantize" in refused(capsys, "inspect", tiny_llama)
    assert "everybit quantize" in refused(capsys, "eval", tiny_llama, "--text", __file__)


def test_unneeded_planes_are_never_read(overlay: Path) -> None:
    import torch

    model = everybit.load(overlay, bits=3)
    model(torch.tensor([[1, 2, 3]]))
    own = {name for spec in model.overlay.weights.values() for name in spec.tensors()}
    suffixes = {name.rpartition("_")[2] for name in model.overlay.touched & own}
    assert suffixes == {"plane0", "plane1", "plane2", "scale", "lut3"}


def test_a_copied_model_has_a_precision_of_its_own(overlay: Path) -> None:
    import copy

    import torch

    model = everybit.load(overlay, bits=2)
    other = copy.deepcopy(model)
    other.set_precision(8)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, everybit.load(overlay, bits=2)(ids).logits)
        assert torch.equal(other(ids).logits, everybit.load(overlay, bits=8)(ids).logits)


def test_from_pretrained_needs_only_the_import(overlay: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(overlay)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, everybit.load(overlay, bits=8)(ids).logits)
        model.set_precision(2)
        assert torch.equal(model(ids).logits, everybit.load(overlay, bits=2)(ids).logits)
    assert model.dequantize()(ids).logits.shape == (1, 3, 258)
