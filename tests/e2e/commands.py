"""What tests of commands share."""

from __future__ import annotations

import pytest

from everybit.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its arguments."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("everybit: error: ")
    return line
