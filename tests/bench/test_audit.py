"""Made-up models whose precisions differ by known noise, behind made-up endpoints."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from everybit.bench.audit import TEXTS, Reference, Verdict, audit, load, record, same, save
from everybit.errors import OutputError, RequestError, SourceError

BITS = {str(bits): f"m@{bits}" for bits in range(2, 9)}
ARITHMETIC = 0.025  # RMS nats, more than the 0.021 between 7 and 8 bits
VOCABULARY = 40


def endpoint(paths=("echo", "completions", "chat"), noise=0.0, weights="w", serves=None, words=str):
    """`ask` of a server: each name's precision (or `serves`) of `weights`; 8 bits are 0.01 nats off, 7 are 0.02 ..."""

    def score(bits, text, place, token):
        def draw(*key):
            return random.Random("/".join(map(str, key))).gauss(0, 1)

        here = (text, place, token)
        off = 0.01 * 2 ** (8 - bits) * draw(weights, bits, *here)
        return -abs(4 * draw(weights, *here)) + off + noise * draw("noise", noise, bits, *here)

    async def ask(path, body):
        method = "chat" if path == "/chat/completions" else "echo" if body["echo"] else "completions"
        if method not in paths:
            raise RequestError("logprobs", "are not served here")
        bits = serves or int(body["model"].partition("@")[2])
        if method == "echo":
            tokens = [words(word) for word in body["prompt"].split()]
            scores = [None] + [score(bits, body["prompt"], i, token) for i, token in enumerate(tokens[1:])]
            logprobs = {"tokens": [*tokens, "x"], "token_logprobs": [*scores, -1.0]}
        else:
            text = body["messages"][0]["content"] if method == "chat" else body["prompt"]
            all_scores = {words(f"t{i}"): score(bits, text, 0, i) for i in range(VOCABULARY)}
            top = sorted(all_scores.items(), key=lambda one: -one[1])[:5]
            listed = [{"token": token, "logprob": value} for token, value in top]
            logprobs = {"content": [{"top_logprobs": listed}]} if method == "chat" else {"top_logprobs": [dict(top)]}
        return {"choices": [{"logprobs": logprobs}], "system_fingerprint": f"{weights}-{bits}"}

    return ask


def run(ask, reference, claims) -> list[Verdict]:
    return asyncio.run(audit(ask, reference, claims))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return asyncio.run(record(endpoint(), BITS))


def test_every_precision_is_named_in_spite_of_noise(reference):
    verdicts = run(endpoint(noise=ARITHMETIC), reference, BITS)
    assert [(one.claim, one.verdict, one.served) for one in verdicts] == [(b, "confirmed", b) for b in BITS]
    assert all(one.confidence == 1 and one.fingerprint == f"w-{one.claim}" for one in verdicts)
    eight = verdicts[-1].distances
    assert eight["8"].rms == pytest.approx(ARITHMETIC, rel=0.1)
    assert eight["8"].mean < eight["8"].rms < eight["7"].rms < eight["8"].max


@pytest.mark.parametrize(("claim", "served"), [("8", "7"), ("7", "8"), ("8", "4"), ("2", "3")])
def test_a_mismatch_is_named(reference, claim, served):
    (one,) = run(endpoint(noise=ARITHMETIC), reference, {claim: f"m@{served}"})
    assert (one.verdict, one.served, one.reason) == ("mismatch", served, f"serves {served}, claims {claim}")


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_a_server_that_ignores_the_switch(reference, noise):
    verdicts = run(endpoint(noise=noise, serves=4), reference, {"4": "m@4", "6": "m@6", "8": "m@8"})
    assert {(one.verdict, one.served) for one in verdicts} == {("ignores the switch", "4")}


def test_another_model_is_unknown(reference):
    async def short(path, body):
        return await endpoint()(path, {**body, "prompt": body["prompt"][:60]})

    assert run(short, reference, {"8": "m@8"})[0].reason.startswith("its tokens are not those")
    (other,) = run(endpoint(weights="v"), reference, {"8": "m@8"})
    assert (other.verdict, other.served) == ("unknown", None)
    assert "nats from the nearest" in other.reason
    (other,) = run(endpoint(words=str.upper), reference, {"8": "m@8"})
    assert other.reason.startswith("its tokens are not those")
    assert other.distances == {}


