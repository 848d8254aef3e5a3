"""Which tokens are guessed before the model is asked, and how many: as many as shorten the time per token.

Speculative decoding (Leviathan et al. 2023) with two sources of guesses: earlier text of the same sequence, at no cost,
and the same weights at a lower precision, which read fewer planes. A step then runs the guessed tokens at once, at the
request's own precision, and samples every one of them as ever. The random number of a position is a function of the
seed, so a guess is right where it equals what plain decoding draws (coupled sampling), and the result is the same,
token for token, at any temperature, whatever is guessed. That needs steps whose logits do not depend on what else is in
them: modes `exact` and `fast`.

Pure, like the scheduler: times come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from everybit.batching.ngrams import NGrams
from everybit.batching.precision import Costs
from everybit.batching.scheduler import Part
from everybit.engine.sampling import Sampling

NGRAM = 0  # the source that is no precision
LONGEST = 8  # tokens guessed at once
ROWS = 64  # and of all sequences in a step: rows of logits, a vocabulary wide each, are kept at once
CROWD = 4  # sequences, beyond which nothing is guessed: their batch reads the weights for many tokens anyway
WORTH = 1.05  # the predicted gain from which guessing is done
QUIET = 64  # steps without it, after which it is tried, and the other way round
PROBE = 0.01  # of the time since, and no more, a try may cost
_CALM = 8  # steps without it, after which only each such a step is thought about: thinking takes time, too
_CHEAP = 0.55  # of the target's bits, at most, a precision that drafts has, where there is one
_HOPE, _HOPE_WEIGHT = 0.95, 4.0  # what is taken for granted of a source that was not tried: so each is
_WEIGHT = 8.0  # guesses of others that count in a sequence's own estimate
_SURPRISE = 2.0  # times the usual, and no more, one step's time counts
_STALE = 4096  # steps after which a time is measured again


@dataclass
class Draft:
    """Guesses for one sequence: `tokens`, or `length` of them to be drawn at `source` bits."""

    source: int
    length: int
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Speculated:
    """Since the beginning, by source ("ngram", "3bit" ...): tokens guessed and guesses that were right.

    `steps` that verified guesses; `gain` that is predicted for now, in tokens per time over plain decoding.
    """

    drafted: Mapping[str, int]
    accepted: Mapping[str, int]
    steps: int
    gain: float


class Rate:
    """How often guesses are right, the last `memory` or so counting most."""

    def __init__(self, memory: float) -> None:
        self._keep = 1 - 1 / memory
        self.hits = self.tries = 0.0

    def note(self, hits: int, misses: int) -> None:
        keep = self._keep ** (hits + misses)
        self.hits, self.tries = self.hits * keep + hits, self.tries * keep + hits + misses

    def mean(self, prior: float, weight: float) -> float:
        return (self.hits + prior * weight) / (self.tries + weight)


class Times:
    """What passes over so many tokens take, by bits and tokens: kernels change with the tokens, so it is no line.

    The first pass at a precision does not count: it reads planes that are not in memory yet.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[int, tuple[float, int, int]]] = {}  # bits -> tokens -> ns, times seen, last time
        self._notes = 0

    def note(self, bits: int, tokens: int, ns: float) -> None:
        self._notes += 1
        if bits not in self._known:
            self._known[bits] = {}
            return
        of = self._known[bits]
        mean, seen, _ = of.get(tokens, (0.0, 0, 0))
        if seen:
            ns = min(ns, _SURPRISE * mean)
        of[tokens] = mean + (ns - mean) / min(seen + 1, 10), seen + 1, self._notes
        if self._notes % _STALE == 0:
            for of in self._known.values():
                for stale in [n for n, (_, _, last) in of.items() if self._notes - last > _STALE]:
                    del of[stale]

    def most(self, bits: int) -> int:
        """The most tokens that were tried."""
        return max(self._known.get(bits, ()), default=0)

    def predict(self, bits: int, tokens: int) -> float:
        """Nanoseconds: between those of fewer and of more tokens, or as the nearest; 0 where nothing is known."""
        of = self._known.get(bits)
        if not of:
            return 0.0
        if tokens in of:
            return of[tokens][0]
        below, above = max((n for n in of if n < tokens), default=0), min((n for n in of if n > tokens), default=0)
        if not below or not above:
            return of[below or above][0]
        share = (tokens - below) / (above - below)
        return of[below][0] * (1 - share) + of[above][0] * share


