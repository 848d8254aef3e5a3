"""`everybit plan ...`: the cheapest deployment that keeps its promise. One module per command, imported when needed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from everybit.errors import SourceError

COMMANDS = (
    "model", "hardware", "memory", "estimate", "roofline", "explain", "simulate", "fleet", "calibrate", "finetune",
    "probe",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="which hardware, which precision, how many, at what price",
        description="The cheapest deployment of a language model that keeps its promise. Nothing is run and nothing is "
        "downloaded; every answer says what it rests on.",
    )
    commands = parser.add_subparsers(title="commands", dest="plan_command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"everybit.cli.plan.{name}").add_parser(commands)
    for name, command in commands.choices.items():
        command.allow_abbrev = False
        command.add_argument("--debug", action="store_true", help="on an error show the whole trace")
        command.set_defaults(run=_checked, plan_run=command.get_default("run"), prog=f"everybit plan {name}")


def _checked(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("scipy") is None:
        raise SourceError("plan needs scipy, which is not installed: pip install 'everybit[plan]'")
    code: int = args.plan_run(args)
    return code
