"""`everybit plan estimate MODEL --on CARD`: latency, throughput, money, energy and CO2 under steady load."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from everybit.cli.options import positive_int
from everybit.cli.plan.options import (
    add_cards,
    add_engine,
    add_json,
    add_load,
    add_model,
    add_money,
    add_split,
    bits_number,
    calibrations_of,
    carbon_of,
    cards_of,
    formats,
    load_of,
    models_of,
    number,
    price_of,
    split_of,
    tell_formats,
    tell_price,
)
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.estimate import Estimate
    from everybit.plan.hardware import Hardware


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="latency, tokens/s, $, joules and CO2 of cards and precisions",
        description="The steady state of users who each ask anew when answered, in closed form: a row for each card "
        "and width, with intervals that should hold the truth in nine of ten cases.",
    )
    add_model(parser)
    add_cards(parser)
    add_load(parser)
    add_split(parser)
    add_engine(parser)
    add_money(parser)
    group = parser.add_argument_group("variants")
    group.add_argument("--offload", action="store_true", help="stream the weights that do not fit from slower memory")
    group.add_argument("--drafts", type=positive_int, metavar="N", help="speculate: tokens drafted a step")
    group.add_argument("--acceptance", type=number, metavar="X", help="chance that a draft is right")
    group.add_argument("--draft-bits", type=bits_number, metavar="BITS", help="that draft")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import plain, print_json
    from everybit.plan.estimate import estimate
    from everybit.plan.speculation import speculation_of
    from everybit.plan.widths import check_multiplied

    models, cards, split = models_of(args), cards_of(args), split_of(args)
    calibrations = calibrations_of(args, cards)
    price, (carbon, pue), speculation = (
        price_of(args.price),
        carbon_of(args),
        speculation_of(args.drafts, args.acceptance, args.draft_bits),
    )
    done: list[tuple[str, Estimate]] = []
    failed: list[tuple[Hardware, str, str]] = []
    for card in cards:
        for width, model in models.items():
            try:
                check_multiplied(width, model, card)
                found = estimate(
                    model,
                    card,
                    parallel=split,
                    calibration=calibrations.get(card.name),
                    price=price,
                    g_per_kwh=carbon,
                    pue=pue,
                    offload=args.offload,
                    speculation=speculation,
                    **load_of(args),
                )
            except SourceError as error:
                failed.append((card, width, str(error)))
            else:
                done.append((width, found))
    if not done:
        why = max(failed, key=lambda one: one[0].main_memory.bytes)[2]
        raise SourceError(why if len(failed) == 1 else f"none of {len(failed)} is possible; on the largest: {why}")
    asked = {one.hardware for _, one in done}
    prices = list(dict.fromkeys(tell_price(args.price, card) for card in cards if card.name in asked))
    if args.json:
        print_json(
            {
                "estimates": [{"bits": width, **formats(models[width]), **plain(one)} for width, one in done],
                "prices": prices,
                "impossible": [{"hardware": card.name, "bits": width, "why": why} for card, width, why in failed],
                "unknown": list(next(iter(models.values())).unknown),
            }
        )
    else:
        print("\n".join([*_text(args, done, failed), *prices, f"widths: {tell_formats(models)}"]))
    return 0


def _text(
    args: argparse.Namespace, done: list[tuple[str, Estimate]], failed: list[tuple[Hardware, str, str]]
) -> list[str]:
    from everybit.cli.plan.output import interval, table

    rows = []
    for width, one in done:
        rows.append(
            [
                one.hardware,
                width,
                f"{one.running:.0f}",
                interval(one.ttft_s, 1e3),
                interval(one.tpot_s, 1e3),
                interval(one.tokens_per_s),
                interval(one.usd_per_mtok),
                interval(one.joules_per_token),
                *([interval(one.gco2e_per_token)] if args.carbon else []),
                "{} {:.0%}".format(*one.binding["decode"]),
                one.known,
                one.card,
            ]
        )
    header = ["card", "bits", "running", "TTFT ms", "TPOT ms", "tokens/s", "$/Mtok", "J/token"]
    header += [*(["gCO2e/token"] if args.carbon else []), "decoding is bound by", "efficiencies", "card's figures"]
    first = done[0][1]
    lines = [
        f"{first.model}, {first.concurrency} users, {first.prompt} + {first.output} tokens, "
        f"{first.parallel.devices} x each card, engine {first.engine}; 90 % intervals",
        table(header, rows),
    ]
    lines += [f"{card.name}, {width}: {why}" for card, width, why in failed]
    for source in dict.fromkeys(one.source for _, one in done):
        cards = ", ".join(dict.fromkeys(one.hardware for _, one in done if one.source == source))
        lines.append(f"efficiencies on {cards}: {source}")
    return lines
