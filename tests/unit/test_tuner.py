"""Table tuning: never worse on held-out text, what is reported is what comes out, stored numbers stay storable."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from everybit.errors import OutputError
from everybit.formats import WeightSpec
from everybit.quantize import tuner as tuner_module
from everybit.quantize.discover import Target, discover
from everybit.quantize.solutions import SolutionFiles
from everybit.quantize.solvers import solve
from everybit.quantize.tuner import Quantized, Tuner, _batches, _LookUp
from everybit.quantize.tuning import tunable, tune_tables, tuned
from tests.e2e.architectures import make
from tests.unit.calibrated import Ready, Untouchable, texts


def float_model(family: str) -> Any:
    """Wide enough that its predictions are far from uniform."""
    model = make(family).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(4)
    return model


def targets_of(model: Any) -> list[Target]:
    return discover(model, [], [])[0]


def stored(model: Any, target: Target) -> np.ndarray:
    """The parameter as f32[rows, K], experts below each other."""
    value = model.get_parameter(target.name).numpy()
    return np.ascontiguousarray(value.swapaxes(-1, -2) if target.transposed else value).reshape(-1, target.shape[-1])


def quantized(model: Any, target: Target, bits: int, codebook: str = "compact") -> Quantized:
    solution = solve(stored(model, target), None, (bits,), codebook=codebook)
    scale = solution.codebook.get("scale")
    shape = tuple(model.get_parameter(target.name).shape)
    return Quantized(solution.codes_at(bits), solution.table_at(bits), scale, shape, target.transposed)


def perturbed(weight: Quantized, by: float = 0.5) -> Quantized:
    """Entries moved by about `by` of the row's deviation, as storable as before."""
    noise = np.random.default_rng(1).standard_normal(weight.table.shape) * weight.table.std(axis=1, keepdims=True) * by
    table = weight.table + noise.astype(np.float32)
    if weight.scale is not None:
        table = np.clip(np.rint(table / weight.scale), -127, 127).astype(np.float32) * weight.scale
    return Quantized(weight.codes, table, weight.scale, weight.shape, weight.transposed)


def values(weight: Quantized, table: np.ndarray) -> torch.Tensor:
    found = np.take_along_axis(table, weight.codes.astype(np.intp), axis=1)
    if weight.transposed:
        found = found.reshape(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]).swapaxes(-1, -2)
    return torch.from_numpy(np.ascontiguousarray(found).reshape(weight.shape))


@torch.no_grad()
def divergence(model: Any, weights: dict[str, torch.Tensor], sequences: list[torch.Tensor]) -> float:
    """KL of the float model to one with other parameters, nats per predicted token, one sequence at a time."""
    other, total, tokens = deepcopy(model), 0.0, 0
    for name, value in weights.items():
        other.get_parameter(name).copy_(value)
    for ids in sequences:
        expected, found = (functional.log_softmax(m(input_ids=ids).logits[0, :-1].double(), -1) for m in (model, other))
        total += float((expected.exp() * (expected - found)).sum())
        tokens += len(expected)
    return total / tokens


@pytest.mark.parametrize(
    ("family", "codebook"),
    [("llama", "compact"), ("llama", "table"), ("gpt2", "compact"), ("mixtral", "table"), ("gpt_oss", "compact")],
)
def test_a_perturbed_table_is_mended_and_the_report_is_true(family: str, codebook: str) -> None:
    model = float_model(family)
    weights = {t.name: perturbed(quantized(model, t, 3, codebook)) for t in targets_of(model)}
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    tuner = Tuner(model, texts(40, 40))
    result = tuner.tune(weights, {}, 3, 40, progress=False)
    assert result.after < 0.9 * result.before
    assert 0 < result.steps <= 40
    # Float32 logits of a few units: an error of 2^-22 a token and path, far below 1e-4 of the divergence.
    for reported, tables in ((result.before, {n: w.table for n, w in weights.items()}), (result.after, result.tables)):
        found = divergence(model, {n: values(weights[n], t) for n, t in tables.items()}, tuner._held)
        assert found == pytest.approx(reported, rel=1e-4)
    for name, weight in weights.items():
        assert result.tables[name].shape == weight.table.shape
        assert result.tables[name].dtype == np.float32
        if weight.scale is not None:
            numbers = result.tables[name] / weight.scale
            assert (np.rint(numbers) * weight.scale == result.tables[name]).all()
            assert np.abs(numbers).max() < 127.001
    for name, before in parameters.items():
        assert torch.equal(model.get_parameter(name), before), f"{name} of the float model changed"


def test_held_out_text_is_never_trained_on() -> None:
    tuner = Tuner(float_model("llama"), texts(30, 24), seed=3)
    assert len(tuner._held) == 3
    assert len(tuner._train) == 27
    assert not {s.numpy().tobytes() for s in tuner._held} & {s.numpy().tobytes() for s in tuner._train}
    endless = tuner._endless(2)
    drawn = torch.cat([next(endless) for _ in range(3)])
    assert {row.numpy().tobytes() for row in drawn} == {s[0].numpy().tobytes() for s in tuner._train}


