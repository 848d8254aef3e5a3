"""The engine's back end in torch: on a CPU in float32 the reference's logits, in half precision near them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import everybit
from everybit.batching.batcher import Batcher
from everybit.batching.scheduler import Request
from everybit.cli.main import main
from everybit.engine import models
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.generate import generate
from everybit.engine.native import make_step
from everybit.engine.plan import Plan
from everybit.engine.reference import Reference
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import ModelError, PrecisionError
from everybit.gpu.engine import Device, open_device
from tests.e2e.architectures import FAMILIES, VARIANTS, make
from tests.parity.test_families_native import typical
from tests.parity.test_families_reference import in_chunks, save, worst

EXACT = 2e-5  # float32 sums where the reference has float64 ones; measured: at most 1.2e-6
# Of the largest logit, for the median token (a router's flip moves one further). Measured: at most 0.0006 and 0.005.
HALF = {"float16": 0.002, "bfloat16": 0.02}
BITS = (2, 3, 4, 5, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device(checkpoint: Checkpoint, **options: object) -> Device:
    given = {"device": DEVICE, "dtype": "float32", "kv_dtype": "F32", **options}
    return Device(models.build(checkpoint), checkpoint, kv_blocks=24, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    make("llama").save_pretrained(folder / "float")
    everybit.quantize(folder / "float", folder / "overlay", bits=BITS, progress=False)
    return folder / "overlay"


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_float_folder(family: str, tmp_path: Path) -> None:
    save(make(family), tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        wanted = in_chunks(Reference(models.build(checkpoint), checkpoint))
        assert worst(in_chunks(device(checkpoint)), wanted) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3_moe_mixed", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [*HALF, "float32"])
def test_overlay_at_every_precision(family: str, dtype: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "float")
    everybit.quantize(tmp_path / "float", tmp_path / "overlay", bits=BITS, progress=False)
    with Checkpoint.open(tmp_path / "overlay") as checkpoint:
        reference, tested = Reference(models.build(checkpoint), checkpoint), device(checkpoint, dtype=dtype)
        for bits in BITS:
            distance = typical if dtype in HALF else worst
            found = distance(in_chunks(tested, bits), in_chunks(reference, bits))
            assert found < HALF.get(dtype, EXACT), f"{bits} bits: {found:.2g}"


def test_kernels_multiply_and_one_set_of_planes_serves_all(overlay: Path) -> None:
    with Checkpoint.open(overlay) as checkpoint:
        tested = device(checkpoint, dtype="float16")
        for bits in BITS:
            in_chunks(tested, bits)
        parameters = tested._parameters
        assert {name for name, _ in parameters._tiled} == set(checkpoint.overlay.weights)
        assert None not in parameters._tiled.values()
        assert not [key for key in parameters._dense if key[1]]


def decoding(tested: Device, sequences: int, bits: int | Plan, *, captured: bool) -> np.ndarray:
    """Logits of the third token of each sequence; sequence s has s + 2 tokens before."""
    blocks = np.arange(24).reshape(-1, 4)
    for s in range(sequences):
        tested.run(make_step([(np.arange(s + 2) + s, 0, blocks[s])], []), bits)
    parts = [([7 + s], s + 2, blocks[s]) for s in range(sequences)]
    if captured:
        before = len(tested._graphs)
        logits = tested.run(make_step(parts, range(sequences)), bits)
        assert len(tested._graphs) == before + 1
        return logits
    return np.concatenate([tested.run(make_step([part], [0]), bits) for part in parts])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_padded_decoding_is_that_of_one_sequence(dtype: str, overlay: Path) -> None:
    with Checkpoint.open(overlay) as checkpoint:
        for sequences in (1, 3, 5):
            together = decoding(device(checkpoint, dtype=dtype), sequences, 4, captured=True)
            alone = decoding(device(checkpoint, dtype=dtype, graphs=False), sequences, 4, captured=False)
            assert np.abs(together - alone).max() < {"float32": 1e-5, "float16": 2e-3}[dtype] * np.abs(alone).max()


def test_a_captured_step_is_used_again_and_old_ones_are_forgotten(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everybit.gpu.engine._MOST_GRAPHS", 2)
    with Checkpoint.open(overlay) as checkpoint:
        tested = device(checkpoint)
        for bits in (2, 3, 2, 4):
            decoding(tested, 2, bits, captured=False)
        assert [key[0] for key in tested._graphs] == [2, 4]


def test_a_plan_reads_each_weight_at_its_own_bits(overlay: Path) -> None:
    with Checkpoint.open(overlay) as checkpoint:
        names = sorted(checkpoint.overlay.weights)
        plan = Plan.of(checkpoint.overlay, {name: BITS[i % len(BITS)] for i, name in enumerate(names)})
        reference = Reference(models.build(checkpoint), checkpoint)
        assert worst(in_chunks(device(checkpoint), plan), in_chunks(reference, plan)) < EXACT


def test_fewer_planes_are_loaded(overlay: Path) -> None:
    with Checkpoint.open(overlay) as checkpoint:
        whole, part = device(checkpoint, dtype="float16"), device(checkpoint, dtype="float16", most_bits=3)
        for one, other in zip(in_chunks(whole, 3), in_chunks(part, 3), strict=True):
            np.testing.assert_array_equal(one, other)
        assert {len(tiled.planes) for tiled in part._parameters._tiled.values()} == {3}
        with pytest.raises(PrecisionError, match="4 bits were asked, only planes of up to 3 bits are loaded"):
            part.run(make_step([([1], 0, [0])], [0]), 4)
        with pytest.raises(PrecisionError, match="most_bits 7 arrived"):
            device(checkpoint, most_bits=7)


def test_a_full_gpu_says_what_fits(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint.open(overlay) as checkpoint:
        tested = device(checkpoint, dtype="float16")
        sizes = checkpoint.overlay.sizes().rows
        total = (sizes[4].bytes + tested.kv_bytes) / 0.9 + 1

        def full(*_: object, **__: object) -> None:
            raise torch.cuda.OutOfMemoryError

        monkeypatch.setattr(tested._parameters, "prepare", full)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
        with pytest.raises(ModelError, match="are full: planes of up to 4 bits fit") as caught:
            tested.prepare(8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "mps", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="arrived"):
        open_device(name)


def test_text_is_that_of_the_processors(overlay: Path) -> None:
    on_device = partial(Device, device=DEVICE, dtype="float32")
    with (
        Runtime.open(overlay, backend=on_device, kv_dtype="float32") as one,
        Runtime.open(overlay, mode="exact") as two,
    ):
        tokens = [list(generate(runtime, [3, 1, 4], Sampling(), 12, 4)) for runtime in (one, two)]
        assert tokens[0] == tokens[1]


def test_requests_share_the_device(overlay: Path) -> None:
    def run(prompts: list[list[int]], **options: object) -> list[list[int]]:
        with Runtime.open(overlay, kv_dtype="float32", sequences=4, **options) as runtime:  # type: ignore[arg-type]
            batcher, tokens = Batcher(runtime, speculate=False), {id: [] for id in range(len(prompts))}
            for id, prompt in enumerate(prompts):
                batcher.submit(Request(id, tuple(prompt), 8, (3, 5)[id % 2]), Sampling())
            while batcher.busy:
                for event in batcher.step():
                    tokens[event.id].append(event.token)
            return list(tokens.values())

    prompts = [[1, 2, 3], [5, 6], [7, 8, 9, 10], [11]]
    assert run(prompts, backend=partial(Device, device=DEVICE, dtype="float32")) == run(prompts, mode="exact")


@pytest.mark.parametrize("option", [{"threads": 2}, {"mode": "exact"}, {"isa": "generic"}, {"pin": [0]}])
def test_what_is_of_the_processors_is_refused(option: dict[str, object], overlay: Path) -> None:
    with pytest.raises(ModelError, match="leave them out"):
        Runtime.open(overlay, backend=partial(Device, device="cpu"), **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:77"], "torch finds"),
        (["--device", "abc"], "expected cuda"),
        (["--dtype", "bfloat16"], "goes with --device cuda"),
        (["--most-bits", "4"], "goes with --device cuda"),
        (["--device", "cuda", "--threads", "2"], "--threads is of the processors"),
        (["--device", "cuda", "--mode", "exact"], "--mode is of the processors"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], said: str, overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(overlay), "--prompt", "a", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize("graphs", [True, False])
def test_what_overflows_stays_in_its_sequence(graphs: bool, overlay: Path) -> None:
    """Block 0 pads short tables, and the place behind the new tokens was somebody's: both hold what is infinite."""
    with Checkpoint.open(overlay) as checkpoint:
        value = next(name for name in checkpoint.overlay.weights if "v_proj" in name)
        tested = device(checkpoint, dtype="float16", kv_dtype="F16", graphs=graphs)
        wanted = device(checkpoint, dtype="float16", kv_dtype="F16", graphs=False)
        times = tested._parameters.times

        def overflow(x: torch.Tensor, name: str, *rest: Any, **how: Any) -> torch.Tensor:
            return times(x, name, *rest, **how) * (torch.inf if name == value else 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tested._parameters, "times", overflow)
            tested.run(make_step([(np.arange(16), 0, [0]), (np.arange(16), 0, [1])], []), 4)
        for one in (tested, wanted):
            one.run(make_step([(np.arange(5, 8), 0, [1]), (np.arange(40), 0, [2, 3, 4])], []), 4)
        step = make_step([([9], 3, [1]), ([9], 40, [2, 3, 4])], [0, 1])
        np.testing.assert_allclose(tested.run(step, 4), wanted.run(step, 4), atol=2e-3)


def test_without_a_precision_the_most_that_is_loaded(overlay: Path) -> None:
    on_device = partial(Device, device=DEVICE, dtype="float16", most_bits=4)
    with Runtime.open(overlay, backend=on_device) as runtime:
        assert runtime.bits == (2, 3, 4)
        generation = generate(runtime, [3, 1, 4], Sampling(), 2, None)
        assert len(list(generation)) == 2
        assert generation.bits == 4


def test_plans_are_forgotten_in_time(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everybit.gpu.engine.MOST_SERVED", 3)
    with Checkpoint.open(overlay) as checkpoint:
        tested = device(checkpoint)
        for _ in range(5):
            tested.prepare(Plan.of(checkpoint.overlay, dict.fromkeys(checkpoint.overlay.weights, 3)))
        assert len(tested._own) == 3
