"""`everybit plan calibrate RESULT ... -o FILE`: efficiencies of one card and engine from measured runs."""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from everybit.cli.options import positive_int
from everybit.cli.plan.options import add_json, add_split, bits_or_format, model_of, split_of
from everybit.errors import OutputError, SourceError, reason

if TYPE_CHECKING:
    from everybit.plan.calibrate import Calibration, Sample
    from everybit.plan.efficiency import Efficiency
    from everybit.plan.hardware import Hardware
    from everybit.plan.importers import Imported
    from everybit.plan.operators import Model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="efficiencies of a card and an engine from measured runs",
        description="Fit efficiencies, with intervals, to folders of everybit bench run, or to tables (csv) of "
        "aiconfigurator, LLM-Inference-Bench, Splitwise or LLMServingSim, of which the rows of --on and --engine "
        "count. A folder and a replay do not say what was served: --model and --bits do.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="folders or csv files")
    parser.add_argument("--on", required=True, metavar="CARD", help="where it was measured")
    parser.add_argument("--engine", required=True, metavar="NAME", help="everybit, vllm, sglang, trtllm or any")
    parser.add_argument("--version", default="", metavar="TEXT", help="of the engine (bench folders, replays)")
    parser.add_argument("--model", metavar="MODEL", help="that was served (bench folders, replays)")
    parser.add_argument("--bits", metavar="BITS", help="of its weights (bench folders, replays)")
    parser.add_argument("--kv-bits", type=bits_or_format, metavar="BITS", help="of its cache")
    parser.add_argument(
        "--activation-bits", type=bits_or_format, metavar="BITS", help="of what weights are multiplied with"
    )
    add_split(parser)
    parser.add_argument("--draws", type=positive_int, default=20, metavar="N", help="for intervals (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="to write")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import print_json
    from everybit.plan.calibrate import calibrate
    from everybit.plan.efficiency import prior
    from everybit.plan.hardware import read_hardware

    if args.seed < 0:
        raise SourceError(f"--seed {args.seed}: expected 0 or more")
    if args.output.is_dir():
        raise OutputError(f"--output {args.output}: a folder is there, expected the name of a file: pass another")
    card = read_hardware(args.on)
    start = prior(card, args.engine)
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for path in args.results:
        found, without = _samples(args, path, card)
        skipped.update(without)
        for sample in found:
            try:
                sample.service(start.ahead)
            except SourceError as error:  # what the planner calls impossible, such as more than the context
                skipped[str(error)] += 1
            else:
                samples.append(sample)
    if not samples:
        raise SourceError(f"no run can be used: {next(iter(skipped))}")
    calibration = calibrate(samples, start, draws=args.draws, seed=args.seed)
    calibration.save(args.output)
    judged = _judged(calibration, samples, start)
    if args.json:
        errors = _errors(calibration, samples)
        print_json({"calibration": calibration, "errors": errors, "families": judged, "skipped": skipped})
    else:
        print(_text(args, calibration, samples, judged, skipped))
    return 0


def _samples(args: argparse.Namespace, path: Path, card: Hardware) -> tuple[list[Sample], dict[str, int]]:
    """Of one result, and why others of its rows were left out."""
    from everybit.plan import importers

    if path.is_dir() or path.suffix == ".json":
        model, result = _served(args), path / "result.json" if path.is_dir() else path
        return [importers.read_bench(result, model, card, split_of(args), args.version, args.engine)], {}
    columns = _columns(path)
    if "queued_s" in columns:
        model = _served(args)
        return [importers.read_replay(path, model, card, split_of(args), args.engine, args.version)], {}
    tables: dict[str, Callable[[Path], Imported]] = {
        "silicon_tpot_ms": importers.read_silicon,
        "Input Output Length": importers.read_inference_bench,
        "token_time": importers.read_splitwise,
    }
    read = next((reader for column, reader in tables.items() if column in columns), None)
    if read is None:
        raise SourceError(
            f"{path}: columns {', '.join(columns)[:80]}; expected a replay (queued_s) or a table with one of "
            f"{', '.join(tables)}"
        )
    given = (args.model, args.bits, args.kv_bits, args.activation_bits, args.version or None)
    if given != (None,) * 5 or split_of(args).devices > 1:
        raise SourceError(f"{path}: a table says itself what was served: leave --model, --bits and the like out")
    table = read(path)
    ours = [one for one in table.samples if (one.hardware.name, one.engine) == (card.name, args.engine)]
    if not ours:
        there = sorted({f"{one.hardware.name} x {one.engine}" for one in table.samples})
        raise SourceError(f"{path}: no rows of {card.name} x {args.engine}, only of {', '.join(there)}")
    others = len(table.samples) - len(ours)
    return ours, {**table.skipped, **({"another card or engine": others} if others else {})}


def _served(args: argparse.Namespace) -> Model:
    if args.model is None:
        raise SourceError("a bench folder or a replay arrived without --model: say what was served")
    return model_of(args)


def _columns(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {reason(error)}") from None


def _errors(calibration: Calibration, samples: list[Sample]) -> dict[str, float]:
    """Median relative error on the very runs of the fit, by measure."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        predicted = sample.predict(calibration.of(sample.model).efficiency)
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            if (value := getattr(sample, name)) is not None:
                found.setdefault(name, []).append(abs(getattr(predicted, name) / value - 1))
    return {name: median(values) for name, values in found.items()}


def _judged(calibration: Calibration, samples: list[Sample], prior: Efficiency) -> list[dict[str, Any]]:
    """Before and after, for models without and with experts, which are fitted apart."""
    from everybit.plan.calibrate import judge
    from everybit.plan.efficiency import is_routed

    found = []
    for name, routed in (("without experts", False), ("with experts", True)):
        if own := [one for one in samples if is_routed(one.model) == routed]:
            model = own[0].model
            before, after = judge(own, prior.of(model)), judge(own, calibration.of(model).efficiency)
            found.append({"models": name, "runs": len(own), "prior": before, "fitted": after})
    return found


def _text(
    args: argparse.Namespace,
    calibration: Calibration,
    samples: list[Sample],
    judged: list[dict[str, Any]],
    skipped: dict[str, int],
) -> str:
    from everybit.cli.plan.output import figure, table
    from everybit.plan.calibrate import Fit
    from everybit.plan.efficiency import BOUNDS

    lines = [f"versions of {args.engine}: {', '.join(filter(None, calibration.versions)) or 'not told'}"]
    for fit in filter(None, (Fit(calibration.efficiency, calibration.draws), calibration.routed)):
        rows = []
        for name in BOUNDS:
            draws = sorted(getattr(one, name) for one in fit.draws)
            ends = f"{figure(draws[0])} to {figure(draws[-1])}"
            rows.append([name, figure(getattr(fit.efficiency, name)), ends])
        lines += [fit.efficiency.source, table(["efficiency", "fitted", "draws"], rows)]
    errors = ", ".join(f"{name[:-2]} {value:.1%}" for name, value in _errors(calibration, samples).items())
    lines.append(f"median error on these {len(samples)} runs, which the fit has seen: {errors}")
    for family in judged:
        if family["prior"]:
            before, after = (
                f"{one.inside:.0%} in a 90 % interval of x{one.factor:.2f}, median error {one.median_error:.1%}"
                for one in (family["prior"], family["fitted"])
            )
            lines.append(f"{family['runs']} runs of models {family['models']}: prior {before}; fitted {after}")
    lines += [f"left out: {count} rows: {why}" for why, count in sorted(skipped.items(), key=lambda one: -one[1])]
    return "\n".join([*lines, f"written: {args.output}"])
