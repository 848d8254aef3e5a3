"""The command line: `everybit COMMAND ...`, one module per command, imported when it is needed.

A command module has `add_parser(subparsers)`, which imports nothing heavy and sets `run=run` as a default, and
`run(args) -> int`, which does. Exit codes: 0 done, 2 a user's error (one line on stderr), 130 interrupted,
141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from everybit import __version__
from everybit.cli.bench import with_command
from everybit.errors import EverybitError

COMMANDS = (
    "quantize",
    "generate",
    "chat",
    "serve",
    "bench",
    "plan",
    "inspect",
    "allocate",
    "eval",
    "compare",
    "probe",
    "export",
    "import",
    "push",
)
MODULES = {"import": "importing"}  # where a command is a word of Python
USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class OneLineParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class UsageError(EverybitError):
    """Arguments that no command understands."""


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of `commands`. Imports the command modules, which import neither numpy nor torch."""
    parser = OneLineParser(
        prog="everybit",
        description="One set of weights, every bit-width: quantize a language model once, run it at 2 to 8 bits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"everybit {__version__}")
    _add_debug(parser)
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name in commands:
        importlib.import_module(f"everybit.cli.{MODULES.get(name, name)}").add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.allow_abbrev = False  # an abbreviation that works today is another option tomorrow
        _add_debug(subparser)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    # Accepted before and after the command; main() looks for it itself, because parsing can fail too.
    parser.add_argument("--debug", action="store_true", help="on an error show the whole trace")


def main(argv: Sequence[str] | None = None, commands: Sequence[str] = COMMANDS) -> int:
    """Run one command and return its exit code; errors that a user can cause become one line on stderr."""
    arguments = with_command(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode still gets its text
    try:
        args = build_parser(commands).parse_args(arguments)
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that left is met here, not in the interpreter's shutdown
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print("everybit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give that flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except EverybitError as error:
        if debug:
            raise
        return _fail(str(error))
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _fail(message: str) -> int:
    print("everybit: error:", " ".join(message.split()), file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
