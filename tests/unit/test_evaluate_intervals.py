"""Intervals against known answers: coverage, pairing, blocks, and what stands in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from everybit import evaluate as ev
from everybit.evaluate import intervals
from everybit.evaluate.intervals import Sums, blocks, interval, plus_minus, resample

F64 = NDArray[np.float64]


def sums(kl: F64, tokens: F64, nll: F64 | None = None, reference: F64 | None = None) -> Sums:
    zero = np.zeros_like(kl)
    return Sums(
        "windows",
        tokens,
        zero if reference is None else reference,
        {4: zero if nll is None else nll},
        {4: kl},
    )


def test_ninety_five_percent_intervals_cover_the_truth_that_often() -> None:
    """400 texts of 40 blocks of unequal length, whose KL per token is skewed and shared within a block."""
    rng = np.random.default_rng(5)
    texts, count, mean = 400, 40, 0.02
    covered = 0
    for _ in range(texts):
        tokens = rng.integers(100, 512, count).astype(np.float64)
        kl = rng.gamma(4.0, mean / 4.0, count) * tokens  # a relative spread of 1/2 from block to block
        found = sums(kl, tokens).kl_interval(4)
        assert found is not None
        covered += found[0] <= mean <= found[1]
    # A percentile interval of 40 skewed blocks covers some 93 %; the count's own standard deviation is 1.2 %, so that
    # 88 to 98 % is four of them either way.
    assert 0.88 <= covered / texts <= 0.98


def test_a_mean_of_normal_blocks_has_the_textbook_width() -> None:
    rng = np.random.default_rng(1)
    kl, tokens = rng.normal(1.0, 0.1, 400) * 100, np.full(400, 100.0)
    found = sums(kl, tokens).kl_interval(4)
    assert found is not None
    expected = 2 * 1.96 * (kl / tokens).std() / 20
    # The 2.5 % quantile of 1,000 draws has a relative error of sqrt(.025 * .975 / 1000) / (1.96 * .058) = 4.3 %.
    assert found[1] - found[0] == pytest.approx(expected, rel=0.15)


def test_the_same_draw_for_both_is_far_narrower_than_a_draw_for_each() -> None:
    rng = np.random.default_rng(2)
    tokens = np.full(60, 500.0)
    hardness = rng.normal(3.0, 0.5, 60)  # nats per token; some blocks are hard for every model
    reference, nll = hardness * tokens, (hardness + rng.normal(0.01, 0.005, 60)) * tokens
    paired = sums(nll, tokens, nll, reference).ratio_interval(4)
    assert paired is not None
    apart = [resample(np.stack([series, tokens], axis=1), seed) for seed, series in enumerate((nll, reference))]
    unpaired = interval(np.exp(apart[0][:, 0] / apart[0][:, 1] - apart[1][:, 0] / apart[1][:, 1]))
    assert unpaired is not None
    # Standard deviations of the block means: 0.005 paired, 0.5 * sqrt(2) unpaired.
    assert paired[1] - paired[0] < (unpaired[1] - unpaired[0]) / 50
    assert paired[0] < np.exp(0.01) < paired[1]


def test_draws_are_the_same_each_time_and_differ_by_seed() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    assert (resample(values) == resample(values)).all()
    assert (resample(values, seed=1) != resample(values)).any()
    assert resample(values).shape == (1000, 2)


def test_little_memory_gives_as_many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "HELD", 70)
    drawn = resample(np.ones((30, 1)))
    assert drawn.shape == (1000, 1)
    assert (drawn == 30).all()  # as many blocks as there are


def test_documents_are_the_blocks_where_there_are_enough() -> None:
    lengths = [3, 2, 4] * 10
    many = blocks(lengths, [i // 3 * 2 for i in range(30)] + [])
    assert (many.of, len(many)) == ("windows", 30)  # ten documents
    assert many.sizes.tolist() == lengths
    two_each = blocks([3, 2] * 20, [i // 2 for i in range(40)])
    assert (two_each.of, two_each.sizes.tolist()) == ("documents", [5.0] * 20)
    assert two_each.sums(np.arange(100.0))[:2].tolist() == [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8 + 9]
    assert blocks([3] * 30).of == "windows"


def test_a_figure_that_is_not_finite_or_of_few_blocks_has_no_interval() -> None:
    tokens = np.full(30, 10.0)
    broken = np.ones(30)
    broken[3] = np.inf
    assert sums(broken, tokens).kl_interval(4) is None
    assert sums(tokens, tokens, nll=broken).ratio_interval(4) is None
    assert sums(np.ones(7), np.ones(7)).kl_interval(4) is None
    assert sums(np.ones(8), np.ones(8)).kl_interval(4) == (1.0, 1.0)


def test_plus_minus_is_half_the_width() -> None:
    assert plus_minus((0.0217, 0.0233)) == " ±0.0008"
    assert plus_minus(None) == ""


class Drifting:
    """A model whose logits depend on the token and on `shift`, which stands for a precision."""

    vocabulary = 4

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def set_precision(self, bits: int) -> None:
        self.shift = 8.0 / bits

    def score(self, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        for window in windows:
            ids = np.asarray(window[:-1])
            yield (np.eye(4)[ids] * (1 + self.shift * (ids[:, None] % 3))).astype(np.float32)


def test_the_report_carries_them() -> None:
    rng = np.random.default_rng(0)
    windows = ev.Windows([rng.integers(0, 4, 20).tolist() for _ in range(25)], 1000, tuple(range(25)))
    model = Drifting()
    report = ev.evaluate(model, (2, 8), windows, Drifting(0.5), set_precision=model.set_precision, progress=False)
    document = json.loads(report.json())
    assert document["intervals"] == {"level": 0.95, "resamples": 1000, "of": "documents", "blocks": 25}
    for row in document["rows"]:
        assert row["kl_interval"][0] < row["kl_mean"] < row["kl_interval"][1]
        assert row["ppl_ratio"] == pytest.approx(row["ppl"] / document["float"]["ppl"], rel=1e-12)
        assert row["ppl_ratio_interval"][0] < row["ppl_ratio"] < row["ppl_ratio_interval"][1]
    table = report.table()
    assert "±: 95 % intervals, 1,000 paired resamples of 25 documents" in table
    assert plus_minus(report.rows[0].kl_interval) in table
    bare = ev.evaluate(model, (2,), windows, set_precision=model.set_precision, progress=False)
    assert bare.document()["intervals"] is None
    assert bare.rows[0].ppl_ratio_interval is None
    assert "±" not in bare.table()


def test_few_windows_say_why_there_is_no_interval() -> None:
    model = Drifting()
    windows = ev.Windows([[0, 1, 2, 3]] * 3, 9)
    report = ev.evaluate(model, (2,), windows, Drifting(0.5), set_precision=model.set_precision, progress=False)
    assert "no intervals: 3 windows, at least 8 are needed" in report.table()
    assert report.rows[0].kl_interval is None
    assert report.rows[0].kl_mean is not None


def test_an_average_over_seeds_by_hand() -> None:
    rng = np.random.default_rng(0)
    windows = ev.Windows([rng.integers(0, 4, 20).tolist() for _ in range(10)], 1000)
    model = Drifting()
    report = ev.evaluate(model, (2, 4, 8), windows, Drifting(0.5), set_precision=model.set_precision, progress=False)
    row = report.average((2, 8), bits=3)
    first, _, last = report.rows
    assert row.bits == 3
    assert row.ppl == pytest.approx((first.ppl * last.ppl) ** 0.5)
    assert row.kl_mean == pytest.approx((first.kl_mean + last.kl_mean) / 2)  # type: ignore[operator]
    assert row.kl_interval is not None
    assert row.kl_interval[0] < row.kl_mean < row.kl_interval[1]  # type: ignore[operator]
    assert report.average((4,), 4) == report.rows[1]
