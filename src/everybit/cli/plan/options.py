"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.options import positive_int
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.calibrate import Calibration
    from everybit.plan.cost import Parallel
    from everybit.plan.efficiency import Efficiency
    from everybit.plan.hardware import Hardware
    from everybit.plan.operators import Model
    from everybit.plan.power import Interval
    from everybit.plan.simulate.metrics import Slo
    from everybit.plan.widths import Width

_BITS = "4, 2-8, everybit3-8, fp8, w8a8, w4a16, int4, 4,8,16, or a PLAN.json of everybit allocate"
_WIDE = {"fp8": 8.0, "int8": 8.0, "fp16": 16.0, "bf16": 16.0}


def add_model(
    parser: argparse.ArgumentParser, several: bool = True, activations: bool = True, required: bool = True
) -> None:
    """`several`: --bits may name more than one width."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="a folder with config.json, a config.json, an overlay, or a name (everybit plan model lists them)",
    )
    group = parser.add_argument_group("widths")
    group.add_argument(
        "--bits",
        metavar="BITS",
        help=f"of weights: {_BITS}; of an overlay its own precisions (default: the checkpoint's); fp8 is w8a8, other "
        "widths leave activations at 16 bits" + ("; a row for each" if several else ""),
    )
    group.add_argument(
        "--kv-bits", type=bits_or_format, metavar="BITS", help="of the KV cache, or fp8 (default: the checkpoint's)"
    )
    if activations:
        group.add_argument(
            "--activation-bits", type=bits_or_format, metavar="BITS", help="of what weights are multiplied with, or fp8"
        )


def add_cards(parser: argparse.ArgumentParser, several: bool = True) -> None:
    parser.add_argument(
        "--on",
        action="append",
        required=True,
        metavar="CARD",
        help="a card's name or FILE.toml (everybit plan hardware lists them)"
        + ("; may be repeated; all: every card" if several else ""),
    )


def add_split(parser: argparse.ArgumentParser, *names: str) -> None:
    """Of `tp`, `pp`, `dp` (default: all)."""
    said = {
        "tp": "devices that share each operator",
        "pp": "groups of them that share the layers",
        "dp": "groups that share the requests; experts are spread over the devices of all",
    }
    group = parser.add_argument_group("parallelism")
    for name in names or said:
        group.add_argument(f"--{name}", type=positive_int, default=1, metavar="N", help=f"{said[name]} (default 1)")


def add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--users", type=positive_int, default=1, metavar="N", help="who each ask anew (default 1)")
    group.add_argument("--prompt", type=positive_int, default=1024, metavar="N", help="tokens (default 1024)")
    group.add_argument("--output", type=positive_int, default=256, metavar="N", help="tokens (default 256)")


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("efficiencies")
    group.add_argument("--engine", default="any", metavar="NAME", help="any, everybit, vllm, sglang, trtllm")
    group.add_argument(
        "--calibration", action="append", default=[], metavar="FILE", help="of everybit plan calibrate; may be repeated"
    )


def add_money(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("money and CO2")
    group.add_argument(
        "--price", default="on-demand", metavar="PRICE", help="on-demand, spot, reserved, or $/h of one device"
    )
    group.add_argument("--carbon", metavar="G/KWH", help="grams of CO2e per kWh: 400, 400+-50 or 350-450")
    group.add_argument(
        "--pue", type=number, metavar="X", help="power of the building over its machines', for --carbon (default 1)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


# --- values
def number(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number")
    return value


def bits_number(text: str) -> float:
    """An argparse type: a number of bits."""
    value = number(text)
    if not 1 <= value <= 32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected bits from 1 to 32")
    return value


def bits_or_format(text: str) -> float:
    """An argparse type: bits of activations or of a cache, as a number or a format."""
    try:
        return _WIDE[text] if text in _WIDE else bits_number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a number from 1 to 32 or one of {', '.join(_WIDE)}"
        ) from None


def widths(text: str | None) -> list[Width]:
    """What --bits names: numbers, formats, the path of a plan; None: the checkpoint's own. Raises: SourceError"""
    if text is None:
        return [None]
    if text.endswith(".json"):
        return [Path(text).expanduser()]
    found: list[Width] = []
    for part in text.split(","):
        match = re.fullmatch(r"(everybit)?(\d{1,2})-(?:everybit)?(\d{1,2})", part.strip())
        if match:
            low, high = int(match[2]), int(match[3])
            if not 1 <= low <= high <= 32:
                raise SourceError(f"--bits {part}: expected a range such as 2-8, from low to high")
            found += [f"everybit{one}" if match[1] else one for one in range(low, high + 1)]
        else:
            found.append(_width(part.strip()))
    if len(set(found)) < len(found):
        raise SourceError(f"--bits {text}: a width twice, expected each once")
    return found


