"""Perplexity, KL and agreement against hand calculation, on models that are a table from token to distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from everybit import evaluate as ev
from everybit.errors import ModelError, PrecisionError, ShapeError, SourceError
from everybit.evaluate import quality


class Table:
    """A causal model whose next-token distribution depends on the current token alone; counts its calls."""

    def __init__(self, rows: list[list[float]], piece: int = 5) -> None:
        self.logits = _logits(rows)
        self.vocabulary = len(rows[0])
        self.piece = piece
        self.calls: list[list[int]] = []  # the lengths of the windows of each

    def score(self, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        self.calls.append([len(window) for window in windows])
        whole = self.logits[[token for window in windows for token in window[:-1]]]
        yield from (whole[i : i + self.piece] for i in range(0, len(whole), self.piece))


class Switched(Table):
    """A model with one table per precision."""

    def __init__(self, tables: dict[int, list[list[float]]]) -> None:
        super().__init__(next(iter(tables.values())), piece=3)  # not the reference's
        self.tables, self.order = tables, list[int]()

    def set_precision(self, bits: int) -> None:
        self.order.append(bits)
        self.logits = _logits(self.tables[bits])


def _logits(rows: list[list[float]]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float64)).astype(np.float32)


SKEWED = [[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25], [0.125, 0.125, 0.25, 0.5]]
UNIFORM = [[0.25] * 4] * 4
# Row 0 ranks token 0 first as SKEWED does, row 1 ranks token 2 first, row 3 token 0.
OTHER = [[0.5, 0.25, 0.125, 0.125], [0.125, 0.25, 0.5, 0.125], [0.25, 0.25, 0.25, 0.25], [0.5, 0.125, 0.25, 0.125]]
WINDOWS = ev.Windows([[0, 1, 2, 3], [1, 0, 0], [3, 3, 1]], text_bytes=10)
# Scored transitions: 0>1 1>2 2>3 | 1>0 0>0 | 3>3 3>1


def run(model: Switched, reference: Table | None, windows: ev.Windows = WINDOWS, **options: Any) -> ev.Report:
    return ev.evaluate(model, (2, 8), windows, reference, set_precision=model.set_precision, progress=False, **options)


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    report = run(Switched({2: UNIFORM, 8: SKEWED}), Table(SKEWED))
    # -log2 of 1/4 1/4 1/4 | 1/8 1/2 | 1/2 1/8 = 2+2+2+3+1+1+3 = 14 bits over 7 tokens and 10 bytes
    assert report.rows[0].ppl == pytest.approx(4.0, abs=1e-6)  # float32 logits: relative 6e-8 each
    assert report.rows[1].ppl == pytest.approx(2 ** (14 / 7), abs=1e-6)
    assert report.rows[1].bits_per_byte == pytest.approx(1.4, abs=1e-6)
    assert report.reference is not None
    assert report.reference.ppl == report.rows[1].ppl
    assert (report.tokens, report.text_bytes) == (7, 10)


def test_kl_direction_mean_p99_and_agreement_by_hand() -> None:
    report = run(Switched({2: OTHER, 8: SKEWED}), Table(SKEWED))
    # KL(SKEWED || OTHER), nats: row 1 swaps 1/2 and 1/4: (1/2 - 1/4) ln 2; row 3 swaps 1/8 and 1/2: (1/2 - 1/8) ln 4
    kl = {0: 0.0, 1: 0.25 * math.log(2), 2: 0.0, 3: 0.375 * math.log(4)}
    per_token = [kl[t] for t in (0, 1, 2, 1, 0, 3, 3)]
    row = report.rows[0]
    assert row.kl_mean == pytest.approx(np.mean(per_token), abs=1e-6)
    assert row.kl_p99 == pytest.approx(np.quantile(per_token, 0.99), abs=1e-6)
    assert row.top1 == pytest.approx(3 / 7)  # rows 1 and 3 disagree at four of seven tokens
    assert (report.rows[1].kl_mean, report.rows[1].kl_p99, report.rows[1].top1) == (0.0, 0.0, 1.0)


def test_kl_is_of_the_float_model_to_the_quantized_one() -> None:
    windows = ev.Windows([[0, 0]], 1)
    sharp, flat = [[0.9, 0.1]] * 2, [[0.5, 0.5]] * 2
    row = run(Switched({2: flat, 8: flat}), Table(sharp), windows).rows[0]
    assert row.kl_mean == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)


def test_without_reference_the_comparison_is_null() -> None:
    report = run(Switched({2: UNIFORM, 8: SKEWED}), None)
    assert report.reference is None
    assert (report.rows[0].kl_mean, report.rows[0].kl_p99, report.rows[0].top1) == (None, None, None)


def test_impossible_tokens_count_nothing_where_the_float_model_excludes_them_too() -> None:
    masked = [[0.5, 0.5, 0.0, 0.0]] * 4
    row = run(Switched({2: masked, 8: masked}), Table(masked), ev.Windows([[0, 1]], 1)).rows[0]
    assert (row.kl_mean, row.top1) == (0.0, 1.0)


def test_a_token_the_model_excludes_gives_infinite_perplexity_and_valid_json() -> None:
    masked = [[0.0, 1.0, 0.0, 0.0]] * 4
    report = run(Switched({2: masked, 8: masked}), Table(SKEWED), ev.Windows([[0, 0]], 1))
    assert report.rows[0].ppl == math.inf
    assert report.document()["rows"][0]["ppl"] is None
    assert "Infinity" not in report.json()


def test_a_perplexity_beyond_float_is_infinite_not_an_exception() -> None:
    nearly = [[1e-320, 1.0, 1e-320, 1e-320]] * 4  # -ln is 736.8; exp overflows beyond 709.8
    assert run(Switched({2: nearly, 8: nearly}), None, ev.Windows([[0, 0]], 1)).rows[0].ppl == math.inf


def test_the_reference_runs_once_per_chunk() -> None:
    model, reference = Switched({2: UNIFORM, 8: SKEWED}), Table(SKEWED)
    run(model, reference)
    assert reference.calls == [[4, 3, 3]]
    assert model.calls == reference.calls * 2
    assert model.order == [2, 8]


def test_small_chunks_slices_and_more_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Switched({2: OTHER, 8: SKEWED}), Table(SKEWED))
    for name in ("CHUNK_BYTES", "SLICE_BYTES"):
        monkeypatch.setattr(quality, name, 1)
    model, reference = Switched({2: OTHER, 8: SKEWED}), Table(SKEWED)
    for row, expected in zip(run(model, reference, threads=3).rows, whole.rows, strict=True):
        found, wanted = ([value for value in dataclasses.astuple(r)[3:] if value is not None] for r in (row, expected))
        assert len(found) == 6
        assert found == pytest.approx(wanted, rel=1e-12)  # sum order
    assert reference.calls == [[4], [3], [3]]
    assert model.order == [2, 8] * 3


def test_chunks_hold_no_more_reference_logits_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "CHUNK_BYTES", 1000)
    chunks = list(quality._chunks([[0] * 11] * 7, vocabulary=10))  # 400 bytes each
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]


def test_a_model_that_gives_too_few_rows_is_refused() -> None:
    class Short(Table):
        def score(self, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
            yield self.logits[:2]

    with pytest.raises(ShapeError, match="the model gave 2 rows of logits for 7 scored tokens"):
        ev.evaluate(Short(SKEWED), (8,), WINDOWS, set_precision=lambda bits: None, progress=False)


def test_mistakes_are_named() -> None:
    with pytest.raises(PrecisionError, match="no precision to evaluate"):
        ev.evaluate(Table(SKEWED), (), WINDOWS, set_precision=lambda bits: None)
    with pytest.raises(ShapeError, match="the reference knows 2 tokens and the quantized model 4"):
        run(Switched({2: UNIFORM, 8: SKEWED}), Table([[0.5, 0.5]] * 4), ev.Windows([[0, 1]], 1))
    with pytest.raises(SourceError, match="token 9 and the model knows tokens 0 to 3"):
        run(Switched({2: UNIFORM, 8: SKEWED}), None, ev.Windows([[0, 9]], 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_no_measurement(bad: float) -> None:
    logits = np.zeros((2, 3), np.float32)
    logits[1, 2] = bad
    with pytest.raises(ModelError, match="not finite"):
        quality._score_slice(np.array([0, 1]), logits, None)
