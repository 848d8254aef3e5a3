"""`everybit plan memory MODEL --on CARD`: what fits, how many sequences beside it, and if nothing does, why not."""

from __future__ import annotations

import argparse

from everybit.cli.options import positive_int
from everybit.cli.plan.options import (
    add_cards,
    add_json,
    add_model,
    add_split,
    cards_of,
    models_of,
    split_of,
    tell_formats,
)
from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="what fits, how many sequences, why not",
        description="Weights, cache, activations and reserve on each device, and how many sequences fit.",
    )
    add_model(parser, activations=False)
    add_cards(parser)
    parser.add_argument("--context", type=positive_int, metavar="N", help="tokens a sequence (default: the model's)")
    add_split(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import gb, plain, print_json, table
    from everybit.plan.memory import fit

    models, split = models_of(args), split_of(args)
    found = [
        (card, width, fit(model, card, split, context=args.context))
        for card in cards_of(args)
        for width, model in models.items()
    ]
    if not any(one.sequences for _, _, one in found):
        largest = max(found, key=lambda one: one[2].capacity_bytes)[2].why
        raise SourceError(largest if len(found) == 1 else f"none of {len(found)} fits; on the largest: {largest}")
    if args.json:
        print_json([{"hardware": card.name, "bits": width, **plain(one)} for card, width, one in found])
        return 0
    rows = [
        [card.name, width, str(one.sequences), *map(gb, (one.weight_bytes, one.cache_bytes, one.activation_bytes)),
         gb(one.reserve_bytes), gb(one.capacity_bytes)]
        for card, width, one in found
    ]  # fmt: skip
    print(f"sequences of {found[0][2].context:,} tokens; GB on each of {split.devices} devices")
    header = ["card", "bits", "sequences", "weights", "cache of one", "activations", "reserve", "memory"]
    print(table(header, rows))
    for card, width, one in found:
        if one.why:
            print(f"{card.name}, {width}: {one.why}")
    print(f"widths: {tell_formats(models)}")
    return 0
