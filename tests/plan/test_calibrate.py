"""Fits find what made the data, keep to priors and bounds, survive outliers and disk; importers; the accuracy goals."""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everybit.errors import SourceError
from everybit.plan.calibrate import Sample, Seen, calibrate, judge, read_calibration
from everybit.plan.cost import Parallel
from everybit.plan.efficiency import BOUNDS, Efficiency, prior
from everybit.plan.hardware import read_hardware
from everybit.plan.importers import (
    read_bench,
    read_inference_bench,
    read_products,
    read_replay,
    read_silicon,
    read_splitwise,
)
from everybit.plan.model import read_model
from everybit.plan.operators import Model

H100 = read_hardware("h100-sxm")
LLAMA = read_model("meta-llama/Meta-Llama-3-8B")
MIXTRAL = read_model("mistralai/Mixtral-8x7B-v0.1", weight_bits=4)
PRIOR = prior(H100, "vllm")
TRUE = replace(PRIOR, memory=0.65, compute=0.6, layer_s=60e-6, overlap=1.2)


def samples(true: Efficiency = TRUE, noise: float = 0.0, seed: int = 0, model: Model = LLAMA) -> list[Sample]:
    randomly, found = random.Random(seed), []
    for tp in (1, 2, 4):
        for clients in (1, 8, 32, 64):
            for prompt, output in ((512, 512), (4096, 256)):
                one = Sample(model, H100, Parallel(tp), clients, prompt, output, "vllm", "1.0")
                made = one.predict(true)
                noisy = (value * randomly.lognormvariate(0, noise) for value in made)
                found.append(replace(one, **dict(zip(("ttft_s", "tpot_s"), noisy, strict=False))))
    return found


def error(rows: list[Sample], efficiency: Efficiency, measure: str = "tpot_s") -> float:
    return statistics.median(abs(getattr(one.predict(efficiency), measure) / getattr(one, measure) - 1) for one in rows)


def test_a_fit_finds_what_made_the_data() -> None:
    rows = samples()
    found = calibrate(rows, PRIOR, draws=0).efficiency
    assert error(rows, PRIOR) > 0.1
    assert error(rows, found) < 0.01
    assert found.memory == pytest.approx(0.65, rel=0.1)
    assert found.source == "calibrated on 24 runs of H100 SXM x vllm, models without experts"


def test_bounds_and_priors_hold() -> None:
    """Times faster than the card allows cannot push a share above the peak; what no run tells stays at its prior."""
    rows = [replace(one, tpot_s=(one.tpot_s or 0) / 4) for one in samples() if one.parallel.tp == 1]
    found = calibrate(rows, PRIOR, draws=0).efficiency
    for name, (low, high) in BOUNDS.items():
        assert low * 0.999 <= getattr(found, name) <= high * 1.001
    assert found.link == pytest.approx(PRIOR.link, rel=1e-3)


def test_an_outlier_does_not_rule() -> None:
    rows = samples(noise=0.02)
    rows[3] = replace(rows[3], tpot_s=10 * (rows[3].tpot_s or 0))
    assert error(rows, calibrate(rows, PRIOR, draws=0).efficiency) < 0.06


def test_draws_spread_with_the_noise() -> None:
    quiet, loud = (calibrate(samples(noise=noise), PRIOR, draws=8) for noise in (0.01, 0.2))
    assert len(quiet.draws) == 8
    assert statistics.pstdev(one.memory for one in quiet.draws) < statistics.pstdev(one.memory for one in loud.draws)
    assert quiet.efficiency.spread < loud.efficiency.spread
    assert calibrate(samples(noise=0.2), PRIOR, draws=8) == loud  # the same seed


def test_few_runs_keep_some_of_the_priors_spread() -> None:
    few = calibrate(samples()[:2], PRIOR, draws=0).efficiency.spread
    assert calibrate(samples(), PRIOR, draws=0).efficiency.spread < few < PRIOR.spread


