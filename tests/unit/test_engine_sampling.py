"""The sampler: ranges, penalties by hand, determinism, and draws that follow the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from everybit.engine import reference_sampling as reference
from everybit.engine.sampling import Sampler, Sampling
from everybit.errors import ModelError, RequestError


def logits(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -1.0, "0, or 0.01 to 100"),
        ("temperature", math.nan, "0, or 0.01 to 100"),
        ("temperature", 0.001, "0, or 0.01 to 100"),
        ("temperature", math.inf, "0, or 0.01 to 100"),
        ("top_k", -1, "0 \\(off\\) or a whole number above"),
        ("top_k", 2.0, "0 \\(off\\) or a whole number above"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.1, "above 0, at most 1"),
        ("min_p", -0.1, "0 to 1"),
        ("repetition_penalty", 0.0, "0.01 to 100"),
        ("presence_penalty", 2.5, "-2 to 2"),
        ("frequency_penalty", -3.0, "-2 to 2"),
        ("seed", -1, "0 to 2\\^63 - 1"),
        ("seed", 2**63, "0 to 2\\^63 - 1"),
        ("seed", True, "0 to 2\\^63 - 1"),
    ],
)
def test_ranges(field: str, value: float, expected: str) -> None:
    with pytest.raises(RequestError, match=f"^{field} .*: expected {expected}$") as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.parameter == field


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling(temperature=0)).choose(logits(1, 5, 5, 2)).token == 1


def test_penalties_by_hand() -> None:
    # Prompt 0, 1; then 2 is generated twice. Repetition halves positive logits and doubles negative ones of all three;
    # 2 also loses 1 for being there and 0.5 for each time.
    sampling = Sampling(temperature=0, repetition_penalty=2, presence_penalty=1, frequency_penalty=0.5)
    for values, expected in (
        ((9.0, -1, 1, 4.4), 0),  # 4.5, -2, -1.5, 4.4
        ((9.0, -1, 13.1, 4.4), 2),  # 13.1 / 2 - 2 = 4.55
        ((8.9, -1, 12.9, 4.4), 0),  # 4.45 beats 4.45 - ... = 12.9 / 2 - 2 = 4.45: the lower id
        ((8.0, -1, 12.0, 4.4), 3),
    ):
        sampler = Sampler(sampling, [0, 1, 0])
        for _ in range(2):
            assert sampler.choose(logits(0, 0, 99, 0)).token == 2
        assert sampler.choose(logits(*values)).token == expected


def test_the_history_grows_past_its_first_room() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2), range(700))
    values = np.full(1000, 1.5, np.float32)
    values[:700] = 2.9
    assert sampler.choose(values.copy()).token == 700  # every token of the prompt is halved, also the 600th
    assert sampler.position == 701


def test_log_probabilities_are_of_the_raw_logits() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=10), [0])
    choice = sampler.choose(logits(math.log(0.5), math.log(0.3), math.log(0.2)) + 3, top=2)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token for token, _ in choice.likeliest] == [0, 1]
    assert choice.likeliest[0][1] == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, math.nan), "token 3 holds a number that is not finite: --debug-numerics"),
        ((1.0, math.inf), "token 3 holds a number that is not finite"),
        ((-math.inf, -math.inf), "token 3 leaves no token possible"),
    ],
)
def test_broken_logits_are_named(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Sampler(Sampling(), [0, 1, 1]).choose(logits(*values))


def test_philox_is_the_published_one() -> None:
    # The known answers of Random123 1.09, tests/kat_vectors.
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert reference.philox(counter, key) == expected


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    """Equal logits of 2^12 tokens turn the draw into the upper 12 bits of the random number."""
    for seed in (0, 1, 2**40 + 7, 2**63 - 1):
        for position in (0, 1, 700, 2**20):
            sampler = Sampler(Sampling(seed=seed))
            sampler.position = position
            expected = int(reference.uniform(seed, position) * 4096)
            assert sampler.choose(np.zeros(4096, np.float32)).token == expected


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=12, top_p=0.97, min_p=0.01)])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    values = np.random.default_rng(0).normal(0, 1.5, 24).astype(np.float32)
    p = reference.distribution(values, {}, sampling)
    sampler, draws = Sampler(sampling), 40_000
    tokens = [sampler.choose(values.copy()).token for _ in range(draws)]
    counts = np.bincount(tokens, minlength=24).astype(float)
    possible = p > 0
    assert not counts[~possible].any()
    degrees = int(possible.sum()) - 1
    # The mean of chi-square is `degrees`, its variance twice that: 5 deviations happen once in a million seeds.
    limit = degrees + 5 * math.sqrt(2 * degrees)
    assert _chi_square(counts[possible], p[possible] * draws) < limit
    # A sampler that is off by a tenth of a temperature would be caught.
    off = reference.distribution(values, {}, Sampling(temperature=sampling.temperature * 1.1))
    off = off[possible] / off[possible].sum()
    assert _chi_square(counts[possible], off * draws) > limit
