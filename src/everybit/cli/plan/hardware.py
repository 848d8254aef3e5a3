"""`everybit plan hardware [CARD]`: the cards, or the figures of one and how each is known."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from everybit.cli.plan.options import add_json

if TYPE_CHECKING:
    from everybit.plan.hardware import Hardware


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "hardware",
        help="the cards, or one with the source of each figure",
        description="List the cards that come with everybit, or show one: figures, prices, and how each is known "
        "(measured, vendor or paper). A file of your own is checked for wrong units.",
    )
    parser.add_argument("card", nargs="?", metavar="CARD", help="a name, or FILE.toml")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import print_json
    from everybit.plan.hardware import cards, read_hardware

    if args.card:
        card = read_hardware(args.card)
        if args.json:
            print_json(_document(card))
        else:
            print(_one(card))
        return 0
    found = {name: read_hardware(name) for name in cards()}
    if args.json:
        print_json({name: _document(card) for name, card in found.items()})
    else:
        print(_all(found))
    return 0


def _document(card: Hardware) -> dict[str, Any]:
    from everybit.cli.plan.output import plain
    from everybit.plan.hardware import figures, trust

    document: dict[str, Any] = plain(card)
    document["provenance"] = {name: plain(trust(card, name)) for name in figures(card)}
    return document


def _all(found: dict[str, Hardware]) -> str:
    from everybit.cli.plan.output import figure, table
    from everybit.plan.hardware import weakest

    rows = []
    for name, card in found.items():
        if not card.plannable:
            rows.append([name, card.kind, "-", "-", "-", "-", "-", "not enough figures to plan with"])
            continue
        dtype = next((one for one in ("bf16", "fp16", "fp32") if one in card.flops), min(card.flops))
        memory = card.main_memory
        kinds = dict.fromkeys(price.kind for price in card.prices)
        prices = ", ".join(f"{kind} {card.price(kind).usd_per_h:g} ({card.price(kind).date})" for kind in kinds)
        rows.append(
            [
                name,
                card.kind,
                f"{figure(card.flops[dtype] / 1e12)} {dtype}",
                figure(memory.bytes / 1e9),
                figure(memory.bytes_per_s / 1e9),
                figure(card.tdp_w),
                weakest(card),
                prices or "no price",
            ]
        )
    return table(["card", "kind", "TFLOP/s", "GB", "GB/s", "W", "weakest figure", "$/h of a device"], rows)


def _one(card: Hardware) -> str:
    from everybit.plan.hardware import figures, trust

    rows = []
    for name in figures(card):
        known = trust(card, name)
        rows.append([name, _value(card, name), known.kind, known.source])
    for price in card.prices:
        said = f"{price.provider}; {price.source}"
        rows.append([f"price {price.kind}", f"{price.usd_per_h:g} $/h", price.date, said])
    head = f"{card.name} ({card.kind}, {card.devices_per_node} in a node)"
    lines = [head + (f": {card.note}" if card.note else "")]
    if not card.prices:
        rows.append(["price", "none known", "", "give --price"])
    header = ["figure", "value", "known", "source"]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(3)]
    for row in (header, *rows):
        lines.append(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip())
    return "\n".join(lines)


def _value(card: Hardware, name: str) -> str:
    kind, _, rest = name.partition(".")
    own, _, key = rest.rpartition(".")
    if kind == "flops":
        return f"{card.flops[rest] / 1e12:g} TFLOP/s"
    if kind == "memory":
        tier = next(one for one in card.memory if one.name == own)
        return f"{getattr(tier, key) / 1e9:g} GB" + ("/s" if key == "bytes_per_s" else "")
    if kind == "links":
        link = next(one for one in card.links if one.kind == own)
        return f"{getattr(link, key) * (1e6 if key == 'latency_s' else 1e-9):g} " + (
            "us" if key == "latency_s" else f"GB/s, joins {link.devices}"
        )
    return f"{getattr(card, name):g}" + (" W" if name.endswith("_w") else "")