def _width(text: str) -> Width:
    try:
        value = float(text)
    except ValueError:
        if not text:
            raise SourceError(f"--bits: an empty width, expected {_BITS}") from None
        return text
    if not 1 <= value <= 32:
        raise SourceError(f"--bits {text}: expected 1 to 32 bits a weight")
    return int(value) if value.is_integer() else value


def model_of(args: argparse.Namespace) -> Model:
    """The one model that a command takes. Raises: SourceError, ModelError and of overlays others"""
    return one_width(args)[1]


def one_width(args: argparse.Namespace) -> tuple[str, Model]:
    """The one model that a command takes, and what its width is called. Raises: as `model_of`"""
    found = models_of(args)
    if len(found) > 1:
        raise SourceError(f"--bits {args.bits}: this command takes one width, {len(found)} were given")
    return next(iter(found.items()))


def models_of(args: argparse.Namespace) -> dict[str, Model]:
    """By width, in the order given. Fields of the config that were not used are told on stderr."""
    from everybit.plan.widths import read_at

    models = {}
    for width in widths(args.bits):
        model = read_at(args.model, width, args.kv_bits, getattr(args, "activation_bits", None))
        models[_label(width, model)] = model
    tell_unknown(models.values())
    return models


def formats(model: Model) -> dict[str, float]:
    """Bits of the weights in layers (scales counted), of what they are multiplied with, and of the cache."""
    linears = [(one, layer.count) for layer in model.layers for one in layer.linears]
    linears += [
        (one, layer.count * layer.experts.count)
        for layer in model.layers
        if layer.experts
        for one in layer.experts.linears
    ]
    stored = sum(one.bytes * 8 * count for one, count in linears) / sum(one.weights * count for one, count in linears)
    return {"weight_bits": stored, "activation_bits": model.activation_bits, "kv_bits": model.kv_bits}


def tell_formats(models: dict[str, Model]) -> str:
    said = (
        "{}: {weight_bits:.3g}-bit weights x {activation_bits:g}-bit activations, {kv_bits:g}-bit cache".format(
            width, **formats(model)
        )
        for width, model in models.items()
    )
    return "; ".join(said)


def _label(width: Width, model: Model) -> str:
    if width is None:
        return f"{8 * model.weight_bytes / model.parameters:.3g} bits (own)"
    return f"{width:g} bits" if isinstance(width, int | float) else str(width)


def tell_unknown(models: Iterable[Model]) -> None:
    model = next(iter(models))
    if model.unknown:
        print(f"plan: {model.name}: not used of the config: {', '.join(model.unknown)}", file=sys.stderr)


def card_of(args: argparse.Namespace) -> Hardware:
    """The one card that a command takes. Raises: SourceError"""
    from everybit.plan.hardware import read_hardware

    if len(args.on) > 1:
        raise SourceError(f"--on was given {len(args.on)} times: this command takes one card")
    return read_hardware(args.on[0])


