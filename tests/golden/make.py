"""Writes the golden overlay: `python -m tests.golden.make`. Run it only when format_version changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from everybit.formats import Overlay
from everybit.kernels import dequantize
from tests.unit import formats_tiny

FOLDER = Path(__file__).parent / "overlay"
VALUES = Path(__file__).parent / "values.json"


def decode(folder: Path) -> dict[str, list[list[float]]]:
    """Every weight at every precision: name and bits -> rows of values."""
    with Overlay.open(folder) as overlay:
        return {
            f"{name} at {b}": dequantize(overlay.planes(name, b), overlay.table(name, b), spec.columns).tolist()
            for name, spec in overlay.weights.items()
            for b in spec.bits
        }


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    formats_tiny.write(FOLDER)
    VALUES.write_text(json.dumps(decode(FOLDER)) + "\n")
