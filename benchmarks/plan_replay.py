"""Does the simulator take as long as a real vLLM did? Two replays of 300 requests, of which the first 60 are fitted.

    python benchmarks/plan_replay.py ../shared/data/planner [--out results.jsonl]

Truth: LLMServingSim's replays of vLLM 0.19 on RTX PRO 6000 (Llama 3.1 8B; Qwen3 30B A3B, data and expert parallel
over two), and its kernel profile of the same GPU and models (MIT). Two step times are calibrated for each: that profile
with a factor for each part, and five numbers that know nothing of it (`linear`). Calibration sees the arrivals and
lengths of all requests, but the times of the first fifth only; errors are those of means, medians and p90s, simulated
over measured. Times are vLLM's own, from when its engine looked for requests between two steps: half of the recorded
ones were scheduled within 5 us of their arrival. `prior` is the profile before calibration. KV blocks come from memory
arithmetic: the data has none. The last line replays the first trace through everybit's own scheduler, for its speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpu_decode import machine
from everybit.plan.simulate.engines import make_engine
from everybit.plan.simulate.fit import Linear, Parameter, fit
from everybit.plan.simulate.profile import Factors, ProfileTime, Shape, read_profile
from everybit.plan.simulate.replica import Replica
from everybit.plan.simulate.requests import Outcome
from everybit.plan.simulate.router import make_router
from everybit.plan.simulate.run import Pool, Simulated, simulate
from everybit.plan.simulate.traces import Timing, read_timings, read_trace
from everybit.plan.step import StepTime
from peers.served import commit, write_line

MEMORY_BYTES = 96 * 2**30 * 0.9  # of an RTX PRO 6000 (vendor's data sheet), as far as vLLM uses it by default
RESERVE_BYTES = 3e9  # activations and CUDA graphs: a guess, which does not matter while blocks do not run out
CONTEXT, BUDGET, MOST, BLOCK_TOKENS = 131_072, 2048, 128, 16
LIMITS = {"ttft_s": 0.15, "tpot_s": 0.10, "e2e_s": 0.10}
FASTEST = 300  # requests a second of wall time


@dataclass(frozen=True)
class Case:
    """`weight_bytes` and `token_bytes` of one GPU; `linear`: priors of the five numbers, from a roofline."""

    replay: str
    profile: str
    shape: Shape
    engines: int
    weight_bytes: float
    token_bytes: float
    linear: dict[str, float]

    @property
    def blocks(self) -> int:
        return int((MEMORY_BYTES - self.weight_bytes - RESERVE_BYTES) / (self.token_bytes * BLOCK_TOKENS))


CASES = [
    Case(
        "rtxpro6000_llama31_8b_tp1",
        "rtxpro6000_llama31_8b_tp1",
        Shape(layers=32),
        1,
        16.06e9,
        131_072,
        {"step_s": 1e-3, "least_s": 1e-2, "token_s": 4e-5, "read_s": 8e-8, "pair_s": 2e-9},
    ),
    Case(
        "rtxpro6000_qwen3_30b_a3b_dp2ep2",
        "rtxpro6000_qwen3_30b_a3b_tp1",
        Shape(layers=48, experts=128, chosen=8, ranks=2),
        2,
        32.1e9,
        98_304,
        {"step_s": 1e-3, "least_s": 2e-2, "token_s": 3e-5, "read_s": 8e-8, "pair_s": 2e-9},
    ),
]


def replay(case: Case, trace: Path, step_time: StepTime, engine: str = "vllm") -> Simulated:
    sizes = {"blocks": case.blocks, "context": CONTEXT, "block_tokens": BLOCK_TOKENS, "budget": BUDGET, "most": MOST}
    engines = [make_engine(engine, **sizes) for _ in range(case.engines)]
    return simulate(read_trace(trace), Pool((Replica("replica", engines, step_time),), make_router("shortest-queue")))


def errors(outcomes: Sequence[Outcome], real: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Of each metric: simulated over measured, less 1, and the measured mean."""
    found = {}
    for name in LIMITS:
        own = name if name == "tpot_s" else f"engine_{name}"
        a = np.asarray([getattr(one, own) for one in outcomes])
        b = np.asarray([getattr(one, name) for one in real])
        ranks = {"mean": np.mean, "median": np.median, "p90": lambda values: np.percentile(values, 90)}
        found[name] = {rank: round(float(of(a) / of(b) - 1), 4) for rank, of in ranks.items()}
        found[name]["measured_mean_s"] = round(float(b.mean()), 4)
    return found