def test_models_with_experts_are_fitted_apart() -> None:
    """Mixed rows: each family is told as well as by a fit of its own, and neither's interval by the other's errors."""
    slow = replace(TRUE, memory=0.3, layer_s=200e-6)
    dense, routed = samples(noise=0.02), samples(slow, noise=0.2, model=MIXTRAL)
    alone, mixed = calibrate(dense, PRIOR, draws=0), calibrate(dense + routed, PRIOR, draws=1)
    assert mixed.efficiency == alone.efficiency
    assert mixed.of(LLAMA).efficiency.spread < 0.1 < mixed.of(MIXTRAL).efficiency.spread < PRIOR.routed_spread
    assert error(routed, mixed.of(MIXTRAL).efficiency) < error(routed, PRIOR) / 2
    assert "24 runs of H100 SXM x vllm, models with experts" in mixed.of(MIXTRAL).efficiency.source
    assert len(mixed.of(MIXTRAL).draws) == 1
    # What was measured on one family alone tells little of the other.
    assert alone.of(MIXTRAL).efficiency.spread == PRIOR.routed_spread
    assert calibrate(routed, PRIOR, draws=0).of(LLAMA).efficiency.spread == PRIOR.routed_spread


def test_a_fit_is_never_worse_on_its_own_runs() -> None:
    for seed in range(3):
        rows = samples(noise=0.3, seed=seed)
        fitted, start = (judge(rows, one) for one in (calibrate(rows, PRIOR, draws=0).efficiency, PRIOR))
        assert fitted
        assert start
        assert fitted.median_error <= start.median_error
        assert fitted.inside >= 0.85
    assert judge([replace(one, tpot_s=None) for one in rows], PRIOR) is None


