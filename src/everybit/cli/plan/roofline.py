"""`everybit plan roofline MODEL --on CARD`: where the operators of a decoding step and of a prompt lie."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.cli.options import positive_int
from everybit.cli.plan.options import (
    add_cards,
    add_engine,
    add_json,
    add_model,
    add_split,
    calibrations_of,
    card_of,
    one_width,
    split_of,
    tell_formats,
)
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.estimate import Point, Roofline

Axis = Callable[[float], float]  # a value -> its place
_MOST_USERS = 1 << 20  # as of an estimate
_WIDE, _HIGH, _EDGE = 760, 460, 60
_COLOURS = {"decode": "#c2410c", "prefill": "#1d4ed8"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "roofline",
        help="what binds each operator, as a table and a plot",
        description="FLOP a byte and FLOP/s of each operator of one decoding step and of one prompt. Sizes of points "
        "are their shares of the time.",
    )
    add_model(parser, several=False)
    add_cards(parser, several=False)
    group = parser.add_argument_group("load")
    group.add_argument("--users", type=positive_int, default=1, metavar="N", help="in a decoding step (default 1)")
    group.add_argument("--prompt", type=positive_int, default=1024, metavar="N", help="tokens (default 1024)")
    add_split(parser)
    add_engine(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import figure, print_json, table, write_text
    from everybit.plan.estimate import roofline
    from everybit.plan.widths import check_multiplied

    (width, model), card = one_width(args), card_of(args)
    check_multiplied(width, model, card)
    if args.prompt > model.context:
        raise SourceError(f"--prompt {args.prompt}: {model.name} has a context of {model.context} tokens: shorten it")
    if args.users > _MOST_USERS:
        raise SourceError(f"--users {args.users}: expected at most {_MOST_USERS}")
    found = roofline(
        model,
        card,
        parallel=split_of(args),
        concurrency=args.users,
        prompt=args.prompt,
        engine=args.engine,
        calibration=calibrations_of(args, [card]).get(card.name),
    )
    if args.svg:
        write_text(args.svg, draw(found, f"{model.name} on {card.name}, {args.users} users, {args.prompt} tokens"))
    if args.json:
        print_json(found)
        return 0
    print(
        f"{model.name} on {card.name}: {found.flops / 1e12:g} TFLOP/s and {found.bytes_per_s / 1e9:g} GB/s at most, ",
        end="",
    )
    print(f"ridge at {found.flops / found.bytes_per_s:.0f} FLOP a byte")
    rows = [
        [phase, one.name, figure(one.intensity), figure(one.flops / 1e12), figure(one.seconds * 1e3), one.bound]
        for phase in _COLOURS
        for one in getattr(found, phase)
    ]
    print(table(["phase", "operator", "FLOP a byte", "TFLOP/s", "ms", "bound by"], rows))
    print(f"width: {tell_formats({width: model})}")
    if args.svg:
        print(f"written: {args.svg}")
    return 0


def draw(found: Roofline, title: str) -> str:
    """An SVG with logarithmic axes."""
    ridge = found.flops / found.bytes_per_s
    points = [(phase, one) for phase in _COLOURS for one in getattr(found, phase) if one.flops > 0]
    xs = [one.intensity for _, one in points] + [ridge]
    ys = [one.flops for _, one in points] + [found.flops]
    low_x, high_x = _decades(xs)
    low_y, high_y = _decades(ys)

    def x(value: float) -> float:
        return _EDGE + (math.log10(value) - low_x) / (high_x - low_x) * (_WIDE - 2 * _EDGE)

    def y(value: float) -> float:
        return _HIGH - _EDGE - (math.log10(value) - low_y) / (high_y - low_y) * (_HIGH - 2 * _EDGE)

    left, right = 10.0**low_x, 10.0**high_x
    begin = max(left, 10.0**low_y / found.bytes_per_s)
    roof = [(begin, begin * found.bytes_per_s), (ridge, found.flops), (right, found.flops)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_HIGH}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDE}" height="{_HIGH}" fill="white"/>',
        f'<text x="{_EDGE}" y="24" font-size="15">{escape(title)}</text>',
        *_grid(low_x, high_x, low_y, high_y, x, y),
        '<polyline fill="none" stroke="#111" stroke-width="2" points="'
        + " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
        + '"/>',
        *(_dot(phase, one, found, x, y) for phase, one in points),
        *(
            f'<text x="{_WIDE - _EDGE - 70}" y="{_HIGH - _EDGE - 24 + 16 * i}" fill="{colour}">{phase}</text>'
            for i, (phase, colour) in enumerate(_COLOURS.items())
        ),
        f'<text x="{_WIDE / 2}" y="{_HIGH - 12}" text-anchor="middle">FLOP a byte</text>',
        f'<text x="16" y="{_HIGH / 2}" text-anchor="middle" transform="rotate(-90 16 {_HIGH / 2})">FLOP/s</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _decades(values: list[float]) -> tuple[int, int]:
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 0.1)


def _grid(low_x: int, high_x: int, low_y: int, high_y: int, x: Axis, y: Axis) -> Iterator[str]:
    for power in range(low_x, high_x + 1):
        at = x(10.0**power)
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_EDGE}" y2="{_HIGH - _EDGE}" stroke="#ddd"/>'
        yield f'<text x="{at:.1f}" y="{_HIGH - _EDGE + 16}" text-anchor="middle">1e{power}</text>'
    for power in range(low_y, high_y + 1):
        at = y(10.0**power)
        yield f'<line x1="{_EDGE}" x2="{_WIDE - _EDGE}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_EDGE - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>'


def _dot(phase: str, one: Point, found: Roofline, x: Axis, y: Axis) -> str:
    share = one.seconds / sum(each.seconds for each in getattr(found, phase))
    said = escape(f"{phase}: {one.name}, {one.seconds * 1e3:.3g} ms, bound by {one.bound}")
    return (
        f'<circle cx="{x(one.intensity):.1f}" cy="{y(one.flops):.1f}" r="{3 + 12 * math.sqrt(share):.1f}" '
        f'fill="{_COLOURS[phase]}" fill-opacity="0.6"><title>{said}</title></circle>'
    )