def cards_of(args: argparse.Namespace) -> list[Hardware]:
    """Raises: SourceError"""
    from everybit.plan.hardware import cards, read_hardware

    if "all" in args.on:
        return [card for card in map(read_hardware, cards()) if card.plannable]
    found = [read_hardware(one) for one in args.on]
    names = [card.name for card in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SourceError(f"--on: {twice} was given twice, expected each card once (by its name, not its file's)")
    return found


def split_of(args: argparse.Namespace) -> Parallel:
    """Raises: SourceError"""
    from everybit.plan.cost import Parallel

    return Parallel(args.tp, getattr(args, "pp", 1), getattr(args, "dp", 1))


def calibrations_of(args: argparse.Namespace, cards: Iterable[Hardware]) -> dict[str, Calibration]:
    """By the card's name. Raises: SourceError for one that no card and engine of the command has"""
    from everybit.plan.calibrate import read_calibration

    found, names = {}, [card.name for card in cards]
    for path in args.calibration:
        one = read_calibration(path)
        if one.engine != args.engine or one.hardware not in names:
            raise SourceError(
                f"--calibration {path}: of {one.hardware} x {one.engine}, asked is {', '.join(names)} x {args.engine}: "
                "pass --engine and --on of the calibration"
            )
        if one.hardware in found:
            raise SourceError(f"--calibration {path}: a second one of {one.hardware}: pass one for each card")
        found[one.hardware] = one
    return found


def efficiency_of(args: argparse.Namespace, card: Hardware, model: Model) -> Efficiency:
    """The calibrated one, or the prior, as it holds for the model. Raises: SourceError"""
    from everybit.plan.estimate import efficiencies

    calibration = calibrations_of(args, [card]).get(card.name)
    return efficiencies(model, card, args.engine, calibration, split_of(args)).efficiency


def price_of(text: str) -> str | float:
    """A kind of price, or $/h. Raises: SourceError"""
    from everybit.plan.hardware import PRICES

    if text in PRICES:
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1000:
        raise SourceError(f"--price {text}: expected {', '.join(PRICES)}, or $/h of one device from 0 to 1000")
    return value + 0.0  # 0 of -0


def usd_per_h_of(text: str, card: Hardware) -> float | None:
    """Of one device; None where the card lists no such price. Raises: SourceError"""
    price = price_of(text)
    if isinstance(price, float):
        return price
    return card.price(price).usd_per_h if any(one.kind == price for one in card.prices) else None


def tell_price(text: str, card: Hardware) -> str:
    """Of one device: where it stands and since when, or which kinds are known instead. Raises: SourceError"""
    price = price_of(text)
    if isinstance(price, float):
        return f"price: {price:g} $/h of one device, as given"
    kinds = {one.kind: card.price(one.kind) for one in card.prices}
    if one := kinds.get(price):
        return f"price of {card.name}: {one.usd_per_h:g} $/h {one.kind}, {one.provider}, {one.date}"
    known = ", ".join(f"{kind} ({one.usd_per_h:g} $/h, {one.date})" for kind, one in kinds.items())
    return f"price of {card.name}: no {price} one is known, {f'only {known}' if known else 'nor another'}: give $/h"


def carbon_of(args: argparse.Namespace) -> tuple[Interval | None, float]:
    """g CO2e/kWh, and the power of the building over its machines'. Raises: SourceError"""
    from everybit.bench.energy import parse_intensity
    from everybit.plan.power import Interval

    if args.pue is not None and not (args.carbon and 1 <= args.pue <= 5):
        raise SourceError(f"--pue {args.pue:g}: expected 1 to 5, and --carbon")
    return Interval(*parse_intensity(args.carbon)) if args.carbon else None, args.pue or 1.0


def slo_of(text: str) -> Slo:
    """Of `ttft=200ms,tpot=50ms,e2e=5s,fluidity=0.9,share=0.99`. Raises: SourceError"""
    from everybit.bench.targets import parse_slo
    from everybit.plan.simulate.metrics import Slo

    found = parse_slo(text)
    first, gap, end = (ns and ns / 1e9 for ns in (found.first_ns, found.gap_ns, found.end_ns))
    return Slo(first, gap, end, found.fluidity, found.share)


def load_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"concurrency": args.users, "prompt": args.prompt, "output": args.output, "engine": args.engine}
