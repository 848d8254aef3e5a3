"""`everybit plan explain MODEL --on CARD --slo ...`: what binds, whether the SLO holds, what would be better."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from everybit.cli.plan.options import (
    add_cards,
    add_engine,
    add_json,
    add_load,
    add_model,
    add_money,
    add_split,
    calibrations_of,
    carbon_of,
    cards_of,
    load_of,
    one_width,
    price_of,
    slo_of,
    split_of,
    tell_formats,
    tell_price,
)
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.estimate import Estimate
    from everybit.plan.hardware import Hardware
    from everybit.plan.operators import Model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="what binds, whether the SLO holds and up to which load, and the next best alternative",
        description="Why a deployment is as fast as it is, which limit it keeps and up to how many users, and the best "
        "alternative for the same load: half or twice the devices, fewer bits, the other cards. The deployment is on "
        "the first --on; others are alternatives. An SLO that no split of a node keeps even for one user is refused.",
    )
    add_model(parser, several=False)
    add_cards(parser)
    parser.add_argument("--slo", metavar="TEXT", help="mean times to keep, such as ttft=500ms,tpot=50ms")
    add_load(parser)
    add_split(parser)
    add_engine(parser)
    add_money(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import plain, print_json
    from everybit.plan.estimate import estimate
    from everybit.plan.explain import explain
    from everybit.plan.widths import check_multiplied

    if "all" in args.on:
        raise SourceError("--on all: explain is of one card, the first --on; name it, then its alternatives")
    (width, model), (card, *others) = one_width(args), cards_of(args)
    check_multiplied(width, model, card)
    others, left_out = _can_have(width, model, others)
    carbon, pue = carbon_of(args)
    calibrations = calibrations_of(args, [card, *others])
    options: dict[str, Any] = {**load_of(args), "price": price_of(args.price), "g_per_kwh": carbon, "pue": pue}
    own = {**options, "calibration": calibrations.get(card.name)}
    first, gap = _limits(args.slo)
    _check_possible(model, card, first, gap, own)
    split = split_of(args)
    lines = explain(
        model,
        card,
        parallel=split,
        most_ttft_s=first,
        most_tpot_s=gap,
        others=others,
        calibrations=calibrations,
        **options,
    )
    lines += [*left_out, *(tell_price(args.price, one) for one in (card, *others))]
    lines.append(f"width: {tell_formats({width: model})}")
    if args.json:
        print_json({"lines": lines, "estimate": plain(estimate(model, card, parallel=split, **own))})
    else:
        print("\n".join(lines))
    return 0


def _can_have(width: str, model: Model, cards: list[Hardware]) -> tuple[list[Hardware], list[str]]:
    """Which alternatives can multiply the width, and a line for each that cannot."""
    from everybit.plan.widths import check_multiplied

    found, left_out = [], []
    for card in cards:
        try:
            check_multiplied(width, model, card)
            found.append(card)
        except SourceError as error:
            left_out.append(f"left out: {error}")
    return found, left_out


def _limits(text: str | None) -> tuple[float | None, float | None]:
    if text is None:
        return None, None
    slo = slo_of(text)
    if slo.end_s is not None or slo.fluidity is not None or "share" in text:
        raise SourceError(
            f"--slo {text}: explain knows ttft and tpot, as means; everybit plan simulate has e2e, fluidity and share"
        )
    return slo.first_s, slo.gap_s


def _check_possible(
    model: Model, card: Hardware, first: float | None, gap: float | None, options: dict[str, Any]
) -> None:
    """Raises: SourceError where no split of a node keeps the SLO for a single user, with the nearest that one does"""
    from everybit.plan.cost import Parallel
    from everybit.plan.estimate import estimate

    if first is None and gap is None:
        return
    alone: list[Estimate] = []
    for tp in (1 << i for i in range(card.devices_per_node.bit_length())):
        try:
            alone.append(estimate(model, card, parallel=Parallel(tp), **{**options, "concurrency": 1}))
        except SourceError:  # does not fit, or cannot be split so
            continue
    asked = [
        (name, most, key)
        for name, most, key in (("ttft", first, "ttft_s"), ("tpot", gap, "tpot_s"))
        if most is not None
    ]
    if not alone or any(all(getattr(one, key).value <= most for _, most, key in asked) for one in alone):
        return  # a model that does not fit is told by the estimate itself
    nearest = min(alone, key=lambda one: max(getattr(one, key).value / most for _, most, key in asked))
    said = []
    for name, most, key in asked:
        if (value := getattr(nearest, key).value) > most:
            binding = nearest.binding["first token" if name == "ttft" else "decode"][0]
            said.append(f"{name} {value * 1e3:.3g} ms > {most * 1e3:g} ms, mostly {binding}")
    works = ",".join(f"{name}={_outwards(max(most, getattr(nearest, key).value)):g}ms" for name, most, key in asked)
    raise SourceError(
        f"SLO impossible on {card.name}, even for one user and any split of a node: with tp {nearest.parallel.tp} "
        f"{' and '.join(said)}; nearest feasible: --slo {works}"
    )


def _outwards(seconds: float) -> float:
    """Milliseconds at one digit, on the side that works."""
    return math.ceil(seconds * 1e4 - 1e-6) / 10