def test_disk(tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    made = calibrate(samples() + samples(model=MIXTRAL), PRIOR, draws=2)
    made.save(file)
    assert read_calibration(file) == made
    assert made.routed
    assert [one.name for one in tmp_path.iterdir()] == ["h100.json"]
    assert made.versions == ("1.0",)
    assert made.seen == Seen(("product",), ((1, 1), (2, 1), (4, 1)))
    assert made.routed.seen == Seen(("weight_only",), ((1, 1), (2, 1), (4, 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=1),
        lambda d: d.pop("draws"),
        lambda d: d["efficiency"].update(memory=7),
        lambda d: d["efficiency"].update(memory="fast"),
        lambda d: d["efficiency"].update(extra=1),
        lambda d: d["efficiency"].pop("link"),
        lambda d: d["efficiency"].update(spread="wide"),
        lambda d: d["efficiency"].update(routed_spread=-1),
        lambda d: d.update(routed=[]),
        lambda d: d.update(seen={"kinds": []}),
        lambda d: d["efficiency"]["weight_only"]["many"].update(share=0),
        lambda d: d["efficiency"]["weight_only"].update(few_rows="two"),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: object) -> None:
    file = tmp_path / "c.json"
    calibrate(samples()[:4], PRIOR, draws=1).save(file)
    document = json.loads(file.read_text())
    change(document)  # type: ignore[operator]
    file.write_text(json.dumps(document))
    with pytest.raises(SourceError, match="expected a file of everybit plan calibrate"):
        read_calibration(file)


def test_samples_that_cannot_be_fitted() -> None:
    rows = samples()
    with pytest.raises(SourceError, match="no samples arrived"):
        calibrate([], PRIOR)
    with pytest.raises(SourceError, match="expected one hardware and engine"):
        calibrate([rows[0], replace(rows[1], engine="trtllm")], PRIOR)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SourceError, match="expected seconds above 0"):
            calibrate([replace(rows[0], tpot_s=bad)], PRIOR)
    with pytest.raises(SourceError, match="expected seconds above 0"):
        calibrate([replace(rows[0], tpot_s=None, ttft_s=None)], PRIOR)


# --- importers
def test_bench_results(tmp_path: Path) -> None:
    columns = ["sent_ms", "first_ms", "end_ms", "prompt", "tokens", "error", "scored"]
    rows: list[list[Any]] = [
        [0, 100, 1100, 50, 11, "", True],
        [0, 300, 1300, 70, 11, "", True],
        [0, None, None, 70, 0, "cut", True],
    ]
    rows.append([0, 9000, 9900, 50, 11, "", False])  # warm-up
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"requests": {"columns": columns, "rows": rows}}))
    found = read_bench(file, LLAMA, H100, Parallel())
    assert (found.ttft_s, found.tpot_s, found.concurrency, found.prompt, found.output) == (0.2, 0.1, 2, 60, 11)
    for text in ("", "{}", '{"requests": {"columns": ["sent_ms"], "rows": [[1, 2]]}}'):
        file.write_text(text)
        with pytest.raises(SourceError, match=r"expected the result\.json of everybit bench run"):
            read_bench(file, LLAMA, H100, Parallel())
    file.write_text(json.dumps({"requests": {"columns": columns, "rows": rows[2:3]}}))
    with pytest.raises(SourceError, match="no complete request"):
        read_bench(file, LLAMA, H100, Parallel())
    rows[0][3] = None
    file.write_text(json.dumps({"requests": {"columns": columns, "rows": rows}}))
    with pytest.raises(SourceError, match="told no prompt tokens"):
        read_bench(file, LLAMA, H100, Parallel())


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    with pytest.raises(SourceError, match="cannot be read"):
        read_silicon(file)
    file.write_text("a,b\n")
    with pytest.raises(SourceError, match="no rows"):
        read_silicon(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(SourceError, match="no column model_path"):
        read_silicon(file)
    file.write_text("gemm_dtype,m,n,k,latency_ms\nfp8,1,2,3,-4\n")
    with pytest.raises(SourceError, match="latency_ms is '-4'"):
        read_products(file, "fp8")
    with pytest.raises(SourceError, match="no rows of int4"):
        read_products(file, "int4")
    file.write_text("Hardware,Framework,Input Output Length,Latency\nAbacus,vLLM,1,1\n")
    with pytest.raises(SourceError, match="no row that can be used"):
        read_inference_bench(file)


def test_derived_rows_are_no_truth(shared_data: Path) -> None:
    found = read_splitwise(shared_data / "planner" / "splitwise_llama2_70b.csv")
    assert len(found.samples) == 630
    assert sum(found.skipped.values()) == 315


def test_a_replay_is_one_sample(shared_data: Path) -> None:
    model, hardware = read_model("meta-llama/Llama-3.1-8B"), read_hardware("rtx-pro-6000")
    path = shared_data / "planner" / "vllm_replay" / "rtxpro6000_llama31_8b_tp1_requests.csv"
    found = read_replay(path, model, hardware, Parallel(), "vllm", "0.19.0")
    assert found.tpot_s
    assert found.predict(prior(hardware, "vllm")).tpot_s == pytest.approx(found.tpot_s, rel=0.5)


# --- goals, on the development half: planner.md, section 4
@pytest.fixture(scope="module")
def servers(shared_data: Path) -> dict[tuple[str, str, str], list[Sample]]:
    groups = defaultdict(list)
    for one in read_silicon(shared_data / "planner" / "silicon_e2e.csv").samples:
        if not any(layer.experts for layer in one.model.layers):
            groups[one.key].append(one)
    return groups


def test_priors_are_within_15_percent(servers: dict[tuple[str, str, str], list[Sample]]) -> None:
    rows = [one for group in servers.values() for one in group]
    assert len(rows) == 574
    errors = [abs(s.predict(prior(s.hardware, s.engine)).tpot_s / (s.tpot_s or 0) - 1) for s in rows]
    assert statistics.median(errors) < 0.10


def test_a_fifth_of_the_rows_brings_the_rest_within_8_percent(
    servers: dict[tuple[str, str, str], list[Sample]],
) -> None:
    errors = []
    for rows in servers.values():
        mixed = random.Random(1).sample(rows, len(rows))
        fit = calibrate(mixed[: len(rows) // 5], prior(rows[0].hardware, rows[0].engine), draws=0)
        errors += [abs(s.predict(fit.efficiency).tpot_s / (s.tpot_s or 0) - 1) for s in mixed[len(rows) // 5 :]]
    assert statistics.median(errors) < 0.08
    assert statistics.quantiles(errors, n=10)[-1] < 0.20
