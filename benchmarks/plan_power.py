"""What `everybit plan fleet` says of a replica's power by its load, beside simulations of that load.

    python benchmarks/plan_power.py [--requests 500]

Of Llama-3.1-8B under a TTFT of 1 s and a TPOT of 40 ms, on a large and a small card, at three widths, with long and
short prompts. `line` is the plan's, from `base_w` to `power_w`; `from idle` one that starts at the power of waiting.
Errors are over the simulation, minus 1. Both sides are computed: no device is asked.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence

from everybit.batching.fluidity import Target
from everybit.plan.candidates import candidate
from everybit.plan.deployment import Deployment
from everybit.plan.fleet_inputs import Bucket
from everybit.plan.hardware import read_hardware
from everybit.plan.power import power_of
from everybit.plan.simulate.metrics import Slo, measure
from everybit.plan.simulate.requests import draw
from everybit.plan.simulate.run import simulate
from everybit.plan.widths import read_at

MODEL = "meta-llama/Llama-3.1-8B"
CARDS, BITS, LENGTHS = ("h100-sxm", "a10g"), ("everybit8", "everybit4", "bf16"), ((1000, 250), (256, 400))
LOADS = (0.1, 0.3, 0.6, 0.9)
SLO = Slo(first_s=1.0, gap_s=0.04, share=0.95)
TARGET = Target(10**9, 4 * 10**7)


def drawn(name: str, bits: str, prompt: int, output: int, requests: int) -> list[tuple[float, float, float]]:
    """(line, line from idle, simulated) in watts at each of `LOADS`. Raises: SourceError"""
    model, card = read_at(MODEL, bits), read_hardware(name)
    one = candidate(model, card, [Bucket(prompt, output, 1.0)], SLO, bits=bits, engine="everybit")
    full, base, idle = one.type.power_w, one.type.power_w * one.type.base_share, power_of(card).idle_w
    found = []
    for load in LOADS:
        pool = Deployment({0: model}, card, one.split, one.efficiency, "everybit").pool(
            1, prompt + output, TARGET, "shortest-queue"
        )
        done = measure(simulate(draw(load * one.type.rates[0], requests, [(prompt, output)]), pool), TARGET)
        watts = sum(each["joules"] for each in done["replicas"].values()) / done["throughput"]["seconds"]
        found.append((base + (full - base) * load, idle + (full - idle) * load, watts))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args(argv)
    errors: defaultdict[float, list[tuple[float, float]]] = defaultdict(list)
    for name in CARDS:
        for bits in BITS:
            for prompt, output in LENGTHS:
                cells = []
                for load, (line, straight, watts) in zip(
                    LOADS, drawn(name, bits, prompt, output, args.requests), strict=True
                ):
                    errors[load].append((line / watts - 1, straight / watts - 1))
                    cells.append(f"{load:.0%}: {line:.0f} W, simulated {watts:.0f} ({line / watts - 1:+.0%})")
                print(f"{name} {bits} {prompt}+{output}  " + "; ".join(cells), flush=True)
    for load, pairs in errors.items():
        told = (
            f"{min(one):+.0%} to {max(one):+.0%}, median {sorted(one)[len(one) // 2]:+.0%}"
            for one in zip(*pairs, strict=True)
        )
        print("load {:.0%}: line {}; from idle {}".format(load, *told))


if __name__ == "__main__":
    main()
