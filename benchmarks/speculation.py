"""What self-speculation gains at batch 1: how often low planes guess right, and tokens per second with and without.

    python benchmarks/speculation.py [--overlay demo-out/overlay] [--model FOLDER] [--shape tinyllama-1.1b] ...

acceptance   of tokens drafted at each precision, the share that 8 bits choose as well: both see the same text, which
             8 bits wrote, and draw with the same random number (measured). `tv`: 1 - total variation, the most that any
             way of coupling the draws can reach (measured, too).
speed        `Batcher` at 8 bits, plain and speculating, one request at a time, in ABBA order; the texts are compared
             token by token. `found` lets it choose, `N bits` drafts at N; the median of pairs' ratios, [min, max].
costs        a synthetic overlay at a real shape, where reading weights is what takes time: median ms of plain passes at
             8 bits, of verifying k + 1 tokens and of draft passes. Random weights accept nothing that means anything,
             so the gain is COMPUTED from these times for a range of acceptances a: (1 - a^(k+1)) / (1 - a) tokens for
             k drafts and one verification, at the best k; `break-even` is the a from which it is 1, `for 1.25` that for
             1.25. `min`: the same from the shortest times, which other jobs disturb least.

Prints a card; writes JSON lines to --out, the last one about the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import everybit
from everybit.batching.batcher import Batcher
from everybit.batching.scheduler import Request
from everybit.engine.native import make_step
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampler, Sampling
from everybit.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
TARGET, DRAFTS = 8, (2, 3, 4, 5, 6)
TEMPERATURES = (0.0, 0.7, 1.0)
LONGEST = 8


def prompts(folder: Path, text: Path, count: int, length: int) -> list[tuple[int, ...]]:
    """Pieces of a text, spread over it."""
    ids = Tokenizer.open(folder).encode(text.read_text())
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    return [tuple(ids[start : start + length]) for start in starts]


def acceptance(runtime: Runtime, name: str, texts: list[tuple[int, ...]], more: int) -> list[dict[str, Any]]:
    """Each draft precision's rows: its logits of texts that 8 bits continued against those of 8 bits."""
    rows = []
    drafts = [bits for bits in DRAFTS if bits in runtime.bits]
    for temperature in TEMPERATURES:
        hits, near, count = dict.fromkeys(drafts, 0), dict.fromkeys(drafts, 0.0), 0
        for seed, text in enumerate(texts):
            sampling = Sampling(temperature=temperature, seed=seed)
            runtime.reset()
            sampler, whole = Sampler(sampling, text), list(text)
            wanted = [runtime.prefill(0, text, TARGET)]
            for _ in range(more):
                whole.append(sampler.choose(wanted[-1].copy()).token)
                wanted.append(runtime.decode(whole[-1:], TARGET)[0])
            count += more
            for bits in drafts:  # over the cache that 8 bits wrote, as a draft reads it
                runtime.reset(0, len(text) - 1)
                blocks = np.arange(-(-len(whole) // 16), dtype=np.int32)
                step = make_step([(whole[len(text) - 1 : -1], len(text) - 1, blocks)], range(more))
                found = runtime.native.run(step, bits)
                again = Sampler(sampling, text)
                for place in range(more):
                    p, q = (probabilities(row, temperature) for row in (wanted[place], found[place]))
                    near[bits] += float(np.minimum(p, q).sum())
                    hits[bits] += again.choose(found[place]).token == whole[len(text) + place]
                    again.position = len(text) + place + 1
                runtime.reset()
                runtime.prefill(0, whole[:-1], TARGET)
        for bits in drafts:
            rows.append({
                "what": "acceptance", "model": name, "draft": bits, "target": TARGET, "temperature": temperature,
                "tokens": count, "accepted": hits[bits] / count, "tv": near[bits] / count,
            })  # fmt: skip
    return rows


def probabilities(logits: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    if temperature == 0:
        one = np.zeros(len(logits))
        one[int(logits.argmax())] = 1
        return one
    found = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return found / found.sum()


def generate(batcher: Batcher, texts: list[tuple[int, ...]], sampling: dict[str, Any], more: int) -> tuple[float, Any]:
    """Tokens per second after each first one, and the tokens."""
    took, found = 0.0, []
    for seed, text in enumerate(texts):
        batcher.submit(Request(0, text, more, TARGET, tenant=object()), Sampling(**sampling, seed=seed))
        tokens = [event.token for event in batcher.step()]
        begin = time.perf_counter()
        while batcher.busy:
            tokens += [event.token for event in batcher.step()]
        took += time.perf_counter() - begin
        found.append(tokens)
    return len(texts) * (more - 1) / took, found


def speed(runtime: Runtime, name: str, texts: list[tuple[int, ...]], more: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for temperature in TEMPERATURES[:2]:
        for draft in (None, 2, 3, 4):
            if draft is not None and (draft not in runtime.bits or temperature):
                continue
            sides = {False: Batcher(runtime, speculate=False), True: Batcher(runtime, draft_bits=draft)}
            sampling: dict[str, Any] = {"temperature": temperature}
            ratios: list[float] = []
            tps: dict[bool, list[float]] = {False: [], True: []}
            for side in sides.values():  # what is learnt and built at first
                generate(side, texts, sampling, more)
            before = sides[True].speculated()
            for _ in range(rounds):
                pair: dict[bool, list[float]] = {False: [], True: []}
                texts_of = {}
                for side in (False, True, True, False):
                    rate, texts_of[side] = generate(sides[side], texts, sampling, more)
                    pair[side].append(rate)
                    tps[side].append(rate)
                ratios.append(sum(pair[True]) / sum(pair[False]))
                if texts_of[True] != texts_of[False]:
                    raise SystemExit(f"{name}: speculation changed the tokens at temperature {temperature}")
            after = sides[True].speculated()
            drafted, accepted = since(before.drafted, after.drafted), since(before.accepted, after.accepted)
            rows.append({
                "what": "speed", "model": name, "temperature": temperature, "draft": draft or "found",
                "plain_tps": median(tps[False]), "plain_spread": [min(tps[False]), max(tps[False])],
                "tps": median(tps[True]), "spread": [min(tps[True]), max(tps[True])],
                "gain": median(ratios), "gain_spread": [min(ratios), max(ratios)],
                "steps": after.steps - before.steps, "drafted": drafted, "accepted": accepted, "same_tokens": True,
            })  # fmt: skip
    return rows


def since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {source: count - before.get(source, 0) for source, count in after.items()}


def costs(runtime: Runtime, name: str, rounds: int) -> list[dict[str, Any]]:
    """Times of passes, in rounds through all of them, and the gain that follows from each acceptance."""
    past, blocks = 32, np.arange(4, dtype=np.int32)
    runtime.prefill(0, list(range(5, 5 + past)), TARGET)
    drafts = [bits for bits in DRAFTS[:3] if bits in runtime.bits]
    cases = [(TARGET, n) for n in range(1, LONGEST + 2)] + [(bits, 1) for bits in drafts]
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for index in range(rounds + 1):
        for bits, tokens in cases:
            step = make_step([(np.arange(9, 9 + tokens), past, blocks)], range(tokens))
            begin = time.perf_counter()
            runtime.native.run(step, bits)
            if index:
                times[bits, tokens].append(1e3 * (time.perf_counter() - begin))
    plain = median(times[TARGET, 1])
    rows = [{
        "what": "costs", "model": name, "bits": bits, "tokens": tokens, "ms": median(of),
        "spread": [min(of), max(of)], "of_plain": median(of) / plain,
    } for (bits, tokens), of in times.items()]  # fmt: skip
    for which, pick in (("median", median), ("min", min)):
        ms = {case: float(pick(of)) for case, of in times.items()}
        for bits in [0, *drafts]:  # 0: guesses from earlier text, at no cost
            rows.append(
                {"what": "computed gain", "model": name, "of": which, "draft": bits or "ngram", **gains(ms, bits)}
            )
    return rows


def gains(ms: dict[tuple[int, int], float], bits: int) -> dict[str, Any]:
    """The best gain and its number of drafts, by acceptance, and the acceptances at which it reaches 1 and 1.25."""

    def best(a: float) -> tuple[float, int]:
        each = ms[bits, 1] if bits else 0.0
        took = {k: ms[TARGET, k + 1] + k * each for k in range(1, LONGEST + 1)}
        return max((sum(a**i for i in range(k + 1)) * ms[TARGET, 1] / took[k], k) for k in took)

    found = {a: best(a) for a in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)}
    grid = [i / 500 for i in range(501)]
    reach = [next((a for a in grid if best(a)[0] >= level), None) for level in (1.0, 1.25)]
    return {
        "gain": {a: gain for a, (gain, _) in found.items()},
        "drafts": {a: k for a, (_, k) in found.items()},
        "break_even": reach[0],
        "for_1.25": reach[1],
    }


def card(row: dict[str, Any]) -> str:
    """A row for people."""
    name = f"{row['model']:14s}"
    match row["what"]:
        case "acceptance":
            return (
                f"{name} acceptance {row['draft']} of {row['target']} bits, T {row['temperature']:.1f}: "
                f"{row['accepted']:.3f} (at most {row['tv']:.3f} by any coupling), {row['tokens']} tokens"
            )
        case "speed":
            low, high = row["gain_spread"]
            return (
                f"{name} speed T {row['temperature']:.1f}, drafts {row['draft']}: plain {row['plain_tps']:.1f} -> "
                f"{row['tps']:.1f} tokens/s, {row['gain']:.2f}x ({low:.2f}..{high:.2f}), drafted {row['drafted']}, "
                f"accepted {row['accepted']}"
            )
        case "costs":
            low, high = row["spread"]
            return (
                f"{name} pass {row['bits']} bits, {row['tokens']} tokens: {row['ms']:6.1f} ms ({low:.1f}..{high:.1f}), "
                f"{row['of_plain']:.2f} of a plain one"
            )
    by = ", ".join(f"{a}: {gain:.2f} (k {row['drafts'][a]})" for a, gain in row["gain"].items())
    return (
        f"{name} COMPUTED gain of {row['of']} times by acceptance, drafts {row['draft']}: {by}; break-even "
        f"{row['break_even']}, for 1.25 {row['for_1.25']}"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", type=Path, default=ROOT / "demo-out" / "overlay", help="a trained model's")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "text" / "heldout.txt")
    second = ROOT.parent / "shared" / "data" / "models" / "babyllama-105"
    parser.add_argument("--model", type=Path, default=second, help="a second trained model, float; none: left out")
    parser.add_argument("--shape", default="tinyllama-1.1b", help='of the synthetic overlay; "" leaves it out')
    parser.add_argument("--codebook", default="cells")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--more", type=int, default=128, help="tokens generated for each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", default="fast", help="fast or exact")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "everybit-speculation")
    parser.add_argument("--out", type=Path, help="JSON lines")
    return parser.parse_args()


def main() -> None:
    args = options()
    args.work.mkdir(parents=True, exist_ok=True)
    load, rows = os.getloadavg()[0], list[dict[str, Any]]()
    if load > 0.5:
        print(f"load average {load:.1f} before the start, expected an idle machine: stop other jobs", file=sys.stderr)

    def add(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        print(*map(card, found), sep="\n", flush=True)

    def opened(folder: Path, **more: Any) -> Runtime:
        return Runtime.open(folder, threads=args.threads, mode=args.mode, **more)

    trained = [("prose-10m", args.overlay)]
    if args.model.is_dir():
        small = args.work / args.model.name
        if not (small / "config.json").exists():
            everybit.quantize(args.model, small, tune=False, solver="tree", calibration="none")
        trained.append((args.model.name, small))
    for name, folder in trained:
        with opened(folder) as runtime:
            length, more = args.prompt, args.more
            if length + more > runtime.context:
                length, more = runtime.context // 4, runtime.context // 2
            texts = prompts(folder, args.text, args.texts, length)
            add(acceptance(runtime, name, texts, more))
            add(speed(runtime, name, texts, more, args.rounds))
    if args.shape:
        folder = args.work / f"{args.shape}-{args.codebook}"
        if not (folder / "config.json").exists():
            made = [sys.executable, str(PEERS / "synthetic_overlay.py"), args.shape, str(folder)]
            subprocess.run([*made, "--codebook", args.codebook], check=True, stdout=sys.stderr)
        with opened(folder, context=256, verify=False) as runtime:
            add(costs(runtime, f"{args.shape} (random)", max(5, args.rounds)))
            isa = runtime.isa
    else:
        isa = ""
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    rows.append({
        "what": "about", "command": " ".join(["python", *sys.argv]), "commit": commit.stdout.strip(), "load": load,
        "machine": f"{(names or ['?'])[0]}, {os.cpu_count()} cores", "threads": args.threads, "mode": args.mode,
        "isa": isa,
    })  # fmt: skip
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
