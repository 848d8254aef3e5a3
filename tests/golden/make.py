"""Writes the golden overlay of today's version: `python -m tests.golden.make`. Run it only when format_version changes.

Those of earlier versions stay as they were written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from everybit.formats import Overlay
from everybit.kernels import dequantize
from tests.unit import formats_tiny

HERE = Path(__file__).parent
VERSIONS = {
    "overlay": formats_tiny.write,
    "overlay-2": formats_tiny.write_cells,
    "overlay-3": formats_tiny.write_compact,
}


def values_of(name: str) -> Path:
    """Where the values of a golden overlay are."""
    return HERE / f"{name.replace('overlay', 'values')}.json"


def decode(folder: Path) -> dict[str, list[list[float]]]:
    """Every weight at every precision: name and bits -> rows of values."""
    with Overlay.open(folder) as overlay:
        return {
            f"{name} at {b}": dequantize(overlay.planes(name, b), overlay.table(name, b), spec.columns).tolist()
            for name, spec in overlay.weights.items()
            for b in spec.bits
        }


if __name__ == "__main__":
    newest = list(VERSIONS)[-1]
    shutil.rmtree(HERE / newest, ignore_errors=True)
    VERSIONS[newest](HERE / newest)
    values_of(newest).write_text(json.dumps(decode(HERE / newest)) + "\n")
