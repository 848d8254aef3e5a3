"""`everybit plan finetune MODEL --method lora --on CARD`: memory, time, money and CO2 of a fine-tune."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from everybit.cli.options import positive_int
from everybit.cli.plan.options import (
    add_cards,
    add_json,
    add_money,
    carbon_of,
    card_of,
    number,
    tell_unknown,
    usd_per_h_of,
)
from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.plan.finetune import Devices, FinetuneCost
    from everybit.plan.finetune_memory import Offload, Recipe
    from everybit.plan.finetune_moe import MoeLaw
    from everybit.plan.hardware import Hardware

_MFU = 0.4
_RANK = 16


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="memory, time, $ and CO2 of full, LoRA and QLoRA",
        description="Memory of a device by part, the batch that fits, and what training on so many tokens takes. Time "
        "rests on --mfu, the share of the card's peak that training reaches: measure it where you can. Adapters are "
        'those of "all-linear" in PEFT.',
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, a config.json, or a name")
    add_cards(parser, several=False)
    group = parser.add_argument_group("training")
    group.add_argument("--method", choices=("full", "lora", "qlora"), required=True)
    group.add_argument("--tokens", type=number, required=True, metavar="N", help="in all, epochs counted, such as 1e8")
    group.add_argument("--devices", type=positive_int, default=1, metavar="N", help="(default 1)")
    group.add_argument("--sequence", type=positive_int, default=2048, metavar="N", help="tokens (default 2048)")
    group.add_argument("--batch", type=positive_int, metavar="N", help="sequences a device (default: what fits)")
    group.add_argument("--accumulate", type=positive_int, default=1, metavar="N", help="batches a step (default 1)")
    group.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw, adam8bit, sgd")
    group.add_argument("--zero", type=int, default=0, metavar="STAGE", help="0 to 3 (default 0)")
    group.add_argument("--recompute", default="selective", metavar="WHAT", help="none, selective (default), full")
    group.add_argument("--rank", type=positive_int, metavar="N", help=f"of adapters (default {_RANK})")
    group.add_argument("--experts", action="store_true", help="adapters beside routed experts, too")
    group.add_argument(
        "--base-bits", type=number, metavar="BITS", help="of frozen weights (lora 16, qlora NF4's 4.127)"
    )
    group.add_argument("--mfu", type=number, metavar="X", help=f"share of peak FLOP/s (default {_MFU})")
    group.add_argument(
        "--moe-runs",
        metavar="FILE",
        help="of a model with experts: measured runs of this method on this card (csv: memory_bytes, model_bytes, "
        "sequence, sparsity, batch, queries_per_s); batch and time are by the law fitted to them, not by --mfu",
    )
    away = parser.add_argument_group("offload")
    away.add_argument("--offload", metavar="TIER", help="a slower memory of the card, such as host")
    away.add_argument("--offload-weights", action="store_true", help="the weights go too")
    away.add_argument("--hidden", type=number, metavar="X", help="part of the update beside the passes (default 0)")
    add_money(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.cli.plan.output import print_json
    from everybit.plan.finetune import finetune
    from everybit.plan.finetune_memory import Recipe
    from everybit.plan.model import read_model

    if args.method == "full" and args.rank is not None:
        raise SourceError(f"--rank {args.rank}: a full fine-tune has no adapters; leave it out")
    model, card = read_model(args.model), card_of(args)
    tell_unknown([model])
    recipe = Recipe(
        method=args.method,
        sequence=args.sequence,
        batch=args.batch,
        accumulate=args.accumulate,
        optimizer=args.optimizer,
        zero=args.zero,
        recompute=args.recompute,
        rank=args.rank or _RANK,
        experts=args.experts,
        base_bits=args.base_bits,
        offload=_offload(args, card),
    )
    devices = _devices(args, card)
    found = finetune(model, recipe, devices, args.tokens, _law(args))
    if not found.fits:
        raise SourceError(f"{found.why}; nearest that fits: {found.nearest or 'none on these devices'}")
    if args.json:
        print_json({**_known(args, card, found), "cost": found, "recipe": recipe})
    else:
        print(_text(args, model.name, card, recipe, devices, found))
    return 0


def _offload(args: argparse.Namespace, card: Hardware) -> Offload | None:
    from everybit.plan.finetune_memory import Offload

    if args.offload is None:
        if args.offload_weights or args.hidden is not None:
            raise SourceError("--offload-weights and --hidden go with --offload")
        return None
    tier = next((one for one in card.memory[1:] if one.name == args.offload), None)
    if tier is None:
        names = ", ".join(one.name for one in card.memory[1:]) or "none"
        raise SourceError(f"--offload {args.offload}: {card.name} has no such slower memory, expected {names}")
    link = next((one.bytes_per_s for one in card.links if one.kind == "pcie"), tier.bytes_per_s)
    return Offload(tier.bytes, tier.bytes_per_s, link, args.offload_weights, args.hidden or 0.0)


def _law(args: argparse.Namespace) -> MoeLaw | None:
    from everybit.plan.finetune_moe import fit_moe_law, read_moe_runs

    if args.moe_runs is None:
        return None
    if args.mfu is not None:
        raise SourceError("--mfu and --moe-runs were given: expected one, the time is by either")
    runs = read_moe_runs(args.moe_runs)
    law = fit_moe_law(runs)
    lengths = sorted(run.sequence for run in runs)
    if not lengths[0] <= args.sequence <= lengths[-1]:  # queries/s of the law know no length
        raise SourceError(
            f"--sequence {args.sequence}: the runs of --moe-runs have {lengths[0]} to {lengths[-1]} tokens: pass one "
            "between, or measure it"
        )
    return law


def _devices(args: argparse.Namespace, card: Hardware) -> Devices:
    from everybit.plan.efficiency import prior
    from everybit.plan.finetune import Devices

    carbon, pue = carbon_of(args)
    link, assumed = card.link(args.devices) if args.devices > 1 else None, prior(card)
    return Devices(
        memory_bytes=card.main_memory.bytes,
        flops=card.flops_of("bf16" if "bf16" in card.flops else "fp16" if "fp16" in card.flops else "fp32"),
        count=args.devices,
        mfu=_MFU if args.mfu is None else args.mfu,
        network_bytes_per_s=link.bytes_per_s * assumed.link if link else None,
        network_latency_s=link.latency_s if link and link.latency_s is not None else assumed.link_s,
        usd_per_h=usd_per_h_of(args.price, card) or 0.0,
        power_w=card.tdp_w or 0.0,
        pue=pue,
        gco2_per_kwh=carbon.value if carbon else 0.0,
    )


def _known(args: argparse.Namespace, card: Hardware, found: FinetuneCost) -> dict[str, float | None]:
    """Zero is no answer where the price or the power is unknown."""
    return {
        "usd": None if usd_per_h_of(args.price, card) is None else found.usd,
        "kwh": None if card.tdp_w is None else found.kwh,
        "gco2": None if card.tdp_w is None or args.carbon is None else found.gco2,
    }


def _text(
    args: argparse.Namespace, model: str, card: Hardware, recipe: Recipe, devices: Devices, found: FinetuneCost
) -> str:
    from everybit.cli.plan.output import figure, gb
    from everybit.plan.hardware import weakest

    assert found.seconds is not None
    parts, known = found.parts, _known(args, card, found)
    named = ("weights", "gradients", "optimizer", "working", "reserve", "activations", "offloaded")
    said = {
        "money": "no price known: give --price" if known["usd"] is None else f"{known['usd']:,.2f} $",
        "energy": "power unknown" if known["kwh"] is None else f"{known['kwh']:,.1f} kWh at full power",
        "CO2": "give --carbon" if known["gco2"] is None else f"{known['gco2'] / 1e3:,.1f} kg",
    }
    rests, network = f"mfu {devices.mfu:g} (given or assumed, not measured)", []
    if args.moe_runs:
        rests = f"the law fitted to {args.moe_runs}"
    if devices.network_bytes_per_s:
        rate = devices.network_bytes_per_s / 1e9
        network = [f"  network              {figure(found.network_s)} s of a step, at {rate:.3g} GB/s a device"]
        rests += "; the prior's share of the link"
    lines = [
        f"{recipe} of {model}: {args.devices} x {card.name}, {found.trained:,} weights trained",
        f"  memory of a device   {gb(parts.total)} of {gb(card.main_memory.bytes)} GB: "
        + ", ".join(f"{name} {gb(getattr(parts, name))}" for name in named if getattr(parts, name)),
        f"  batch                {found.batch} sequences of {recipe.sequence} tokens a device",
        f"  step                 {figure(found.step_s)} s, waits for {found.bound}; "
        f"{figure(found.tokens_per_s)} tokens/s",
        *network,
        f"  time                 {figure(found.seconds / 3600)} h for {args.tokens:,.0f} tokens",
        *(f"  {name:<20} {value}" for name, value in said.items()),
        f"rests on: {rests}; figures of the card: {weakest(card)}",
    ]
    return "\n".join(lines)