def holds(found: dict[str, dict[str, float]]) -> bool:
    return all(abs(found[name][rank]) <= most for name, most in LIMITS.items() for rank in ("mean", "median"))


def fastest(run: Callable[[], Simulated]) -> float:
    """Requests a second of wall time, of the best of three runs, reading the trace included."""
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        requests = len(run().outcomes)
        took.append(time.perf_counter() - begin)
    return requests / min(took)


def models(case: Case, data: Path) -> dict[str, tuple[Callable[[dict[str, float]], StepTime], list[Parameter]]]:
    profile = read_profile(data / "vllm_layer_profile" / case.profile, case.shape)
    factors = [Parameter("dense", 0.8, 1, 1.5, 1.1), Parameter("attention", 0.7, 1, 1.5, 1.1)]
    factors += [Parameter("step_s", 1e-5, 1e-3, 2e-2, 3)]
    if case.shape.ranks > 1:  # tokens travel between GPUs
        factors += [Parameter("experts", 0.7, 1, 1.5, 1.1), Parameter("token_s", 1e-7, 1e-5, 1e-4, 5)]
    numbers = [Parameter(name, prior / 10, prior, prior * 10, 2) for name, prior in case.linear.items()]
    return {
        "profile": (lambda values: ProfileTime(profile, Factors(**values)), factors),
        "linear": (lambda values: Linear(**values), numbers),
    }


def lines(case: Case, data: Path, share: float) -> list[dict[str, Any]]:
    trace = data / "vllm_replay" / f"{case.replay}_requests.csv"
    real = read_timings(trace)
    count = round(share * len(real))
    truth = dict(enumerate(real[:count]))
    found = []
    for name, (make, parameters) in models(case, data).items():
        if name == "profile":
            prior = replay(case, trace, make({one.name: one.prior for one in parameters}))
            found.append({"model": "prior", "rest": errors(prior.outcomes[count:], real[count:])})
        begin = time.perf_counter()
        fitted = fit(
            parameters, lambda values, make=make: replay(case, trace, make(values)).outcomes, truth, clock="engine"
        )
        took_s = time.perf_counter() - begin
        done = replay(case, trace, make(fitted.values))
        speed = fastest(lambda make=make, fitted=fitted: replay(case, trace, make(fitted.values)))
        parts = {"fitted": slice(count), "rest": slice(count, None), "all": slice(None)}
        line = {part: errors(done.outcomes[chosen], real[chosen]) for part, chosen in parts.items()}
        ran = done.replicas[0].ran
        found.append(
            {
                "model": name,
                "values": fitted.values,
                "at_bound": fitted.at_bound,
                "fit_s": round(took_s, 1),
                "fit_runs": fitted.runs,
                "requests_per_s": round(speed, 1),
                "fast_enough": speed >= FASTEST,
                "kv_blocks": case.blocks,
                "kv_used_max": round(max(one.blocks_used for one in ran), 3),
                "preempted": done.replicas[0].preempted,
                **line,
                "holds": holds(line["rest"]) and holds(line["all"]),
            }
        )
    return [{"replay": case.replay, "requests": len(real), "calibrated_on": count, **one} for one in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with vllm_replay and vllm_layer_profile")
    parser.add_argument("--share", type=float, default=0.2, help="of the requests, whose times are fitted (0.2)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common = {"benchmark": "plan_replay", "commit": commit(), "machine": machine()}
    written = [{**common, **line} for case in CASES for line in lines(case, args.data, args.share)]
    case, step_time = CASES[0], Linear(**CASES[0].linear)
    trace = args.data / "vllm_replay" / f"{case.replay}_requests.csv"
    speed = fastest(lambda: replay(case, trace, step_time, "everybit"))
    written.append(
        {**common, "replay": case.replay, "model": "everybit's scheduler", "requests_per_s": round(speed, 1)}
    )
    for line in written:
        write_line(args.out, line)
    print("\nerrors of mean / median / p90, requests that were not fitted")
    for line in written:
        shown = {name[:-2]: [line["rest"][name][rank] for rank in ("mean", "median", "p90")] for name in LIMITS} if (
            "rest" in line
        ) else {}  # fmt: skip
        figures = ", ".join(
            f"{name} " + " / ".join(f"{100 * one:+.1f} %" for one in many) for name, many in shown.items()
        )
        speed_text = f" {line['requests_per_s']:.0f} requests/s" if "requests_per_s" in line else ""
        verdict = {True: " HOLDS", False: " DOES NOT HOLD", None: ""}[line.get("holds")]
        print(f"{line['replay']}, {line['model']}: {figures}{speed_text}{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
