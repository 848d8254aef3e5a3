"""The front of the command line: exit codes, one-line errors, nothing heavy imported."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from everybit.cli import inspect
from everybit.cli.main import COMMANDS, build_parser, main
from everybit.errors import FormatError

SOURCE = Path(__file__).resolve().parents[2] / "src"


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FormatError("x: two\n  lines"), 2, "everybit: error: x: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "everybit: error: out: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "everybit: error: out: Permission denied\n"),
        (KeyboardInterrupt(), 130, "everybit: interrupted\n"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr(inspect, "run", raising(error))
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "x"], ["inspect", "x", "--debug"]])
def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(inspect, "run", raising(FormatError("broken")))
    with pytest.raises(FormatError, match="broken"):
        main(arguments)


def test_a_mistake_in_our_own_code_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["absent"], ["eval", "x"], ["inspect", "x", "--nonsense"], ["eval", "x", "--text", "t", "--trunc"]],
)
def test_wrong_usage_exits_with_2_and_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("everybit: error: ")
    assert line.endswith("--help)")


def test_a_reader_that_leaves_is_met_quietly() -> None:
    script = "import sys; from everybit.cli import inspect, main\n"
    script += "inspect.run = lambda args: print('x' * 1_000_000) or 0\nsys.exit(main.main(['inspect', 'x']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = _python(script, stdout)
    assert (done.returncode, done.stderr) == (141, b"")


def test_building_every_parser_imports_nothing_heavy() -> None:
    script = (
        "import sys; from everybit.cli.main import build_parser; build_parser().format_help();"
        "print([m for m in ('numpy', 'torch', 'transformers', 'matplotlib', 'tqdm') if m in sys.modules])"
    )
    done = _python(script)
    assert (done.stdout, done.stderr) == (b"[]\n", b"")


def test_every_command_is_listed_and_has_an_exit() -> None:
    help_text = build_parser().format_help()
    assert all(f"    {name} " in help_text for name in COMMANDS)


def _python(script: str, stdout: int | BinaryIO = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    """Run a script that can import everybit, also where it is not installed."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
