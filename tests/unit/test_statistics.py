"""Calibration statistics against brute force with autograd; waves, interruptions and files leave no trace in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from everybit.errors import OutputError, SourceError
from everybit.quantize import statistics
from everybit.quantize.calibrate import Calibrated, Calibration
from everybit.quantize.discover import Target, discover, is_fused_experts
from everybit.quantize.source import load_float
from everybit.quantize.statistics import FLOOR, Statistics, measure
from tests.e2e.architectures import make
from tests.unit.calibrated import Ready, Untouchable, texts

FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss"]
GROUPS = 3  # does not divide the 40, 52, 80 and 104 rows


@dataclass
class Counted:
    """A model that counts its runs and is interrupted at one of them."""

    inner: Any
    stop: int = -1
    runs: int = 0

    def __call__(self, **inputs: Any) -> Any:
        if self.runs == self.stop:
            raise KeyboardInterrupt
        self.runs += 1
        return self.inner(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def loaded(family: str, folder: Path) -> Any:
    """As calibration loads it, with whatever kernels transformers picks for experts then."""
    make(family).save_pretrained(folder)
    return load_float(folder).requires_grad_(False)


def targets_of(model: Any) -> list[Target]:
    return discover(model, [], [])[0]


Products = list[tuple[str, int, torch.Tensor, torch.Tensor]]  # parameter, expert, x, z


def dense_experts(name: str, module: Any, products: Products) -> Any:
    """A forward that runs every expert on every token, and once more for those that the router did not choose."""

    def multiply(parameter: str, e: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(module, parameter)[e]
        z = x @ (weight if module.is_transposed else weight.T)
        z.retain_grad()
        products.append((f"{name}.{parameter}", e, x, z))
        return z + getattr(module, parameter + "_bias")[e] if module.has_bias else z

    def run(e: int, x: torch.Tensor) -> torch.Tensor:
        inner = multiply("gate_up_proj", e, x)
        if module.is_transposed:  # gpt-oss has a gate of its own
            inner = module._apply_gate(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        return multiply("down_proj", e, inner)

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count = module.num_experts
        chosen = torch.zeros(len(hidden), count).scatter(1, index, weights)
        share = torch.full((len(hidden), count), 1.0 / count).scatter(1, index, 0.0)
        out = sum(chosen[:, e : e + 1] * run(e, hidden) for e in range(count))
        unchosen = sum(share[:, e : e + 1] * run(e, hidden.detach()) for e in range(count))
        return out + (unchosen - unchosen.detach())

    return forward


def brute_force(model: Any, targets: list[Target], sequences: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Hessians (name + '|hessian') and squared gradients in float64, from hooks on modules."""
    products: Products = []
    by_name = {t.name: t for t in targets}
    undo = []
    for name, module in model.named_modules():
        if is_fused_experts(module):
            module.forward = dense_experts(name, module, products)
            undo.append(module)
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and f"{name}.weight" in by_name:

            def hook(_: Any, inputs: Any, z: torch.Tensor, name: str = f"{name}.weight") -> None:
                z.retain_grad()
                products.append((name, 0, inputs[0], z))

            module.register_forward_hook(hook)
    found: dict[str, np.ndarray] = {}
    for t in targets:
        model.get_parameter(t.name).requires_grad_(True)
        found[t.name] = np.zeros(t.shape)
        found[t.name + "|hessian"] = np.zeros((*t.shape[:-2], GROUPS, t.shape[-1], t.shape[-1]))
    for ids in sequences:
        products.clear()
        model.zero_grad()
        (model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)).backward()
        for t in targets:
            gradient = model.get_parameter(t.name).grad.double().numpy()
            found[t.name] += np.square(gradient.swapaxes(-1, -2) if t.transposed else gradient)
        for name, e, x, z in products:
            t = by_name[name]
            inputs = x.detach().double().numpy().reshape(-1, t.shape[-1])
            squares = np.square(z.grad.double().numpy().reshape(-1, t.shape[-2]))  # type: ignore[union-attr]
            total = found[name + "|hessian"]
            total = total[e] if total.ndim == 4 else total
            for row in range(t.shape[-2]):
                g = row * GROUPS // t.shape[-2]
                members = sum(r * GROUPS // t.shape[-2] == g for r in range(t.shape[-2]))
                total[g] += (inputs * squares[:, row : row + 1]).T @ inputs / members
    for module in undo:
        del module.forward
    return found


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Gradients are float32 sums over at most 104 products in another order, squared, then summed over 36 tokens:
    about 2 * sqrt(104) * 2^-24 + 36 * 2^-24 = 3e-6 of the largest entry, ten times that through three more layers."""
    assert np.abs(found - wanted).max() <= 3e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_brute_force(family: str, tmp_path: Path) -> None:
    model, sequences = loaded(family, tmp_path / "float"), texts(3, 12)
    targets = targets_of(model)
    found = measure(Ready(model, sequences), targets, tmp_path / "statistics", GROUPS, progress=False)
    wanted = brute_force(model, targets, sequences)
    assert not found.unreached()
    for t in targets:
        close(found._tensor(t.name), wanted[t.name])
        hessian = found.hessian(t.name)
        assert hessian is not None
        assert hessian.dtype == np.float32
        assert hessian.shape == wanted[t.name + "|hessian"].shape
        assert (np.einsum("...kk->...k", hessian).max(axis=-1) > 0).all(), f"{t.name}: a group without a Hessian"
        close(hessian, wanted[t.name + "|hessian"])


@pytest.mark.parametrize("family", FAMILIES)
def test_tapping_changes_no_gradient(family: str, tmp_path: Path) -> None:
    """Bit for bit: hooks look at gradients on their way and must not write to them."""
    model, sequences = loaded(family, tmp_path / "float"), texts(2, 12)
    targets, before = targets_of(model), model.get_experts_implementation()
    tapped, plain = (
        measure(Ready(model, sequences), targets, tmp_path / f"with{g}", g, progress=False) for g in (GROUPS, 0)
    )
    for t in targets:
        np.testing.assert_array_equal(tapped._tensor(t.name), plain._tensor(t.name))
        assert plain.hessian(t.name) is None
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    if any(is_fused_experts(module) for module in model.modules()):
        assert model.get_experts_implementation() == before


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded("llama", tmp_path_factory.mktemp("statistics") / "float")


@pytest.fixture
def fresh(llama: Any, tmp_path: Path) -> Statistics:
    """All in one wave."""
    return measure(
        Ready(llama, texts(3, 12)), targets_of(llama), tmp_path / "whole" / "statistics", GROUPS, progress=False
    )


@pytest.fixture(autouse=True)
def whole_folder(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()


def same(a: Statistics, b: Statistics, targets: list[Target]) -> None:
    for t in targets:
        for key in (t.name, t.name + "|hessian"):
            np.testing.assert_array_equal(a._tensor(key), b._tensor(key))


def test_several_waves_are_as_one(llama: Any, fresh: Statistics, tmp_path: Path) -> None:
    targets = targets_of(llama)
    largest = max(statistics._hessian_bytes(t, GROUPS) for t in targets)
    for memory, waves in ((1, len(targets)), (2 * largest, None)):
        folder = tmp_path / str(memory)
        folder.mkdir()
        counted = Counted(llama)
        found = measure(Ready(counted, texts(3, 12)), targets, folder / "statistics", GROUPS, memory, progress=False)
        files = list(folder.iterdir())
        assert len(files) == waves or (waves is None and 1 < len(files) < len(targets))
        assert counted.runs == 3 * len(files)
        same(found, fresh, targets)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_an_interrupted_measurement_goes_on(
    stop: int, llama: Any, fresh: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two waves of three sequences; the first sequence of a wave is saved, the next ones as time allows."""
    monkeypatch.setattr(statistics, "SAVE_EVERY_S", -1.0)
    targets = targets_of(llama)
    half = sum(statistics._hessian_bytes(t, GROUPS) for t in targets[: len(targets) // 2])
    path = tmp_path / "statistics"
    with pytest.raises(KeyboardInterrupt):
        measure(Ready(Counted(llama, stop), texts(3, 12)), targets, path, GROUPS, half, progress=False)
    assert not any(p.requires_grad for p in llama.parameters())
    again = Counted(llama)
    found = measure(Ready(again, texts(3, 12)), targets, path, GROUPS, half, progress=False)
    same(found, fresh, targets)
    assert 6 - stop <= again.runs < 6
    if stop > 3:
        assert again.runs <= 3, "the finished wave was measured again"


def test_a_finished_file_is_taken_as_it_is(llama: Any, tmp_path: Path) -> None:
    targets, path = targets_of(llama), tmp_path / "statistics"
    first = measure(Ready(llama, texts(3, 12)), targets, path, GROUPS, 1, progress=False)
    again = measure(Untouchable(), targets, path, GROUPS, 1, progress=False)  # type: ignore[arg-type]
    same(first, again, targets)


@pytest.mark.parametrize("change", ["torn", "other targets", "other groups", "other text"])
def test_a_file_of_another_run_is_not(change: str, llama: Any, tmp_path: Path) -> None:
    targets, path = targets_of(llama), tmp_path / "statistics"
    counted = Counted(llama, stop=2 if change == "other text" else -1)
    try:
        measure(Ready(counted, texts(3, 12)), targets, path, GROUPS, progress=False)
    except KeyboardInterrupt:
        assert not path.exists() or statistics._state(path)["done"] < 3  # type: ignore[index]
    if change == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    counted = Counted(llama)
    groups, sequences = (2 if change == "other groups" else GROUPS), texts(3, 12)
    if change == "other text":
        sequences[0] = sequences[0] + 1
    if change == "other targets":
        targets = targets[1:]
    found = measure(Ready(counted, sequences), targets, path, groups, progress=False)
    assert counted.runs == 3
    (tmp_path / "new").mkdir()
    same(found, measure(Ready(llama, sequences), targets, tmp_path / "new/s", groups, progress=False), targets)


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = make("llama").requires_grad_(False)
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(SourceError, match="loss on calibration sequence 0 is nan: check the weights"):
        measure(Ready(model, texts(3, 12)), targets_of(model), tmp_path / "statistics", GROUPS, progress=False)
    assert not (tmp_path / "statistics").exists()


def test_gradients_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    model = make("llama").requires_grad_(False)
    model.model.norm.weight.mul_(1e21)  # the loss is finite, the squares of its gradients are not
    with pytest.raises(SourceError, match=r"non-finite gradients at model\.layers\.0\.self_attn\.q_proj\.weight"):
        measure(Ready(model, texts(3, 12)), targets_of(model), tmp_path / "statistics", GROUPS, progress=False)


def test_a_full_disk_says_so(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free space, then continue with --resume"):
        measure(
            Ready(llama, texts(3, 12)), targets_of(llama), tmp_path / "absent" / "statistics", GROUPS, progress=False
        )


def test_too_little_disk_is_refused_before_the_first_pass(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"statistics need 0\.\d GB, 0\.0 GB are free: free space, give --statistics"):
        measure(Ready(llama, texts(3, 12)), targets_of(llama), tmp_path / "statistics", GROUPS, progress=False)
    assert not (tmp_path / "statistics").exists()


def test_weights_that_nothing_reached_are_named_and_floored(tmp_path: Path) -> None:
    """Without an up-projection the other two of an MLP have no gradient; dead inputs of others count a thousandth."""
    model = make("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.zero_()
    model.model.layers[1].mlp.up_proj.weight[5].zero_()
    found = measure(Ready(model, texts(3, 12)), targets_of(model), tmp_path / "statistics", GROUPS, progress=False)
    unreached = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    assert sorted(found.unreached()) == unreached
    assert not found.hessian("model.layers.0.mlp.down_proj.weight").any()  # type: ignore[union-attr]
    name = "model.layers.1.mlp.down_proj.weight"
    raw, floored = found._tensor(name), found.sensitivity(name)
    assert not raw[:, 5].any()
    np.testing.assert_allclose(floored[:, 5], FLOOR * raw.mean(axis=1), rtol=1e-6)
    assert (floored >= raw).all()


def test_more_groups_than_rows_are_one_a_row(tmp_path: Path) -> None:
    model = make("qwen3_moe").requires_grad_(False)
    targets = [t for t in targets_of(model) if "k_proj" in t.name]  # 20 rows
    found = measure(Ready(model, texts(3, 12)), targets, tmp_path / "statistics", 64, progress=False)
    hessian = found.hessian(targets[0].name)
    assert hessian is not None
    assert hessian.shape == (20, 40, 40)


def test_random_calibration_is_seeded_and_in_range(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "float")
    drawn = [
        Calibrated(tmp_path / "float", Calibration("random", sequences=4, length=200, seed=s), None, False).sequences
        for s in (1, 1, 2)
    ]
    assert [s.shape for s in drawn[0]] == [(1, 64)] * 4  # the model's context
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert 0 <= min(int(s.min()) for s in drawn[0]) <= 5
    assert 90 <= max(int(s.max()) for s in drawn[0]) < 96
