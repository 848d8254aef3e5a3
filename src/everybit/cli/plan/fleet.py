"""`everybit plan fleet SPEC.toml`: the cheapest fleet for a demand: how many of which replicas, and who serves what."""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.cli.options import positive_int
from everybit.cli.plan.options import add_json
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.cli.plan.fleet_spec import Spec
    from everybit.cli.plan.fleet_types import Candidate
    from everybit.plan.fleet import Fleet
    from everybit.plan.fleet_inputs import Limits, ReplicaType

_EQUAL = 1.001  # the solver's own gap, and more
_SURE = 1.645  # standard deviations on either side of the middle of nine tenths


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "fleet",
        help="the cheapest fleet for a demand, under quotas, power, CO2 and quality",
        description="Replica types are cards x tp x bits; what each serves within the SLO is estimated, then the "
        "cheapest mix is solved for. docs/plan.md says what a SPEC.toml holds.",
    )
    parser.add_argument("spec", type=Path, metavar="SPEC.toml")
    parser.add_argument(
        "--compatible",
        type=positive_int,
        nargs="?",
        const=1,
        metavar="SLICES",
        help="as Melange has it: buckets in equal slices (default 1) that are not split",
    )
    parser.add_argument("--verify", action="store_true", help="simulate the fleet, and tighten until the SLO holds")
    parser.add_argument("--brief", action="store_true", help="leave out what binds and the runner-up")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.fleet_spec import read_spec
    from everybit.cli.plan.fleet_types import candidates, verifier
    from everybit.cli.plan.output import print_json
    from everybit.plan.fleet import plan_fleet

    spec = read_spec(args.spec)
    if args.verify and spec.types:
        raise SourceError("--verify simulates cards; a type with rates of its own cannot be simulated: leave one out")
    found, without = candidates(spec)
    types = [*spec.types, *(one.type for one in found)]
    if not types:
        name, why = next(iter(without.items()))
        raise SourceError(f"none of {len(without)} replica types is possible; {name}: {why}")
    limits = spec.limits if args.compatible else _finest(spec, types)
    fleet = plan_fleet(
        spec.demand,
        types,
        limits,
        verify=verifier(spec, found) if args.verify else None,
        slices=args.compatible,
        explain=not args.brief,
    )
    if args.json:
        print_json(
            {
                "fleet": fleet,
                "demand": spec.demand,
                "types": types,
                "impossible": without,
                "verified": args.verify,
                "rests_on": {
                    one.type.name: {"efficiencies": one.efficiency.source, "card": one.known} for one in found
                },
            }
        )
    else:
        print(_text(args, spec, fleet, found, without))
    return 0


def _finest(spec: Spec, types: list[ReplicaType]) -> Limits:
    """The limits with the highest floor of quality that costs no more: the program itself does not prefer quality."""
    from everybit.plan.fleet import plan_fleet

    cheapest = plan_fleet(spec.demand, types, spec.limits).cost_usd_per_h
    for floor in sorted({one.quality for one in types}, reverse=True)[:-1]:
        limits = replace(spec.limits, least_quality=max(floor, spec.limits.least_quality or floor))
        with contextlib.suppress(SourceError):  # no fleet of these
            if plan_fleet(spec.demand, types, limits).cost_usd_per_h <= cheapest * _EQUAL:
                return limits
    return spec.limits


def _text(args: argparse.Namespace, spec: Spec, fleet: Fleet, found: list[Candidate], without: dict[str, str]) -> str:
    from everybit.cli.plan.output import figure, table

    header = ["bucket", "requests/s", *fleet.counts]
    split = [
        [bucket.name, figure(bucket.requests_per_s), *(f"{row.get(name, 0):.0%}" for name in fleet.counts)]
        for bucket, row in zip(spec.demand, fleet.split, strict=True)
    ]
    bill = f"{fleet.usd_per_h:.2f} $/h"
    if fleet.co2_usd_per_h:
        bill += f" and {fleet.co2_usd_per_h:.2f} $/h for its CO2"
    lines = [
        f"{bill}; no fleet of these types costs less than {fleet.bound_usd_per_h:.2f} $/h",
        *(
            f"  {count} x {name}, busy {fleet.loads[name]:.0%}"
            + (
                f", more than the spares gone {fleet.spot_risk[name]:.2%} of the time"
                if name in fleet.spot_risk
                else ""
            )
            for name, count in fleet.counts.items()
        ),
        table(header, split),
    ]
    if fleet.power_w:
        lines.append(f"power {fleet.power_w:,.0f} W, at most {fleet.peak_w:,.0f} W; {fleet.gco2_per_h:,.0f} gCO2e/h")
    if spec.quality:
        lines.append(f"quality, mean over requests: {fleet.mean_quality:.4g}")
    lines += [
        f"binding: {one.limit} {one.value:g}: without it {one.saves_usd_per_h:.2f} $/h less, "
        f"at {one.relaxed:g} {one.relaxed_saves_usd_per_h:.2f} $/h less"
        for one in fleet.binding
    ]
    if fleet.runner_up:
        counts = ", ".join(f"{count} x {name}" for name, count in fleet.runner_up.counts.items())
        lines.append(f"runner-up: {counts} at {fleet.runner_up.usd_per_h:.2f} $/h")
    lines += [f"impossible: {name}: {why}" for name, why in without.items()]
    used = [one for one in found if one.type.name in fleet.counts]
    for card, known, efficiency in dict.fromkeys((one.card.name, one.known, one.efficiency) for one in used):
        factor = math.exp(_SURE * efficiency.spread)
        lines.append(f"rates on {card}: {efficiency.source}; nine in ten times are within x{factor:.2f}; card: {known}")
    held = "verified by simulation" if args.verify else "not simulated (--verify)"
    return "\n".join([*lines, f"utilisation at most {fleet.utilisation:.0%}, {held}"])
