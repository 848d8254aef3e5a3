"""Tuning block by block: the blocks are the model, what is reported is what comes out, and a kill costs one block."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import everybit
from everybit.cli.quantize import describe
from everybit.errors import OutputError, SourceError
from everybit.formats import WeightSpec
from everybit.quantize import block_tuner, build, calibrate
from everybit.quantize import tuner as tuner_module
from everybit.quantize.block_tuner import BlockTuner
from everybit.quantize.blocks import Blocks
from everybit.quantize.solutions import SolutionFiles
from everybit.quantize.solvers import solve
from everybit.quantize.source import Source, load_float
from everybit.quantize.tuner import Level, hold_out
from everybit.quantize.tuning import block_memory_bytes, tunable, tune_blocks, tuned
from tests.e2e.architectures import FAMILIES, VARIANTS, make
from tests.unit.calibrated import texts
from tests.unit.test_tuner import divergence, float_model, quantized, stored, targets_of

BITS = {"down_proj": (3,), "k_proj": (6, 8)}  # of gpt_oss: others have 2, 3 and 6
Solved = tuple[Blocks, dict[str, WeightSpec], SolutionFiles]


def blocks_of(model: Any, folder: Path) -> Blocks:
    model.save_pretrained(folder)
    return Blocks(Source(folder))


def solve_all(model: Any, folder: Path) -> tuple[dict[str, WeightSpec], SolutionFiles]:
    specs, files = {}, SolutionFiles(folder / "solutions")
    for t in targets_of(model):
        bits = next((b for word, b in BITS.items() if word in t.name), (2, 3, 6))
        specs[t.name] = WeightSpec(t.name, t.shape, bits, "compact", t.transposed)
        matrices = stored(model, t).reshape(-1, *t.shape[-2:])
        files.save(t.name, [solve(np.ascontiguousarray(m), None, bits, codebook="compact") for m in matrices])
    return specs, files


@pytest.fixture
def solved(tmp_path: Path) -> Solved:
    model = float_model("gpt_oss")
    specs, files = solve_all(model, tmp_path)
    return blocks_of(model, tmp_path / "float"), specs, files


def values_of(spec: WeightSpec, solutions: list[Any], bits: int) -> torch.Tensor:
    """The weight as the model holds it, served at `bits`."""
    value = np.stack([s.values_at(spec.served_bits(bits)) for s in solutions])
    value = value.swapaxes(-1, -2) if spec.transposed else value
    shape = spec.shape if not spec.transposed else (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
    return torch.from_numpy(np.ascontiguousarray(value).reshape(shape))


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_the_chain_of_blocks_is_the_model(family: str, tmp_path: Path) -> None:
    blocks = blocks_of(make(family), tmp_path)
    assert blocks.why_not() is None
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 96, (3, 30)))
    with torch.no_grad():
        hidden = blocks.enter(ids, {})
        for index in range(len(blocks.names)):
            hidden = blocks.run(index, blocks.read(index), hidden)
        wanted = load_float(tmp_path)(input_ids=ids, use_cache=False).logits
        # the same operations on the same numbers, of a few units at most: nothing but memory alignment may differ
        assert torch.allclose(blocks.logits(hidden, {}), wanted, rtol=0, atol=1e-5)


def test_what_is_no_chain_of_blocks_says_so(tmp_path: Path) -> None:
    blocks = blocks_of(make("llama"), tmp_path)
    layer = blocks._source.model.model.layers[0]
    hook = layer.register_forward_hook(lambda module, arguments, hidden: hidden + 1)
    assert blocks.why_not() == "its decoder blocks are not a chain"
    hook.remove()

    def fail(module: Any, arguments: Any) -> None:
        raise RuntimeError("no\nway")

    hook = layer.register_forward_pre_hook(fail)
    assert blocks.why_not() == "its decoder blocks cannot be run one by one (no)"
    hook.remove()
    assert blocks.why_not() is None
    blocks._source.model.config.num_hidden_layers = 3
    assert Blocks(blocks._source).why_not() == "its decoder blocks are not to be found"


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_blocks_that_are_told_the_tokens_are_refused(family: str, tmp_path: Path) -> None:
    """Gemma's embeddings for each layer: a chain that runs on without them is another model."""
    common: dict[str, Any] = {
        "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 64, "num_kv_shared_layers": 0, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    if family == "gemma4":
        config: Any = transformers.Gemma4TextConfig(**common)
    else:
        config = transformers.Gemma3nTextConfig(
            **common, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    blocks = blocks_of(model, tmp_path)
    assert blocks.why_not() in (
        "its decoder blocks are told which tokens they see",
        "its decoder blocks are not a chain",
    )


def test_the_report_is_true_and_only_tables_change(solved: Solved, tmp_path: Path) -> None:
    """Against the whole model, one sequence at a time; unequal ones, so that some are padded."""
    blocks, specs, files = solved
    sequences = [s[:, : 24 - i % 3] for i, s in enumerate(texts(100, 24))]
    work = tmp_path / "work"
    work.mkdir()
    report = tune_blocks(blocks, lambda: sequences, specs, files, [2, 3, 6], 12, work, 0, False)
    assert {p.name for p in work.iterdir()} == {"tuned2.part", "tuned3.part"}
    assert set(report) == {2, 3}
    model, (_, held) = load_float(tmp_path / "float"), hold_out(sequences, 0)
    for b, found in report.items():
        assert found.after < 0.95 * found.before
        assert 0 < found.steps <= 12
        assert found.blocks in (1, 2)
        for wanted, after in ((found.before, False), (found.after, True)):
            weights = {}
            for name, spec in specs.items():
                solutions = files.must_read(spec)
                if after and tunable(spec, spec.served_bits(b)) and spec.served_bits(b) == b:
                    solutions = tuned(spec, solutions, work)
                weights[name] = values_of(spec, solutions, b)
            # Float32 logits of a few units: an error of 2^-22 a token and path, far below 1e-4 of the divergence.
            assert divergence(model, weights, held) == pytest.approx(wanted, rel=1e-4)
    for spec in specs.values():
        for old, new in zip(files.must_read(spec), tuned(spec, files.must_read(spec), work), strict=True):
            changed = {k for k in old.codebook if (old.codebook[k] != new.codebook[k]).any()}
            assert changed <= {"lut2", "lut3"}
            assert all(new.codebook[k].dtype == old.codebook[k].dtype for k in changed)
    assert all((tuned(s, files.must_read(s), work)[0].codebook["lut3"] != files.must_read(s)[0].codebook["lut3"]).any()
               for s in specs.values() if "down_proj" in s.name)  # fmt: skip


def test_weights_of_no_block_count_and_stay(tmp_path: Path) -> None:
    """OPT's projections around its blocks: quantized with the rest, not tuned."""
    model = make("opt_post_norm").requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim == 2 else 1)
    specs, files = solve_all(model, tmp_path)
    outside = [n for n in specs if "project" in n]
    assert len(outside) == 2
    blocks, sequences = blocks_of(model, tmp_path / "float"), texts(24, 24)
    report = tune_blocks(blocks, lambda: sequences, specs, files, [2], 12, tmp_path, 0, False)
    weights = {n: values_of(s, tuned(s, files.must_read(s), tmp_path), 2) for n, s in specs.items()}
    found = divergence(load_float(tmp_path / "float"), weights, hold_out(sequences, 0)[1])
    assert found == pytest.approx(report[2].after, rel=1e-4)
    for name in outside:
        old, new = files.must_read(specs[name]), tuned(specs[name], files.must_read(specs[name]), tmp_path)
        np.testing.assert_array_equal(old[0].codebook["lut2"], new[0].codebook["lut2"])


def test_a_model_that_loses_keeps_its_tables(solved: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that ruin themselves, and a model that is worse although its blocks are better."""
    blocks, specs, files = solved

    def unchanged() -> bool:
        pairs = ((files.must_read(s), tuned(s, files.must_read(s), tmp_path)) for s in specs.values())
        return all((a.codebook[k] == b.codebook[k]).all() for old, new in pairs for a, b in zip(old, new, strict=True)
                   for k in a.codebook)  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(tuner_module, "RATES", dict.fromkeys((2, 3, 4), 1e3))
        (ruined,) = tune_blocks(blocks, lambda: texts(100, 24), specs, files, [2], 8, tmp_path, 0, False).values()
    assert (ruined.after, ruined.blocks) == (ruined.before, 0)
    assert unchanged()
    (tmp_path / "tuned2.part").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(BlockTuner, "divergences", lambda self: (1.0, 2.0))
        (worse,) = tune_blocks(blocks, lambda: texts(100, 24), specs, files, [2], 8, tmp_path, 0, False).values()
    assert (worse.before, worse.after, worse.blocks) == (1.0, 1.0, 0)
    assert unchanged()
    (tmp_path / "tuned2.part").unlink()
    tune_blocks(blocks, lambda: texts(100, 24), specs, files, [2], 8, tmp_path, 0, False)
    assert not unchanged()


def test_a_kill_costs_one_block(solved: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, specs, files = solved
    tune, calls = BlockTuner.tune, 0

    def counted(stop: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return tune(*arguments)

        return wrapper

    def run(name: str, stop: int = 0) -> dict[str, bytes]:
        nonlocal calls
        calls = 0
        monkeypatch.setattr(BlockTuner, "tune", counted(stop))
        (tmp_path / name).mkdir(exist_ok=True)
        tune_blocks(blocks, lambda: texts(60, 24), specs, files, [2, 3], 8, tmp_path / name, 0, False)
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    whole = run("whole")
    assert calls == 4
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop=4)  # 2 bits and the first block of 3 are done
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {"tuned2.part", "tuned3.block0.part"}
    assert run("killed") == whole
    assert calls == 1
    with pytest.raises(KeyboardInterrupt):
        run("torn", stop=4)
    part = tmp_path / "torn" / "tuned3.block0.part"
    part.write_bytes(part.read_bytes()[:-30])
    assert run("torn") == whole
    assert calls == 2
    nothing = lambda: pytest.fail("the text was made")  # noqa: E731
    again = tune_blocks(blocks, nothing, specs, files, [2, 3], 8, tmp_path / "whole", 0, False)
    assert set(again) == {2, 3}


def test_a_block_works_on_what_the_tuned_blocks_before_it_say(tmp_path: Path) -> None:
    model = float_model("llama")
    blocks, sequences = blocks_of(model, tmp_path / "float"), texts(20, 24)
    tuner = BlockTuner(blocks, sequences, tmp_path)
    tuner.enter(2, {})
    weights = {t.name: quantized(model, t, 2) for t in targets_of(model)}
    moved: dict[str, torch.Tensor] = {}
    for index, name in enumerate(blocks.names):
        level = Level({n: w for n, w in weights.items() if n.startswith(name)}, {})
        tuner.read()
        found = tuner.tune(level, 12, build.tqdm(disable=True))
        tuner.move_on(level, found.tables)
        moved |= level.parameters(found.tables)
        assert found.after < found.before
        ids = torch.cat(sequences)[: len(tuner._ids)]
        order = [int((ids == row).all(dim=1).nonzero()) for row in tuner._ids]
        with torch.no_grad():
            found_states, float_states = (
                _states(model, dict(parameters), index, ids[order]) for parameters in (moved, {})
            )
        # float32 states of some units through two blocks
        assert torch.allclose(tuner._tuned, found_states, rtol=1e-4, atol=1e-4)
        assert torch.allclose(tuner._float, float_states, rtol=1e-4, atol=1e-4)
    # the last block is judged by the model's own divergence, which sequences of one length count alike
    assert tuner.divergences()[1] == pytest.approx(found.after, rel=1e-4)


def _states(model: Any, parameters: dict[str, torch.Tensor], index: int, ids: torch.Tensor) -> torch.Tensor:
    """What block `index` of the model with other parameters says, by a hook on the whole model."""
    caught = []
    hook = model.model.layers[index].register_forward_hook(lambda module, arguments, hidden: caught.append(hidden))
    torch.func.functional_call(model, parameters, (), {"input_ids": ids, "use_cache": False})
    hook.remove()
    found: torch.Tensor = caught[0]
    return found


def test_channels_count_by_their_variance(tmp_path: Path) -> None:
    blocks, sequences = blocks_of(make("llama"), tmp_path), [s[:, : 20 + i % 5] for i, s in enumerate(texts(20, 24))]
    tuner = BlockTuner(blocks, sequences, tmp_path)
    random = np.random.default_rng(0)
    tuner._float.copy_(torch.from_numpy(random.standard_normal(tuner._float.shape) * np.arange(40) + 3))
    train = tuner._float[: tuner._first_held][tuner._ids[: tuner._first_held] >= 0].double().numpy()
    wanted = 1 / np.maximum(train.var(axis=0), block_tuner.FLOOR * train.var(axis=0).mean())
    assert wanted[0] < 1 / (1e-4 * train.var(axis=0).mean())  # the channel that never changes
    np.testing.assert_allclose(tuner._channel_weights().numpy(), wanted, rtol=1e-5)  # float32 of float64 sums


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    tuner = BlockTuner(blocks_of(make("llama"), tmp_path), texts(30, 24), tmp_path, seed=3)
    tuner.enter(2, {})
    tuner.read()
    endless = tuner._endless()
    drawn = torch.cat([next(endless) for _ in range(5)]).tolist()
    assert set(drawn) == set(range(27)) == set(range(tuner._first_held))
    assert len(tuner._ids) == 30


def test_a_full_disk_is_said_before_anything_is_written(
    solved: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, specs, files = solved
    asked: list[int] = []

    def full(descriptor: int, offset: int, size_bytes: int) -> None:
        asked.append(size_bytes)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"disk full while writing .*: free space, then continue with --resume"):
        tune_blocks(blocks, lambda: texts(12, 24), specs, files, [2], 8, tmp_path, 0, False)
    assert asked == [12 * 24 * 40 * 4]


def test_one_block_is_in_memory(solved: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the parameters of two, and of the source's own model none."""
    blocks, specs, files = solved
    read = Blocks.read
    alive: list[weakref.ref[torch.Tensor]] = []

    def counted(self: Blocks, index: int) -> dict[str, torch.Tensor]:
        assert not [r for r in alive if r() is not None], "two blocks at once"
        found = read(self, index)
        alive.extend(weakref.ref(t) for t in found.values())
        return found

    monkeypatch.setattr(Blocks, "read", counted)
    tune_blocks(blocks, lambda: texts(12, 24), specs, files, [2], 4, tmp_path, 0, False)
    assert len(alive) > 2
    assert all(p.device.type == "meta" for p in blocks._source.model.parameters())


def test_memory_by_hand() -> None:
    shapes = {"embed": (100, 8), "head": (100, 8), "layers.0.a": (4, 8), "layers.0.norm": (8,), "layers.1.a": (16, 8)}
    specs = {n: WeightSpec(n, shapes[n], (2,), "compact") for n in ("head", "layers.0.a", "layers.1.a")}
    logits = 4 * 100 * 6 * tuner_module.STEP_TOKENS
    found = block_memory_bytes(shapes, ["layers.0.", "layers.1."], specs, 100)
    assert found == logits + 4 * 800 + 8 * 800 + 128 * (4 + 10 + 16)


HOW: dict[str, Any] = {"calibration": "random", "calibration_sequences": 64, "calibration_length": 24,
                       "tune_steps": 16, "progress": False}  # fmt: skip


def test_blocks_are_tuned_where_the_model_does_not_fit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybit.quantize(tiny_llama, tmp_path / "asked", (2, 4), tune="blocks", **HOW)
    everybit.quantize(tiny_llama, tmp_path / "plain", (2, 4), tune=False, **HOW)
    monkeypatch.setattr(build, "memory_bytes", lambda *_: 1 << 60)
    report = everybit.quantize(tiny_llama, tmp_path / "out", (2, 4), **HOW)
    provenance = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["provenance"]
    assert provenance["tuning"] == {"steps": 16, "by": "blocks"}
    assert report.untuned is None
    assert set(report.tuned) == {2, 4}
    assert all(t.after < t.before and t.blocks in (1, 2) for t in report.tuned.values())
    assert f"steps at most for each block, {report.tuned[2].blocks} of which gained" in describe(report)
    asked, plain, out = (
        b"".join(p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors")))
        for name in ("asked", "plain", "out")
    )
    assert out == asked != plain
    assert not list(tmp_path.glob("out/*.part*"))


def test_neither_model_nor_block_fits(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tune, message in (
        ("blocks", r"block by block about \d+ GB of \d+ GB; drop the wish"),
        ("whole", r"it needs about 0 GB of memory, this machine has \d+ GB; drop the wish"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(build, "MEMORY_SHARE", 0.0)
            with pytest.raises(SourceError, match=f"tables cannot be tuned: {message}"):
                everybit.quantize(tiny_llama, tmp_path / "out", (2,), tune=tune, dry_run=True, **HOW)
    with monkeypatch.context() as patched:
        patched.setattr(build, "MEMORY_SHARE", 0.0)
        report = everybit.quantize(tiny_llama, tmp_path / "out", (2,), dry_run=True, **HOW)
    assert report.untuned is not None
    assert report.untuned.startswith("it needs about 0 GB of memory, this machine has ")
    assert report.untuned.endswith("; block by block about 0 GB")
    with pytest.raises(SourceError, match="tune 'layers': expected True, False, None or one of whole, blocks"):
        everybit.quantize(tiny_llama, tmp_path / "out", (2,), tune="layers", **HOW)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(build, "memory_bytes", lambda *_: 1 << 60)
        patched.setattr(Blocks, "why_not", lambda self: "its blocks are round")
        report = everybit.quantize(tiny_llama, tmp_path / "out", (2,), dry_run=True, **HOW)
    assert report.untuned is not None
    assert report.untuned.endswith(" GB; its blocks are round")


def test_the_model_is_not_kept_for_its_sequences(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, documents = calibrate.describe("random", 4, 2000, 0)
    calibrated = calibrate.Calibrated(tiny_llama, record, documents, False)
    assert calibrated.model is calibrated.model
    sequences = calibrated.without_model()
    assert "model" not in vars(calibrated)
    monkeypatch.setattr(calibrate, "load_float", lambda folder: pytest.fail("the model was loaded"))
    fresh = calibrate.Calibrated(tiny_llama, record, documents, False).without_model()
    context = json.loads((tiny_llama / "config.json").read_text())["max_position_embeddings"]
    assert [tuple(s.shape) for s in fresh] == [(1, context)] * 4
    assert all(torch.equal(a, b) for a, b in zip(sequences, fresh, strict=True))
