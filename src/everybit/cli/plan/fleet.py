"""`everybit plan fleet SPEC.toml`: the cheapest fleet for a demand: how many of which replicas, and who serves what."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.cli.options import positive_int
from everybit.cli.plan.options import add_json
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.cli.plan.fleet_spec import Spec
    from everybit.plan.candidates import Candidate
    from everybit.plan.fleet import Fleet
    from everybit.plan.simulate.metrics import Slo

_SURE = 1.645  # standard deviations on either side of the middle of nine tenths
_RISK = 0.05  # of the time, where no SLO says more


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
    from everybit.cli.plan.fleet_types import candidates
    from everybit.cli.plan.options import slo_of
    from everybit.cli.plan.output import print_json
    from everybit.plan.fleet import finest, plan_fleet
    from everybit.plan.fleet_checks import queued, simulated

    spec = read_spec(args.spec)
    if args.verify and spec.types:
        raise SourceError("--verify simulates cards; a type with rates of its own cannot be simulated: leave one out")
    found, without = candidates(spec)
    types = [*spec.types, *(one.type for one in found)]
    if not types:
        name, why = next(iter(without.items()))
        raise SourceError(f"none of {len(without)} replica types is possible; {name}: {why}")
    verify, slo, losses = None, slo_of(spec.slo) if found else None, spec.limits.spot_losses
    if slo:
        simulate = simulated(found, spec.demand, slo, engine=spec.engine, spot_losses=losses)
        verify = simulate if args.verify else queued(found, spec.demand, slo, spot_losses=losses)
    fleet = plan_fleet(
        spec.demand,
        types,
        spec.limits if args.compatible else finest(spec.demand, types, spec.limits),
        verify=verify,
        slices=args.compatible,
        explain=not args.brief,
    )
    warnings = _warnings(fleet, slo, args.verify)
    if args.json:
        print_json(
            {
                "fleet": fleet,
                "demand": spec.demand,
                "types": types,
                "impossible": without,
                "verified": args.verify,
                "held_by": _held(args, bool(found)),
                "warnings": warnings,
                "prices": {one.type.name: one.price or "given" for one in found},
                "rests_on": {
                    one.type.name: {"efficiencies": one.efficiency.source, "card": one.known} for one in found
                },
                "caps": {
                    one.type.name: {"flops": one.cap.flops, "bandwidth": one.cap.bandwidth} for one in found if one.cap
                },
                "cleanest_hours": {one.card: one.cleanest for one in spec.offers if one.cleanest},
            }
        )
    else:
        print("\n".join([_text(args, spec, fleet, found, without), *(f"warning: {one}" for one in warnings)]))
    return 0


def _warnings(fleet: Fleet, slo: Slo | None, verified: bool) -> list[str]:
    risk = 1 - slo.share if slo else _RISK
    found = [
        f"{name}: more than the spares are gone {gone:.2%} of the time, expected at most {risk:.2%}: raise spot_losses "
        "or on_demand_share"
        for name, gone in fleet.spot_risk.items()
        if gone > risk
    ]
    if slo and slo.fluidity is not None and not verified:
        found.append(f"fluidity {slo.fluidity:g} of the SLO is not judged by the formula: --verify simulates it")
    return found


def _held(args: argparse.Namespace, estimated: bool) -> str:
    if args.verify:
        return "simulation"
    return "queues (M/M/c)" if estimated else "utilisation"


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
    for one in used:
        lines.append(f"price of {one.type.name}: {_price(one)}")
        if one.cap:
            lines.append(
                f"cap of {one.type.name}: rates are those under it, arithmetic at {one.cap.flops:.0%}, reading at "
                f"{one.cap.bandwidth:.0%} of the card's"
            )
    for card, known, efficiency in dict.fromkeys((one.card.name, one.known, one.efficiency) for one in used):
        factor = math.exp(_SURE * efficiency.spread)
        lines.append(f"rates on {card}: {efficiency.source}; nine in ten times are within x{factor:.2f}; card: {known}")
    lines += [
        f"cleanest hours of {one.card}: {', '.join(map(str, one.cleanest))} (from {min(one.carbon):g}, on average "
        f"{one.g_per_kwh:.0f} g/kWh)"
        for one in spec.offers
        if one.cleanest
    ]
    apart = ", fluidity apart" if "fluidity" in spec.slo else ""
    held = {
        "simulation": "verified by simulation",
        "queues (M/M/c)": f"where queues by a formula (M/M/c) keep the SLO{apart}; not simulated (--verify)",
        "utilisation": "as told; not simulated (rates are the spec's)",
    }
    return "\n".join([*lines, f"utilisation at most {fleet.utilisation:.0%}, {held[_held(args, bool(found))]}"])


def _price(one: Candidate) -> str:
    each = one.type.usd_per_h / one.type.devices
    if one.price is None:
        listed = ", ".join(f"{price.kind} {price.usd_per_h:g} ({price.date})" for price in one.card.prices)
        return f"{each:g} $/h of a device, given; listed: {listed or 'nothing'}"
    return f"{each:g} $/h of a device, {one.price.kind}, {one.price.provider}, {one.price.date}"
