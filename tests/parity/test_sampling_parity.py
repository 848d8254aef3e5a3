"""The native sampler chooses what its definition does, over every combination of parameters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from everybit.engine import reference_sampling as reference
from everybit.engine.sampling import Sampler, Sampling

# Single-precision weights (3 ulp each, 2e-7) and sums of up to 1,024 of them: edges move by some 1e-6 of the mass.
EDGE = 3e-6


def near_an_edge(values: np.ndarray, history: dict[int, int], sampling: Sampling, position: int) -> bool:
    """Whether rounding may change the choice: another comes out of filters or numbers that differ by EDGE."""
    found = set()
    for factor in (1 - EDGE, 1, 1 + EDGE):
        top_p = min(sampling.top_p * factor, 1.0) if sampling.top_p < 1 else 1.0
        moved = Sampling(**{**vars(sampling), "top_p": top_p, "min_p": min(sampling.min_p * factor, 1.0)})
        edges = np.cumsum(reference.distribution(values, history, moved))
        u = reference.uniform(sampling.seed, position)
        found |= {int(np.searchsorted(edges, np.clip(u + d, 0, 1 - 1e-12) * edges[-1], "right")) for d in (-EDGE, EDGE)}
    return len(found) > 1


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 1023, 1024, 1025, 20_011])
def test_parity(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    skipped = tried = 0
    grid = itertools.product((0.3, 1.0, 2.0), (0, 1, 7, 5000), (1.0, 0.9, 0.3), (0.0, 0.05), (False, True))
    for case, (temperature, top_k, top_p, min_p, penalties) in enumerate(grid):
        penalty = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2} if penalties else {}
        sampling = Sampling(temperature, top_k, top_p, min_p, **penalty, seed=case)
        values = (rng.normal(0, 3, vocabulary) * rng.choice([0.2, 1.0, 3.0])).astype(np.float32)
        if vocabulary > 2:
            values[rng.integers(0, vocabulary, vocabulary // 10)] = -np.inf
            values[-1] = 1.0
        prompt = rng.integers(0, vocabulary, 20).tolist()
        sampler, history = Sampler(sampling, prompt), dict.fromkeys(prompt, 0)
        for _ in range(6 if vocabulary < 5000 else 1):
            position = sampler.position
            expected = reference.choose(values, history, sampling, position)
            if near_an_edge(values, history, sampling, position):
                skipped += 1
                token = sampler.choose(values.copy()).token
            else:
                token = sampler.choose(values.copy()).token
                assert token == expected, (sampling, position)
            history[token] = history.get(token, 0) + 1
            tried += 1
    assert skipped < tried / 20, f"{skipped} of {tried} were too near an edge to be judged"


def test_greedy_parity() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        sampling = Sampling(temperature=0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
        values = rng.integers(-20, 20, 300).astype(np.float32)  # ties
        prompt = rng.integers(0, 300, 50).tolist()
        expected = reference.choose(values, dict.fromkeys(prompt, 0), sampling, 50)
        assert Sampler(sampling, prompt).choose(values.copy()).token == expected