@pytest.mark.parametrize("steps", [1, 3, 4, 17])
def test_the_result_is_never_worse(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even at rates that destroy everything: then the tables come back as they were."""
    model = float_model("llama")
    weights = {t.name: quantized(model, t, 2) for t in targets_of(model)}
    plain = Tuner(model, texts(12, 24)).tune(weights, {}, 2, steps, progress=False)
    assert plain.after <= plain.before
    monkeypatch.setattr(tuner_module, "RATES", dict.fromkeys((2, 3, 4), 1e3))
    ruined = Tuner(model, texts(12, 24)).tune(weights, {}, 2, steps, progress=False)
    assert ruined.after == ruined.before == plain.before
    for name, weight in weights.items():
        np.testing.assert_array_equal(ruined.tables[name], weight.table)


def test_the_same_seed_gives_the_same_tables() -> None:
    model = float_model("llama")
    weights = {t.name: perturbed(quantized(model, t, 2)) for t in targets_of(model)}
    sequences = texts(100, 24)  # two steps' worth, so that their order counts
    one, two, other = (Tuner(model, sequences, seed).tune(weights, {}, 2, 12, progress=False) for seed in (1, 1, 2))
    assert one.after == two.after < one.before
    for name in weights:
        np.testing.assert_array_equal(one.tables[name], two.tables[name])
    assert any((one.tables[name] != other.tables[name]).any() for name in weights)


def test_fixed_parameters_are_those_of_the_quantized_model() -> None:
    model = float_model("llama")
    first, *rest = targets_of(model)
    weights = {first.name: quantized(model, first, 2)}
    others = {t.name: quantized(model, t, 2) for t in rest}
    fixed = {name: values(w, w.table) for name, w in others.items()}
    tuner = Tuner(model, texts(12, 24))
    alone, among = (tuner.tune(weights, f, 2, 1, progress=False) for f in ({}, fixed))
    start = {first.name: values(weights[first.name], weights[first.name].table)}
    assert among.before == pytest.approx(divergence(model, {**start, **fixed}, tuner._held), rel=1e-4)
    assert alone.before == pytest.approx(divergence(model, start, tuner._held), rel=1e-4)
    assert set(among.tables) == {first.name}


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_that_of_a_gather(scaled: bool) -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 8, (5, 33)).astype(np.uint8))
    scale = torch.full((5, 1), 0.125) if scaled else None
    table = torch.from_numpy(rng.integers(-100, 100, (5, 8)) * np.float32(0.125)).requires_grad_(True)
    towards = torch.from_numpy(rng.standard_normal((5, 33)).astype(np.float32))
    found = _LookUp.apply(table, codes, scale)
    (gradient,) = torch.autograd.grad((found * towards).sum(), table)
    wanted = table.gather(1, codes.long())
    (expected,) = torch.autograd.grad((wanted * towards).sum(), table)
    assert torch.equal(found, wanted)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-6)  # float32 sums of 33 numbers in some order


def test_rounding_is_to_the_nearest_int8_and_clips() -> None:
    table = torch.tensor([[0.4, 0.6, -1.4, 200.0, -200.0, 127.4], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    codes = torch.arange(6, dtype=torch.uint8).repeat(2, 1)
    found = _LookUp.apply(table, codes, torch.tensor([[1.0], [0.0]]))
    assert found.tolist() == [[0, 1, -1, 127, -127, 127], [0] * 6]


def test_padding_changes_nothing() -> None:
    """A batch of unequal sequences has the loss and gradient of its tokens one sequence at a time."""
    model = float_model("llama")
    sequences = [s[:, :n] for s, n in zip(texts(4, 24), (24, 2, 9, 17), strict=True)]
    tuner = Tuner(model, texts(12, 24))
    name = targets_of(model)[0].name
    value = (model.get_parameter(name) * 0.7).requires_grad_(True)
    (batch,) = _batches(sequences)
    assert batch.shape == (4, 24)
    together = tuner._divergence({name: value}, batch, tuner._probabilities(batch))
    apart = sum(tuner._divergence({name: value}, s, tuner._probabilities(s)) * (s.shape[1] - 1) for s in sequences)
    apart = apart / sum(s.shape[1] - 1 for s in sequences)
    # float32: log-softmax over 96 entries and matrices of 40 and 52 columns, some 2^-20 of the terms
    assert together.item() == pytest.approx(apart.item(), rel=1e-4)
    one, other = (torch.autograd.grad(loss, value, retain_graph=True)[0] for loss in (together, apart))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_batches_hold_a_step() -> None:
    sequences = [torch.ones(1, n, dtype=torch.int64) for n in (1500, 500, 100, 3000, 40)]
    assert [tuple(b.shape) for b in _batches(sequences)] == [(2, 1500), (1, 100), (1, 3000), (1, 40)]


@pytest.fixture
def solved(tmp_path: Path) -> tuple[Any, dict[str, WeightSpec], SolutionFiles]:
    """GPT-OSS: transposed experts, plain attention; down-projections at 3 bits alone, keys at 6 and 8."""
    model, specs = float_model("gpt_oss"), {}
    files = SolutionFiles(tmp_path / "solutions")
    for t in targets_of(model):
        bits = (3,) if "down_proj" in t.name else (6, 8) if "k_proj" in t.name else (2, 3, 6)
        specs[t.name] = WeightSpec(t.name, t.shape, bits, "compact", t.transposed)
        matrices = stored(model, t).reshape(-1, *t.shape[-2:])
        files.save(t.name, [solve(np.ascontiguousarray(m), None, bits, codebook="compact") for m in matrices])
    for parameter in model.parameters():
        parameter.mul_(2)  # so that there is something to tune
    return model, specs, files


def test_weights_with_their_own_bits(solved: Any, tmp_path: Path) -> None:
    model, specs, files = solved
    report = tune_tables(Ready(model, texts(12, 24)), specs, files, [2, 3, 6], 8, tmp_path, 0, False)
    assert set(report) == {2, 3}
    assert all(r.after <= r.before for r in report.values())
    for b in (2, 3):  # what was reported, of all weights as they are served at b bits
        served = {n: s.served_bits(b) for n, s in specs.items()}
        for which, wanted in (("before", report[b].before), ("after", report[b].after)):
            weights = {}
            for name, spec in specs.items():
                solutions = files.must_read(spec)
                if which == "after" and served[name] == b:
                    solutions = tuned(spec, solutions, tmp_path)
                value = np.stack([s.values_at(served[name]) for s in solutions])
                value = value.swapaxes(-1, -2) if spec.transposed else value
                shape = model.get_parameter(name).shape
                weights[name] = torch.from_numpy(np.ascontiguousarray(value).reshape(shape))
            found = divergence(model, weights, Tuner(model, texts(12, 24))._held)
            assert found == pytest.approx(wanted, rel=1e-4)
    for spec in specs.values():
        before, after = files.must_read(spec), tuned(spec, files.must_read(spec), tmp_path)
        for old, new in zip(before, after, strict=True):
            assert old.codebook.keys() == new.codebook.keys()
            changed = {k for k in old.codebook if (old.codebook[k] != new.codebook[k]).any()}
            assert changed == {f"lut{b}" for b in spec.bits if tunable(spec, b) and report[b].after < report[b].before}
            assert all(new.codebook[k].dtype == old.codebook[k].dtype for k in changed)


def test_tuned_tables_are_found_again(solved: Any, tmp_path: Path) -> None:
    model, specs, files = solved
    first = tune_tables(Ready(model, texts(12, 24)), specs, files, [2, 3], 4, tmp_path, 0, False)
    content = (tmp_path / "tuned3.part").read_bytes()
    again = tune_tables(Untouchable(), specs, files, [2, 3], 4, tmp_path, 0, False)  # type: ignore[arg-type]
    assert again == first
    (tmp_path / "tuned3.part").write_bytes(content[:-50])
    assert tune_tables(Ready(model, texts(12, 24)), specs, files, [2, 3], 4, tmp_path, 0, False) == first
    assert (tmp_path / "tuned3.part").read_bytes() == content


def test_a_solution_that_is_gone_says_so(solved: Any, tmp_path: Path) -> None:
    model, specs, files = solved
    next((tmp_path / "solutions").iterdir()).unlink()
    with pytest.raises(OutputError, match="is gone or damaged: continue with --resume"):
        tune_tables(Ready(model, texts(12, 24)), specs, files, [2], 4, tmp_path, 0, False)


def test_solutions_come_back_as_they_were(solved: Any) -> None:
    model, specs, files = solved
    for t in targets_of(model):
        spec = specs[t.name]
        matrices = (stored(model, t) / 2).reshape(-1, *t.shape[-2:])
        found = files.must_read(spec)
        assert len(found) == len(matrices)
        for matrix, solution in zip(matrices, found, strict=True):
            wanted = solve(np.ascontiguousarray(matrix), None, spec.bits, codebook="compact")
            assert (solution.bits, solution.kind) == (wanted.bits, wanted.kind)
            np.testing.assert_array_equal(solution.codes, wanted.codes)
            assert set(solution.codebook) == set(wanted.codebook)
            for b in spec.bits:
                np.testing.assert_array_equal(solution.values_at(b), wanted.values_at(b))
    name = next(iter(specs))
    path = files._path(name)
    path.write_bytes(path.read_bytes()[:-10])
    assert files.read(specs[name]) is None
