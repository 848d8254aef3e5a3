"""Plans on both back ends: equal bits are a uniform precision bit for bit, mixed ones give the reference's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import everybit
from everybit.engine import models
from everybit.engine import native as native_module
from everybit.engine.checkpoint import Checkpoint
from everybit.engine.plan import Plan
from everybit.engine.reference import Reference
from everybit.engine.runtime import Runtime
from everybit.errors import FormatError, PrecisionError
from tests.e2e.architectures import make
from tests.parity.test_families_native import EXACT, ROUNDED, native, typical
from tests.parity.test_families_reference import in_chunks, worst

BITS = (2, 3, 5, 8)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_oss"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("plans")
    make(request.param).save_pretrained(folder / "float")
    everybit.quantize(folder / "float", folder / "overlay", bits=BITS, progress=False)
    return Checkpoint.open(folder / "overlay")


def uniform(checkpoint: Checkpoint, bits: int) -> Plan:
    assert checkpoint.overlay is not None
    return Plan.of(checkpoint.overlay, dict.fromkeys(checkpoint.overlay.weights, bits))


def mixed(checkpoint: Checkpoint, seed: int) -> Plan:
    random = np.random.default_rng(seed)
    assert checkpoint.overlay is not None
    return Plan.of(checkpoint.overlay, {name: int(random.choice(BITS)) for name in checkpoint.overlay.weights})


@pytest.mark.parametrize("mode", ["exact", "default"])
def test_equal_bits_are_that_precision_bit_for_bit(
    checkpoint: Checkpoint, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_end = native(checkpoint, mode=mode, threads=2, most_tokens=64)
    uniforms = {bits: in_chunks(back_end, bits) for bits in BITS}
    tables = back_end.table_bytes
    monkeypatch.setattr(back_end, "_prepare_weight", None)  # all is there
    for bits, whole in uniforms.items():
        for one, other in zip(in_chunks(back_end, uniform(checkpoint, bits)), whole, strict=True):
            np.testing.assert_array_equal(one, other)
        assert back_end.table_bytes == tables  # shared


def test_equal_bits_on_the_reference(checkpoint: Checkpoint) -> None:
    reference = Reference(models.build(checkpoint), checkpoint)
    for one, other in zip(in_chunks(reference, uniform(checkpoint, 3)), in_chunks(reference, 3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mixed_plans_are_the_references(checkpoint: Checkpoint) -> None:
    reference = Reference(models.build(checkpoint), checkpoint)
    exact = native(checkpoint, mode="exact", threads=2, most_tokens=64)
    rounded = native(checkpoint, threads=2, most_tokens=64)
    uniforms = {bits: in_chunks(exact, bits) for bits in BITS}
    for seed in range(3):
        plan = mixed(checkpoint, seed)
        wanted = in_chunks(reference, plan)
        assert worst(in_chunks(exact, plan), wanted) < EXACT
        assert typical(in_chunks(rounded, plan), wanted) < ROUNDED
        assert min(worst(logits, wanted) for logits in uniforms.values()) > 100 * EXACT  # none of them by mistake


def test_a_mixed_plan_reads_its_planes_and_codebooks_only(checkpoint: Checkpoint) -> None:
    with Checkpoint.open(checkpoint.folder) as fresh:
        assert fresh.overlay is not None
        plan = mixed(fresh, 7)
        native(fresh, most_tokens=64).prepare(plan)
        wanted = {
            tensor
            for name, bits in plan.bits.items()
            for spec in [fresh.overlay.weights[name]]
            for tensor in (*map(spec.plane_name, range(bits)), *spec.codebook_names(bits).values())
        }
        own = {tensor for spec in fresh.overlay.weights.values() for tensor in spec.tensors()}
        assert fresh.overlay.touched & own == wanted


def test_plans_beyond_those_remembered(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "MOST_SERVED", 2)
    back_end = native(checkpoint, most_tokens=64)
    plans = [mixed(checkpoint, seed) for seed in range(4)]
    first = [in_chunks(back_end, plan) for plan in plans]
    for plan, logits in zip(plans, first, strict=True):
        for one, other in zip(in_chunks(back_end, plan), logits, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_no_precision_is_is_refused(checkpoint: Checkpoint, tiny_llama: Path) -> None:
    plan = mixed(checkpoint, 0)
    foreign = Plan("0" * 64, plan.bits, 1.0, 1)
    partial = Plan(plan.overlay, dict(list(plan.bits.items())[1:]), 1.0, 1)
    absent = Plan(plan.overlay, {**plan.bits, next(iter(plan.bits)): 4}, 1.0, 1)
    with Runtime.open(checkpoint.folder, threads=1) as runtime:
        for wrong, kind, message in (
            (foreign, FormatError, f"a plan for the overlay {'0' * 64} arrived, .* is {plan.overlay}"),
            (partial, FormatError, "the plan does not name the weight"),
            (absent, PrecisionError, "bits 4 asked, .* has 2, 3, 5, 8"),
            (3.0, PrecisionError, "bits 3.0 asked"),
            (4, PrecisionError, "bits 4 asked"),
            ([3], PrecisionError, "asked, the overlay has"),
        ):
            runtime.prefill(0, [1, 2], 3)
            runtime.reset()
            with pytest.raises(kind, match=message):
                runtime.prefill(0, [1, 2], wrong)  # type: ignore[arg-type]
            assert runtime.lengths == [0]
        runtime.prefill(0, [1, 2], plan)
        runtime.decode([3], plan)
    with (
        Runtime.open(tiny_llama, threads=1) as floats,
        pytest.raises(PrecisionError, match=r"a plan .* float weights, expected 0"),
    ):
        floats.prefill(0, [1], plan)