def test_a_foreign_quantization_between_the_references_is_unknown():
    coarse = asyncio.run(record(endpoint(), {"4": "m@4", "8": "m@8"}))
    (foreign,) = run(endpoint(noise=0.16), coarse, {"8": "m@8"})  # as far off as 4 bits are, in other directions
    assert foreign.verdict == "unknown"


def test_halfway_between_two_precisions_it_abstains(reference):
    async def mixed(path, body):
        seven, eight = [await endpoint(serves=bits)(path, body) for bits in (7, 8)]
        scores = [one["choices"][0]["logprobs"]["token_logprobs"] for one in (seven, eight)]
        for i in range(1, len(scores[0])):
            scores[0][i] = (scores[0][i] + scores[1][i]) / 2
        return seven

    (one,) = run(mixed, reference, {"8": "m@8"})
    assert (one.verdict, one.served) == ("unknown", None)
    assert "of resamples" in one.reason


@pytest.mark.parametrize("paths", [("completions",), ("chat",), ("completions", "chat")])
def test_without_echo_candidates_are_compared(paths):
    reference = asyncio.run(record(endpoint(paths), BITS))
    assert reference.method == paths[0]
    verdicts = run(endpoint(paths, noise=0.005), reference, BITS)
    assert [(one.verdict, one.served) for one in verdicts] == [("confirmed", b) for b in BITS]
    assert run(endpoint(paths, noise=0.005), reference, {"8": "m@6"})[0].verdict == "mismatch"
    assert run(endpoint(paths, weights="v"), reference, {"8": "m@8"})[0].verdict == "unknown"
    assert run(endpoint(paths, words=str.upper), reference, {"8": "m@8"})[0].verdict == "unknown"


def test_same():
    assert asyncio.run(same(endpoint(serves=5), "m@4", "m@8"))
    assert not asyncio.run(same(endpoint(), "m@7", "m@8"))


def test_a_reference_is_read_as_it_was_written(reference, tmp_path):
    path = tmp_path / "reference.json"
    save(reference, path)
    assert load(path) == reference
    document = json.loads(path.read_text())
    for changes, problem in [
        ({"probes": "0"}, "another everybit"),
        ({"version": 2}, "version 1"),
        ({"answers": {"8": document["answers"]["8"]}}, "one precision"),
        ({"answers": {**document["answers"], "7": document["answers"]["8"]}}, "7 and 8 are the same"),
        ({"answers": {"7": [], "8": []}}, "damaged"),
        ({"answers": {"7": [[]] * len(TEXTS), "8": [[]] * len(TEXTS)}}, "damaged"),
        ({"answers": {"7": [[{}]] * len(TEXTS), "8": [[{"a": 1.0}]] * len(TEXTS)}}, "damaged"),
        ({"answers": {"7": [[{"a": float("nan")}]] * len(TEXTS)}}, "damaged"),
        ({"answers": {"7": 3}}, "damaged"),
        ({"method": "guess"}, "damaged"),
    ]:
        path.write_text(json.dumps({**document, **changes}))
        with pytest.raises(SourceError, match=problem):
            load(path)
    path.write_text("{")
    with pytest.raises(SourceError, match="expected a reference"):
        load(path)
    with pytest.raises(OutputError):
        save(reference, tmp_path)


def test_bad_input(reference):
    with pytest.raises(SourceError, match="claim '9'"):
        run(endpoint(), reference, {"9": "m@8"})
    with pytest.raises(SourceError, match="two or more"):
        asyncio.run(record(endpoint(), {"8": "m@8"}))
    with pytest.raises(SourceError, match="method 'guess'"):
        asyncio.run(record(endpoint(), BITS, "guess"))
    with pytest.raises(SourceError, match="2 and 3 are the same"):
        asyncio.run(record(endpoint(serves=4), BITS))
    with pytest.raises(SourceError, match="no log-probabilities by any"):
        asyncio.run(record(endpoint(()), BITS))
    with pytest.raises(RequestError):
        run(endpoint(("chat",)), reference, BITS)


@pytest.mark.parametrize("answer", [{}, {"choices": [{"logprobs": None}]}, {"choices": []}, {"choices": [3]}])
def test_answers_without_log_probabilities(answer):
    async def ask(path, body):
        return answer

    with pytest.raises(SourceError, match="no log-probabilities"):
        asyncio.run(same(ask, "a", "b"))
