"""The engines by name."""

from __future__ import annotations

from everybit.batching.precision import Auto
from everybit.batching.scheduler import Scheduler
from everybit.errors import SourceError
from everybit.plan.simulate.engine import Engine
from everybit.plan.simulate.ours import Ours
from everybit.plan.simulate.vllm import Vllm

ENGINES = ("everybit", "vllm")


def make_engine(
    name: str,
    *,
    blocks: int,
    context: int,
    block_tokens: int = 16,
    budget: int = 2048,
    most: int = 128,
    holds: bool = False,
    bits: int | Auto = 0,
    rungs: tuple[int, ...] = (0,),
) -> Engine:
    """`holds`: of a pool that only computes prompts, which everybit has none of; `bits`, `rungs`: everybit's alone.

    Raises: SourceError, RequestError, PrecisionError
    """
    if name == "vllm" and bits == 0 and rungs == (0,):
        return Vllm(blocks=blocks, context=context, block_tokens=block_tokens, budget=budget, most=most, holds=holds)
    if name == "everybit" and not holds:
        queue = 1_000_000  # a simulation has no reason to turn requests away
        sizes = {"blocks": blocks, "block_tokens": block_tokens, "context": context}
        return Ours(Scheduler(**sizes, budget=budget, most=most, queue=queue), bits, rungs=rungs)
    raise SourceError(
        f"engine {name!r}, bits {bits}, rungs {rungs}, holds {holds}: expected one of {', '.join(ENGINES)}; "
        "vllm has no bits, everybit does not hold caches"
    )
