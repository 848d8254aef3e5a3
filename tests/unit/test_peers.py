"""Other people's methods against what their papers promise, on matrices where the answer is known."""

from __future__ import annotations

import importlib.util
import statistics as textbook
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from everybit.errors import SourceError
from everybit.quantize import peers
from everybit.quantize.peers import nested
from everybit.quantize.peers.gptq import gptq
from everybit.quantize.peers.hqq import hqq
from everybit.quantize.peers.method import UnfitError, groups_of
from everybit.quantize.peers.nf4 import TABLE, nf4
from everybit.quantize.peers.rtn import rtn

F32 = NDArray[np.float32]


@dataclass
class Known:
    """Statistics that are given."""

    h: Any = None
    s: Any = None
    seed: int = 0

    def hessian(self) -> F32:
        if self.h is None:
            raise UnfitError("no Hessians were measured")
        return np.asarray(self.h, np.float32)

    def sensitivity(self) -> F32:
        return np.asarray(self.s, np.float32)


def normal(rows: int = 24, columns: int = 192, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)


def correlated(columns: int, seed: int = 1) -> F32:
    """X'X / tokens of inputs that share a few directions, as a residual stream's do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2048, 16)) @ rng.normal(size=(16, columns)) + 0.3 * rng.normal(size=(2048, columns))
    return np.asarray(x.T @ x / len(x), np.float32)


def output_error(error: F32, hessian: F32) -> float:
    return float(np.trace(error.astype(np.float64) @ hessian.astype(np.float64) @ error.T))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(192, 0), (192, 64), (100, 64)])
def test_rtn_is_at_most_half_a_step_away(bits: int, columns: int, group: int) -> None:
    w = normal(columns=columns)
    values, bpw = rtn(w, bits, Known(), group=group)
    assert bpw == bits + 32 * (2 if columns == 100 and group else columns // (group or columns)) / columns
    for part in groups_of(columns, group):
        low, high = w[:, part].min(axis=1), w[:, part].max(axis=1)
        step = (high - low) / ((1 << bits) - 1)
        # Scale and offset are rounded to float16, 2^-11 of themselves each: the far end of the grid may be off by both,
        # and a weight beyond it by that more than half a step.
        slack = 2**-11 * ((high - low) + np.abs(low)) + 1e-7
        error = np.abs(values[:, part] - w[:, part]).max(axis=1)
        assert (error <= step / 2 + slack).all()
        assert error.max() > step.max() / 4  # and it did round
        assert max(len(np.unique(row)) for row in values[:, part]) <= 1 << bits


def test_rows_that_are_all_one_value_survive() -> None:
    w = np.full((3, 64), 0.125, np.float32)
    w[1] = 0.0
    for values, _ in (rtn(w, 2, Known()), hqq(w, 2, Known()), nf4(w, 4, Known()), gptq(w, 2, Known(np.eye(64)))):
        assert (values == w).all()


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(UnfitError, match="overflow float16"):
        rtn(normal() * 1e8, 4, Known())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [0, 48, 128])
def test_gptq_with_a_diagonal_hessian_is_rtn(act_order: bool, group: int) -> None:
    w = normal(columns=300)  # more than two lazy batches, the last one ragged
    diagonal = np.diag(np.random.default_rng(3).uniform(0.1, 10, 300))
    values, bpw = gptq(w, 3, Known(diagonal), group=group, act_order=act_order)
    expected, price = rtn(w, 3, Known(), group=group)
    assert bpw == price
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [0, 48, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_where_inputs_are_correlated(bits: int, group: int, act_order: bool) -> None:
    w, h = normal(columns=300), correlated(300)
    values, _ = gptq(w, bits, Known(h), group=group, act_order=act_order)
    rounded, _ = rtn(w, bits, Known(), group=group)
    assert output_error(values - w, h) < 0.5 * output_error(rounded - w, h)
    assert np.square(values - w).sum() > np.square(rounded - w).sum()  # at the price of the weights' own error
    for part in groups_of(300, group):
        assert max(len(np.unique(row)) for row in values[:, part]) <= 1 << bits


@pytest.mark.parametrize("group", [0, 48, 200])
def test_gptq_in_lazy_batches_is_the_plain_recursion(group: int) -> None:
    """Equations 2 and 3 of the paper, one column after the other, the inverse shrunk by elimination, in float64."""
    w, h = normal(columns=300), correlated(300).astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(300))
    left, expected = w.astype(np.float64), np.empty_like(w)
    for i in range(300):
        if i % (group or 300) == 0:  # the grid of `rtn` over the group as it is by now
            part = left[:, i : i + (group or 300)]
            low, high = part.min(axis=1), part.max(axis=1)
            scale = ((high - low) / 7).astype(np.float16).astype(np.float64)
            offset = low.astype(np.float16).astype(np.float64)
        expected[:, i] = offset + scale * np.clip(np.rint((left[:, i] - offset) / scale), 0, 7)
        error = (left[:, i] - expected[:, i]) / inverse[i, i]
        left[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
        inverse[i + 1 :, i + 1 :] -= np.outer(inverse[i + 1 :, i], inverse[i, i + 1 :]) / inverse[i, i]
    values, _ = gptq(w, 3, Known(h), group=group, act_order=False)
    same = np.isclose(values, expected, rtol=1e-3, atol=1e-5).all(axis=1)
    assert same.sum() >= 21  # of 24: float32 may round a near tie otherwise, and the row goes another way from there


def test_gptq_is_the_optimum_for_two_columns() -> None:
    """After the first column is rounded, the second makes up for it: w2 - (w1 - q1) * -H12 / H22, then rounded."""
    h = np.array([[2.0, 0.9], [0.9, 1.0]])
    w = np.array([[0.30, 0.40], [0.0, 1.0], [1.0, 0.0]], np.float32)
    values, _ = gptq(w, 2, Known(h), act_order=False)
    damped = h + 0.01 * 1.5 * np.eye(2)
    first, _ = rtn(w, 2, Known())
    error = w[:, 0] - first[:, 0]
    wanted = w[:, 1] + error * damped[0, 1] / damped[1, 1]
    low, high = w.min(axis=1), w.max(axis=1)
    step = (high - low) / 3
    second = low + step * np.clip(np.rint((wanted - low) / step), 0, 3)
    np.testing.assert_allclose(values[:, 0], first[:, 0])
    np.testing.assert_allclose(values[:, 1], second, atol=2e-3)  # float16 scale and offset


def test_gptq_lives_with_inputs_that_are_always_zero_and_refuses_what_is_no_hessian() -> None:
    h = correlated(64)
    h[5], h[:, 5] = 0, 0
    values, _ = gptq(normal(columns=64), 3, Known(h))
    assert np.isfinite(values).all()
    with pytest.raises(UnfitError, match="not positive definite"):
        gptq(normal(columns=64), 3, Known(-np.eye(64)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_beats_rtn_on_heavy_tails(bits: int) -> None:
    w = (np.random.default_rng(4).standard_t(3, (64, 256)) * 0.02).astype(np.float32)
    values, bpw = hqq(w, bits, Known())
    rounded, price = rtn(w, bits, Known(), group=64)
    assert bpw == price == bits + 0.5
    assert (np.abs(values - w) ** 0.7).mean() < 0.97 * (np.abs(rounded - w) ** 0.7).mean()
    assert max(len(np.unique(row[:64])) for row in values) <= 1 << bits


def test_nf4_has_the_papers_table_and_its_price() -> None:
    """QLoRA appendix E: 8 quantiles above zero, 7 below, zero itself, divided by the greatest."""
    quantile = textbook.NormalDist().inv_cdf
    offset = 0.9677083
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([0.0, *above, *below]) / max(above)
    np.testing.assert_allclose(TABLE, expected, atol=1e-6)  # the offset has seven digits

    w = normal(rows=3, columns=192)
    values, bpw = nf4(w, 4, Known())
    assert bpw == 4.5
    blocks, own = w.reshape(-1, 64), values.reshape(-1, 64)
    most = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = TABLE[np.abs(blocks[..., None] / most[..., None] - TABLE).argmin(axis=-1)] * most
    np.testing.assert_array_equal(own, nearest)
    assert (own[np.abs(blocks) == most] == blocks[np.abs(blocks) == most]).all()
    ragged, price = nf4(normal(rows=3, columns=50), 4, Known())
    assert ragged.shape == (3, 50)
    assert price == 4 + 32 * 3 / 150


def weighted_error(values: F32, w: F32, s: F32) -> float:
    return float((s * (values - w) ** 2).sum(dtype=np.float64))


def test_tables_of_one_bit_width_are_weighted_means_of_their_cells() -> None:
    w = normal(rows=6, columns=256)
    s = np.random.default_rng(7).gamma(0.5, size=w.shape).astype(np.float32)
    values, bpw = nested.squeezellm(w, 3, Known(s=s))
    assert bpw == 3 + 16 * 8 / 256
    for row, own, weight in zip(values, w, s, strict=True):
        levels = np.unique(row)
        assert len(levels) <= 8
        for level in levels:
            cell = row == level
            assert np.average(own[cell], weights=weight[cell]) == pytest.approx(level, rel=1e-3, abs=1e-5)  # float16
            # a fixed point of Lloyd: every weight of the cell is nearest to this level
            others = np.abs(own[cell][:, None] - levels)
            assert (np.abs(own[cell] - level) <= others.min(axis=1) + 1e-4).all()


def test_nesting_costs_and_the_seed_is_where_the_paper_has_it() -> None:
    w = normal(rows=16, columns=512)
    s = np.ones_like(w)
    error = {}
    for bits in (2, 3, 4, 6):
        (nest, price), (free, same) = nested.upscale(w, bits, Known(s=s)), nested.squeezellm(w, bits, Known(s=s))
        assert price == same == bits + 16 * 2**bits / 512
        error[bits] = weighted_error(nest, w, s) / weighted_error(free, w, s)
    assert error[2] == error[3] == 1.0  # seeds are plain k-means
    assert 1.0 < error[4] < 2.0
    assert 1.0 < error[6] < 2.0


def test_gguf_round_trips_are_the_librarys_own() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra: peers)")
    w = normal(rows=8, columns=256)
    for kind, bits, price in (("Q4_0", 4, 4.5), ("Q5_1", 5, 6.0), ("Q8_0", 8, 8.5)):
        values, bpw = peers.METHODS[f"gguf:{kind}"].load()(w, bits, Known())
        number = gguf.GGMLQuantizationType[kind]
        np.testing.assert_array_equal(values, gguf.quants.dequantize(gguf.quants.quantize(w, number), number))
        assert bpw == price
        assert 0 < np.abs(values - w).max() < np.abs(w).max() * 2 ** (1 - bits) * 1.2  # one step and its float16 scale
    with pytest.raises(UnfitError, match="rows of 48 weights are no multiple of 32"):
        peers.METHODS["gguf:Q4_0"].load()(normal(columns=48), 4, Known())


def test_k_quants_are_ggmls_and_heed_importance() -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed (extra: peers)")
    if importlib.util.find_spec("llama_cpp") is None:  # not imported: its library alone is used
        pytest.skip("llama-cpp-python is not installed: only its ggml makes K-quants")
    w = normal(rows=8, columns=512)
    importance = np.ones(512)
    importance[::7] = 1000.0
    previous = np.inf
    for kind, bits, price in (("Q2_K", 2, 2.625), ("Q3_K", 3, 3.4375), ("Q4_K", 4, 4.5), ("Q6_K", 6, 6.5625)):
        values, bpw = peers.METHODS[f"gguf:{kind}"].load()(w, bits, Known())
        guided, same = peers.METHODS[f"gguf-imatrix:{kind}"].load()(w, bits, Known(np.diag(importance)))
        assert bpw == same == price
        error = float(np.square(values - w).mean())
        assert error < previous / 2
        previous = error
        if kind != "Q6_K":  # its grid is so fine that little is to be gained
            assert np.square(guided - w)[:, ::7].mean() < np.square(values - w)[:, ::7].mean()
    with pytest.raises(UnfitError, match="no multiple of 256"):
        peers.METHODS["gguf:Q4_K"].load()(normal(columns=384), 4, Known())


def test_methods_are_found_by_name_family_and_refused_with_the_list() -> None:
    assert [m.name for m in peers.find(["gptq", "rtn", "gptq"])] == ["gptq", "rtn"]
    assert {m.name for m in peers.find(["gguf"])} >= {"gguf:Q4_0", "gguf:Q6_K"}
    with pytest.raises(SourceError, match=r"unknown method 'awq': expected some of rtn, .*gptq.*gguf:TYPE"):
        peers.find(["rtn", "awq"])
    assert all(set(method.bits) <= set(range(2, 9)) for method in peers.METHODS.values())
    assert set(peers.DEFAULT) < set(peers.METHODS)
