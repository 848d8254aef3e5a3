"""`make demo` on the shipped model, with less text: its table, plot and report."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.conftest import REPOSITORY


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/demo.py", "--out", str(tmp_path / "out"), "--max-tokens", "1000"]
    command += ["--calibration-sequences", "4", "--tune-steps", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["rows"]
    assert [row["bits"] for row in rows] == [2, 3, 4, 5, 6, 7, 8]
    assert all(low["kl_mean"] > high["kl_mean"] for low, high in pairwise(rows))
    assert abs(rows[-1]["ppl"] / report["float"]["ppl"] - 1) < 1e-3
    assert (tmp_path / "out" / "quality.svg").read_text().startswith("<?xml")
    assert "Next: " in done.stdout.splitlines()[-1]
