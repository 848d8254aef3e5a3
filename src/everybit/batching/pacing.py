"""What keeps streams in time: how many tokens the next step has, and the rung of the ladder that it runs at.

Rules of the batcher and of `everybit plan simulate` alike. Pure: times come from the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from everybit.batching.fluidity import Pace, Target
from everybit.batching.precision import Auto, Costs, Ladder
from everybit.batching.scheduler import Part

LEAST_CHUNK = 32  # tokens of prompts in a step: fewer would read the weights for too little
TARGET = Target(first_ns=1_000_000_000, gap_ns=100_000_000)  # a reader's pace: ten tokens a second


def step_budget(reading: Collection[Pace], now_ns: int, bits: int, costs: Costs) -> int | None:
    """Tokens of a step at `bits` that makes no stream late, where it can be helped; None where nobody reads yet.

    A stream that has time in hand lets long prompts through faster (stall-free batching: Agrawal et al. 2024).
    """
    if not reading:
        return None
    limit = min([room if (room := one.due_ns - now_ns) > (gap := one.target.gap_ns) else gap for one in reading])
    return len(reading) + int(min(max(costs.tokens(bits, limit) - len(reading), LEAST_CHUNK), 1 << 20))


def choose_rung(
    ladder: Ladder,
    costs: Costs,
    parts: Sequence[Part],
    autos: Mapping[Hashable, Auto],
    dues_ns: Mapping[Hashable, int],
    now_ns: int,
) -> bool:
    """One rung for all `auto` requests, within the bounds of each; whether it is another one.

    The next step is taken to be like the last, `parts`. A request that waits counts while it can still be in time.
    `dues_ns`: when the next token of each of `autos` has to be there. Mutates: `ladder`
    """
    if not autos:
        return False
    kinds, before = set(autos.values()), ladder.bits
    bounds = Auto(min(one.floor for one in kinds), max(one.ceiling for one in kinds))
    tokens: dict[Hashable, int] = {}  # by bounds, else by precision
    for part in parts:
        key = autos.get(part.id, part.bits)
        tokens[key] = tokens.get(key, 0) + len(part.tokens)
    ran = {part.id for part in parts}
    lowest = _predict(ladder, costs, tokens, bounds.floor)
    rooms = [room for id, due in dues_ns.items() if (room := due - now_ns) >= lowest or id in ran]
    if rooms:
        here, above = (_predict(ladder, costs, tokens, rung) for rung in (ladder.bits, ladder.above))
        ladder.step(min(rooms), here, above, bounds)
    return ladder.bits != before


def _predict(ladder: Ladder, costs: Costs, tokens: Mapping[Hashable, int], rung: int) -> float:
    """Nanoseconds of a step, one pass for each precision, with `auto` requests at `rung`."""
    passes: dict[int, int] = {}
    for key, count in tokens.items():
        bits = ladder.within(key, rung) if isinstance(key, Auto) else key
        if isinstance(bits, int):  # what a plan takes is not known
            passes[bits] = passes.get(bits, 0) + count
    return sum(costs.predict(bits, count) for bits, count in passes.items())
