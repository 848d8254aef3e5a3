"""`everybit plan memory MODEL --on CARD`: what fits, how many sequences beside it, and if nothing does, why not."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from everybit.plan.cost import Parallel
    from everybit.plan.hardware import Hardware
    from everybit.plan.memory import Fit
    from everybit.plan.operators import Model


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

    models, split = models_of(args), split_of(args)
    for model in models.values():
        if args.context and args.context > model.context:
            raise SourceError(
                f"--context {args.context}: {model.name} has a context of {model.context} tokens: shorten it"
            )
    found = [
        (card, width, _fit(width, model, card, split, args.context))
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


def _fit(width: str, model: Model, card: Hardware, split: Parallel, context: int | None) -> Fit:
    """No sequences, too, at a width or a split that the model or the card cannot have. Raises: SourceError"""
    from everybit.plan.cost import Cost
    from everybit.plan.memory import fit
    from everybit.plan.widths import check_multiplied

    found = fit(model, card, split, context=context)
    try:
        check_multiplied(width, model, card)
        Cost(model, card, split)
    except SourceError as error:
        return replace(found, sequences=0, why=str(error))
    return found
