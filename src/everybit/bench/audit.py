"""Does an endpoint serve the precision it claims? Log-probabilities of fixed texts, compared with a trusted endpoint's.

Two ways to see them: `echo` (completions with echo and logprobs: every token of the texts), and where a server has no
echo the first token's most likely candidates (`completions` or `chat`) after beginnings of the texts.

How it judges. s, r and q are the served answer and two references, as vectors. Other arithmetic (kernels, KV type,
batches) adds noise to s, which goes in all directions alike, so s is asked on which side of the middle between r and q
it lies: |s-r| < |s-q|. That the noise is larger than |r-q| does not matter, as long as it is small along that line:
everybit's fast mode is 0.026 nats (RMS) from its exact mode, as far as 7 bits are from 8, and each precision is named.
Texts are the unit of the bootstrap, since tokens of one text are not independent (Efron and Tibshirani 1993, 13.3).

What it cannot tell: another quantization of the same weights that is as fine as the finest reference, or finer, looks
like that reference with noise. A coarser one looks like another model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from everybit.errors import OutputError, RequestError, SourceError, reason

# Sends a body, which names the model, to a path, and gives the JSON answer. Raises RequestError where it is refused.
Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
# Of each text, places; of each place, log-probabilities (nats) by token: one with echo, else the candidates.
Answers = list[list[dict[str, float]]]

HEADER = {"format": "everybit-bench-precisions", "version": 1}
METHODS = ("echo", "completions", "chat")
CANDIDATES = 5  # what every server gives
CUTS = 4  # beginnings of each text, where only candidates can be seen
RESAMPLES = 1000
SURE = 0.99  # share of resamples that have to agree
# Root mean square nats. Between kernels and modes of one server 0.026 to 0.046 were measured (a 10M-parameter model,
# which feels more than large ones); a foreign 6-bit quantization was 0.078 away.
NOISE = 0.06
# Noise grows with what it disturbs, as the distance between neighbouring references does (0.02 to 0.9 nats there). So
# where they are far apart a quarter of it is noise too; where they are near, 2.5 of them are too far.
NOISE_SHARE, MOST_SPACINGS = 0.25, 2.5
IGNORED = 0.25  # two claims this much nearer to each other than their references are one and the same

TEXTS = (
    "The ferry left the harbour a little after six, before the fog had lifted, and the few passengers who "
    "stood on deck could hear the bells of the town long after its roofs had gone from sight behind the grey "
    "water.",
    "To make the dough, stir two cups of flour with a spoon of salt, add warm water slowly, and knead until "
    "it is smooth. Let it rest under a cloth for one hour, then divide it into eight equal pieces.",
    "In 1869 a chemist wrote the names of sixty-three elements on cards and laid them out by weight. Gaps "
    "remained in his table, and he predicted what would be found there; within twenty years, three of the "
    "missing elements had been discovered.",
    "A function that calls itself must have a case that ends the recursion. Otherwise each call makes "
    "another, the stack grows, and the program stops with an error. Here is a short example in Python: def "
    "factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
    "The court found that the contract had been broken by both parties. Neither could claim damages for the "
    "delay, because each had known of it in time and said nothing; the costs of the trial were therefore "
    "shared between them in equal parts.",
    '"You never told me," she said, and put the letter back on the table. "There was nothing to tell," he '
    'answered. "It came a year ago. I read it once, I did not believe a word of it, and I have not thought '
    'about it since."',
    "The heart of an adult beats about seventy times a minute at rest. Blood that has given up its oxygen "
    "returns to the right side, is sent through the lungs, and comes back to the left side, which drives it "
    "into the rest of the body.",
    "Prices rose by 3.2 percent in March, after 2.9 percent in February and 2.5 percent in January. "
    "Economists had expected 3.0 percent. Energy was the main cause: without it, the figure would have been "
    "2.1 percent, slightly less than the year before.",
    "Turn left at the church and follow the lane down to the river. Cross the second bridge, not the first, "
    "which is closed in winter. The mill is on the other bank, about half a mile to the north, behind a row "
    "of tall poplars.",
    "Light takes eight minutes to come from the sun and four years from the next star. When we look at a "
    "distant galaxy we therefore see it as it was long ago, and the farther away it is, the younger the "
    "universe that we see.",
    "Dear Sir or Madam, I am writing about the lamp which I ordered from your shop on the fourth of May. It "
    "arrived yesterday with a broken shade. Please let me know whether you will replace it or return the "
    "price of 48 dollars.",
    "Once upon a time there lived a miller who had three sons. To the eldest he left the mill, to the second "
    "his donkey, and to the youngest nothing but a cat, and the young man sat down by the road and wondered "
    "how he should live.",
)


@dataclass(frozen=True)
class Reference:
    """What a trusted endpoint answered: `answers` and `fingerprints` (empty: none was given) by claim, such as `8`."""

    method: str
    answers: dict[str, Answers]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Distance:
    """Between two answers, in nats a token."""

    rms: float
    mean: float
    max: float


@dataclass(frozen=True)
class Verdict:
    """`verdict`: confirmed, mismatch, ignores the switch, or unknown. `served`: the reference that it serves, if known.

    `confidence`: share of resamples in which the nearest reference is the nearest. `distances` to every reference.
    """

    claim: str
    model: str
    verdict: str
    reason: str
    served: str | None
    confidence: float | None
    distances: dict[str, Distance]
    fingerprint: str


async def record(ask: Ask, models: Mapping[str, str], method: str | None = None) -> Reference:
    """`models`: the endpoint's names of two or more precisions. `method`: the first that it knows, unless given.

    Raises: SourceError, RequestError
    """
    if len(models) < 2:
        raise SourceError(f"{len(models)} precisions to record: expected two or more, to be told apart")
    if method is not None and method not in METHODS:
        raise SourceError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    method = method or await _method(ask, next(iter(models.values())))
    answers, prints = {}, {}
    for claim, model in models.items():
        answers[claim], prints[claim] = await _answers(ask, model, method)
    reference = Reference(method, answers, prints)
    _check(reference, "the trusted endpoint")
    return reference


async def audit(ask: Ask, reference: Reference, claims: Mapping[str, str], noise: float = NOISE) -> list[Verdict]:
    """`claims`: the endpoint's model names by what they claim to be, each a precision of the reference.

    `noise`: RMS nats by which other arithmetic may differ. Raises: SourceError, RequestError
    """
    for claim in claims:
        if claim not in reference.answers:
            raise SourceError(f"claim {claim!r}: the reference has {', '.join(reference.answers)}")
    served = {claim: await _answers(ask, model, reference.method) for claim, model in claims.items()}
    found = {
        claim: _judge(reference, claim, claims[claim], answers, fingerprint, noise)
        for claim, (answers, fingerprint) in served.items()
    }
    alike: set[str] = set()
    for a, b in combinations(claims, 2):
        ours, theirs = _aligned(reference.method, [served[a][0], served[b][0]]), _pair(reference, a, b)
        if ours is not None and _distance(*ours).rms < IGNORED * _distance(*theirs).rms:
            alike |= {a, b}
    return [_ignores(one) if claim in alike else one for claim, one in found.items()]


async def same(ask: Ask, a: str, b: str) -> bool:
    """Whether two models of an endpoint answer alike to the last bit, which different precisions never do.

    No evidence on a server that answers a model differently each time. Raises: SourceError, RequestError
    """
    method = await _method(ask, a)
    return (await _answers(ask, a, method))[0] == (await _answers(ask, b, method))[0]


def save(reference: Reference, path: Path) -> None:
    """As JSON, readable anywhere. Raises: OutputError"""
    try:
        path.write_text(json.dumps({**HEADER, "probes": _digest(), **asdict(reference)}), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {reason(error)}") from None


def load(path: Path) -> Reference:
    """Raises: SourceError"""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: {reason(error)}; expected a reference of everybit bench") from None
    if not isinstance(document, dict) or any(document.get(key) != value for key, value in HEADER.items()):
        raise SourceError(f"{path}: not a reference of everybit bench, version {HEADER['version']}")
    if document.get("probes") != _digest():
        raise SourceError(f"{path}: made with the probes of another everybit; record it again")
    try:
        answers = {
            claim: [[{token: float(value) for token, value in place.items()} for place in text] for text in texts]
            for claim, texts in document["answers"].items()
        }
        prints = {claim: str(document["fingerprints"][claim]) for claim in answers}
        reference = Reference(document["method"], answers, prints)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise SourceError(f"{path}: a damaged reference; record it again") from None
    if reference.method not in METHODS or not all(map(_whole, answers.values())):
        raise SourceError(f"{path}: a damaged reference; record it again")
    _check(reference, str(path))
    return reference


def _digest() -> str:
    return hashlib.sha256(json.dumps([TEXTS, CUTS, CANDIDATES]).encode()).hexdigest()[:16]


def _whole(answers: Answers) -> bool:
    places = [place for text in answers for place in text]
    numbers = all(place and all(map(math.isfinite, place.values())) for place in places)
    return numbers and len(answers) == len(TEXTS) and all(answers)


def _check(reference: Reference, where: str) -> None:
    """That all precisions differ, and only in their log-probabilities. Raises: SourceError"""
    for a, b in combinations(reference.answers, 2):
        if _distance(*_pair(reference, a, b)).rms == 0:
            raise SourceError(f"{where}: {a} and {b} are the same; expected an endpoint that serves each precision")
    if len(reference.answers) < 2:
        raise SourceError(f"{where}: one precision, expected two or more")


async def _method(ask: Ask, model: str) -> str:
    """The first way to see log-probabilities that the endpoint knows. Raises: SourceError"""
    problem = ""
    for method in METHODS:
        try:
            await _probe(ask, model, method, TEXTS[0])
        except RequestError as error:
            problem = reason(error)
        else:
            return method
    raise SourceError(f"{model}: no log-probabilities by any of {', '.join(METHODS)} (the last: {problem})")


async def _answers(ask: Ask, model: str, method: str) -> tuple[Answers, str]:
    """Of all texts, one after another so that they share no batch; and the fingerprint."""
    answers: Answers = []
    fingerprint = ""
    for text in TEXTS:
        words, places = text.split(" "), []
        cuts = [len(words)] if method == "echo" else [len(words) * (i + 1) // CUTS for i in range(CUTS)]
        for cut in cuts:
            more, fingerprint = await _probe(ask, model, method, " ".join(words[:cut]))
            places += more
        answers.append(places)
    return answers, fingerprint


async def _probe(ask: Ask, model: str, method: str, text: str) -> tuple[list[dict[str, float]], str]:
    """The places of one prompt, and the fingerprint. Raises: RequestError"""
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0}
    if method == "chat":
        body |= {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": CANDIDATES}
    else:
        body |= {"prompt": text, "logprobs": 1 if method == "echo" else CANDIDATES, "echo": method == "echo"}
    document = await ask("/chat/completions" if method == "chat" else "/completions", body)
    try:
        logprobs = document["choices"][0]["logprobs"]
        if method == "echo":
            # Beginnings of texts have no log-probability. The last token is the one generated: some servers take 0
            # tokens to mean no limit.
            pairs = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))[:-1]
            places = [{str(token): float(value)} for token, value in pairs if value is not None]
        elif method == "chat":
            top = logprobs["content"][0]["top_logprobs"]
            places = [{str(one["token"]): float(one["logprob"]) for one in reversed(top)}]
        else:
            places = [{str(token): float(value) for token, value in logprobs["top_logprobs"][0].items()}]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        places = []
    values = [value for place in places for value in place.values()]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise RequestError("logprobs", f"of the prompt or its next token are not in the answer ({method})")
    return places, str(document.get("system_fingerprint") or "")


def _aligned(method: str, many: Sequence[Answers]) -> list[list[list[float]]] | None:
    """Comparable numbers of each text, for each of `many`; None where the tokens differ.

    Candidates: every answer knows its own, and of all others that they are less likely. Below the highest of those
    bounds nothing can be compared, so all is raised to it.
    """
    found: list[list[list[float]]] = [[] for _ in many]
    for texts in zip(*many, strict=True):
        rows: list[list[float]] = [[] for _ in many]
        lengths = [len(text) for text in texts]
        if max(lengths) - min(lengths) > 1:  # where the text's end came next, a server may not list it
            return None
        for places in zip(*texts, strict=False):
            if method == "echo":
                if len({token for place in places for token in place}) > 1:
                    return None
                values = [list(place.values()) for place in places]
            else:
                floor = max(min(place.values()) for place in places)
                tokens = sorted({token for place in places for token in place})
                values = [[max(place.get(token, floor), floor) for token in tokens] for place in places]
            for row, more in zip(rows, values, strict=True):
                row += more
        for one, row in zip(found, rows, strict=True):
            one.append(row)
    return found


def _pair(reference: Reference, a: str, b: str) -> list[list[list[float]]]:
    """Raises: SourceError"""
    pair = _aligned(reference.method, [reference.answers[a], reference.answers[b]])
    if pair is None:
        raise SourceError(f"references {a} and {b} have other tokens: expected precisions of one model")
    return pair


def _distance(a: list[list[float]], b: list[list[float]]) -> Distance:
    away = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return Distance(math.sqrt(math.fsum(x * x for x in away) / len(away)), math.fsum(away) / len(away), max(away))


def _judge(reference: Reference, claim: str, model: str, answers: Answers, fingerprint: str, noise: float) -> Verdict:
    names = list(reference.answers)

    def verdict(kind: str, why: str, served: str | None = None) -> Verdict:
        return Verdict(claim, model, kind, why, served, confidence, distances, fingerprint)

    confidence, distances = None, dict[str, Distance]()
    aligned = _aligned(reference.method, [answers, *reference.answers.values()])
    if aligned is None:
        return verdict("unknown", "its tokens are not those of the reference: another model")
    own, others = aligned[0], dict(zip(names, aligned[1:], strict=True))
    distances = {name: _distance(own, other) for name, other in others.items()}
    nearest = min(names, key=lambda name: distances[name].rms)
    confidence = _agreement(own, others, nearest)
    spacing = min(_distance(others[nearest], others[name]).rms for name in names if name != nearest)
    bound = max(NOISE_SHARE * spacing, min(noise, MOST_SPACINGS * spacing))
    rms = distances[nearest].rms
    if rms > bound:
        return verdict("unknown", f"{rms:.3g} nats from the nearest ({nearest}), more than {bound:.3g}: another model")
    if confidence < SURE:
        return verdict("unknown", f"nearest to {nearest}, but only in {confidence:.1%} of resamples")
    if nearest == claim:
        return verdict("confirmed", f"{rms:.3g} nats from {claim}", nearest)
    return verdict("mismatch", f"serves {nearest}, claims {claim}", nearest)


def _agreement(own: list[list[float]], others: Mapping[str, list[list[float]]], nearest: str) -> float:
    """Share of resamples of the texts in which `nearest` is nearer than every other."""
    squares = {
        name: [math.fsum((x - y) ** 2 for x, y in zip(p, q, strict=True)) for p, q in zip(own, other, strict=True)]
        for name, other in others.items()
    }
    best = squares.pop(nearest)
    leads = [[b - a for a, b in zip(best, other, strict=True)] for other in squares.values()]
    draw, texts = random.Random(0), range(len(best))
    agree = 0
    for _ in range(RESAMPLES):
        chosen = draw.choices(texts, k=len(best))
        agree += all(math.fsum(lead[i] for i in chosen) > 0 for lead in leads)
    return agree / RESAMPLES


def _ignores(one: Verdict) -> Verdict:
    why = f"serves {one.served or 'another model'} under other claims too"
    return Verdict(**{**vars(one), "verdict": "ignores the switch", "reason": why})