@dataclass
class _Stream:
    text: NGrams
    model: bool  # whether the model may draft
    heat: int
    rates: dict[tuple[int, int], Rate] = field(default_factory=dict)  # by target and source


@dataclass
class _Option:
    """How a sequence may be guessed in this step, and what each further guess is worth."""

    part: Part
    ngram: list[int]
    ngram_worth: list[float]  # of the first k guesses, in tokens
    source: int
    worth: list[float]


Scenario = list[tuple[_Option, int, list[float]]]  # an option, its source and what that is worth


class Speculation:
    """Decides for a batcher. `bits` are the overlay's precisions; `draft_bits` the one to draft at, else it is found.

    A precision is chosen by what it takes and how often it is right, both measured: each is tried, because what is not
    known is hoped for. It goes by target and temperature, and lengths by sequence as well. Where no choice is predicted
    to gain 5 %, nothing is guessed but for a try now and then, which costs 1 % of the time in between.
    """

    def __init__(self, bits: Sequence[int], draft_bits: int | None = None) -> None:
        self._bits, self._draft_bits = sorted(bits), draft_bits
        self._streams: dict[Hashable, _Stream] = {}
        self._rates: dict[tuple[int, int, int], Rate] = {}  # by target, heat and source
        self._chosen: dict[tuple[int, int], tuple[int, int]] = {}  # by target and heat: a source, and until when
        self._passes, self._drafts = Times(), Times()
        self._rest = {False: 0.0, True: 0.0}  # ns for a sequence beside all passes, without and with guesses
        self._plans = self._steps = self._probes = 0
        self._quiet = self._loud = 0  # steps without guesses since the last with, and with since the last without
        self._quiet_ns = self._plain_ns = 0.0
        self._gain = 1.0
        self._drafted: dict[int, int] = {}
        self._accepted: dict[int, int] = {}

    def candidates(self, target: object) -> list[int]:
        """The precisions that may draft for a target; none for a plan."""
        if not isinstance(target, int):
            return []
        lower = [bits for bits in self._bits if 0 < bits < target]
        if self._draft_bits is not None:
            return [bits for bits in lower if bits == self._draft_bits]
        return [bits for bits in lower if bits <= _CHEAP * target] or lower[:1]

    def join(self, id: Hashable, prompt: Sequence[int], sampling: Sampling, model: bool) -> None:
        """`model`: whether the model may draft, too."""
        self._streams[id] = _Stream(NGrams(prompt), model, min(4, round(2 * sampling.temperature)))

    def leave(self, id: Hashable) -> None:
        self._streams.pop(id, None)

    def extend(self, id: Hashable, tokens: Sequence[int]) -> None:
        """A sequence has got further tokens."""
        if id in self._streams:
            self._streams[id].text.extend(tokens)

    def ahead(self) -> dict[Hashable, int]:
        """The room that sequences ask for in the next step; none in most where guessing does not pay."""
        self._plans += 1
        if len(self._streams) > CROWD:
            return {}
        if self._quiet > _CALM and self._plans % _CALM:
            self._quiet, self._quiet_ns = self._quiet + 1, self._quiet_ns + self._plain_ns
            return {}
        return dict.fromkeys(self._streams, LONGEST)

    def metrics(self) -> Speculated:
        def named(counts: Mapping[int, int]) -> dict[str, int]:
            return {f"{source}bit" if source else "ngram": count for source, count in sorted(counts.items())}

        return Speculated(named(self._drafted), named(self._accepted), self._steps, self._gain)

    def note_pass(self, bits: int, tokens: int, ns: float) -> None:
        """A pass at the sequences' own precision, no prompt among them, took so long."""
        self._passes.note(bits, tokens, ns)

    def note_draft(self, bits: int, tokens: int, ns: float) -> None:
        """Drafting a token for so many sequences took so long, all in all."""
        self._drafts.note(bits, tokens, ns)

    def note_rest(self, sequences: int, ns: float, guessed: bool) -> None:
        """All but the passes of a step, with guesses or without, took so long."""
        each, known = ns / sequences, self._rest[guessed]
        self._rest[guessed] += (min(each, _SURPRISE * known) - known) / 10 if known else each

    def note(self, part: Part, draft: Draft, accepted: int, rejected: bool) -> None:
        """So many of a draft's guesses were right; the next was wrong, or was not asked for."""
        source, stream = draft.source, self._streams.get(part.id)
        self._drafted[source] = self._drafted.get(source, 0) + len(draft.tokens)
        self._accepted[source] = self._accepted.get(source, 0) + accepted
        if stream is not None and isinstance(part.bits, int):
            self._rate(part.bits, stream.heat, source).note(accepted, int(rejected))
            stream.rates.setdefault((part.bits, source), Rate(32)).note(accepted, int(rejected))

    def plan(self, parts: Sequence[Part], rooms: Mapping[Hashable, float], costs: Costs) -> dict[Hashable, Draft]:
        """What is guessed in this step. `rooms`: ns until each part's next token is due; `costs` where prompts run."""
        asked = [p for p in parts if p.ahead and p.id in self._streams and isinstance(p.bits, int) and p.bits]
        if not asked:
            return {}
        sampling = sum(p.samples for p in parts)
        load: dict[int, int] = {}
        for p in parts:
            if isinstance(p.bits, int):
                load[p.bits] = load.get(p.bits, 0) + len(p.tokens)
        decodes = all(len(p.tokens) == 1 for p in parts)
        price = self._passes.predict if decodes else costs.predict
        plain = sum(price(bits, tokens) for bits, tokens in load.items()) + self._rest[False] * sampling
        if any(not price(p.bits, 1) for p in asked):  # type: ignore[arg-type]
            return {}
        limit = self._limit(parts, {p.id for p in asked}, rooms, plain)
        options = [self._option(p, len(asked), price) for p in asked[: ROWS // 2]]
        drafts: dict[Hashable, Draft] = {}
        if self._loud < QUIET:  # else a plain step, to know what it takes
            self._gain, drafts = self._best(options, load, plain, sampling, limit, price)
            if self._gain < WORTH:
                drafts = {}
        if not drafts:
            drafts = self._probe(options, plain, limit)
        if drafts:
            self._steps, self._quiet, self._quiet_ns, self._loud = self._steps + 1, 0, 0.0, self._loud + 1
        else:
            self._quiet, self._quiet_ns, self._loud = self._quiet + 1, self._quiet_ns + plain, 0
            self._plain_ns = plain
        return drafts

    def _limit(
        self, parts: Sequence[Part], asked: set[Hashable], rooms: Mapping[Hashable, float], plain: float
    ) -> float:
        """Ns that the step may take: guesses make no token late that would be in time, nor others later."""
        found = [rooms[p.id] for p in parts if p.id in rooms and (p.id not in asked or rooms[p.id] >= plain)]
        return min(found, default=float("inf"))

    def _rate(self, target: int, heat: int, source: int) -> Rate:
        return self._rates.setdefault((target, heat, source), Rate(256))

    def _chance(self, stream: _Stream, target: int, source: int) -> float:
        """That a guess is right where those before it were."""
        common = self._rate(target, stream.heat, source).mean(_HOPE, _HOPE_WEIGHT)
        own = stream.rates.get((target, source))
        return common if own is None else own.mean(common, _WEIGHT)

    def _option(self, part: Part, streams: int, price: Callable[[int, int], float]) -> _Option:
        stream, target = self._streams[part.id], part.bits
        assert isinstance(target, int)
        most = min(part.ahead, LONGEST)
        ngram = stream.text.guess(most)
        source = self._source(target, stream.heat, streams, price) if stream.model else NGRAM
        return _Option(
            part,
            ngram,
            _worth(self._chance(stream, target, NGRAM), len(ngram)) if ngram else [],
            source,
            _worth(self._chance(stream, target, source), most) if source else [],
        )

    def _source(self, target: int, heat: int, streams: int, price: Callable[[int, int], float]) -> int:
        """The precision that would gain most for a sequence like this; NGRAM where there is none."""
        found, until = self._chosen.get((target, heat), (NGRAM, 0))
        if until > self._plans:
            return found
        plain, best = price(target, streams), 0.0
        for bits in self.candidates(target):
            worth = _worth(self._rate(target, heat, bits).mean(_HOPE, _HOPE_WEIGHT), LONGEST)
            each = self._draft_ns(bits, target, streams, price)
            gain = max(
                (1 + worth[k - 1]) * plain / (price(target, streams * (k + 1)) + k * each)
                for k in range(1, LONGEST + 1)
            )
            if gain > best:
                found, best = bits, gain
        self._chosen[target, heat] = found, self._plans + 8
        return found

    def _draft_ns(self, bits: int, target: int, streams: int, price: Callable[[int, int], float]) -> float:
        """A precision not tried yet is taken to cost its share of planes."""
        return self._drafts.predict(bits, streams) or price(target, streams) * bits / target

    def _best(
        self,
        options: Sequence[_Option],
        load: Mapping[int, int],
        plain: float,
        sampling: int,
        limit: float,
        price: Callable[[int, int], float],
    ) -> tuple[float, dict[Hashable, Draft]]:
        """The predicted gain in tokens per time, of all in the step, and the guesses that give it."""
        best, chosen, count = 0.0, None, 0
        for scenario in _scenarios(options):
            falls, before = 0, 0.0
            for length in range(1, LONGEST + 1):
                took = self._took(scenario, length, load, plain, sampling, price)
                tokens = sampling + sum(worth[min(length, len(worth)) - 1] for _, _, worth in scenario)
                gain = tokens * plain / (sampling * took) if took <= limit else 0.0
                if gain > best:
                    best, chosen, count = gain, scenario, length
                falls, before = (0 if gain > before else falls + 1), gain
                if falls == 2:
                    break
        return best, {} if chosen is None else _drafts(chosen, count)

    def _took(
        self,
        scenario: Scenario,
        length: int,
        load: Mapping[int, int],
        plain: float,
        sampling: int,
        price: Callable[[int, int], float],
    ) -> float:
        """Ns of the step with up to so many guesses for each; infinite where it tries too much at once."""
        more: dict[int, int] = {}
        drafting: dict[tuple[int, int], int] = {}  # (bits, target) -> sequences
        total = 0
        for option, source, worth in scenario:
            target, guesses = int(option.part.bits), min(length, len(worth))  # type: ignore[call-overload]
            more[target] = more.get(target, 0) + guesses
            total += guesses
            if source:
                drafting[source, target] = drafting.get((source, target), 0) + 1
        took = plain + (self._rest[True] - self._rest[False] if self._rest[True] else 0.0) * sampling
        for bits, tokens in more.items():
            if load[bits] + tokens > max(self._passes.most(bits), load[bits]) + len(scenario) or total > ROWS:
                return float("inf")
            took += price(bits, load[bits] + tokens) - price(bits, load[bits])
        for (bits, target), streams in drafting.items():
            took += length * self._draft_ns(bits, target, streams, price)
        return took

    def _probe(self, options: Sequence[_Option], plain: float, limit: float) -> dict[Hashable, Draft]:
        """One guess for one sequence, by each source in turn, where it was quiet long enough to pay for it."""
        if self._quiet < QUIET:
            return {}
        option = options[self._probes % len(options)]
        stream, target = self._streams[option.part.id], option.part.bits
        assert isinstance(target, int)
        sources = self.candidates(target) if stream.model else []
        turn = self._probes % (len(sources) + 1)
        if turn == len(sources):
            self._probes += not option.ngram  # nothing to try: the next one's turn
            source, tokens = NGRAM, option.ngram[:1]
        else:
            source, tokens = sources[turn], []
        cost = self._draft_ns(source, target, 1, lambda *_: plain) + plain / 4 if source else plain / 4
        if not (source or tokens) or cost > PROBE * self._quiet_ns or plain + cost > limit:
            return {}
        self._probes += 1
        return {option.part.id: Draft(source, 1, tokens)}


def _worth(chance: float, most: int) -> list[float]:
    """How many of the first 1, 2 ... guesses are right."""
    found, last, total = [], 1.0, 0.0
    for _ in range(most):
        last *= chance
        total += last
        found.append(total)
    return found


def _scenarios(options: Sequence[_Option]) -> Iterator[Scenario]:
    """Earlier text where there is some, and the model for the others; the model for all; earlier text alone."""
    texts: Scenario = [(o, NGRAM, o.ngram_worth) for o in options if o.ngram]
    model: Scenario = [(o, o.source, o.worth) for o in options if o.worth]
    rest: Scenario = [one for one in model if not one[0].ngram]
    if texts:
        yield texts
    if model:
        yield model
    if texts and rest:
        yield texts + rest


def _drafts(scenario: Scenario, length: int) -> dict[Hashable, Draft]:
    found: dict[Hashable, Draft] = {}
    for option, source, worth in scenario:
        count = min(length, len(worth))
        found[option.part.id] = Draft(source, count, [] if source else option.ngram[:count])
    return found
