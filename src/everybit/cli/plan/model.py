"""`everybit plan model [MODEL]`: operators, bytes, parameters and cache; what was not used; without MODEL the names."""

from __future__ import annotations

import argparse
from typing import Any

from everybit.cli.plan.options import add_json, add_model, models_of
from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "model",
        help="operators, bytes, parameters and cache of a model",
        description="Read a config.json, an overlay or a name of the offline set, and show what the planner sees. "
        "Weights and fields that it does not use are listed. Without MODEL: the names of the offline set.",
    )
    add_model(parser, required=False)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import print_json
    from everybit.plan.model import describe, models

    if args.model is None:
        if (args.bits, args.kv_bits, args.activation_bits) != (None,) * 3:
            raise SourceError("--bits and the like arrived without MODEL: say whose widths they are")
        print_json(models()) if args.json else print("\n".join(models()))
        return 0
    found = {width: describe(model) for width, model in models_of(args).items()}
    if args.json:
        print_json(found)
    else:
        print("\n\n".join(_text(width, one) for width, one in found.items()))
    return 0


def _text(width: str, one: dict[str, Any]) -> str:
    from everybit.cli.plan.output import gb, table

    lines = [
        f"{one['name']}, {width}",
        f"  parameters         {one['parameters']:,} ({one['active_parameters']:,} multiplied for a token)",
        f"  weights            {gb(one['weight_bytes'])} GB, {one['bits_per_weight']:.2f} bits each",
        f"  cache              {one['cache_bytes_per_token']:,.0f} bytes a token, {one['kv_bits']:g} bits a number"
        + (f"; {one['state_bytes_per_sequence']:,.0f} bytes a sequence" if one["state_bytes_per_sequence"] else ""),
        f"  context            {one['context']:,} tokens; vocabulary {one['vocabulary']:,}, hidden {one['hidden']:,}",
        f"  activations        {one['activation_bits']:g} bits",
    ]
    rows = []
    for layer in one["layers"]:
        experts = layer["experts"]
        for linear in layer["linears"]:
            rows.append(_row(f"{layer['count']} x", linear))
        for linear in experts["linears"] if experts else ():
            rows.append(_row(f"{layer['count']} x {experts['count']} ({experts['chosen']} chosen)", linear))
        if attention := layer["attention"]:
            seen = f", window {attention['window']}" if attention["window"] else ""
            heads = f"{attention['heads']} heads, {attention['kv_heads']} of the cache{seen}"
            rows.append([f"{layer['count']} x", "attention", heads, "", ""])
        if state := layer["state"]:
            rows.append([f"{layer['count']} x", "state", f"{state['numbers']:,} numbers", "", ""])
    lines += ["", table(["layers", "operator", "out x into", "bits", "split"], rows)]
    if one["unknown"]:
        lines += ["", f"not used of the config: {', '.join(one['unknown'])}"]
    return "\n".join(lines)


def _row(count: str, linear: dict[str, Any]) -> list[str]:
    return [count, linear["name"], f"{linear['out']:,} x {linear['into']:,}", f"{linear['bits']:.3g}", linear["split"]]
