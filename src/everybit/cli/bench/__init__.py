"""`everybit bench ...`: measure any endpoint as its users feel it. One module per command, imported when it is needed.

`everybit bench URL` is short for `everybit bench run URL`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence

from everybit import __version__
from everybit.errors import SourceError

COMMANDS = ("run", "sweep", "capacity", "sustain", "compare", "fit", "audit", "report", "selftest", "mock")
_NEEDS = ("httptools", "rich")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure any OpenAI-compatible endpoint as its users feel it",
        description="Measure any OpenAI-compatible endpoint as its users feel it. `everybit bench URL ...` is `run`.",
    )
    commands = parser.add_subparsers(title="commands", dest="bench_command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"everybit.cli.bench.{name}").add_parser(commands)
    for name, command in commands.choices.items():
        command.allow_abbrev = False
        command.add_argument("--debug", action="store_true", help="on an error show the whole trace")
        command.set_defaults(run=_checked, bench_run=command.get_default("run"), prog=f"everybit bench {name}")


def with_command(arguments: Sequence[str]) -> list[str]:
    """`bench URL ...` as `bench run URL ...`."""
    found = list(arguments)
    place = next((i for i, one in enumerate(found) if not one.startswith("-")), 0)  # main's options have no values
    rest = found[place + 1 :]
    if found[place : place + 1] != ["bench"] or not rest or rest[0] in (*COMMANDS, "-h", "--help"):
        return found
    if re.search(r"^-|[:./]|^localhost$|^$", rest[0]):  # else it is a command, mistyped
        found.insert(place + 1, "run")
    return found


def _checked(args: argparse.Namespace) -> int:
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise SourceError(f"bench needs {missing[0]}, which is not installed: pip install 'everybit[bench]'")
    if "json" in args:
        from everybit.cli.bench.output import claimed_folder

        with claimed_folder(args):
            return int(args.bench_run(args))
    return int(args.bench_run(args))


def main() -> int:
    """`everybit-bench`: the bench alone, for machines that have nothing else of everybit."""
    from everybit.cli.main import main as main_of

    if sys.argv[1:] == ["--version"]:
        print(f"everybit-bench {__version__}")
        return 0
    return main_of(["bench", *sys.argv[1:]], ("bench",))
